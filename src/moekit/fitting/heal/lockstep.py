"""Teacher and student side by side: the teacher a layer ahead, so that what its layer gave is known to the student's.

Both run the same batches. A layer's weights of either are in memory, and its neighbours'.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from moekit.apply.live import live
from moekit.data import Batch
from moekit.families.loader import Loader
from moekit.families.model import Model
from moekit.families.seam import Call, Observer
from moekit.layout import MoELayer
from moekit.plans import Plan
from moekit.progress import Progress, silent
from moekit.stream import Stop, Stream
from moekit.view import MoEView


@dataclass
class Seen(Observer):
    """What the teacher showed of one layer, by batch.

    Attributes:
        wanted: of these, what is kept: "logits" [T, E], "block" [T, D], "hidden" [T, D], "arguments".
    """

    wanted: frozenset[str]
    logits: list[torch.Tensor] = field(default_factory=list)
    block: list[torch.Tensor] = field(default_factory=list)
    hidden: list[torch.Tensor] = field(default_factory=list)
    arguments: list[tuple[tuple, dict[str, Any]]] = field(default_factory=list)

    def routed(self, call: Call) -> None:
        """Keep the router's raw logits."""
        if "logits" in self.wanted and call.logits is not None:
            self.logits.append(call.logits.clone())

    def finished(self, call: Call, output: torch.Tensor) -> None:
        """Keep the routed experts' sum."""
        if "block" in self.wanted:
            self.block.append(output.clone())


@dataclass
class Pair:
    """An MoE layer that the teacher has passed and the student stands before.

    Attributes:
        layer: the student's.
        seen: what the teacher's gave; inference tensors.
        stop: where the student stands.
        view: of the student.
        loader: of the student.
    """

    layer: MoELayer
    seen: Seen
    stop: Stop
    view: MoEView
    loader: Loader


def hidden_of(output: object) -> torch.Tensor:
    """The hidden states [T, D] in what a decoder layer gave."""
    found = output if isinstance(output, torch.Tensor) else next(x for x in output if isinstance(x, torch.Tensor))  # type: ignore[attr-defined]
    return found.reshape(-1, found.shape[-1])


def side_by_side(
    teacher: Model,
    student: Model,
    batches: Sequence[Batch],
    wanted: frozenset[str],
    *,
    plan: Plan | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> Iterator[Pair]:
    """Stop at every MoE layer; going on runs the student's layer as it then is.

    Args:
        teacher: runs as it is.
        student: runs by transformers' own loop over experts, which gradients pass through.
        batches: that both run.
        wanted: see `Seen`.
        plan: applied to the student live.
        dtype: to run both in; None for each one's own.
        device: "cpu" or "cuda".
        progress: told as the student's layers pass.
    """
    theirs = Stream(teacher.loader(dtype, device))
    loader = student.loader(dtype, device)
    loader.differentiable()
    ours = Stream(loader, progress=progress)
    eyes, view = MoEView(theirs.model, teacher.layout), MoEView(loader.model, student.layout)
    ids, last = [x.ids for x in batches], student.layout.routed[-1].index
    seen = Seen(wanted)

    @contextlib.contextmanager
    def around(index: int, number: int) -> Iterator[None]:
        with eyes.watch(seen, layers=[index]):
            yield

    def passed(index: int, number: int, output: object) -> None:
        if "hidden" in wanted:
            seen.hidden.append(hidden_of(output).clone())

    ahead = theirs.stops(ids, around=around, passed=passed, last_layer=last)
    behind = ours.stops(ids, last_layer=last)
    changed: Callable[[], Any] = (lambda: live(view, plan, loader)) if plan else contextlib.nullcontext
    with contextlib.closing(ahead), contextlib.closing(behind), changed():
        here: Stop | None = next(ahead)
        for stop in behind:
            for kept in (seen.logits, seen.block, seen.hidden, seen.arguments):
                kept.clear()
            layer = student.layout.by_index.get(stop.layer)
            if layer is not None and "arguments" in wanted and here is not None:
                seen.arguments += [here.arguments(number) for number in range(len(ids))]
            here = next(ahead, None)
            if layer is not None:
                yield Pair(layer, seen, stop, view, loader)
