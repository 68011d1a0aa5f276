"""`OUT.work`: what a run keeps until its result is there. Only what this program has made is used, or removed.

stats/                  statistics of the source; stats-3/: those that step 3 asked to have measured anew
pass/                   a statistics pass that was interrupted
step-1-easy-ep/         the proven model that step 1 has made, complete from the moment that it has its name
step-1-easy-ep.json     which job's it is, and what was found when it was proven
step-2-x-1f2e3d.tensors/    numbers that step 2's method has computed so far
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from moekit.apply.bake import PLAN, PROVENANCE, Baked
from moekit.checkpoint.place import replace as give_name
from moekit.errors import OutputError
from moekit.evaluation.verify import Verification
from moekit.pipeline.result import Done
from moekit.plans import Plan
from moekit.recipe import Step

UNVERIFIED, TENSORS = ".unverified", ".tensors"


class Workplace:
    """The folder beside an output in which its run keeps what it needs.

    Args:
        out: the output.
    """

    def __init__(self, out: Path):
        self.folder = out.with_name(out.name + ".work")

    def stats(self, number: int = 1) -> Path:
        """Statistics of the model that a step begins with."""
        return self.folder / ("stats" if number == 1 else f"stats-{number}")

    def measuring(self, number: int = 1) -> Path:
        """What an interrupted pass needs to go on."""
        return self.folder / ("pass" if number == 1 else f"pass-{number}")

    def model(self, number: int, step: Step) -> Path:
        """The model that a step makes."""
        return self.folder / f"step-{number}-{step.method}"

    def tensors(self, number: int, step: Step, identity: str) -> Path:
        """Numbers that a step's method computes, of this very job."""
        return self.folder / f"step-{number}-{step.method}-{identity}{TENSORS}"

    def check(self, steps: Sequence[Step]) -> None:
        """Refuse folders under our names that we have not made.

        Raises:
            OutputError: there is one.
        """
        for number, step in enumerate(steps[:-1], 1):
            check_ours(self.model(number, step), PROVENANCE)
            check_ours(unverified(self.model(number, step)), PROVENANCE)

    def found(self, number: int, step: Step, identity: str) -> Done | None:
        """What a run of the same job has finished of a step, if it has."""
        place = self.model(number, step)
        try:
            known = json.loads(_record(place).read_text())
            if known["identity"] != identity or not place.is_dir():
                return None
            proof = known["verification"]
            return Done(
                Plan.load(place / PLAN),
                Baked(place, **known["baked"]),
                Verification(**proof) if proof else None,
                known["seconds"],
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep(self, number: int, step: Step, done: Done, identity: str) -> Done:
        """Give a proven model its name here; one of another job that has it goes."""
        assert done.baked is not None
        place = self.model(number, step)
        _remove(place)
        baked = asdict(done.baked)
        del baked["path"]
        proof = asdict(done.verification) if done.verification else None
        known = {"identity": identity, "baked": baked, "verification": proof, "seconds": done.seconds}
        partial = _record(place).with_suffix(".partial")
        partial.write_text(json.dumps(known, indent=1))
        os.replace(partial, _record(place))
        give_name(done.baked.path, place)
        return replace(done, baked=replace(done.baked, path=place))

    def clear(self, *, models: bool) -> None:
        """Remove what a finished run needs no more; with `models`, those between the steps too."""
        for stats in (self.stats(), *self.folder.glob("stats-[0-9]*")):
            if (stats / "stats.json").is_file():
                shutil.rmtree(stats)
        for tensors in self.folder.glob("step-[0-9]*" + TENSORS):
            if (tensors / "tensors.json").is_file():
                shutil.rmtree(tensors)
        for record in self.folder.glob("step-[0-9]*.json") if models else ():
            _remove(record.with_suffix(""))
        self.vanish()

    def vanish(self) -> None:
        """Remove the folder if it is empty."""
        with suppress(OSError):
            self.folder.rmdir()


def unverified(place: Path) -> Path:
    """Where a model lies until it is proven."""
    return place.with_name(place.name + UNVERIFIED)


def check_ours(place: Path, mark: str) -> None:
    """Refuse a folder that this program has not made.

    Args:
        place: where a folder of ours would lie.
        mark: a file that ours have.

    Raises:
        OutputError: something else lies there.
    """
    if place.exists() and not (place / mark).is_file():
        raise OutputError(
            "a folder that this output needs is taken", where=place, fix="move it away, or choose another output"
        )


def _record(place: Path) -> Path:
    return place.with_name(place.name + ".json")


def _remove(place: Path) -> None:
    """Remove a step's model and what is said of it."""
    if (place / PROVENANCE).is_file():
        _record(place).unlink(missing_ok=True)  # first: a half-removed model is nobody's
        shutil.rmtree(place)
    elif not place.exists():
        _record(place).unlink(missing_ok=True)
