"""run_tasks(model, tasks): scores of lm-evaluation-harness's tasks, or of those in a folder of one's own.

A score is what the harness says (`lm_eval.simple_evaluate`), its standard error too. Two models answer the same
documents, so their difference gets a paired 95% interval: documents are drawn with replacement, the same for both, and
the task's own aggregation is taken of each draw (of a mean, the mean of the differences). Metrics over texts (BLEU) and
groups of tasks get the difference alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moekit.errors import ModelError, RecipeError
from moekit.evaluation.intervals import LEVEL, Interval, ratio_interval
from moekit.families.model import Model
from moekit.markup import html_table
from moekit.plans import Plan
from moekit.progress import Progress, silent

SCHEMA = 1
BATCH_SIZE = 8
RESAMPLES = 500  # of documents, for metrics that are no mean


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        task: name of the task or group.
        metric: as the harness names it, with the filter of answers where one is used ("exact_match, strict-match").
        samples: documents asked; 0 for a group.
        value: of the model.
        stderr: standard error of `value`; None where the harness gives none.
        higher_is_better: None where the task does not say.
        against: value of the other model; None without one.
        against_stderr: its standard error.
        difference: `value - against`; its interval is paired over documents. None without another model.
        paired: whether the interval could be taken; if not, it is the difference alone.
    """

    task: str
    metric: str
    samples: int
    value: float
    stderr: float | None = None
    higher_is_better: bool | None = None
    against: float | None = None
    against_stderr: float | None = None
    difference: Interval | None = None
    paired: bool = False


@dataclass(frozen=True)
class TaskScores:
    """Scores of a model, perhaps beside another's.

    Attributes:
        scores: by task and metric, in the order of the harness.
        settings: models, tasks with their versions, limit, few-shot examples, how each model ran, versions of programs.
    """

    scores: Sequence[TaskScore]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"schema": SCHEMA, **self.settings, "scores": [asdict(x) for x in self.scores]}

    def save(self, file: str | Path) -> Path:
        """Write as JSON."""
        path = Path(file)
        path.write_text(json.dumps(self.to_dict(), indent=1))
        return path

    def rows(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """(columns, rows) of a table as text, values with standard errors."""
        compared = any(x.difference for x in self.scores)
        scores = ("against", "score", "difference [95%]") if compared else ("score",)
        rows: list[tuple[str, ...]] = []
        for x in self.scores:
            name = x.metric + {True: " ↑", False: " ↓", None: ""}[x.higher_is_better]
            row = [x.task, name, f"{x.samples:,}" if x.samples else ""]
            if compared:
                row.append(_score(x.against, x.against_stderr))
            row.append(_score(x.value, x.stderr))
            if compared:
                row.append(_difference(x))
            rows.append(tuple(row))
        columns = ("task", "metric", "documents", *scores)
        return columns, rows

    def __str__(self) -> str:
        columns, rows = self.rows()
        widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
        return "\n".join("  ".join(x.ljust(n) for x, n in zip(row, widths, strict=True)) for row in (columns, *rows))

    def _repr_html_(self) -> str:
        return html_table("Task scores with standard errors", *self.rows())


def _score(value: float | None, stderr: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if stderr is None else f"{value:.4f} ± {stderr:.4f}"


def _difference(x: TaskScore) -> str:
    if x.difference is None:
        return ""
    value, low, high = x.difference
    return f"{value:+.4f} [{low:+.4f}, {high:+.4f}]" if x.paired else f"{value:+.4f}"


def run_tasks(
    model: Model,
    tasks: Sequence[str],
    *,
    task_folder: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    against: Model | None = None,
    plan: Plan | None = None,
    batch_size: int = BATCH_SIZE,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> TaskScores:
    """Score a model on tasks, perhaps beside another model.

    A model that fits in half of the free memory is loaded by stock transformers; else its layers are streamed, and it
    can only be asked how likely given answers are.

    Args:
        model: what to score.
        tasks: names of tasks, groups or tags.
        task_folder: of YAML files with tasks of one's own; relative paths of data files start there.
        limit: documents of each task, at most.
        num_fewshot: examples before each question; None: as the task says.
        against: another model to compare with, on the same documents; with a plan, None is the model without it.
        plan: applied live to the model, whose layers are streamed then.
        batch_size: sequences at once, for a model in memory.
        dtype: to run in; None for each model's own.
        device: "cpu" or "cuda".
        progress: told as requests are answered, or layers pass.

    Raises:
        RecipeError: the package is missing, a task is unknown, or a number is impossible.
        DataError: a task or its data cannot be loaded.
        ModelError: the tasks want a model to write that does not fit in memory; or it has no tokenizer.
    """
    for name, value, least in (("limit", limit, 1), ("num_fewshot", num_fewshot, 0), ("batch_size", batch_size, 1)):
        if value is not None and value < least:
            raise RecipeError(f"{name} is too small", where=name, expected=f"at least {least}", got=value)
    if not tasks:
        raise RecipeError("no task is named", fix="e.g. --tasks arc_easy")
    if missing := [name for name in ("lm_eval", "accelerate") if not find_spec(name)]:
        raise RecipeError(
            "task scores need lm-evaluation-harness, which is not here",
            got=f"no package {' and '.join(missing)}",
            fix="pip install 'moekit[eval]'",
        )
    from moekit.evaluation import harness

    against = model if plan is not None and against is None else against
    subjects = [model] if against is None else [model, against]
    with harness.quiet():
        found = harness.Tasks(tasks, None if task_folder is None else Path(task_folder))
    fits = [x.fits(dtype, device) for x in subjects]
    fits[0] = fits[0] and plan is None
    for subject, fit in zip(subjects, fits, strict=True):
        if found.generating and not fit:
            raise ModelError(
                "these tasks want the model to write, which it cannot while its layers are streamed",
                where=subject.name,
                got=f"{', '.join(found.generating)}; "
                + ("a plan is applied live" if plan else "the model does not fit in half of the free memory"),
                fix="choose tasks with given answers (multiple choice, likelihood)"
                + ("" if plan else ", or a machine with more memory"),
            )
    results = []
    for subject, fit, live in zip(subjects, fits, (plan, None), strict=False):
        with harness.quiet():
            lm = (
                harness.LoadedLM(subject, dtype, device, batch_size, progress)
                if fit
                else harness.StreamedLM(subject, dtype, device, progress, live)
            )
            results.append(found.run(lm, limit, num_fewshot))
            del lm
    settings: dict[str, Any] = {
        "model": model.name,
        "against": None if against is None else against.name,
        "ran": ["stock transformers" if x else "stock layers, streamed" for x in fits],
        "tasks": {name: results[0]["versions"].get(name) for name in found.tasks},
        "num_fewshot": dict(results[0]["n-shot"]),
        "limit": limit,
        "versions": {"lm_eval": results[0]["lm_eval_version"]},
    }
    return TaskScores(_scores(results, found.tasks), settings)


def _scores(results: Sequence[Mapping[str, Any]], tasks: Mapping[str, Any]) -> list[TaskScore]:
    """Of each task (or group) and metric, in order."""
    first, other = results[0], results[1] if len(results) > 1 else None
    out = []
    for name, metrics in first["results"].items():
        for key, value in metrics.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error_key = f"{metric}_stderr,{chosen}"
            score = TaskScore(
                task=name,
                metric=metric if chosen == "none" else f"{metric}, {chosen}",
                samples=len(_items(first, name, chosen, metric)),
                value=float(value),
                stderr=_number(metrics.get(error_key)),
                higher_is_better=first["higher_is_better"].get(name, {}).get(metric),
            )
            if other is not None:
                its = other["results"][name]
                values = float(value), float(its[key])
                items = _items(first, name, chosen, metric), _items(other, name, chosen, metric)
                found = paired_difference(*items, _aggregation(tasks.get(name), metric), *values)
                score = replace(
                    score,
                    against=values[1],
                    against_stderr=_number(its.get(error_key)),
                    difference=found or Interval(*[values[0] - values[1]] * 3),
                    paired=found is not None,
                )
            out.append(score)
    return out


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None  # "N/A" where there is none


def _items(result: Mapping[str, Any], task: str, chosen: str, metric: str) -> list[Any]:
    """What each document gave, in order of documents; empty for a group."""
    samples = [x for x in result.get("samples", {}).get(task, ()) if x["filter"] == chosen and metric in x]
    return [x[metric] for x in sorted(samples, key=lambda x: x["doc_id"])]


def _aggregation(task: Any, metric: str) -> Callable[[list[Any]], float] | None:
    return None if task is None else task.aggregation().get(metric)


def paired_difference(
    ours: list[Any],
    theirs: list[Any],
    aggregate: Callable[[list[Any]], float] | None,
    value: float,
    other: float,
    seed: int = 0,
) -> Interval | None:
    """The difference of two scores over the same documents, with a 95% interval by bootstrap over documents.

    Args:
        ours: of each document, what the metric aggregates.
        theirs: of the other model.
        aggregate: the metric's own; None: unknown.
        value: the score of `ours`.
        other: that of `theirs`.
        seed: of the resampling.

    Returns:
        None where the items do not allow it: none, texts, or no aggregation.
    """
    if len(ours) != len(theirs) or not ours or not all(map(_is_numbers, [*ours, *theirs])):
        return None
    if not isinstance(ours[0], tuple | list):
        a, b = np.array(ours, np.float64), np.array(theirs, np.float64)
        if np.allclose([a.mean(), b.mean()], [value, other], rtol=1e-9, atol=1e-12):
            return ratio_interval(a - b, np.ones(len(a)), seed=seed)
    if aggregate is None:
        return None
    rng, gaps = np.random.default_rng(seed), np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        drawn = rng.integers(0, len(ours), len(ours))
        gaps[number] = aggregate([ours[i] for i in drawn]) - aggregate([theirs[i] for i in drawn])
    tail = (1 - LEVEL) / 2
    return Interval(value - other, *np.quantile(gaps, (tail, 1 - tail)).tolist())


def _is_numbers(item: Any) -> bool:
    parts = item if isinstance(item, tuple | list) else (item,)
    return all(isinstance(x, int | float | np.number | np.bool_) for x in parts)
