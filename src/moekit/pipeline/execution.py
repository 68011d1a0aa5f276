"""run: the steps of a recipe, one after the other, each deciding from what the one before has left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moekit import methods
from moekit.families.model import Model
from moekit.fitting import FITTED, Fit, decide, needs_model
from moekit.layout import Layout
from moekit.pipeline.job import PLANNED, Job, check_room
from moekit.pipeline.outlook import check_written, label, layout_after, of_step
from moekit.pipeline.production import FAILED, check_out, produce, proven, provenance_of, timed
from moekit.pipeline.result import Done, Result
from moekit.pipeline.statistics import carried, statistics_of
from moekit.pipeline.workplace import unverified
from moekit.plans import Plan
from moekit.progress import Progress, silent
from moekit.recipe import Step
from moekit.stats import Stats


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
        plan_only: stop when the plans are made; nothing is written but statistics. A step that needs the model which
            the one before it would have written is not planned, nor what comes after it.
        stats_folder: keep statistics of the source there (and use them if they are of this model and data); None for
            `OUT.work`.
        device: to measure and evaluate on.
        overwrite: replace a model that lies at `out`.
        progress: told as work goes on.

    Raises:
        VerificationError: the files of a step do not do what its plan says; they are kept as `OUT.failed`.
        UserError: anything else that the user can mend.
    """
    folder = Path(stats_folder) if stats_folder else job.workplace.stats()
    steps = _Steps(job, folder, device, progress)
    if plan_only:
        return steps.planned()
    check_out(job.out, overwrite)
    check_written(job.model.layout, job.steps)
    check_room(job)
    result = steps.carried_out(overwrite)
    job.workplace.clear(models=not job.recipe.keep_steps)
    return result


class _Steps:
    """A job under way. Steps are numbered from 1.

    Attributes:
        done: the steps so far.
        layouts: of the source, and of what each step left.
        models: the same models; nothing where a step was only planned.
    """

    def __init__(self, job: Job, stats_folder: Path, device: str, progress: Progress):
        self.job, self.stats_folder, self.device, self.progress = job, stats_folder, device, progress
        self.steps: Sequence[Step] = job.steps
        self.done: list[Done] = []
        self.layouts: list[Layout] = [job.model.layout]
        self.models: list[Model | None] = [job.model]
        self.seconds: dict[str, float] = {}
        self._stats: tuple[int, Stats] | None = None  # of the model that a step begins with
        self._find_finished()

    def planned(self) -> Result:
        """The plans of all steps, or of those that can be made while no model is written."""
        for number in range(len(self.done) + 1, len(self.steps) + 1):
            step = self.steps[number - 1]
            if self.models[-1] is None and (needs_model(step.method, step.options) or step.remeasure):
                self.done[-1].plan.notes.append(f"not planned: {label(number, step)} needs a model that is not written")
                break
            plan = self._decided(number)
            self._append(Done(plan), layout_after(self.layouts[-1], plan), None)
        return Result(self.done[-1].plan, self._stats and self._stats[1], seconds=self.seconds, steps=self.done)

    def carried_out(self, overwrite: bool) -> Result:
        """The result, proven and under its name."""
        job, last = self.job, len(self.steps)
        for number in range(len(self.done) + 1, last):
            self._make(number)
        with of_step(last, self.steps):
            model = self._model(last)
            result = produce(
                model,
                self._decided(last),
                job.out,
                source=job.model,
                before=self.done,
                calibration=self._calibration(),
                recipe=job.recipe.to_yaml(),
                text=job.evaluation or job.calibration,
                evaluation=job.evaluation,
                tokenizer=job.tokenizer,
                prove=job.recipe.verify,
                shard_bytes=job.recipe.shard_size,
                dtype=job.dtype,
                device=self.device,
                overwrite=overwrite,
                seconds=self.seconds,
                progress=self.progress,
            )
        result.stats = self._stats and self._stats[1]
        for between in self.models[1:]:
            if between is not None:
                between.checkpoint.close()
        return result

    def _find_finished(self) -> None:
        """Take over the steps that an interrupted run of this very job has finished."""
        job = self.job
        for number, step in enumerate(self.steps[:-1], 1):
            known = job.workplace.found(number, step, job.identity(number))
            if known is None:
                return
            self._open(number, known)

    def _make(self, number: int) -> None:
        """Write and prove the model between a step and the next."""
        job, step = self.job, self.steps[number - 1]
        place = job.workplace.model(number, step)
        with of_step(number, self.steps):
            plan = self._decided(number)
            job.workplace.folder.mkdir(exist_ok=True)
            plans = [*(x.plan for x in self.done), plan]
            done, made = proven(
                self._model(number),
                plan,
                unverified(place),
                job.out.with_name(job.out.name + FAILED),
                provenance=provenance_of(job.model, job.recipe.to_yaml(), plans)
                | {"step": f"{number} of {len(self.steps)}"},
                text=job.evaluation or job.calibration,
                prove=job.recipe.verify,
                shard_bytes=job.recipe.shard_size,
                progress=self.progress,
            )
            made.checkpoint.close()
            self._open(number, job.workplace.keep(number, step, done, job.identity(number)))

    def _open(self, number: int, done: Done) -> None:
        step = self.steps[number - 1]
        made = Model.open(self.job.workplace.model(number, step), trust_remote_code=self.job.model.trust_remote_code)
        made.name = f"{self.job.model.name} after {label(number, step)}"
        self._append(done, made.layout, made)

    def _append(self, done: Done, layout: Layout, model: Model | None) -> None:
        self.done.append(done)
        self.layouts.append(layout)
        self.models.append(model)

    def _model(self, number: int) -> Model:
        """What a step begins with."""
        model = self.models[number - 1]
        assert model is not None, "a step that needs its model was not kept from being planned"
        return model

    def _decided(self, number: int) -> Plan:
        """The plan of a step."""
        job, step = self.job, self.steps[number - 1]
        with of_step(number, self.steps):
            with timed(self.seconds, "measure"):
                stats = self._statistics(number) if _reads_statistics(step) else None
            settings: dict[str, Any] = {
                "keep": step.keep,
                "domain": step.domain,
                "spread": step.spread,
                "protect": step.protect,
            }
            seed = job.recipe.calibration.seed
            with timed(self.seconds, "plan"):
                if self.models[number - 1] is None:
                    plan = methods.make_plan(
                        step.method, stats, self.layouts[number - 1], seed=seed, **settings, **step.options
                    )
                else:
                    fit = Fit(
                        self._model(number),
                        job.model,
                        stats,
                        job.calibration,
                        job.workplace.tensors(number, step, job.identity(number)),
                        job.dtype,
                        self.device,
                        self.progress,
                    )
                    plan = decide(step.method, fit, seed=seed, options=step.options, **settings)
        plan.padding = step.padding
        if number > 1 and stats is not None:
            plan.notes.append(self._told(number))
        if number == 1:
            plan.notes += [PLANNED + said for said in job.words]
        return plan

    def _statistics(self, number: int) -> Stats:
        """What a step decides from: of the model that it begins with."""
        if self._stats is None or self._stats[0] != number:
            if number == self._measured_at(number):
                self._stats = number, self._measured(number)
            else:
                model = self.models[number - 1]
                stats = carried(
                    self._statistics(number - 1),
                    self.layouts[number - 2],
                    self.done[number - 2].plan,
                    self.layouts[number - 1],
                    model.fingerprint if model else "",
                )
                self._stats = number, stats
        return self._stats[1]

    def _measured_at(self, number: int) -> int:
        """The step before which the statistics of a step were measured."""
        return max(n for n in range(1, number + 1) if n == 1 or self.steps[n - 1].remeasure)

    def _measured(self, number: int) -> Stats:
        """Statistics of the model that a step begins with, with all that is decided from them."""
        users = [x for n, x in enumerate(self.steps, 1) if self._measured_at(n) == number and _reads_statistics(x)]
        return statistics_of(
            self.job,
            self._model(number),
            {group for x in users for group in methods.get(x.method).groups},
            self.stats_folder if number == 1 else self.job.workplace.stats(number),
            self.job.workplace.measuring(number),
            self.device,
            self.progress,
        )

    def _calibration(self) -> Stats | None:
        """Statistics of the source, if something was decided from them and they are at hand."""
        needed = any(methods.get(step.method).needs for step in self.steps)
        if not needed or not (self.stats_folder / "stats.json").is_file():
            return None
        stats = Stats.load(self.stats_folder)
        return stats if stats.manifest.get("fingerprint") == self.job.model.fingerprint else None

    def _told(self, number: int) -> str:
        """Where the statistics of a step come from, for the notes of its plan."""
        first = self._measured_at(number)
        if first == number:
            return f"statistics measured anew on what {label(number - 1, self.steps[number - 2])} left"
        over = range(first, number)
        said = "statistics carried over " + ", ".join(label(n, self.steps[n - 1]) for n in over)
        if any(self.done[n - 1].plan.dropped() for n in over):
            said += ": what tokens do now whose experts are gone is not in them"
        return said


def _reads_statistics(step: Step) -> bool:
    method = methods.get(step.method)
    return bool(method.groups) and (step.method not in FITTED or bool(method.needs))
