"""A recipe with a budget becomes one with steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from moekit.pipeline.job import Job, budget_bytes, formats_of
from moekit.pipeline.statistics import statistics_of
from moekit.planning import Choice, Fitting, groups, plan_for_budget
from moekit.progress import Progress, silent
from moekit.recipe import Step


def choose(
    job: Job, *, stats_folder: str | Path | None = None, device: str = "cpu", progress: Progress = silent
) -> tuple[Job, Choice]:
    """(the job with steps in its recipe, why): for a job whose recipe has a budget and no steps.

    Args:
        job: from `prepare`.
        stats_folder: as for `run`, which finds the statistics there.
        device: to measure on.
        progress: told as work goes on.

    Raises:
        UserError: anything that the user can mend.
    """
    assert job.held_out is not None, "the recipe has no budget"
    kept, work = Path(stats_folder) if stats_folder else job.workplace.stats(), job.workplace.measuring()
    stats = statistics_of(job, job.model, groups(job.model.layout), kept, work, device, progress)

    def folder(steps: Sequence[Step]) -> Path:
        """Where the run will look for the numbers of a single step; those of others, fitted anew then, go with it."""
        planned = replace(job, recipe=job.recipe.model_copy(update={"steps": list(steps)}))
        number = len(planned.steps) if len(planned.steps) == 1 else 0
        return job.workplace.tensors(number, planned.steps[-1], planned.identity(len(planned.steps)))

    choice = plan_for_budget(
        job.model,
        stats,
        job.held_out,
        budget_bytes(job.recipe, job.model),
        formats=formats_of(job.recipe),
        domain=job.recipe.domain,
        fitting=Fitting(job.calibration, folder),
        seed=job.recipe.calibration.seed,
        dtype=job.dtype,
        device=device,
        progress=progress,
    )
    recipe = job.recipe.model_copy(update={"steps": list(choice.steps)})
    return replace(job, recipe=recipe, words=choice.words), choice
