"""Losses of a model without some of its experts, by sequence: the passes that `ablate` needs, many sets at a time.

Switching off an expert of layer l changes nothing before l, and nothing at all in a sequence whose tokens do not choose
it. A first pass scores the model as it is and counts who chooses whom. In the second, every batch and set of experts
that meet are a fork of the batch (`moekit.stream.Fork`): it shares what the batch's layers give up to the first layer
in question and runs the rest with the experts scaled to zero. A fork has the shape of its batch, so that no difference
comes from rounding; sequences that do not choose the experts count as exactly unchanged. Where all forks together would
need too much memory, further passes follow, each with some of them.

Symbols: B sequences of a batch, T positions, V vocabulary, E experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from operator import le

import numpy as np
import torch

from moekit.data import Batch
from moekit.families.model import Model
from moekit.families.seam import Call, Observer
from moekit.layout import ExpertId
from moekit.progress import Progress
from moekit.stream import Fork, Stream
from moekit.view import MoEView

ROW_CHUNK = 256  # positions whose log-probabilities are held at once
FORK_BYTES, FORKS = 2 << 30, 256  # what the forks of one pass may hold (roughly), and how many there may be

Removed = tuple[ExpertId, ...]


class Counter(Observer):
    """How many tokens of each sequence choose each expert, by layer and batch: [B, E]."""

    def __init__(self) -> None:
        self.counts: dict[tuple[int, int], np.ndarray] = {}
        self.batch: tuple[int, Batch]

    def routed(self, call: Call) -> None:
        """Count one call."""
        number, batch = self.batch
        rows, experts = len(batch.ids), call.layer.num_experts
        ids = call.ids.cpu().reshape(rows, -1, call.ids.shape[-1])[..., :].masked_fill(~batch.mask[..., None], experts)
        keys = ids + torch.arange(rows)[:, None, None] * (experts + 1)
        found = torch.bincount(keys.reshape(-1), minlength=rows * (experts + 1))
        self.counts[call.layer.index, number] = found.reshape(rows, -1)[:, :experts].numpy()


class Removal:
    """Passes over batches and what they gave, by sequence.

    Args:
        model: from `moekit.open`.
        batches: by domain, in order.
        renormalise: the other chosen experts of a token take over the weight.
        dtype: to run in; None for the model's own.
        device: "cpu" or "cuda".
        progress: told as layers pass.
    """

    def __init__(
        self,
        model: Model,
        batches: list[Batch],
        renormalise: bool,
        dtype: torch.dtype | None,
        device: str,
        progress: Progress,
    ):
        self.layout, self.batches, self.renormalise = model.layout, batches, renormalise
        self.loader = model.loader(dtype, device)
        self.view = MoEView(self.loader.model, model.layout)
        self.stream = Stream(self.loader, progress=progress)
        self._counter = Counter()
        self._nll: list[np.ndarray] = []
        self._changes: dict[tuple[int, Removed], np.ndarray] = {}

    def clean(self) -> None:
        """The first pass: losses and choices of the model as it is."""

        def around(layer: int, number: int) -> contextlib.AbstractContextManager:
            if layer not in self.layout.by_index:
                return contextlib.nullcontext()
            self._counter.batch = number, self.batches[number]
            return self.view.watch(self._counter, layers=[layer])

        logits = self.stream.run([x.ids for x in self.batches], around=around)
        self._nll = [nll_by_row(found, batch) for found, batch in zip(logits, self.batches, strict=True)]

    def without(self, wanted: Sequence[Iterable[Removed]], fork_bytes: int) -> None:
        """Further passes: losses without the sets `wanted` of each domain."""
        jobs = [
            (number, experts)
            for number, batch in enumerate(self.batches)
            for experts in wanted[batch.domain]
            if self._touched(number, experts).any()
        ]
        for some in self._groups(jobs, fork_bytes):
            self._pass(some)

    def _groups(self, jobs: list[tuple[int, Removed]], fork_bytes: int) -> Iterator[list[tuple[int, Removed]]]:
        """Jobs that go into one pass each; a run holds embeddings, hidden states and what lies between."""
        group: list[tuple[int, Removed]] = []
        held = 0
        for job in jobs:
            size = 4 * self.batches[job[0]].ids.numel() * self.layout.hidden_size * self.loader.dtype.itemsize
            if group and (held + size > fork_bytes or len(group) == FORKS):
                yield group
                group, held = [], 0
            group.append(job)
            held += size
        if group:
            yield group

    def _pass(self, jobs: list[tuple[int, Removed]]) -> None:
        numbers = sorted({number for number, _ in jobs})

        def first(number: int, experts: Removed) -> int:
            return min(x.layer for x in experts if self._touched(number, (x,)).any())

        def around(layer: int, run: int) -> contextlib.AbstractContextManager:
            off = {} if run < len(numbers) else {x.expert: 0.0 for x in jobs[run - len(numbers)][1] if x.layer == layer}
            return self.view.scale({layer: off}, renormalise=self.renormalise)

        forks = [Fork(numbers.index(number), partial(le, first(number, experts))) for number, experts in jobs]
        logits = self.stream.run([self.batches[x].ids for x in numbers], forks=forks, around=around)
        for run, found in enumerate(logits):
            if run >= len(numbers):
                number, experts = jobs[run - len(numbers)]
                change = nll_by_row(found, self.batches[number]) - self._nll[number]
                self._changes[number, experts] = np.where(self._touched(number, experts), change, 0.0)

    def _touched(self, number: int, experts: Removed) -> np.ndarray:
        return np.any([self._counter.counts[layer, number][:, expert] > 0 for layer, expert in experts], axis=0)

    def _join(self, domain: int, of: Callable[[int], np.ndarray]) -> np.ndarray:
        """What `of` says of the batches of a domain, for the sequences that have a token to predict."""
        own = [number for number, batch in enumerate(self.batches) if batch.domain == domain]
        rows = [of(number)[self.batches[number].mask.sum(1).numpy() > 1] for number in own]
        return np.concatenate(rows) if rows else np.zeros(0)

    def nll(self, domain: int) -> np.ndarray:
        """Summed -log p of each sequence of a domain, as the model is."""
        return self._join(domain, lambda number: self._nll[number])

    def tokens(self, domain: int) -> np.ndarray:
        """Predicted tokens of each sequence."""
        return self._join(domain, lambda number: self.batches[number].mask.sum(1).numpy() - 1)

    def change(self, experts: Removed, domain: int) -> np.ndarray:
        """How much `nll` grows without the experts."""
        return self._join(
            domain,
            lambda number: self._changes.get((number, experts), np.zeros(len(self.batches[number].ids))),
        )

    def touched(self, experts: Removed, domain: int) -> np.ndarray:
        """Which sequences have a token that chooses one of the experts."""
        return self._join(domain, lambda number: self._touched(number, experts))

    def share(self, layer: int, domain: int) -> np.ndarray:
        """Share of a domain's tokens that choose each expert of a layer [E]."""
        own = [number for number, batch in enumerate(self.batches) if batch.domain == domain]
        counts = sum(self._counter.counts[layer, number].sum(0) for number in own)
        return counts / sum(self.batches[number].tokens for number in own)


def nll_by_row(logits_BTV: torch.Tensor, batch: Batch) -> np.ndarray:
    """Summed -log p of the tokens of each sequence [B], float64; the first token and padding do not count."""
    out = np.zeros(len(batch.ids))
    for row, (ids_T, mask_T) in enumerate(zip(batch.ids, batch.mask, strict=True)):
        for start in range(0, int(mask_T.sum()) - 1, ROW_CHUNK):
            stop = min(start + ROW_CHUNK, int(mask_T.sum()) - 1)
            target = ids_T[start + 1 : stop + 1, None].to(logits_BTV.device)
            logp = logits_BTV[row, start:stop].float().log_softmax(-1)
            out[row] -= float(logp.gather(1, target).double().sum())
    return out
