"""A recipe carried out: measure, plan, bake, verify, evaluate, report. Nothing appears at `out` before all is right.

The new model is written and proven in `OUT.unverified` and gets its name at the end; a model that fails its proof is
kept as `OUT.failed`. Statistics are kept in `OUT.work` (or a folder of the caller's choice) until then, so that an
interrupted run goes on where it stopped. Nothing is removed that this program has not made.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from moekit import methods
from moekit.apply.bake import PROVENANCE, Baked, bake
from moekit.apply.quantize import expert_weights
from moekit.checkpoint.place import check_place, check_space, replace
from moekit.data import Dataset, load_tokenizer
from moekit.errors import OutputError, VerificationError
from moekit.evaluation import Evaluation, evaluate
from moekit.evaluation.verify import Verification, verify
from moekit.families.model import Model
from moekit.measurement import measure, versions
from moekit.methods.budget import uniform
from moekit.methods.quantize import ways
from moekit.plans import Plan
from moekit.progress import Progress, silent
from moekit.recipe import Recipe
from moekit.report.compression import write_report
from moekit.stats import GROUPS, Stats
from moekit.stream import Stream

UNVERIFIED, FAILED, WHY_FAILED = ".unverified", ".failed", "VERIFICATION_FAILED"


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
        return Path(self.recipe.out).resolve()

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


@dataclass(repr=False)
class Result:
    """What a run made.

    Attributes:
        path: the new model; None when only planned.
        plan: what was done.
        stats: what it was decided from; None where the plan was given.
        baked: what was written.
        verification: proof that the files do what the plan says.
        evaluation: the new model against its source, by domain.
        seconds: by stage.
    """

    plan: Plan
    stats: Stats | None = None
    path: Path | None = None
    baked: Baked | None = None
    verification: Verification | None = None
    evaluation: Evaluation | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        proof = self.verification
        said = "not verified" if proof is None else f"verified, logits within {proof.max_difference:.2g}"
        size = f"{self.baked.bytes_before:,} -> {self.baked.bytes_after:,} bytes, " if self.baked else ""
        return f"<Result {self.path}: {size}{said}>"


def prepare(recipe: Recipe, *, overwrite: bool = False, trust_remote_code: bool = False) -> Job:
    """Open and check everything that a recipe needs.

    Raises:
        UserError: of any kind: whatever can be known before the work starts.
    """
    out = Path(recipe.out).resolve()
    _check_out(out, overwrite)
    Stats.check_place(_default_stats(out))
    method, *_ = methods.check_options(recipe.method, recipe.options)
    keep = methods.check_keep(method, recipe.keep)
    model = Model.open(recipe.model, trust_remote_code=trust_remote_code)
    if out.is_relative_to(model.path.resolve()):
        raise OutputError("the output lies in the model's own folder", where=out, fix="choose another folder")
    uniform(model.layout, keep)
    if method.kind == "quantize":
        for layer in model.layout.routed:
            expert_weights(model.checkpoint, layer)
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
    """Bytes of the result, from the number of experts that stay, or the bits of their weights."""
    layout = job.model.layout
    method = methods.get(job.recipe.method)
    if method.kind == "quantize":
        ops = ways(method, layout, method.settings(job.recipe.options))
        return layout.total.bytes - Plan(layout_hash=layout.hash, ops=[*ops]).saved_bytes(layout)
    counts = uniform(layout, methods.check_keep(method, job.recipe.keep))
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
    recipe, model = job.recipe, job.model
    seconds: dict[str, float] = {}
    kept = _default_stats(job.out)
    if not plan_only:
        check_space(job.out.parent, bytes_after(job))
    with _timed(seconds, "measure"):
        stats = _statistics(job, Path(stats_folder) if stats_folder else kept, device, progress)
    with _timed(seconds, "plan"):
        plan = methods.make_plan(
            recipe.method,
            stats,
            model.layout,
            keep=recipe.keep,
            domain=recipe.domain,
            seed=recipe.calibration.seed,
            spread=recipe.spread,
            protect=recipe.protect,
            **recipe.options,
        )
    result = Result(plan, stats, seconds=seconds)
    if plan_only:
        return result
    made = produce(
        model,
        plan,
        job.out,
        recipe=recipe.to_yaml(),
        text=job.evaluation or job.calibration,
        evaluation=job.evaluation,
        tokenizer=job.tokenizer,
        prove=recipe.verify,
        shard_bytes=recipe.shard_size,
        dtype=job.dtype,
        device=device,
        overwrite=overwrite,
        seconds=seconds,
        progress=progress,
    )
    if kept.exists():
        shutil.rmtree(kept)
        _remove_empty(kept.parent)
    made.stats = stats
    return made


def produce(
    model: Model,
    plan: Plan,
    out: Path,
    *,
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
) -> Result:
    """Write the model that a plan makes, prove it, compare it, report; it gets its name when all of that is done.

    Args:
        model: the source.
        plan: what to do to it.
        out: the folder to make.
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

    Raises:
        VerificationError: the files do not do what the plan says; they are kept as `OUT.failed`.
        UserError: anything else that the user can mend.
    """
    seconds = {} if seconds is None else seconds
    out = Path(out).resolve()
    _check_out(out, overwrite)
    unverified = out.with_name(out.name + UNVERIFIED)
    if unverified.exists():
        shutil.rmtree(unverified)
    result = Result(plan, seconds=seconds)
    with _timed(seconds, "bake"):
        baked = bake(
            model.checkpoint,
            model.understanding,
            plan,
            unverified,
            provenance={"recipe": recipe},
            shard_bytes=shard_bytes,
            progress=progress,
        )
    made = Model.open(unverified, trust_remote_code=model.trust_remote_code)
    made.name = out.name
    if prove:
        with _timed(seconds, "verify"):
            result.verification = verify(model, plan, made, text, tokenizer, progress)
        if not result.verification.ok:
            _fail(out, unverified, result.verification)
    if evaluation is not None:
        with _timed(seconds, "evaluate"):
            result.evaluation = evaluate(made, evaluation, against=model, dtype=dtype, device=device, progress=progress)
    result.baked = dataclasses.replace(baked, path=out)
    write_report(unverified, report_of(model, result, recipe))
    made.checkpoint.close()
    check_place(out, overwrite)  # hours may have passed
    replace(unverified, out)
    result.path = out
    return result


def _check_out(out: Path, overwrite: bool) -> None:
    """Refuse a place that is taken, beside it too: what stands under our names must be of our making."""
    check_place(out, overwrite)
    for suffix, mark in ((UNVERIFIED, PROVENANCE), (FAILED, WHY_FAILED)):
        beside = out.with_name(out.name + suffix)
        if beside.exists() and not (beside / mark).is_file():
            raise OutputError(
                "a folder that this output needs is taken", where=beside, fix="move it away, or choose another output"
            )


def _default_stats(out: Path) -> Path:
    return out.with_name(out.name + ".work") / "stats"


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - started, 2)


def _statistics(job: Job, folder: Path, device: str, progress: Progress) -> Stats:
    """Those that lie in `folder`, if they are of this job and hold what its method needs; else they are measured."""
    Stats.check_place(folder)
    groups = set(methods.get(job.recipe.method).groups)
    if (folder / "stats.json").is_file():
        known = Stats.load(folder)
        wanted = (job.model.fingerprint, job.calibration.hash, str(job.dtype or job.model.dtype).removeprefix("torch."))
        found = (known.manifest.get("fingerprint"), known.manifest.get("data", {}).get("hash"))
        if (*found, known.manifest.get("dtype")) == wanted:
            if groups <= set(known.manifest["groups"]):
                return known
            groups |= set(known.manifest["groups"])
        elif folder != _default_stats(job.out):
            raise OutputError(
                "that folder holds statistics of another model, of other data, or in another dtype",
                where=folder,
                fix="choose another folder, or remove this one",
            )
    work = _default_stats(job.out).parent
    stats = measure(
        job.model,
        job.calibration,
        groups=[x for x in GROUPS if x in groups],
        dtype=job.dtype,
        device=device,
        workdir=work / "pass",
        progress=progress,
    )
    stats.save(folder)
    _remove_empty(work)
    return stats


def _fail(out: Path, unverified: Path, found: Verification) -> None:
    failed = out.with_name(out.name + FAILED)
    shutil.rmtree(failed, ignore_errors=True)
    (unverified / WHY_FAILED).write_text(json.dumps(asdict(found), indent=1))
    unverified.rename(failed)
    raise VerificationError(
        "the written model does not do what the plan says",
        where=failed,
        expected=f"logits within {found.tolerance:g} of the plan applied live, at 99% of positions",
        got=f"{found.within:.1%} of positions, largest difference {found.max_difference:.3g}",
        fix="do not use it; please report the family",
    )


def report_of(model: Model, result: Result, recipe: str = "") -> Mapping[str, object]:
    """Everything that the report says, as plain data."""
    layout, plan, baked = model.layout, result.plan, result.baked
    return {
        "model": {
            "name": model.name,
            "family": layout.family,
            "fingerprint": model.fingerprint,
            "layout": layout.hash,
            "layers": len(layout.routed),
            "experts": layout.routed[0].num_experts,
        },
        "recipe": recipe,
        "method": plan.method,
        "kind": plan.kind,
        "settings": plan.settings,
        "kept": {str(layer.index): list(plan.kept(layer)) for layer in layout.routed},
        "bytes": {"before": baked.bytes_before, "after": baked.bytes_after} if baked else None,
        "removed_gate_mass": plan.measured.get("removed_gate_mass", {}),
        "notes": [*plan.notes, *(baked.notes if baked else ())],
        "calibration": plan.made_from.get("data"),
        "verification": asdict(result.verification) if result.verification else None,
        "evaluation": result.evaluation.to_dict() if result.evaluation else None,
        "seconds": result.seconds,
        "versions": versions(),
    }
