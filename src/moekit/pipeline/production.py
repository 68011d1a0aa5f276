"""A plan made into a model: written, proven, compared, reported; it gets its name when all of that is done."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch

from moekit.apply.bake import PROVENANCE, bake
from moekit.checkpoint.place import check_place
from moekit.checkpoint.place import replace as give_name
from moekit.data import Dataset
from moekit.errors import VerificationError
from moekit.evaluation import evaluate
from moekit.evaluation.verify import Verification, verify
from moekit.families.model import Model
from moekit.pipeline.account import covered, report_of
from moekit.pipeline.result import Done, Result
from moekit.pipeline.usage import Usage
from moekit.pipeline.workplace import check_ours, unverified
from moekit.plans import Plan
from moekit.progress import Progress, silent
from moekit.report.compression import write_report
from moekit.stats import Stats

FAILED, WHY_FAILED = ".failed", "VERIFICATION_FAILED"


def produce(
    model: Model,
    plan: Plan,
    out: Path,
    *,
    source: Model | None = None,
    before: Sequence[Done] = (),
    calibration: Stats | None = None,
    recipe: str = "",
    text: Dataset | None = None,
    evaluation: Dataset | None = None,
    tokenizer: object = None,
    prove: bool = True,
    shard_bytes: int = 5_000_000_000,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    seconds: dict[str, float] | None = None,
    progress: Progress = silent,
    instead: Plan | None = None,
) -> Result:
    """Write the model that a plan makes, prove it, compare it, report; it gets its name when all of that is done.

    Args:
        model: what the plan changes.
        plan: what to do to it.
        out: the folder to make.
        source: the model before all steps, which the result is compared with; None for `model`.
        before: the steps that made `model` of `source`.
        calibration: statistics of `source` that were decided from, to tell how far they hold; None: it is not told.
        recipe: YAML of the whole job, for the record.
        text: what the proof is read on; None: random tokens.
        evaluation: what the result is compared with its source on; None: it is not.
        tokenizer: to show what the new model writes.
        prove: reload the result in stock transformers and compare it with the plan applied live.
        shard_bytes: largest size of a file.
        dtype: to evaluate in; None for the model's own.
        device: to evaluate on.
        overwrite: replace a model that lies at `out`.
        seconds: filled with the time of each stage.
        progress: told as work goes on.
        instead: a plan that acts on a running model, which `plan` does the same as in weights: the proof compares with
            it.

    Raises:
        VerificationError: the files do not do what the plan says; they are kept as `OUT.failed`.
        UserError: anything else that the user can mend.
    """
    source, seconds = source or model, {} if seconds is None else seconds
    out = Path(out).resolve()
    check_out(out, overwrite)
    done, made = proven(
        model,
        plan,
        unverified(out),
        out.with_name(out.name + FAILED),
        provenance=provenance_of(source, recipe, [*(x.plan for x in before), plan]),
        text=text,
        tokenizer=tokenizer,
        prove=prove,
        shard_bytes=shard_bytes,
        progress=progress,
        instead=instead,
    )
    made.name = out.name
    assert done.baked is not None, "what is proven was baked"
    baked = replace(done.baked, path=out)
    steps = [*before, replace(done, baked=baked)]
    for step in steps:
        for stage, spent in step.seconds.items():
            seconds[stage] = round(seconds.get(stage, 0) + spent, 2)
    said = tuple(dict.fromkeys(note for step in steps if step.baked for note in step.baked.notes))
    whole = replace(baked, bytes_before=source.checkpoint.bytes, notes=said)
    result = Result(plan, baked=whole, verification=done.verification, seconds=seconds, steps=steps)
    usage = None
    if evaluation is not None:
        usage = Usage(source.layout, evaluation) if calibration is not None else None
        with timed(seconds, "evaluate"):
            result.evaluation = evaluate(
                made, evaluation, against=source, watcher=usage, dtype=dtype, device=device, progress=progress
            )
    if calibration is not None:
        seen = None if usage is None else usage.stats()
        result.coverage = covered(source.layout, [x.plan for x in steps], calibration, seen)
    write_report(unverified(out), report_of(source, result, recipe))
    made.checkpoint.close()
    check_place(out, overwrite)  # hours may have passed
    give_name(unverified(out), out)
    result.path = out
    return result


def proven(
    model: Model,
    plan: Plan,
    place: Path,
    failed: Path,
    *,
    provenance: Mapping[str, object],
    text: Dataset | None = None,
    tokenizer: object = None,
    prove: bool = True,
    shard_bytes: int = 5_000_000_000,
    progress: Progress = silent,
    instead: Plan | None = None,
) -> tuple[Done, Model]:
    """Write the model that a plan makes and prove it; it stays under its makeshift name.

    Args:
        model: what the plan changes.
        plan: what to do to it.
        place: the folder to make; one of ours that lies there goes.
        failed: the name that the folder gets if its proof fails.
        provenance: for moekit.json.
        text: as for `produce`, with all that follows.
        tokenizer: as for `produce`.
        prove: as for `produce`.
        shard_bytes: as for `produce`.
        progress: as for `produce`.
        instead: as for `produce`.

    Raises:
        VerificationError: the files do not do what the plan says.
        UserError: anything else that the user can mend.
    """
    seconds: dict[str, float] = {}
    if place.exists():
        shutil.rmtree(place)
    with timed(seconds, "bake"):
        baked = bake(
            model.checkpoint,
            model.understanding,
            plan,
            place,
            provenance=provenance,
            shard_bytes=shard_bytes,
            progress=progress,
        )
    made = Model.open(place, trust_remote_code=model.trust_remote_code)
    proof = None
    if prove:
        with timed(seconds, "verify"):
            proof = verify(model, plan, made, text, tokenizer, progress, instead)
        if not proof.ok:
            made.checkpoint.close()
            _fail(failed, place, proof)
    return Done(plan, baked, proof, seconds), made


def provenance_of(source: Model, recipe: str, plans: Sequence[Plan]) -> dict[str, object]:
    """What moekit.json says: the recipe, and for a model of several steps its first source and all that was decided."""
    if len(plans) == 1:
        return {"recipe": recipe}
    first = {"name": source.path.name, "fingerprint": source.fingerprint, "layout": source.layout.hash}
    told = [x.model_copy(update={"tensors": ""}) for x in plans]  # what they held is in the weights
    return {"recipe": recipe, "source": first, "plans": [x.model_dump(mode="json") for x in told]}


def check_out(out: Path, overwrite: bool) -> None:
    """Refuse a place that is taken, beside it too: what stands under our names must be of our making.

    Raises:
        OutputError: it is taken.
    """
    check_place(out, overwrite)
    check_ours(unverified(out), PROVENANCE)
    check_ours(out.with_name(out.name + FAILED), WHY_FAILED)


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the time that something takes to that of its stage."""
    started = time.perf_counter()
    yield
    seconds[stage] = round(seconds.get(stage, 0) + time.perf_counter() - started, 2)


def _fail(failed: Path, place: Path, found: Verification) -> None:
    shutil.rmtree(failed, ignore_errors=True)
    (place / WHY_FAILED).write_text(json.dumps(asdict(found), indent=1))
    place.rename(failed)
    raise VerificationError(
        "the written model does not do what the plan says",
        where=failed,
        expected=f"logits within {found.tolerance:g} of the plan applied live, at 99% of positions, and its weights",
        got=f"{found.within:.1%} of positions, largest difference {found.max_difference:.3g}"
        + (f"; {len(found.wrong)} weights differ, the first {found.wrong[0]}" if found.wrong else ""),
        fix="do not use it; please report the family",
    )
