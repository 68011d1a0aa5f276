"""What passes over text can still do for a choice: bits fitted to the text, instead of rounding to the nearest.

Fitting is too dear to try on every candidate, so that it is tried on the chosen one: the fitted methods of the registry
that keep experts in as many bits, and, where the packed form has a width for each expert (moekit's own), those that are
told an average, with the largest that fits when all experts stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from moekit import methods
from moekit.data import Dataset
from moekit.errors import PlanError
from moekit.families.model import Model
from moekit.fitting import FITTED, Fit, decide
from moekit.methods import Method
from moekit.planning.candidates import Candidate
from moekit.planning.outlook import Outlook
from moekit.planning.sizes import AnyQuantize
from moekit.planning.ways import Formats, Space, options_of, ways_of
from moekit.planning.weights import look
from moekit.plans import UNQUANTISED, Plan, Quantize, QuantizeDense
from moekit.progress import Progress
from moekit.recipe import Step
from moekit.stats import Stats

WORTH_BITS = 4  # of the chosen weights, at most: with more, rounding to the nearest loses next to nothing


@dataclass(frozen=True)
class Fitting:
    """What fitted methods may use.

    Attributes:
        data: the text that they are fitted to.
        folder: for the numbers of what these steps say: a folder of its own.
    """

    data: Dataset
    folder: Callable[[Sequence[Step]], Path]


def fitted(
    chosen: Candidate,
    space: Space,
    model: Model,
    stats: Stats,
    budget: int,
    fitting: Fitting,
    *,
    formats: Formats = "stock",
    domain: list[str] | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    progress: Progress,
) -> Iterator[Candidate]:
    """Candidates in the place of the chosen one; their plans refer to numbers in the folders of `fitting`.

    Predicted is what rounding to the nearest in these bits would do: fitting does better.
    """
    for step, base in _proposals(chosen, space, model, budget, formats):
        steps = (*base.steps[:-1], step) if base.steps else (step,)
        fit = Fit(model, model, None, fitting.data, fitting.folder(steps), dtype, device, progress)
        made = decide(step.method, fit, domain=domain, options=step.options)
        kept = [op for op in base.plan.ops if not isinstance(op, Quantize | QuantizeDense)]
        plan = base.plan.model_copy(update={"ops": [*kept, *made.ops], "tensors": made.tensors})
        nearest = [_nearest(op) for op in made.ops if isinstance(op, Quantize | QuantizeDense)]
        if (size := space.sizes.of(base.keep, nearest)) > budget:
            continue  # rows that end within a word: widths do not mix evenly
        predicted = _predicted(base.plan.model_copy(update={"ops": [*kept, *nearest]}), model, stats, domain)
        widths = [b for op in nearest if isinstance(op, Quantize) for b in op.widths(range(base.experts))]
        bits = round(sum(widths) / len(widths), 2)
        kind = base.kind[0], int(bits) if bits == int(bits) else bits
        yield replace(base, steps=steps, plan=plan, kind=kind, bytes=size, predicted=predicted)


def _proposals(
    chosen: Candidate, space: Space, model: Model, budget: int, formats: Formats
) -> Iterator[tuple[Step, Candidate]]:
    """(quantising step, what it is put behind) of each."""
    if not any(isinstance(op, Quantize) for op in chosen.plan.ops):
        return
    for method in (methods.get(name) for name in methods.names("quantize") if name in FITTED):
        options = options_of(method, model, formats, chosen.rest)
        try:
            if "bits" in method.options:
                whole = _whole(chosen, model)
                average = _average(method, space, model, budget, options) if formats == "moekit" else 0.0
                if average and average < 2 * WORTH_BITS:
                    yield Step(method=method.name, options=options | _spread(average)), whole
            elif chosen.kind[1] <= WORTH_BITS:
                ops = ways_of(method, model.layout, method.settings(options))
                if {op.bits for op in ops if isinstance(op, Quantize)} == {chosen.kind[1]}:
                    yield Step(method=method.name, options=options), chosen
        except PlanError:
            continue  # bits that the format has not: others are there


def _whole(chosen: Candidate, model: Model) -> Candidate:
    """The same with all experts."""
    plan = Plan(layout_hash=model.layout.hash)
    return replace(chosen, steps=chosen.steps[-1:], plan=plan, keep=chosen.experts, kind=("", chosen.kind[1]))


def _average(method: Method, space: Space, model: Model, budget: int, options: dict) -> float:
    """The largest average of bits with which all experts fit, to a hundredth; 0: none.

    Between two widths bytes grow with the average, whichever experts have which.
    """
    ops = ways_of(method, model.layout, method.settings(options))

    def size(bits: int) -> int:
        alike = [op.model_copy(update={"bits": bits}) if isinstance(op, Quantize) else op for op in ops]
        return space.sizes.of(space.sizes.experts, alike)

    low = max((bits for bits in range(1, 9) if size(bits) <= budget), default=0)
    if low in (0, 8):
        return float(low)
    return low + math.floor(100 * min(0.99, (budget - size(low)) / (size(low + 1) - size(low)))) / 100


def _spread(average: float) -> dict[str, object]:
    """Options that say an average, and widths around it."""
    widths = range(max(1, math.floor(average) - 1), min(8, math.ceil(average) + 1) + 1)
    return {"bits": average, "widths": ",".join(map(str, widths))}


def _nearest(op: AnyQuantize) -> AnyQuantize:
    """The same without numbers of its own: as large, and no better."""
    return op.model_copy(update={"scheme": "fitted"})


def _predicted(plan: Plan, model: Model, stats: Stats, domain: list[str] | None) -> float:
    alike = {
        op.model_copy(update={"bits": bits})
        for index, op in plan.quantised().items()
        for bits in op.widths(range(model.layout.by_index[index].num_experts))
        if bits != UNQUANTISED
    }
    weights = look(model, [*alike, *plan.quantised_dense().values()])
    return Outlook(model.layout, stats, weights, domain).error(plan)
