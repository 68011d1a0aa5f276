"""A recipe carried out: measure, plan, bake, verify, evaluate, report. Nothing appears at `out` before all is right.

The new model is written and proven in `OUT.unverified` and gets its name at the end; a model that fails its proof is
kept as `OUT.failed`. Statistics are kept in `OUT.work` (or a folder of the caller's choice) until then, so that an
interrupted run goes on where it stopped.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from moekit import methods
from moekit.apply.bake import Baked, bake
from moekit.checkpoint.place import check_place, check_space
from moekit.data import Dataset, load_tokenizer
from moekit.errors import OutputError, VerificationError
from moekit.evaluation import Evaluation, evaluate
from moekit.evaluation.verify import Verification, verify
from moekit.families.model import Model
from moekit.measurement import measure, versions
from moekit.methods.budget import uniform
from moekit.plans import Plan
from moekit.progress import Progress, silent
from moekit.recipe import Recipe
from moekit.report.compression import write_report
from moekit.stats import Stats
from moekit.stream import Stream


@dataclass
class Job:
    """A recipe with everything that it needs opened and checked, before any work starts."""

    recipe: Recipe
    model: Model
    calibration: Dataset
    evaluation: Dataset | None
    tokenizer: object
    dtype: torch.dtype | None

    @property
    def out(self) -> Path:
        """Where the result goes."""
        return Path(self.recipe.out)

    def beside(self, suffix: str) -> Path:
        """A path beside `out`."""
        return self.out.with_name(self.out.name + suffix)


@dataclass(frozen=True)
class Estimate:
    """How long the parts will take, measured on one layer and one batch.

    Attributes:
        measure_s: the statistics pass.
        bake_s: writing the result.
        bytes_after: of the result, roughly.
    """

    measure_s: float
    bake_s: float
    bytes_after: int


@dataclass
class Result:
    """What a run made.

    Attributes:
        path: the new model; None when only planned.
        plan: what was done.
        stats: what it was decided from.
        baked: what was written.
        verification: proof that the files do what the plan says.
        evaluation: the new model against its source, by domain.
        seconds: by stage.
    """

    plan: Plan
    stats: Stats
    path: Path | None = None
    baked: Baked | None = None
    verification: Verification | None = None
    evaluation: Evaluation | None = None
    seconds: dict[str, float] = field(default_factory=dict)


def prepare(recipe: Recipe, *, overwrite: bool = False, trust_remote_code: bool = False) -> Job:
    """Open and check everything that a recipe needs.

    Raises:
        UserError: of any kind: whatever can be known before the work starts.
    """
    check_place(Path(recipe.out).resolve(), overwrite)
    method = methods.get(recipe.method)
    method.settings({key: value for key, value in recipe.options.items() if key != "seed"})
    model = Model.open(recipe.model, trust_remote_code=trust_remote_code)
    uniform(model.layout, recipe.keep)
    tokenizer = load_tokenizer(model.path, trust_remote_code=trust_remote_code)
    settings = recipe.calibration
    calibration = Dataset.build(
        recipe.data,
        tokenizer,
        tokens=settings.tokens,
        sequence_length=settings.sequence_length,
        seed=settings.seed,
        tokens_per_batch=settings.batch_tokens,
    )
    evaluation = None
    if recipe.evaluation is not None:
        evaluation = Dataset.build(
            recipe.evaluation.data,
            tokenizer,
            tokens=recipe.evaluation.tokens,
            sequence_length=recipe.evaluation.sequence_length,
        )
    dtype = None if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    return Job(recipe, model, calibration, evaluation, tokenizer, dtype)


def estimate(job: Job, device: str = "cpu") -> Estimate:
    """Time one MoE layer on one batch, and one read, and scale up."""
    model, layout = job.model, job.model.layout
    loader = model.loader(job.dtype, device)
    first = layout.routed[0].index
    started = time.perf_counter()
    loader.read(first)
    read_s = time.perf_counter() - started
    started = time.perf_counter()
    for _ in Stream(loader).run([job.calibration.batches[0].ids], last_layer=first):
        pass
    compute_s = max(1e-3, time.perf_counter() - started - read_s) / (first + 1)
    after = bytes_after(job)
    speed = loader.layer_bytes(first) / max(read_s, 1e-4)
    layers = layout.num_layers
    return Estimate(layers * max(read_s, 1.3 * compute_s * len(job.calibration.batches)), 2 * after / speed, after)


def bytes_after(job: Job) -> int:
    """Bytes of the result, from the number of experts that stay."""
    layout = job.model.layout
    counts = uniform(layout, job.recipe.keep)
    saved = sum((layer.num_experts - counts[layer.index]) * layer.expert_bytes for layer in layout.routed)
    return layout.total.bytes - layout.parts["mtp"].bytes - saved


def run(
    job: Job,
    *,
    plan_only: bool = False,
    stats_folder: str | Path | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress = silent,
) -> Result:
    """Carry out a prepared recipe.

    Args:
        job: from `prepare`.
        plan_only: stop when the plan is made; nothing is written but statistics.
        stats_folder: keep statistics there (and use them if they are of this model and data); None for `OUT.work`.
        device: to measure and evaluate on.
        overwrite: replace a model that lies at `out`.
        progress: told as work goes on.

    Raises:
        VerificationError: the files do not do what the plan says; they are kept as `OUT.failed`.
        UserError: anything else that the user can mend.
    """
    recipe, model, seconds = job.recipe, job.model, {}
    work = job.beside(".work")
    if not plan_only:
        check_space(job.out.resolve().parent, bytes_after(job))
    with _timed(seconds, "measure"):
        stats = _statistics(job, Path(stats_folder) if stats_folder else work / "stats", work, device, progress)
    with _timed(seconds, "plan"):
        plan = methods.make_plan(
            recipe.method,
            stats,
            model.layout,
            keep=recipe.keep,
            domain=recipe.domain,
            seed=recipe.calibration.seed,
            budget=recipe.budget,
            protect=recipe.protect,
            **recipe.options,
        )
    result = Result(plan, stats, seconds=seconds)
    if plan_only:
        return result
    unverified = job.beside(".unverified")
    if unverified.exists():
        shutil.rmtree(unverified)
    with _timed(seconds, "bake"):
        result.baked = bake(
            model.checkpoint,
            model.understanding,
            plan,
            unverified,
            provenance={"recipe": recipe.to_yaml()},
            shard_bytes=recipe.shard_size,
            progress=progress,
        )
    baked = Model.open(unverified, trust_remote_code=model.trust_remote_code)
    baked.name = job.out.name
    if recipe.verify:
        with _timed(seconds, "verify"):
            result.verification = verify(model, plan, baked, job.evaluation or job.calibration, job.tokenizer, progress)
        if not result.verification.ok:
            _fail(job, unverified, result.verification)
    if job.evaluation is not None:
        with _timed(seconds, "evaluate"):
            result.evaluation = evaluate(
                baked, job.evaluation, against=model, dtype=job.dtype, device=device, progress=progress
            )
    write_report(unverified, report_of(job, result))
    baked.checkpoint.close()
    if job.out.exists():
        shutil.rmtree(job.out) if overwrite else job.out.rmdir()
    unverified.rename(job.out)
    shutil.rmtree(work, ignore_errors=True)
    result.path = job.out
    return result


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - started, 2)


def _statistics(job: Job, folder: Path, work: Path, device: str, progress: Progress) -> Stats:
    method = methods.get(job.recipe.method)
    if (folder / "stats.json").is_file():
        known = Stats.load(folder)
        same = known.manifest.get("fingerprint") == job.model.fingerprint
        same = same and known.manifest.get("data", {}).get("hash") == job.calibration.hash
        if same and set(method.groups) <= set(known.manifest["groups"]):
            return known
        if not folder.is_relative_to(work):
            raise OutputError(
                "that folder holds statistics of another model or other data", where=folder, fix="choose another folder"
            )
    stats = measure(
        job.model,
        job.calibration,
        groups=method.groups,
        dtype=job.dtype,
        device=device,
        workdir=work / "pass",
        progress=progress,
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    stats.save(folder)
    return stats


def _fail(job: Job, unverified: Path, found: Verification) -> None:
    failed = job.beside(".failed")
    shutil.rmtree(failed, ignore_errors=True)
    (unverified / "VERIFICATION_FAILED").write_text(json.dumps(asdict(found), indent=1))
    unverified.rename(failed)
    raise VerificationError(
        "the written model does not do what the plan says",
        where=failed,
        expected=f"logits within {found.tolerance:g} of the plan applied live, at 99% of positions",
        got=f"{found.within:.1%} of positions, largest difference {found.max_difference:.3g}",
        fix="do not use it; please report the family",
    )


def report_of(job: Job, result: Result) -> Mapping[str, object]:
    """Everything that the report says, as plain data."""
    layout, plan, baked = job.model.layout, result.plan, result.baked
    return {
        "model": {
            "name": job.model.name,
            "family": layout.family,
            "fingerprint": job.model.fingerprint,
            "layout": layout.hash,
            "layers": len(layout.routed),
            "experts": layout.routed[0].num_experts,
        },
        "recipe": job.recipe.to_yaml(),
        "method": plan.method,
        "settings": plan.settings,
        "kept": {str(layer.index): list(plan.kept(layer)) for layer in layout.routed},
        "bytes": {"before": baked.bytes_before, "after": baked.bytes_after} if baked else None,
        "removed_gate_mass": methods.removed_gate_mass(plan, result.stats, layout, plan.settings["domain"]),
        "notes": [*plan.notes, *(baked.notes if baked else ())],
        "calibration": job.calibration.describe(),
        "verification": asdict(result.verification) if result.verification else None,
        "evaluation": result.evaluation.to_dict() if result.evaluation else None,
        "seconds": result.seconds,
        "versions": versions(),
    }
