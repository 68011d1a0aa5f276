"""Pairs of experts: chosen together, chosen one layer after the other, or alike.

Co-activation i -> j is N_ij / N_i, over ALL pairs of the k experts that a token chose. Inter-layer affinity is
P(E_{j,l+1} | E_{i,l}) = N(i chosen in layer l, j chosen in the next MoE layer) / N_i, over all pairs again.
Lift divides by what independent choices would give: N N_ij / (N_i N_j); 1 means independent.

Symbols: E experts of a layer, F of the MoE layer before it, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Literal

import numpy as np

from moekit.errors import DataError
from moekit.stats import Stats
from moekit.trace.store import Trace
from moekit.trace.table import Table

Domain = str | Iterable[str] | None
Likeness = Literal["routing", "logits", "outputs"]


def coactivation(source: Stats | Trace, layer: int, domain: Domain = None) -> Table:
    """Every ordered pair of different experts of a layer: expert, other, count (N_ij), given (N_ij / N_i), lift.

    `chance` is the lift that k blind choices of different experts have, E (k - 1) / (k (E - 1)), a little below 1.

    Raises:
        DataError: unknown layer or domain, or "routing" was not measured.
    """
    stats = _stats(source, layer)
    pairs = stats.get("coactivation", layer, domain)
    experts = len(pairs)
    i, j = np.nonzero(~np.eye(experts, dtype=bool))
    top_k = stats.layout.by_index[layer].top_k
    columns = {
        "layer": np.full(len(i), layer),
        "expert": i,
        "other": j,
        "count": pairs[i, j].astype(np.int64),
        "given": given_matrix(pairs)[i, j],
        "lift": lift_matrix(pairs, pairs.diagonal(), pairs.diagonal(), stats.token_count(domain))[i, j],
        "chance": np.full(len(i), experts * (top_k - 1) / (top_k * max(experts - 1, 1))),
    }
    return Table(
        "co-activation", columns, "Tokens that chose both experts; lift 1 means as often as by independent choice."
    )


def affinity(source: Stats | Trace, layer: int, domain: Domain = None) -> Table:
    """Every pair of an expert of the MoE layer before `layer` and one of `layer`.

    Returns:
        from_layer, expert, layer, other, count, probability P(other | expert), lift.

    Raises:
        DataError: unknown layer or domain, `layer` is the first MoE layer, or "routing" was not measured.
    """
    stats = _stats(source, layer)
    before = previous_layer(stats, layer)
    pairs = stats.get("transition", layer, domain)
    came, chosen = stats.get("count", before, domain), stats.get("count", layer, domain)
    i, j = (x.reshape(-1) for x in np.indices(pairs.shape))
    columns = {
        "from_layer": np.full(len(i), before),
        "expert": i,
        "layer": np.full(len(i), layer),
        "other": j,
        "count": pairs[i, j].astype(np.int64),
        "probability": affinity_matrix(pairs, came)[i, j],
        "lift": lift_matrix(pairs, came, chosen, stats.token_count(domain))[i, j],
    }
    return Table("inter-layer affinity", columns, "How often an expert follows another one layer later.")


def affinity_matrices(source: Stats | Trace, domain: Domain = None) -> dict[int, np.ndarray]:
    """P(E_{j,l} | E_{i,l-1}) [F, E] by layer l; the first MoE layer has none.

    Raises:
        DataError: unknown domain, or "routing" was not measured.
    """
    stats = source.stats if isinstance(source, Trace) else source
    indices = list(stats.layers)
    return {
        layer: affinity_matrix(stats.get("transition", layer, domain), stats.get("count", before, domain))
        for before, layer in pairwise(indices)
    }


def similarity(source: Stats | Trace, layer: int, kind: Likeness = "routing", domain: Domain = None) -> Table:
    """How alike two experts of a layer are: expert, other (the larger number), cosine.

    Args:
        source: a trace or statistics.
        layer: decoder layer.
        kind: "routing", cosine of the rows of co-activation (chosen along with the same experts); "logits", correlation
            of their router logits (wanted by the same tokens); "outputs", cosine of their mean outputs (write the same
            direction; needs the group "outputs").
        domain: one or more domains; None: all.

    Raises:
        DataError: unknown layer, domain or kind, or what `kind` needs was not measured.
    """
    matrix = similarity_matrix(source, layer, kind, domain)
    i, j = np.triu_indices(len(matrix), 1)
    columns = {"layer": np.full(len(i), layer), "expert": i, "other": j, "cosine": matrix[i, j]}
    return Table("expert similarity", columns, _LIKENESS[kind])


_LIKENESS = {
    "routing": "Cosine of the rows of co-activation, the pair itself left out: chosen along with the same experts.",
    "logits": "Correlation of the router's logits: wanted by the same tokens.",
    "outputs": "Cosine of the mean outputs: they write the same direction.",
}


def similarity_matrix(
    source: Stats | Trace, layer: int, kind: Likeness = "routing", domain: Domain = None
) -> np.ndarray:
    """The same as a matrix [E, E], 1 on the diagonal, 0 for experts that were never seen."""
    stats = _stats(source, layer)
    if kind == "routing":
        matrix = _company(stats.get("coactivation", layer, domain))
    elif kind == "logits":
        tokens = stats.token_count(domain)
        mean = stats.get("logit", layer, domain) / tokens
        covariance = stats.get("logit_gram", layer, domain) / tokens - np.outer(mean, mean)
        matrix = _normalised(covariance, covariance.diagonal())
    elif kind == "outputs":
        outputs = stats.get("output", layer, domain).astype(np.float64)
        matrix = _normalised(outputs @ outputs.T, np.square(outputs).sum(1))
    else:
        raise DataError(f"no similarity of kind {kind!r}", expected=", ".join(_LIKENESS))
    np.fill_diagonal(matrix, 1.0)
    return matrix


def given_matrix(pairs: np.ndarray) -> np.ndarray:
    """N_ij / N_i [E, E] from co-activation counts, whose diagonal is N_i; 0 for experts that were never chosen."""
    chosen = pairs.diagonal()[:, None]
    return np.divide(pairs, chosen, out=np.zeros(pairs.shape), where=chosen > 0)


def affinity_matrix(pairs: np.ndarray, came: np.ndarray) -> np.ndarray:
    """P(j | i) [F, E] from transition counts and the counts of the layer before; rows sum to k (0 if never chosen)."""
    return np.divide(pairs, came[:, None], out=np.zeros(pairs.shape), where=came[:, None] > 0)


def lift_matrix(pairs: np.ndarray, rows: np.ndarray, columns: np.ndarray, tokens: int) -> np.ndarray:
    """N N_ij / (N_i N_j); 1 where one of the two was never chosen."""
    expected = np.outer(rows, columns) / max(tokens, 1)
    return np.divide(pairs, expected, out=np.ones(pairs.shape), where=expected > 0)


def previous_layer(stats: Stats, layer: int) -> int:
    """The MoE layer before `layer`.

    Raises:
        DataError: there is none.
    """
    before = [index for index in stats.layers if index < layer]
    if not before:
        raise DataError(f"layer {layer} is the first MoE layer: nothing comes before it", fix="name a later layer")
    return max(before)


def _company(pairs: np.ndarray) -> np.ndarray:
    """Cosine of rows i and j of co-activation, columns i and j left out of both (their own counts say nothing)."""
    own = pairs * (1 - np.eye(len(pairs)))
    dots = (
        own @ own
    )  # own is symmetric; columns i and j contribute nothing, for own_ii = 0 in row i and own_jj in row j
    squares = np.square(own).sum(1)
    left = squares[:, None] - np.square(own)  # |row i|^2 without column j
    scale = np.sqrt(np.maximum(left * left.T, 0))
    return np.divide(dots, scale, out=np.zeros(pairs.shape), where=scale > 0)


def _normalised(products: np.ndarray, squares: np.ndarray) -> np.ndarray:
    scale = np.sqrt(np.maximum(np.outer(squares, squares), 0))
    return np.divide(products, scale, out=np.zeros(products.shape), where=scale > 0).clip(-1, 1)


def _stats(source: Stats | Trace, layer: int) -> Stats:
    stats = source.stats if isinstance(source, Trace) else source
    if layer not in stats.layers:
        raise DataError(f"layer {layer} has no experts", expected=f"one of {', '.join(map(str, stats.layers))}")
    return stats
