"""Paths: which expert follows on those of the two layers before, counted in a trace.

    score(e) = sum over a in l-1, b in l-2 of (N(b, a, e) + s P(e | a)) / (N(b, a) + s)

N(b, a, e)  tokens of the trace that chose b in layer l-2, a in l-1 and e in l
P(e | a)    the share of those that chose a which also chose e
s           tokens that P(e | a) is worth

Paper: R. Yi et al., "EdgeMoE", arXiv 2308.14352, P(e_l | e_(l-1), e_(l-2)). Deviations: the paper's models choose one
expert; for k > 1 the pairs' estimates are added up, and seldom-seen pairs lean on single experts.
"""

from __future__ import annotations

import numpy as np

from moekit.serve.predictors.base import Predictor, Seen
from moekit.serve.routes import Routes

SMOOTHING = 4.0


class Paths(Predictor):
    """EdgeMoE's statistics of paths."""

    def __init__(self, trace: Routes | None = None, routers: object = None):
        super().__init__(trace, None)
        assert trace is not None
        self.experts = trace.experts
        self._single = [_given(trace, layer) for layer in range(1, trace.layers)]
        self._pairs = [_pairs(trace, layer) for layer in range(2, trace.layers)]

    def scores(self, layer: int, seen: Seen) -> np.ndarray:
        """The sum over the paths that were taken."""
        ids_TK = seen.ids[layer - 1].astype(np.int64)
        single_TKE = self._single[layer - 1][ids_TK]
        if layer < 2:
            return single_TKE.sum(1)
        rows, counts = self._pairs[layer - 2]
        before_TK = seen.ids[layer - 2].astype(np.int64)
        out = np.zeros((len(ids_TK), self.experts), np.float32)
        for a in range(ids_TK.shape[1]):
            for b in range(before_TK.shape[1]):
                found_TE = counts[rows[before_TK[:, b], ids_TK[:, a]]]
                total_T1 = found_TE[:, -1:]
                out += (found_TE[:, :-1] + SMOOTHING * single_TKE[:, a]) / (total_T1 + SMOOTHING)
        return out


def _given(trace: Routes, layer: int) -> np.ndarray:
    """P(e | a) [E + 1, E]: the last row, of an empty slot, is the plain share."""
    used = trace.used(slice(None))
    together = used[:, layer - 1].T @ used[:, layer]
    plain = used[:, layer].mean(0, keepdims=True)
    seen = used[:, layer - 1].sum(0)[:, None]
    return np.concatenate([(together + plain) / (seen + 1), plain]).astype(np.float32)


def _pairs(trace: Routes, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Row of each pair (b, a) [E + 1, E + 1], row 0: none; counts [rows, E + 1], the pair's own last."""
    side = trace.experts + 1
    before, last = trace.ids[:, layer - 2].astype(np.int64), trace.ids[:, layer - 1].astype(np.int64)
    codes_TKK = before[:, :, None] * side + last[:, None, :]
    seen, inverse = np.unique(codes_TKK.reshape(-1), return_inverse=True)
    rows = np.zeros(side * side, np.int64)
    rows[seen] = 1 + np.arange(len(seen))
    counts = np.zeros((len(seen) + 1, side), np.float32)
    pairs = codes_TKK.shape[1] * codes_TKK.shape[2]
    inverse_TP = 1 + inverse.reshape(len(before), pairs)
    for slot in range(trace.top_k):
        expert_T1 = trace.ids[:, layer, slot].astype(np.int64)[:, None]
        np.add.at(counts, (inverse_TP, np.where(expert_T1 < trace.experts, expert_T1, 0)), expert_T1 < trace.experts)
    counts[:, -1] = np.bincount(inverse_TP.reshape(-1), minlength=len(counts))
    return rows.reshape(side, side), counts
