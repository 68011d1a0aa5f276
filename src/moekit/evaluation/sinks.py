"""What super experts do to a model: massive activations and attention sinks, with and without the experts.

A super expert writes one extreme value into the residual stream, nearly always on the first token. From then on that
token is easy to find for every head that has nothing to look at: an attention sink. Measured here, layer by layer, in
the model as it is, with the experts switched off (weight zero, slot empty), and with as many random experts of the same
layers switched off:

    largest     max |h| over tokens and coordinates of the hidden states h after the layer; and its token's position
    median      median |h| of a batch, mean over batches; a massive activation is over 100 and over 1000 times it (M.
                Sun and others, "Massive Activations in Large Language Models", arXiv 2402.17762)
    top share   share of |h|^2 in the token's 3 largest coordinates, mean over tokens at the first position
    sink        S_{l,h} = mean over queries t > 0 of the attention weight of position 0 in head h, mean over heads

    decay       1 - sum of sink without the experts / sum of sink, over the layers behind the first of them

Paper: Z. Su et al., "Unveiling Super Experts in Mixture-of-Experts Large Language Models", arXiv 2507.23279.

Deviations: the sink is the first position, whatever token stands there; queries at position 0, which have nothing else
to look at, do not count. Attention runs eagerly here, which differs from other implementations by rounding.

Symbols: B sequences, H heads, T positions, D hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch.utils import _pytree as pytree

from moekit.data import Batch, Dataset
from moekit.evaluation.ablation import checked, random_controls
from moekit.evaluation.removal import Removed
from moekit.families.attention import make_eager, watch_attention
from moekit.families.model import Model
from moekit.layout import ExpertId
from moekit.progress import Progress, silent
from moekit.stream import Fork, Stream
from moekit.view import MoEView

TOP = 3  # coordinates
MASSIVE, TIMES_MEDIAN = 100.0, 1000.0
ATTENTION_BYTES, HEADS = 256 << 20, 64  # attention weights of one batch, at most so many heads assumed
RUNS = ("as_is", "without", "control")


@dataclass(frozen=True)
class LayerState:
    """One layer in one run.

    Attributes:
        largest: max |h| after the layer.
        position: of the token that holds it.
        coordinate: that holds it.
        median: median |h|.
        top_share: share of |h|^2 in the 3 largest coordinates of the tokens at position 0.
        sink: attention to position 0, mean over queries, by head; empty for layers without attention weights.
    """

    largest: float
    position: int
    coordinate: int
    median: float
    top_share: float
    sink: tuple[float, ...]

    @property
    def massive(self) -> bool:
        """Whether the largest value is a massive activation."""
        return self.largest > max(MASSIVE, TIMES_MEDIAN * self.median)

    @property
    def mean_sink(self) -> float:
        """Mean over heads; NaN for layers without attention weights."""
        return float(np.mean(self.sink)) if self.sink else float("nan")


@dataclass(frozen=True)
class Sinks:
    """Every layer in every run.

    Attributes:
        experts: that were switched off.
        control: the random experts switched off instead; empty where the layers have too few.
        layers: by decoder layer, the states as it is, without the experts, and without the control.
    """

    experts: Removed
    control: Removed
    layers: dict[int, dict[str, LayerState]] = field(default_factory=dict)

    def decay(self, run: str = "without") -> float:
        """Share of the attention to position 0 that is gone in the layers behind the first expert; NaN without any."""
        behind = [x for layer, x in self.layers.items() if layer > self.experts[0].layer and run in x and x[run].sink]
        before = sum(x["as_is"].mean_sink for x in behind)
        return 1 - sum(x[run].mean_sink for x in behind) / before if before else float("nan")

    def to_dict(self) -> dict:
        """Plain data for JSON."""
        layers = {
            str(layer): {name: asdict(x) | {"massive": x.massive} for name, x in runs.items()}
            for layer, runs in self.layers.items()
        }
        decay = {run: self.decay(run) for run in RUNS[1:] if run == "without" or self.control}
        return {
            "experts": [str(x) for x in self.experts],
            "control": [str(x) for x in self.control],
            "decay": {name: None if np.isnan(x) else x for name, x in decay.items()},
            "layers": layers,
        }


class _State:
    """Sums of one layer in one run."""

    def __init__(self) -> None:
        self.largest, self.position, self.coordinate = 0.0, 0, 0
        self.median, self.tokens = 0.0, 0
        self.top: list[float] = []
        self.sink = torch.zeros(0, dtype=torch.float64)
        self.queries = 0

    def add_hidden(self, hidden: torch.Tensor, batch: Batch) -> None:
        """Hidden states [B, T, ...] after the layer; several streams (hyper-connections) count as one."""
        h_BTD = hidden.flatten(2).float().abs() * batch.mask[..., None].to(hidden.device)
        largest = float(h_BTD.max())
        if largest > self.largest:
            at = int(h_BTD.argmax())
            width = h_BTD.shape[2]
            self.largest, self.position, self.coordinate = largest, at // width % h_BTD.shape[1], at % width
        self.median += float(h_BTD[batch.mask.to(h_BTD.device)].median()) * batch.tokens
        self.tokens += batch.tokens
        square_BD = h_BTD[:, 0].square()
        share_B = square_BD.topk(min(TOP, square_BD.shape[1])).values.sum(1) / square_BD.sum(1).clamp_min(1e-30)
        self.top += share_B.tolist()

    def add_attention(self, weights: torch.Tensor, batch: Batch) -> None:
        """Attention weights [B, H, T, T]."""
        if weights.shape[-1] != batch.ids.shape[1]:
            return
        queries_BT = batch.mask[:, 1:].to(weights.device)
        found_H = (weights[:, :, 1:, 0].double() * queries_BT[:, None]).sum((0, 2)).cpu()
        self.sink = found_H if not self.queries else self.sink + found_H
        self.queries += int(queries_BT.sum())

    def result(self) -> LayerState:
        """The means."""
        median, sink = self.median / self.tokens, (self.sink / max(self.queries, 1)).tolist()
        return LayerState(self.largest, self.position, self.coordinate, median, float(np.mean(self.top)), tuple(sink))


def sinks(
    model: Model,
    data: Dataset,
    experts: Collection[ExpertId],
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> Sinks:
    """Massive activations and attention sinks with and without experts, in one streamed pass.

    Args:
        model: from `moekit.open`.
        data: text, tokenised.
        experts: switched off together; `moekit.methods.super_experts` names them.
        seed: of the random control.
        dtype: to run in; None for the model's own.
        device: "cpu" or "cuda".
        progress: told as layers pass.

    Raises:
        PlanError: no expert given, or one that the model has not.
        CheckpointError: weights cannot be read.
    """
    off = checked(model.layout, experts)
    control = next(iter(random_controls(model.layout, off, 1, seed)), ())
    batches = _split(data)
    loader = model.loader(dtype, device)
    make_eager(loader.model)
    view = MoEView(loader.model, model.layout)
    sets = [x for x in (off, control) if x]
    forks = [Fork(number, off[0].layer.__le__) for _ in sets for number in range(len(batches))]
    states = {(layer, run): _State() for layer in range(model.layout.num_layers) for run in range(1 + len(sets))}

    def around(layer: int, number: int) -> contextlib.AbstractContextManager:
        run, batch = divmod(number, len(batches))
        stack = contextlib.ExitStack()
        if run:
            stack.enter_context(view.scale({layer: {x.expert: 0.0 for x in sets[run - 1] if x.layer == layer}}))
        state = states[layer, run]
        see = watch_attention(loader.layers[layer], lambda weights: state.add_attention(weights, batches[batch]))
        stack.enter_context(see)
        return stack

    def passed(layer: int, number: int, output: object) -> None:
        run, batch = divmod(number, len(batches))
        hidden = next(x for x in pytree.tree_leaves(output) if isinstance(x, torch.Tensor))
        states[layer, run].add_hidden(hidden, batches[batch])

    stream = Stream(loader, progress=progress)
    last = model.layout.num_layers - 1
    for _ in stream.run([x.ids for x in batches], forks=forks, around=around, passed=passed, last_layer=last):
        pass
    layers: dict[int, dict[str, LayerState]] = {}
    for (layer, run), state in states.items():
        same = state if state.tokens else states[layer, 0]  # before the first expert, all runs are one
        layers.setdefault(layer, {})[RUNS[run]] = same.result()
    return Sinks(off, control, layers)


def _split(data: Dataset) -> list[Batch]:
    """The batches of `data`, cut into fewer rows where their attention weights would be too large."""
    out: list[Batch] = []
    for batch in data.batches:
        rows = max(1, ATTENTION_BYTES // (4 * HEADS * batch.ids.shape[1] ** 2))
        cuts: Sequence[int] = range(0, len(batch.ids), rows)
        out += [Batch(batch.domain, batch.ids[i : i + rows], batch.mask[i : i + rows]) for i in cuts]
    return out
