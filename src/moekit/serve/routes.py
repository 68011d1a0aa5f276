"""Routes: which experts every token of some texts chose, as policies, predictors and the simulator read them.

Symbols: T tokens, L MoE layers, E experts (the most that a layer has), K chosen, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moekit.errors import DataError
from moekit.trace import Trace

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Routes:
    """Texts one after the other, token by token.

    Attributes:
        ids: chosen experts [T, L, K]; `experts` where a slot stayed empty.
        experts: E.
        tokens: token ids [T].
        starts: the first token of each text, ascending.
        domains: the number of each text's domain.
        hidden: what each layer's router was given, by MoE layer [T, D]; empty unless recorded from a model.
    """

    ids: np.ndarray
    experts: int
    tokens: np.ndarray
    starts: np.ndarray
    domains: np.ndarray
    hidden: Mapping[int, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, trace: Trace | str | Path) -> Routes:
        """The routes of a trace, domain after domain.

        Args:
            trace: recorded with every token.

        Raises:
            DataError: no trace, or one of statistics only.
        """
        opened = trace if isinstance(trace, Trace) else Trace.open(trace)
        columns = opened.tokens()
        layers = [opened.layer(index) for index in opened.layers]
        experts, top_k = max(x.num_experts for x in layers), max(x.top_k for x in layers)
        ids = np.full((opened.token_count, len(layers), top_k), experts, np.int16)
        for number, layer in enumerate(layers):
            ids[:, number, : layer.top_k] = np.where(layer.ids < layer.num_experts, layer.ids, experts)
        sequence = np.asarray(columns["sequence"])
        starts = np.flatnonzero(np.diff(sequence, prepend=sequence[:1] - 1))
        return cls(ids, experts, np.asarray(columns["id"]), starts, np.asarray(columns["domain"])[starts])

    @property
    def layers(self) -> int:
        """L."""
        return self.ids.shape[1]

    @property
    def top_k(self) -> int:
        """K."""
        return self.ids.shape[2]

    @cached_property
    def ends(self) -> np.ndarray:
        """Where each text ends."""
        return np.append(self.starts[1:], len(self.ids))

    @cached_property
    def text(self) -> np.ndarray:
        """The number of each token's text [T]."""
        return np.repeat(np.arange(len(self.starts)), self.ends - self.starts)

    @cached_property
    def frequency(self) -> np.ndarray:
        """The share of tokens that chose each expert [L, E]."""
        return self.used(slice(None)).mean(0)

    def used(self, rows: slice) -> np.ndarray:
        """Whether each token chose each expert [T, L, E], as float32 0 or 1."""
        ids = self.ids[rows].astype(np.int64)
        out = np.zeros((*ids.shape[:2], self.experts + 1), np.float32)
        np.put_along_axis(out, ids, 1.0, axis=2)
        return out[:, :, :-1]

    def texts(self, numbers: Sequence[int] | np.ndarray) -> Routes:
        """Some of the texts, in this order (without recorded hidden states)."""
        rows = [np.arange(self.starts[n], self.ends[n]) for n in numbers]
        lengths = [len(x) for x in rows]
        every = np.concatenate(rows) if rows else np.zeros(0, np.int64)
        starts = np.cumsum([0, *lengths[:-1]])
        domains = self.domains[np.asarray(numbers, np.int64)]
        return Routes(self.ids[every], self.experts, self.tokens[every], starts, domains)

    def interleaved(self) -> Routes:
        """The domains' texts in turn: a user who changes the subject with every text."""
        rank = np.zeros(len(self.starts), np.int64)
        for number in np.unique(self.domains):
            rank[self.domains == number] = np.arange((self.domains == number).sum())
        return self.texts(np.lexsort((self.domains, rank)))

    def spread(self, tokens: int) -> Routes:
        """About so many tokens, of texts evenly spread; all where there are no more."""
        count = max(1, round(len(self.starts) * tokens / max(1, len(self.ids))))
        if count >= len(self.starts):
            return self
        return self.texts(np.linspace(0, len(self.starts) - 1, count).round().astype(int))

    def check_like(self, other: Routes) -> None:
        """Refuse routes of a model of another shape.

        Raises:
            DataError: other layers, experts or k.
        """
        mine, theirs = (self.layers, self.experts, self.top_k), (other.layers, other.experts, other.top_k)
        if mine != theirs:
            raise DataError(
                "the two traces are of different models",
                expected="{} MoE layers of {} experts, top-{}".format(*mine),
                got="{} MoE layers of {} experts, top-{}".format(*theirs),
                fix="record both from the same model",
            )
