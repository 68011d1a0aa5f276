"""Source: a trace as the report's views see it, with arrays [domains, layers, experts] out of long tables.

Symbols: N domains, L MoE layers, E the most experts that a layer has.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from moekit.stats import Stats
from moekit.trace import Table, Trace


class Source:
    """A trace, its sizes, and where in an array an expert's number stands."""

    def __init__(self, trace: Trace):
        self.trace = trace
        self.layers = list(trace.layers)
        self.domains = list(trace.domains)
        self.moe = [trace.moe_layer(index) for index in self.layers]
        self.experts = [layer.num_experts for layer in self.moe]
        self.top_k = [layer.top_k for layer in self.moe]
        self.width = max(self.experts)

    @cached_property
    def stats(self) -> Stats:
        """The trace's sums over all phases."""
        return self.trace.stats

    @cached_property
    def tokens(self) -> list[int]:
        """Tokens of each domain."""
        return [int(x) for x in self.stats.tokens]

    def has(self, name: str) -> bool:
        """Whether a quantity of `moekit.stats.FIELDS` was measured (looked up in the last layer)."""
        return name in self.stats.layers[self.layers[-1]].arrays

    def cube(self, table: Table, column: str) -> np.ndarray:
        """A column of a table by domain, layer and expert [N, L, E], NaN where a layer has fewer experts."""
        out = np.full((len(self.domains), len(self.layers), self.width), np.nan)
        domain = {name: n for n, name in enumerate(self.domains)}
        layer = {index: i for i, index in enumerate(self.layers)}
        n = np.array([domain[x] for x in table["domain"].tolist()])
        i = np.array([layer[x] for x in table["layer"].tolist()])
        out[n, i, table["expert"]] = table[column]
        return out

    @cached_property
    def counts(self) -> np.ndarray:
        """Tokens routed to each expert in all domains together [L, E]; NaN where a layer has fewer experts."""
        out = np.full((len(self.layers), self.width), np.nan)
        for i, index in enumerate(self.layers):
            out[i, : self.experts[i]] = self.stats.get("count", index)
        return out
