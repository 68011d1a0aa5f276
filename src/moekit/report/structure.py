"""The report's views of experts together: co-activation, flow from layer to layer, maps of alike experts.

Symbols: L MoE layers, E experts of a layer, M experts shown of a layer.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, get_args

import numpy as np

from moekit.report.pack import Packed
from moekit.report.source import Source
from moekit.trace import tables
from moekit.trace.pairs import Likeness

MATRIX_CELLS = 40_000  # co-activation: cells of all layers' matrices together
PAIRS, PAIR_COUNT = 12, 10  # strongest pairs named in a layer, each seen at least so often
NODES, FLOW_CELLS = 12, 24_000  # flow: experts drawn apart in a layer, and cells of all layers and domains together
NO_EXPERT = 2**16 - 1
OVER_UNIFORM = 1.5
LEAST_NODES = 4  # drawn apart even where a layer is so even that none is over 1.5 times uniform
NEEDS = {"routing": "coactivation", "logits": "logit_gram", "outputs": "output"}


def coactivation(source: Source) -> dict[str, Any] | None:
    """View 4: lift of pairs of the most used experts, alike ones side by side, and the strongest pairs of all."""
    if not source.has("coactivation") or max(source.top_k) < 2:
        return None
    per_layer = 2 * MATRIX_CELLS / len(source.layers)
    size = min(source.width, int((1 + np.sqrt(1 + 4 * per_layer)) / 2))
    shown = np.full((len(source.layers), size), -1)
    lifts = np.full((len(source.layers), size * (size - 1) // 2), np.nan)
    pairs = []
    for i, index in enumerate(source.layers):
        table = tables.coactivation(source.trace, index)
        lift = np.full((source.experts[i], source.experts[i]), np.nan)
        lift[table["expert"], table["other"]] = table["lift"]
        order = _most_used_alike_together(source, i, size)
        shown[i, : len(order)] = order
        rows, columns = np.triu_indices(size, 1)
        there = columns < len(order)
        lifts[i, there] = lift[order[rows[there]], order[columns[there]]]
        once = table.take(np.flatnonzero((table["expert"] < table["other"]) & (table["count"] >= PAIR_COUNT)))
        best = once.top(PAIRS, "lift")
        pairs.append([(x["expert"], x["other"], x["count"], x["lift"]) for x in best.rows()])
    spread = np.abs(np.log2(lifts[lifts > 0]))
    return {
        "shown": Packed(np.where(shown < 0, NO_EXPERT, shown)),
        "lift": Packed(lifts, 16 if lifts.size < MATRIX_CELLS // 2 else 8, log=True),
        "pairs": pairs,
        "limit": float(np.clip(np.quantile(spread, 0.9), 0.5, 3)) if len(spread) else 1.0,
        "how": (
            "Lift N·N_ij / (N_i·N_j) over all pairs of a token's chosen experts: 1× is what independent choices would "
            f"give; pairs are named that came at least {PAIR_COUNT} times."
        ),
    }


def _most_used_alike_together(source: Source, i: int, size: int) -> np.ndarray:
    """The numbers of the `size` most used experts, in the order of the axis along which their company differs most."""
    used = np.sort(np.argsort(-source.counts[i, : source.experts[i]], kind="stable")[:size])
    alike = tables.similarity_matrix(source.trace, source.layers[i], "routing")
    points, _ = classical_scaling(alike[np.ix_(used, used)])
    return used[np.argsort(points[:, 0], kind="stable")]


def flow(source: Source) -> dict[str, Any] | None:
    """View 5: shares and lifts of pairs of experts of neighbouring MoE layers, little used ones bundled.

    For all domains together and for each: experts drawn apart [1 + N, L, M], and pairs [1 + N, L - 1, M + 1, M + 1],
    the bundle last.
    """
    if len(source.layers) < 2 or not source.has("transition"):
        return None
    domains = (None, *source.domains)
    pairs = len(domains) * (len(source.layers) - 1)
    most = int(np.clip(np.sqrt(FLOW_CELLS / pairs) - 1, LEAST_NODES, NODES))
    nodes = np.full((len(domains), len(source.layers), most), NO_EXPERT)
    share = np.zeros((len(domains), len(source.layers) - 1, most + 1, most + 1))
    for n, domain in enumerate(domains):
        apart = [_apart(source.stats.get("count", index, domain), most) for index in source.layers]
        for i, chosen in enumerate(apart):
            nodes[n, i, : len(chosen)] = chosen
        for i, (before, after) in enumerate(pairwise(apart)):
            table = tables.affinity(source.trace, source.layers[i + 1], domain)
            places = _places(before, source.experts[i], most), _places(after, source.experts[i + 1], most)
            np.add.at(share[n, i], (places[0][table["expert"]], places[1][table["other"]]), table["count"])
    share /= np.maximum(share.sum((2, 3), keepdims=True), 1)
    expected = share.sum(3, keepdims=True) * share.sum(2, keepdims=True)
    lift = np.divide(share, expected, out=np.full(share.shape, np.nan), where=expected > 0)
    how = (
        "All pairs of (an expert chosen in one MoE layer, an expert chosen in the next) of a token; experts below "
        f"{OVER_UNIFORM} times the uniform share are drawn together as ‘others’ ({LEAST_NODES} to {most} a layer are "
        "drawn apart); ribbons darken with their lift over independent choices."
    )
    return {"nodes": Packed(nodes), "share": Packed(share), "lift": Packed(lift, 8, log=True), "how": how}


def _apart(count: np.ndarray, most: int) -> np.ndarray:
    """The experts of a layer that are drawn apart, ascending."""
    often = int((count >= OVER_UNIFORM * count.mean()).sum())
    return np.sort(np.argsort(-count, kind="stable")[: np.clip(often, LEAST_NODES, most)])


def _places(chosen: np.ndarray, experts: int, others: int) -> np.ndarray:
    """Where each expert stands among the nodes [E]; `others` for those that are bundled."""
    out = np.full(experts, others)
    out[chosen] = np.arange(len(chosen))
    return out


def similarity(source: Source) -> dict[str, Any] | None:
    """View 9: experts of a layer in the plane, by every likeness that was measured."""
    kinds = []
    for kind in get_args(Likeness):
        if not source.has(NEEDS[kind]):
            continue
        points = np.full((len(source.layers), source.width, 2), np.nan)
        kept = []
        for i, index in enumerate(source.layers):
            used = np.flatnonzero(source.counts[i, : source.experts[i]] > 0)
            points[i, used], share = classical_scaling(
                tables.similarity_matrix(source.trace, index, kind)[np.ix_(used, used)]
            )
            kept.append(share)
        kinds.append({"name": kind, "points": Packed(points, 8 if points.size > 5000 else 16), "kept": kept})
    if not kinds:
        return None
    how = (
        "Classical scaling of 1 − similarity to two dimensions, layer by layer; the axes have no meaning of their own. "
        "Routing: cosine of co-activation rows; logits: correlation of router logits; outputs: cosine of mean outputs. "
        "Size: share of tokens; colour: the domain that uses the expert most. Never used experts are left out."
    )
    return {"kinds": kinds, "how": how}


def classical_scaling(similarity_EE: np.ndarray) -> tuple[np.ndarray, float]:
    """Points [E, 2] whose distances resemble sqrt(2 - 2 similarity), and the share of the variance that they hold.

    Torgerson (1952): the two largest eigenvectors of the similarities, centred by rows and columns. An axis points to
    where its largest coordinate is.
    """
    centred = similarity_EE - similarity_EE.mean(0) - similarity_EE.mean(1)[:, None] + similarity_EE.mean()
    values, vectors = np.linalg.eigh((centred + centred.T) / 2)
    values = np.maximum(values, 0)
    points = np.zeros((len(values), 2))
    for axis in range(min(2, len(values))):
        vector = vectors[:, -1 - axis]
        points[:, axis] = vector * np.sign(vector[np.abs(vector).argmax()]) * np.sqrt(values[-1 - axis])
    return points, float(values[-2:].sum() / values.sum()) if values.sum() > 0 else 1.0
