"""Domains: which experts a domain uses more than others do, and how much an expert tells about the domain.

Domain specialisation of expert e for domain D is N_{e,D} / N_D, the share of D's tokens routed to e (OLMoE, Muennighoff
and others 2024, arXiv 2409.02060). A router that chose blindly would give every expert k/E.

Symbols: S sequences, E experts, K chosen, N domains, P permutations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moekit.errors import DataError
from moekit.stats import Stats
from moekit.trace import resample
from moekit.trace.store import Trace
from moekit.trace.table import Table

RESAMPLES, PERMUTATIONS = 1000, 200
BY_SEQUENCE = "Intervals (95%): bootstrap over sequences. Null: sequences swap their domains."
BY_TOKEN = (
    "Intervals (95%): Wilson. Null: tokens swap their domains. Both take tokens for independent, which they are not: "
    "they are too narrow; record every token to resample sequences."
)


@dataclass(frozen=True, eq=False)
class _Layer:
    """Counts of one layer [N, E], the ends of their shares' intervals [N, E], and the null's counts [P, N, E]."""

    index: int
    top_k: int
    counts: np.ndarray
    low: np.ndarray
    high: np.ndarray
    null: np.ndarray
    null_tokens: np.ndarray


def specialisation(
    source: Stats | Trace, *, resamples: int = RESAMPLES, permutations: int = PERMUTATIONS, seed: int = 0
) -> Table:
    """Domain specialisation N_{e,D} / N_D with interval, uniform line k/E and permutation null.

    Args:
        source: a trace (with tokens: sequences are resampled), or statistics.
        resamples: of the bootstrap.
        permutations: of the null.
        seed: of both.

    Returns:
        By layer, expert and domain: count, share, low, high, uniform (k/E), overall (the expert's share in all domains
        together), null_low, null_high (95% of the null's shares), p (two-sided).

    Raises:
        DataError: a domain has no tokens.
    """
    domains, tokens_N = _domains(source)
    tables = []
    for layer in _layers(source, resamples, permutations, seed):
        experts = layer.counts.shape[1]
        share = layer.counts / tokens_N[:, None]
        overall = np.broadcast_to(layer.counts.sum(0) / tokens_N.sum(), share.shape)
        null = layer.null / np.maximum(layer.null_tokens[:, :, None], 1)
        null_low, null_high = np.quantile(null, resample.TAILS, axis=0)
        columns = {
            "layer": np.full(share.size, layer.index),
            "expert": np.tile(np.arange(experts), len(domains)),
            "domain": np.repeat(domains, experts),
            "count": layer.counts.astype(np.int64).reshape(-1),
            "share": share.reshape(-1),
            "low": layer.low.reshape(-1),
            "high": layer.high.reshape(-1),
            "uniform": np.full(share.size, layer.top_k / experts),
            "overall": overall.reshape(-1),
            "null_low": null_low.reshape(-1),
            "null_high": null_high.reshape(-1),
            "p": resample.p_value(share, null, overall).reshape(-1),
        }
        note = "Share of a domain's tokens routed to the expert. " + (BY_SEQUENCE if _kept(source) else BY_TOKEN)
        tables.append(Table("domain specialisation", columns, note))
    return Table.stacked(tables)


def preferred(source: Stats | Trace) -> Table:
    """The expert that each domain prefers most: by domain, the largest of share less overall share.

    Returns:
        By domain: layer, expert, share (of the domain's tokens), overall (of all tokens).

    Raises:
        DataError: a domain has no tokens.
    """
    domains, tokens_N = _domains(source)
    stats = source.stats if isinstance(source, Trace) else source
    rows = []
    for number, domain in enumerate(domains):
        best: tuple[float, ...] = (-np.inf,)
        for index, layer in stats.layers.items():
            count_NE = np.asarray(layer.arrays["count"])
            share, overall = count_NE[number] / tokens_N[number], count_NE.sum(0) / tokens_N.sum()
            expert = int(np.argmax(share - overall))
            best = max(best, (share[expert] - overall[expert], index, expert, share[expert], overall[expert]))
        rows.append({"domain": domain, **dict(zip(("layer", "expert", "share", "overall"), best[1:], strict=True))})
    return Table.of(
        "preferred experts", rows, "The expert whose share of the domain is furthest above its overall share."
    )


def mutual_information(
    source: Stats | Trace, *, balanced: bool = True, permutations: int = PERMUTATIONS, seed: int = 0
) -> Table:
    """What one choice of an expert tells about the domain, by layer.

    I(D; e) = sum p(D, e) log2( p(D, e) / (p(D) p(e)) ), over the (token, slot) pairs; normalised by H(D): 1 means that
    the expert gives the domain away, 0 that it says nothing.

    Args:
        source: a trace (with tokens: sequences are permuted), or statistics.
        balanced: every domain weighs the same, whatever its number of tokens; False: every token does.
        permutations: of the null.
        seed: of the null.

    Returns:
        By layer: bits, normalised, null_mean, null_high (95th percentile of the null, in bits), p (one-sided).

    Raises:
        DataError: a domain has no tokens.
    """
    _domains(source)
    rows = []
    for layer in _layers(source, 0, permutations, seed):
        bits = float(information(layer.counts, balanced))
        null = information(layer.null, balanced)
        weights = np.ones(len(layer.counts)) if balanced else layer.counts.sum(1)
        limit = _entropy(weights / weights.sum())
        rows.append(
            {
                "layer": layer.index,
                "bits": bits,
                "normalised": bits / limit if limit > 0 else 0.0,
                "null_mean": float(null.mean()),
                "null_high": float(np.quantile(null, resample.LEVEL)),
                "p": (1 + int((null >= bits - 1e-12).sum())) / (1 + len(null)),
            }
        )
    how = "sequences" if _kept(source) else "tokens (taken for independent, so the null is too low)"
    note = (
        f"Mutual information of domain and chosen expert; normalised by the domains' entropy. Null: {how} swap domains."
    )
    return Table.of("mutual information of domain and expert", rows, note)


def information(counts: np.ndarray, balanced: bool) -> np.ndarray:
    """Mutual information, in bits, of the two last axes of counts [..., N, E]."""
    sums = counts.sum((-1,) if balanced else (-2, -1), keepdims=True)
    joint = counts / np.maximum(sums, 1) / (counts.shape[-2] if balanced else 1)
    expected = joint.sum(-1, keepdims=True) * joint.sum(-2, keepdims=True)
    ratio = np.divide(joint, expected, out=np.ones_like(joint), where=joint > 0)
    return (joint * np.log2(ratio)).sum((-2, -1))


def _entropy(shares: np.ndarray) -> float:
    positive = shares[shares > 0]
    return float(-(positive * np.log2(positive)).sum())


def _kept(source: Stats | Trace) -> bool:
    return isinstance(source, Trace) and source.has_tokens


def _domains(source: Stats | Trace) -> tuple[tuple[str, ...], np.ndarray]:
    stats = source.stats if isinstance(source, Trace) else source
    for name, count in zip(stats.domains, stats.tokens, strict=True):
        if not count:
            raise DataError(f"the domain {name!r} has no tokens", fix="leave it out, or give it text")
    return stats.domains, stats.tokens


def _layers(source: Stats | Trace, resamples: int, permutations: int, seed: int) -> Iterator[_Layer]:
    if isinstance(source, Trace) and source.has_tokens:
        yield from _by_sequence(source, resamples, permutations, seed)
    else:
        yield from _by_token(source.stats if isinstance(source, Trace) else source, permutations, seed)


def _by_sequence(trace: Trace, resamples: int, permutations: int, seed: int) -> Iterator[_Layer]:
    rng = np.random.default_rng(seed)
    sequences = resample.Sequences.of(trace)
    labels_PS = np.stack([rng.permutation(sequences.domain) for _ in range(permutations)])
    members = [np.flatnonzero(sequences.domain == number) for number in range(len(trace.domains))]
    draws = [resample.draws(len(rows), resamples, rng) for rows in members]
    for index in trace.layers:
        layer = trace.layer(index)
        counts_SE = sequences.counts(layer.ids, layer.num_experts)
        ends = [
            resample.bootstrap(counts_SE[rows], sequences.tokens[rows], drawn) if resamples else np.zeros((2, 1))
            for rows, drawn in zip(members, draws, strict=True)
        ]
        yield _Layer(
            index,
            layer.top_k,
            np.stack([counts_SE[rows].sum(0) for rows in members]),
            np.stack([low for low, _ in ends]),
            np.stack([high for _, high in ends]),
            *resample.permuted_sequences(counts_SE, sequences.tokens, labels_PS, len(members)),
        )


def _by_token(stats: Stats, permutations: int, seed: int) -> Iterator[_Layer]:
    rng = np.random.default_rng(seed)
    for layer in stats.layout.routed:
        counts_NE = np.asarray(stats.layers[layer.index].arrays["count"])
        low, high = resample.wilson(counts_NE, stats.tokens[:, None])
        null = resample.permuted_tokens(counts_NE, stats.tokens, permutations, rng)
        yield _Layer(layer.index, layer.top_k, counts_NE, low, high, *null)
