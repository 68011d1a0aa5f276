"""Everything that a recipe needs, opened and checked before any work starts, and how long the work may take."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from moekit import __version__, methods
from moekit.apply.quantize import check_packable
from moekit.apply.standins import check_separable
from moekit.checkpoint.place import check_space
from moekit.data import Dataset, load_tokenizer
from moekit.errors import OutputError, RecipeError
from moekit.families.matrices import expert_matrices
from moekit.families.model import Model
from moekit.layout import Layout
from moekit.pipeline.outlook import check_steps, expected_layouts
from moekit.pipeline.production import check_out
from moekit.pipeline.workplace import Workplace
from moekit.planning import check_budget, hold_out
from moekit.planning.ways import FORMS, Formats
from moekit.recipe import Recipe, Step
from moekit.stats import Stats
from moekit.stream import Stream

PLANNED = "for the budget: "  # before what the planner says, in a plan's notes


@dataclass
class Job:
    """A recipe with everything that it needs opened and checked, before any work starts.

    Attributes:
        held_out: of a recipe with a budget, the part of the calibration text that nothing is decided from.
        words: why the planner chose what the recipe says.
    """

    recipe: Recipe
    model: Model
    calibration: Dataset
    evaluation: Dataset | None
    tokenizer: object
    dtype: torch.dtype | None
    held_out: Dataset | None = None
    words: tuple[str, ...] = ()

    @property
    def out(self) -> Path:
        """Where the result goes."""
        return Path(self.recipe.out).resolve()

    @property
    def steps(self) -> list[Step]:
        """What is done, one after the other."""
        return self.recipe.steps_

    @property
    def workplace(self) -> Workplace:
        """`OUT.work`."""
        return Workplace(self.out)

    def identity(self, number: int) -> str:
        """16 hex digits that name what the first `number` steps make: the model, the text, and the steps themselves."""
        recipe, steps = self.recipe, [x.model_dump(mode="json") for x in self.steps[:number]]
        made_of = [__version__, self.model.fingerprint, self.calibration.hash, str(self.dtype)]
        text = json.dumps([*made_of, recipe.calibration.seed, recipe.verify, steps], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def expected(self) -> list[Layout]:
        """The layout that each step leaves, as far as it is known beforehand."""
        return expected_layouts(self.model.layout, self.steps)


@dataclass(frozen=True)
class Estimate:
    """How long the parts will take, measured on one layer and one batch.

    Attributes:
        measure_s: the statistics passes.
        bake_s: writing the result, and the models between the steps.
        bytes_after: of the result, roughly.
    """

    measure_s: float
    bake_s: float
    bytes_after: int


def prepare(
    recipe: Recipe, *, overwrite: bool = False, trust_remote_code: bool = False, plan_only: bool = False
) -> Job:
    """Open and check everything that a recipe needs.

    Args:
        recipe: what is to be done.
        overwrite: a model may lie at `out`.
        trust_remote_code: allow code that the checkpoint brings along.
        plan_only: no model is to be written; a live method may be asked for.

    Raises:
        UserError: of any kind: whatever can be known before the work starts.
    """
    out = Path(recipe.out).resolve()
    check_out(out, overwrite)
    work, steps = Workplace(out), recipe.steps_
    Stats.check_place(work.stats())
    work.check(steps)
    check_steps(steps, plan_only)
    model = Model.open(recipe.model, trust_remote_code=trust_remote_code)
    if out.is_relative_to(model.path.resolve()):
        raise OutputError("the output lies in the model's own folder", where=out, fix="choose another folder")
    expected_layouts(model.layout, steps)
    for step in steps:
        if (method := methods.get(step.method)).kind == "quantize":
            check_packable(model.checkpoint, model.understanding, method.settings(step.options)["format"])
    if any(methods.get(step.method).kind == "factor" for step in steps):
        for layer in model.layout.routed:
            expert_matrices(model.checkpoint, model.understanding, layer)
    if any(methods.get(step.method).kind == "replace" for step in steps):
        for layer in model.layout.routed:
            check_separable(model.understanding, layer)
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
    held_out = None
    if recipe.budget is not None:
        check_budget(model, budget_bytes(recipe, model), formats_of(recipe))
        calibration, held_out = hold_out(calibration)
    evaluation = None
    if recipe.evaluation is not None:
        evaluation = Dataset.build(
            recipe.evaluation.data,
            tokenizer,
            tokens=recipe.evaluation.tokens,
            sequence_length=recipe.evaluation.sequence_length,
        )
    dtype = None if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    return Job(recipe, model, calibration, evaluation, tokenizer, dtype, held_out)


def budget_bytes(recipe: Recipe, model: Model) -> int:
    """What a recipe's budget is in bytes."""
    budget = recipe.budget or 0
    return budget if isinstance(budget, int) else int(budget * model.checkpoint.bytes)


def formats_of(recipe: Recipe) -> Formats:
    """In which form the planner may quantise.

    Raises:
        RecipeError: options that it has not.
    """
    options = dict(recipe.options)
    name = options.pop("format", FORMS["stock"])
    found = next((known for known, form in FORMS.items() if form == name), None)
    if options or found is None:
        raise RecipeError(
            "the planner has no such option",
            where="options",
            expected=f"format: {' or '.join(FORMS.values())}",
            got=recipe.options,
            fix="leave it out",
        )
    return found


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
    planned = bool(job.steps)
    written = [x.total.bytes for x in job.expected()] if planned else [budget_bytes(job.recipe, model)]
    speed = loader.layer_bytes(first) / max(read_s, 1e-4)
    passes = 1 + sum(step.remeasure for step in job.steps[1:])
    measure_s = passes * layout.num_layers * max(read_s, 1.3 * compute_s * len(job.calibration.batches))
    return Estimate(measure_s, 2 * sum(written) / speed, written[-1])


def bytes_after(job: Job) -> int:
    """Bytes of the result, from the number of experts that stay, or the bits of their weights."""
    return job.expected()[-1].total.bytes


def check_room(job: Job) -> None:
    """Refuse a disk that has no room for the result and for the models between the steps that are not there yet.

    Raises:
        OutputError: with what is missing.
    """
    sizes = [x.total.bytes for x in job.expected()]
    known = [job.workplace.found(n, step, job.identity(n)) for n, step in enumerate(job.steps[:-1], 1)]
    needed = sum(size for size, found in zip(sizes, [*known, None], strict=True) if found is None)
    check_space(job.out.parent, needed)
