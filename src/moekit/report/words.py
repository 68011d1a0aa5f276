"""The report's views of words: sampled texts with every token's experts, and the tokens that each expert is for.

Symbols: T tokens shown, L MoE layers, E the most experts that a layer has, K experts shown of a token, M tokens a card.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moekit.report.pack import Packed
from moekit.report.source import Source
from moekit.trace import Trace, tables
from moekit.trace.words import Kind

TEXT_BYTES = 200_000  # ids, weights and margins of the texts shown, before compression
TEXT_TOKENS, TEXTS = 240, 2  # of a domain: tokens in all, from so many sequences
ENOUGH_TOKENS = 100  # of a domain; below, fewer of a token's experts are shown
LEAST_EXPERTS, LEAST_CARD_TOKENS = 4, 2
CARD_TOKENS, CARD_BYTES = 10, 165_000  # of an expert, at most; of all cards with the texts of their tokens
SLOT_BYTES, TEXT_SHARE = 3.0, 0.6  # compressed: a token's place on a card (text number, nPMI); a text, of its bytes
NONE = 2**32 - 1


class Strings:
    """Every text that the page shows, once; views hold numbers."""

    def __init__(self, trace: Trace):
        self.trace = trace
        self.texts: list[str] = []
        self._numbers: dict[int, int] = {}

    def numbers(self, ids: np.ndarray) -> np.ndarray:
        """The number of each token id's text."""
        flat = np.asarray(ids).reshape(-1).tolist()
        new = [x for x in dict.fromkeys(flat) if x not in self._numbers]
        self._numbers |= {x: len(self.texts) + i for i, x in enumerate(new)}
        self.texts += self.trace.text(new)
        return np.array([self._numbers[x] for x in flat], np.int64).reshape(np.shape(ids))


@dataclass(frozen=True, eq=False)
class Excerpts:
    """The texts that are shown.

    Attributes:
        samples: [{name, first, count}], tokens first to first + count - 1 of those shown.
        rows: each token's row in the trace [T].
        experts: how many of a token's experts are shown, the strongest.
    """

    samples: list[dict[str, Any]]
    rows: np.ndarray
    experts: int

    @classmethod
    def of(cls, source: Source, budget_bytes: int = TEXT_BYTES) -> Excerpts | None:
        """The beginnings of each domain's first sequences, as many tokens as fit; None for a trace without tokens."""
        if not source.trace.has_tokens:
            return None
        experts, tokens = text_size(len(source.layers), max(source.top_k), len(source.domains), budget_bytes)
        columns = source.trace.tokens()
        domain, sequence = np.asarray(columns["domain"]), np.asarray(columns["sequence"])
        samples: list[dict[str, Any]] = []
        rows: list[np.ndarray] = []
        at = 0
        for number in np.unique(domain):
            mine = np.flatnonzero(domain == number)
            starts = mine[np.flatnonzero(np.diff(sequence[mine], prepend=sequence[mine[0]] - 1))]
            ends = np.append(starts[1:], mine[-1] + 1)
            texts = min(TEXTS, len(starts)) if tokens >= ENOUGH_TOKENS else 1
            for i in range(texts):
                count = int(min(ends[i] - starts[i], tokens // texts))
                name = source.trace.head["domains"][number] + (f", text {i + 1}" if texts > 1 else "")
                samples.append({"name": name, "first": at, "count": count})
                rows.append(np.arange(starts[i], starts[i] + count))
                at += count
        return cls(samples, np.concatenate(rows), experts)


def text_size(layers: int, top_k: int, domains: int, budget_bytes: int = TEXT_BYTES) -> tuple[int, int]:
    """How many experts of a token are shown, and how many tokens of a domain, so that all fit."""

    def tokens(experts: int) -> int:
        return min(TEXT_TOKENS, budget_bytes // (layers * (2 * experts + 1) * domains))

    experts = top_k
    while experts > LEAST_EXPERTS and tokens(experts) < ENOUGH_TOKENS:
        experts -= 1
    return experts, max(tokens(experts), 8)


def text(source: Source, strings: Strings, excerpts: Excerpts | None) -> dict[str, Any] | None:
    """View 3: sequences of each domain with their tokens' experts, weights and margins by layer."""
    if excerpts is None:
        return None
    trace, rows, shown = source.trace, excerpts.rows, excerpts.experts
    ids = np.full((len(rows), len(source.layers), shown), source.width, np.int64)
    weights = np.zeros(ids.shape)
    margin = np.full(ids.shape[:2], np.nan)
    for i, index in enumerate(source.layers):
        layer = trace.layer(index)
        chosen, weight = (
            np.asarray(layer.ids)[rows].astype(np.int64),
            np.asarray(layer.weights)[rows].astype(np.float64),
        )
        best = np.argsort(-weight, 1, kind="stable")[:, :shown]
        chosen[chosen >= layer.num_experts] = source.width
        ids[:, i, : best.shape[1]] = np.take_along_axis(chosen, best, 1)
        weights[:, i, : best.shape[1]] = np.take_along_axis(weight, best, 1)
        margin[:, i] = np.asarray(layer.margin)[rows]
    part = "" if shown >= max(source.top_k) else f" the {shown} strongest of {max(source.top_k)} are kept here;"
    return {
        "samples": excerpts.samples,
        "token": Packed(strings.numbers(trace.tokens()["id"][rows]), 32),
        "ids": Packed(ids, 8 if source.width < 256 else 16),
        "weights": Packed(weights, 8),
        "margin": Packed(margin, 8),
        "how": (
            "A token has the colour of the expert that got the largest weight in the chosen layer, the stronger the "
            f"more weight (the seven most frequent experts of the text have a colour);{part} margin: score of the last "
            "chosen expert minus that of the first that was not."
        ),
    }


def cards(source: Source, strings: Strings) -> dict[str, Any]:
    """View 8: for each expert the tokens that bring it in, and those that come out where it was."""
    first = source.stats.layers[source.layers[0]]
    kinds: dict[str, Kind] = {"input": "input"} if len(first.vocabulary) else {}
    if source.trace.has_tokens:
        kinds["output"] = "predicted"
    elif len(first.following):
        kinds["output"] = "next"
    found = {name: _top_tokens(source, kind) for name, kind in kinds.items()}
    most = _tokens_that_fit(source.trace, [ids for ids, _ in found.values()])
    how = "Shares of tokens by domain"
    if kinds:
        note = tables.top_tokens(source.trace, source.layers[0]).note
        how += f"; {note[0].lower()}{note[1:-1]} (normalised pointwise mutual information)"
    if source.trace.has_tokens:
        how += "; passages are from the texts above"
    out: dict[str, Any] = {"how": how + "."}
    for name, (ids, npmi) in found.items():
        token = np.full(ids[..., :most].shape, NONE, np.int64)
        there = ids[..., :most] >= 0
        token[there] = strings.numbers(ids[..., :most][there])
        out[name] = {"token": Packed(token, 32), "npmi": Packed(npmi[..., :most], 8)}
    if "output" in kinds:
        predicted = kinds["output"] == "predicted"
        out["output_name"] = "tokens that the model predicts there" if predicted else "tokens that come next"
    return out


def _top_tokens(source: Source, kind: Kind) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [L, E, M], best first, -1 for none, and their nPMI; only what comes more often than by chance."""
    ids = np.full((len(source.layers), source.width, CARD_TOKENS), -1, np.int64)
    npmi = np.full(ids.shape, np.nan)
    for i, index in enumerate(source.layers):
        table = tables.top_tokens(source.trace, index, kind=kind, per_expert=CARD_TOKENS)
        expert = table["expert"]
        rank = np.arange(len(expert)) - np.searchsorted(expert, expert)
        good = table["npmi"] > 0
        ids[i, expert[good], rank[good]] = table["token"][good]
        npmi[i, expert[good], rank[good]] = table["npmi"][good]
    return ids, npmi


def _tokens_that_fit(trace: Trace, kinds: list[np.ndarray]) -> int:
    """How many tokens a card may have so that all cards fit with the texts of their tokens."""
    for most in range(CARD_TOKENS, LEAST_CARD_TOKENS, -1):
        shown = [ids[..., :most] for ids in kinds]
        distinct = np.unique(np.concatenate([x[x >= 0] for x in shown])) if shown else np.zeros(0, np.int64)
        texts = sum(len(x.encode()) + 3 for x in trace.text(distinct))
        if TEXT_SHARE * texts + SLOT_BYTES * sum(x.size for x in shown) <= CARD_BYTES:
            return most
    return LEAST_CARD_TOKENS
