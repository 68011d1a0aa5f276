"""Words: which tokens an expert is for, by the token that goes in or the one that comes out.

Vocabulary specialisation of expert e for token id x is N_{x,e} / N_x (OLMoE, arXiv 2409.02060). The normalised
pointwise mutual information (Bouma 2009) is

    nPMI(e; x) = log( p(e, x) / (p(e) p(x)) ) / -log p(e, x)

over tokens: p(x) = N_x / N, p(e) = N_e / N, p(e, x) = p(x) p(e | x); 1 means that they only come together, 0 that they
are independent, -1 that they never meet. p(e | x) is smoothed towards independence, (N_{x,e} + a p(e)) / (N_x + a), so
that rare tokens do not win by luck, and tokens seen less than `min_count` times are left out.

Symbols: T tokens, K chosen, E experts, X token ids.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from moekit.errors import DataError
from moekit.stats import Stats, add_up
from moekit.tally import Tally
from moekit.trace.resample import ROWS
from moekit.trace.store import Trace
from moekit.trace.table import Table

MIN_COUNT = 10
KEPT = 100  # token ids that each expert of a trace keeps apart, by each of two measures
SMOOTHING = 1.0
Kind = Literal["input", "next", "predicted"]


def npmi(
    joint: np.ndarray, words: np.ndarray, experts: np.ndarray, tokens: int, smoothing: float = SMOOTHING
) -> np.ndarray:
    """Normalised pointwise mutual information of counts of the same shape (or that broadcast).

    Args:
        joint: tokens with this word that went to this expert.
        words: tokens with this word (above 0).
        experts: tokens that went to this expert (above 0).
        tokens: all tokens.
        smoothing: weight of independence, in tokens.
    """
    of_expert = experts / tokens
    given = (joint + smoothing * of_expert) / (words + smoothing)
    together = given * (words / tokens)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.log(given / of_expert) / -np.log(together)
    value = np.where(together >= 1, 0.0, value)  # always together, and nothing else happens
    return np.where(given > 0, value, -1.0)


def vocabulary(
    source: Stats | Trace,
    layer: int,
    *,
    kind: Kind = "input",
    domain: str | None = None,
    min_count: int = MIN_COUNT,
    smoothing: float = SMOOTHING,
) -> Table:
    """Vocabulary specialisation N_{x,e} / N_x of pairs of a token id and an expert that met in a layer.

    All pairs with statistics of `moekit.measure` or a trace with tokens; from a trace without, those that `thin` kept.

    Args:
        source: a trace or statistics.
        layer: decoder layer.
        kind: the token that goes in; "next", the one that follows in the text; or "predicted", the one that the model
            finds likeliest to follow (needs a trace with tokens).
        domain: one domain; None: all.
        min_count: token ids seen less often are left out.
        smoothing: of nPMI, see the top of this file.

    Returns:
        By token id and expert: token, expert, count, total (N_x), share, overall (the expert's share of all tokens),
        npmi; with a trace also text.

    Raises:
        DataError: unknown layer or domain, or what `kind` needs was not recorded.
    """
    rows, top_k, experts = _rows(source, layer, kind, domain)
    words, position = np.unique(rows[:, 0], return_inverse=True)
    totals = np.bincount(position, rows[:, 2], len(words)) / top_k
    apart = rows[rows[:, 1] <= experts]
    by_expert = np.bincount(apart[:, 1], apart[:, 2], experts + 1)
    tokens = round(by_expert.sum() / top_k)
    keep = np.flatnonzero((rows[:, 1] < experts) & (rows[:, 0] >= 0) & (totals[position] >= min_count))
    token, expert, count = rows[keep].T
    total = totals[position[keep]]
    columns = {
        "token": token,
        "expert": expert,
        "count": count,
        "total": np.rint(total).astype(np.int64),
        "share": count / total,
        "overall": by_expert[expert] / max(tokens, 1),
        "npmi": npmi(count, total, by_expert[expert], max(tokens, 1), smoothing),
    }
    if isinstance(source, Trace):
        columns["text"] = np.array(source.text(token), object)
    return Table("vocabulary specialisation", columns, f"{_KINDS[kind]}, seen at least {min_count} times.")


_KINDS = {
    "input": "Token ids that went into the layer",
    "next": "Token ids that came next in the text",
    "predicted": "Token ids that the model found likeliest to come next",
}


def top_tokens(
    source: Stats | Trace,
    layer: int,
    *,
    by: str = "npmi",
    per_expert: int = 10,
    expert: int | None = None,
    **settings: Any,
) -> Table:
    """The token ids that stand out most for each expert of a layer (or for one), best first.

    Args:
        source: a trace or statistics.
        layer: decoder layer.
        by: the column that decides: "npmi", "share" or "count".
        per_expert: how many.
        expert: one expert; None: all.
        settings: of `vocabulary`.

    Raises:
        DataError: see `vocabulary`.
    """
    table = vocabulary(source, layer, **settings)
    if expert is not None:
        table = table.where(expert=expert)
    chosen = _best(table["expert"], table[by], per_expert)
    return Table("top tokens", table.take(chosen).columns, f"{table.note} Ordered by {by}.")


def vocabulary_specialisation(source: Stats | Trace, *, kind: Kind = "input", min_count: int = MIN_COUNT) -> Table:
    """How far a layer routes by token id: the mean, over token ids, of the largest share that one expert has of it.

    Returns:
        By layer: token_ids (seen often enough), strongest (mean over token ids), strongest_weighted (mean over tokens),
        always (token ids that some expert gets every time), uniform (k/E).

    Raises:
        DataError: see `vocabulary`.
    """
    stats = source.stats if isinstance(source, Trace) else source
    rows = []
    for layer in stats.layout.routed:
        table = vocabulary(source, layer.index, kind=kind, min_count=min_count)
        ids, position = np.unique(table["token"], return_inverse=True)
        strongest, totals = np.zeros(len(ids)), np.zeros(len(ids))
        np.maximum.at(strongest, position, table["share"])
        totals[position] = table["total"]
        rows.append(
            {
                "layer": layer.index,
                "token_ids": len(ids),
                "strongest": float(strongest.mean()) if len(ids) else 0.0,
                "strongest_weighted": float(np.average(strongest, weights=totals)) if len(ids) else 0.0,
                "always": int((strongest >= 1).sum()),
                "uniform": layer.top_k / layer.num_experts,
            }
        )
    return Table.of("vocabulary specialisation by layer", rows, f"{_KINDS[kind]}, seen at least {min_count} times.")


def domain_npmi(source: Stats | Trace, *, min_count: int = MIN_COUNT, smoothing: float = SMOOTHING) -> Table:
    """nPMI of every expert with every domain (the label of a token): layer, expert, domain, count, npmi.

    Experts that are chosen less than `min_count` times in all are left out.
    """
    stats = source.stats if isinstance(source, Trace) else source
    tables = []
    for index, layer in stats.layers.items():
        count_NE = np.asarray(layer.arrays["count"])
        total_E = count_NE.sum(0)
        seen = np.flatnonzero(total_E >= max(min_count, 1))
        joint = count_NE[:, seen]
        values = npmi(joint, stats.tokens[:, None], total_E[seen], int(stats.tokens.sum()), smoothing)
        columns = {
            "layer": np.full(joint.size, index),
            "expert": np.tile(seen, len(joint)),
            "domain": np.repeat(stats.domains, len(seen)),
            "count": joint.astype(np.int64).reshape(-1),
            "npmi": values.reshape(-1),
        }
        tables.append(
            Table("nPMI of expert and domain", columns, "1: only together, 0: independent, -1: never together.")
        )
    return Table.stacked(tables)


def thin(
    rows: np.ndarray, num_experts: int, top_k: int, per_expert: int = KEPT, min_count: int = MIN_COUNT
) -> np.ndarray:
    """Counts by token id made small: only pairs that stand out keep rows of their own, and all sums stay exact.

    Kept are, among token ids seen at least `min_count` times, each one's strongest expert, and for each expert the
    `per_expert` token ids that it has the most of and those of highest nPMI. What is left out is added up twice: under
    the token id (expert E + 1, "the rest"), so that N_x stays known, and under the expert (token id -1), for N_e.

    Args:
        rows: [M, 4], domain, token id, expert (E: an empty slot), count.
        num_experts: E.
        top_k: k.
        per_expert: token ids that each expert keeps, by count and by nPMI.
        min_count: token ids seen less often are left out.
    """
    keys, cell = np.unique(rows[:, 1] << 16 | rows[:, 2], return_inverse=True)
    cells = np.stack([keys >> 16, keys & 0xFFFF], 1)
    counts = np.bincount(cell, rows[:, 3], len(cells))
    words, word = np.unique(cells[:, 0], return_inverse=True)
    totals = np.bincount(word, counts, len(words))[word] / top_k
    experts = np.bincount(cells[:, 1], counts, num_experts + 1)
    fit = np.flatnonzero((cells[:, 1] < num_experts) & (cells[:, 0] >= 0) & (totals >= min_count))
    expert, count = cells[fit, 1], counts[fit]
    score = npmi(count, totals[fit], experts[expert], max(round(experts.sum() / top_k), 1))
    chosen = [_best(expert, count, per_expert), _best(expert, score, per_expert), _best(word[fit], count, 1)]
    kept = np.zeros(len(cells), bool)
    kept[fit[np.concatenate(chosen)]] = True
    known = np.zeros(len(words), bool)
    known[word[kept]] = True
    left = rows[~kept[cell]]
    by_word = left[known[word[cell[~kept[cell]]]]]
    by_word = np.stack([by_word[:, 0], by_word[:, 1], np.full(len(by_word), num_experts + 1), by_word[:, 3]], 1)
    by_expert = np.stack([left[:, 0], np.full(len(left), -1), left[:, 2], left[:, 3]], 1)
    return add_up(np.concatenate([rows[kept[cell]], by_word, by_expert]))


def _best(groups: np.ndarray, scores: np.ndarray, count: int) -> np.ndarray:
    """Places of the `count` highest scores of each group."""
    order = np.lexsort((-scores, groups))
    rank = np.arange(len(order)) - np.searchsorted(groups[order], groups[order])
    return order[rank < count]


def _rows(source: Stats | Trace, layer: int, kind: Kind, domain: str | None) -> tuple[np.ndarray, int, int]:
    """Counts [M, 3] of token id, expert (E: an empty slot, E + 1: the rest) and count; with K and E."""
    if isinstance(source, Trace) and source.has_tokens:
        view = source if domain is None else source.domain(domain)
        traced = view.layer(layer)
        return count_words(traced.ids, _words(view, kind)), traced.top_k, traced.num_experts
    if kind == "predicted":
        raise DataError("what the model predicted was not recorded", fix="record a trace with tokens")
    stats = source.stats if isinstance(source, Trace) else source
    if layer not in stats.layers:
        raise DataError(f"layer {layer} has no experts", expected=f"one of {', '.join(map(str, stats.layers))}")
    found = stats.layout.by_index[layer]
    rows = np.asarray(stats.layers[layer].vocabulary if kind == "input" else stats.layers[layer].following)
    if not len(rows):
        raise DataError("token ids were not counted", fix='measure with the group "vocabulary", on longer sequences')
    rows = add_up(rows[np.isin(rows[:, 0], stats.domain_numbers(domain))] * [0, 1, 1, 1])
    return rows[:, 1:], found.top_k, found.num_experts


def _words(trace: Trace, kind: Kind) -> np.ndarray:
    """The token id that counts for each token; -1 where there is none."""
    tokens = trace.tokens()
    if kind != "next":
        return np.asarray(tokens["id" if kind == "input" else "predicted"])
    following = np.append(tokens["id"][1:], -1)
    last = np.append(np.diff(tokens["sequence"]) != 0, True)
    # The last token of a continuation was followed by the one that the model chose, which was never fed.
    return np.where(last, tokens["predicted"] if len(trace.phases) > 1 else -1, following)


def count_words(ids_TK: np.ndarray, words_T: np.ndarray) -> np.ndarray:
    """Counts [M, 3] of word, expert (E: an empty slot) and count over tokens; words below 0 are left out."""
    tally = Tally(memory_keys=1 << 26)
    for start in range(0, len(words_T), ROWS):
        words = words_T[start : start + ROWS].astype(np.int64)
        real = words >= 0
        tally.add((words[real, None] << 16 | ids_TK[start : start + ROWS][real]).reshape(-1))
    keys, counts = tally.result()
    return np.stack([keys >> 16, keys & 0xFFFF, counts], 1)
