"""Two traces of the same text: how far two models, or one model at two times, choose the same experts.

Router saturation (OLMoE, arXiv 2409.02060) is the mean over tokens of |A & B| / k, A and B being the experts that the
two models chose for the token.

Symbols: T tokens, K chosen, S sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from moekit.errors import DataError
from moekit.trace import resample
from moekit.trace.store import Trace
from moekit.trace.table import Table

RESAMPLES = 1000


def saturation(
    one: Trace,
    other: Trace,
    *,
    renumbered: Mapping[int, Sequence[int]] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Table:
    """The share of its experts that a token keeps from one trace to the other.

    Args:
        one: a trace with tokens.
        other: a trace of the same tokens.
        renumbered: where `other` is a pruned model: by layer, the number in `one` of each of its experts.
        resamples: of the bootstrap over sequences.
        seed: of the bootstrap.

    Returns:
        By layer and domain: tokens, overlap, low, high (95%, bootstrap over sequences), uniform (k/E: blind choices).

    Raises:
        DataError: no tokens, other tokens, or other layers or k.
    """
    _check(one, other)
    sequences = resample.Sequences.of(one)
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(sequences.domain == number) for number in range(len(one.domains))]
    draws = [resample.draws(len(rows), resamples, rng) for rows in members]
    found = []
    chunk = resample.ROWS // 8
    for index in one.layers:
        first, second = one.layer(index), other.layer(index)
        names = None if renumbered is None else np.asarray(renumbered[index])
        kept_S = np.zeros(len(sequences.tokens))
        for start in range(0, len(first.ids), chunk):
            part = slice(start, start + chunk)
            kept = common(first.ids[part], second.ids[part], first.num_experts, names) / first.top_k
            kept_S += np.bincount(sequences.number[part], weights=kept, minlength=len(kept_S))
        for domain, rows, drawn in zip(one.domains, members, draws, strict=True):
            tokens = sequences.tokens[rows]
            low, high = resample.bootstrap(kept_S[rows, None], tokens, drawn)[:, 0]
            found.append(
                {
                    "layer": index,
                    "domain": domain,
                    "tokens": int(tokens.sum()),
                    "overlap": float(kept_S[rows].sum() / tokens.sum()),
                    "low": float(low),
                    "high": float(high),
                    "uniform": first.top_k / first.num_experts,
                }
            )
    return Table.of("saturation", found, "Mean share of a token's experts that both traces chose.")


def common(ids_TK: np.ndarray, other_TK: np.ndarray, num_experts: int, names: np.ndarray | None = None) -> np.ndarray:
    """How many experts both chose for each token [T]; `names` renumbers the other's, empty slots count for nothing."""
    other = other_TK.astype(np.int64)
    if names is not None:
        other = np.append(names, num_experts)[np.minimum(other, len(names))]
    same_TKK = (ids_TK[:, :, None] == other[:, None, :]) & (ids_TK < num_experts)[:, :, None]
    return same_TKK.sum((1, 2))


def _check(one: Trace, other: Trace) -> None:
    for trace in (one, other):
        trace.need_tokens("comparing choices")
    if one.layers != other.layers:
        raise DataError("the two models have other MoE layers", expected=one.layers, got=other.layers)
    for index in one.layers:
        k = one.moe_layer(index).top_k, other.moe_layer(index).top_k
        if k[0] != k[1]:
            raise DataError(f"layer {index} chooses another number of experts", expected=k[0], got=k[1])
    mine, theirs = one.tokens(), other.tokens()
    if one.domains != other.domains or any(
        not np.array_equal(mine[name], theirs[name]) for name in ("id", "sequence", "position")
    ):
        raise DataError(
            "the two traces are not of the same tokens",
            where=other.path,
            fix="record both with the same texts, tokens per domain, sequence length and seed",
        )
