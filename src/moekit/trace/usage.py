"""Usage: how much each expert is used, how evenly a layer spreads its load, how sure its router is.

Symbols: E experts, K chosen, N domains, P position buckets.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from moekit.errors import DataError
from moekit.stats import POSITION_BUCKETS, Stats
from moekit.trace.store import Trace
from moekit.trace.table import Table

HELD_MASS = 0.7  # balance: how few experts hold this share of the gate mass


def usage(source: Stats | Trace) -> Table:
    """How often each expert is chosen and with how much weight.

    Returns:
        By layer, expert and domain: count, share (of the domain's tokens), gate_mass, gate_share (of the layer's gate
        mass in the domain).
    """
    stats = _stats(source)
    tables = []
    for index, layer in stats.layers.items():
        count, mass = (np.asarray(layer.arrays[name]) for name in ("count", "gate_mass"))
        domains, experts = count.shape
        columns = {
            "layer": np.full(count.size, index),
            "expert": np.tile(np.arange(experts), domains),
            "domain": np.repeat(stats.domains, experts),
            "count": count.astype(np.int64).reshape(-1),
            "share": (count / np.maximum(stats.tokens[:, None], 1)).reshape(-1),
            "gate_mass": mass.reshape(-1).copy(),
            "gate_share": _shares(mass).reshape(-1),
        }
        tables.append(Table("usage", columns, "Tokens routed to the expert, and the sum of the weights they gave it."))
    return Table.stacked(tables)


def balance(source: Stats | Trace, domain: str | Iterable[str] | None = None) -> Table:
    """How evenly each layer spreads its tokens.

    Returns:
        By layer: experts, entropy (of the shares of choices, over log E: 1 is even), gini (0 is even), max_over_mean,
        never_used (experts), experts_for_70 (the fewest experts that hold 70% of the gate mass).

    Raises:
        DataError: unknown domain.
    """
    stats = _stats(source)
    rows = []
    for index in stats.layers:
        count, mass = stats.get("count", index, domain), stats.get("gate_mass", index, domain)
        rows.append(
            {
                "layer": index,
                "experts": len(count),
                "entropy": evenness(count),
                "gini": gini(count),
                "max_over_mean": float(count.max() / count.mean()) if count.any() else 1.0,
                "never_used": int((count == 0).sum()),
                "experts_for_70": fewest(mass, HELD_MASS),
            }
        )
    return Table.of("balance", rows, "How evenly a layer spreads its choices over its experts.")


def never_used(source: Stats | Trace, domain: str | Iterable[str] | None = None) -> Table:
    """The experts that no token chose: layer, expert.

    Raises:
        DataError: unknown domain.
    """
    stats = _stats(source)
    found = [(i, int(e)) for i in stats.layers for e in np.flatnonzero(stats.get("count", i, domain) == 0)]
    pairs = np.array(found, np.int64).reshape(-1, 2)
    return Table("never used", {"layer": pairs[:, 0], "expert": pairs[:, 1]}, "Experts that no token chose.")


def confidence(source: Stats | Trace, domain: str | Iterable[str] | None = None) -> Table:
    """How sure the router is, by place in the sequence and phase.

    Returns:
        By layer, phase and position bucket (first to last position): tokens, entropy (mean, nats, of the router's
        scores over all experts), margin (mean p_k - p_(k+1)).

    Raises:
        DataError: unknown domain, or the statistics were taken without the group "routing".
    """
    parts = {"all": source} if isinstance(source, Stats) else {x: source.phase_stats(x) for x in source.phases}
    first = np.array([0, *(1 << np.arange(POSITION_BUCKETS - 1))])
    last = np.array([0, *((2 << np.arange(POSITION_BUCKETS - 1)) - 1)])
    tables = []
    for phase, stats in parts.items():
        for index in stats.layers:
            tokens = stats.get("position_tokens", index, domain)
            seen = tokens > 0
            columns = {
                "layer": np.full(int(seen.sum()), index),
                "phase": np.full(int(seen.sum()), phase),
                "first": first[seen],
                "last": last[seen],
                "tokens": tokens[seen].astype(np.int64),
                **{name: stats.get(name, index, domain)[seen] / tokens[seen] for name in ("entropy", "margin")},
            }
            tables.append(Table("router confidence", columns, "Means over the tokens at these places."))
    return Table.stacked(tables)


def evenness(loads: np.ndarray) -> float:
    """Entropy of the shares over log E: 1 when all are equal, 0 when one has all."""
    shares = _shares(loads)
    positive = shares[shares > 0]
    return float(-(positive * np.log(positive)).sum() / np.log(len(loads))) if len(loads) > 1 else 1.0


def gini(loads: np.ndarray) -> float:
    """Gini coefficient: 0 when all are equal, (E - 1) / E when one has all."""
    ordered = np.sort(loads)
    n = len(ordered)
    total = ordered.sum()
    return float(2 * (np.arange(1, n + 1) * ordered).sum() / (n * total) - (n + 1) / n) if total > 0 else 0.0


def fewest(loads: np.ndarray, share: float) -> int:
    """How few of the largest hold at least `share` of the sum."""
    held = np.cumsum(np.sort(loads)[::-1])
    return int(np.searchsorted(held, share * held[-1] * (1 - 1e-12)) + 1) if held[-1] > 0 else 0


def _shares(loads: np.ndarray) -> np.ndarray:
    sums = loads.sum(-1, keepdims=True)
    return np.divide(loads, sums, out=np.zeros(loads.shape), where=sums > 0)


def _stats(source: Stats | Trace) -> Stats:
    stats = source.stats if isinstance(source, Trace) else source
    if not stats.tokens.sum():
        raise DataError("there are no tokens", fix="record or measure some text")
    return stats
