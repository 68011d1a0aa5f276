"""Intervals and nulls: what the numbers of a trace could have been by chance.

Tokens of one sequence are not independent, so whole sequences are resampled (bootstrap) and whole sequences change
their domain (permutation) wherever every token was kept. Statistics alone know no sequences; there tokens must stand in
for them, which makes intervals and nulls too narrow, and the tables' notes say so.

Symbols: S sequences, E experts, N domains, R resamples, P permutations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moekit.trace.store import Trace

LEVEL = 0.95
Z = 1.959963984540054  # the normal quantile of LEVEL
ROWS = 1 << 19  # tokens looked at together
TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)


@dataclass(frozen=True, eq=False)
class Sequences:
    """The sequences of a trace.

    Attributes:
        number: of each token, from 0 [T].
        tokens: of each sequence [S].
        domain: of each sequence [S], as a number in the trace's `domains`.
    """

    number: np.ndarray
    tokens: np.ndarray
    domain: np.ndarray

    @classmethod
    def of(cls, trace: Trace) -> Sequences:
        """Find them by where the sequence number changes."""
        columns = trace.tokens()
        sequence = np.asarray(columns["sequence"])
        starts = np.flatnonzero(np.diff(sequence, prepend=sequence[:1] - 1))
        tokens = np.diff(starts, append=len(sequence))
        domain = np.asarray(columns["domain"])[starts].astype(np.int64)
        return cls(np.repeat(np.arange(len(starts)), tokens), tokens, domain - domain.min() * (len(trace.domains) == 1))

    def counts(self, ids_TK: np.ndarray, num_experts: int) -> np.ndarray:
        """Tokens of each sequence that each expert got, float64 [S, E]; the id E counts for none."""
        width = num_experts + 1
        out = np.zeros(len(self.tokens) * width, np.int64)
        for start in range(0, len(ids_TK), ROWS):
            rows = slice(start, start + ROWS)
            keys = self.number[rows, None] * width + ids_TK[rows]
            out += np.bincount(keys.reshape(-1), minlength=len(out))
        return out.reshape(-1, width)[:, :num_experts].astype(np.float64)


def bootstrap(counts_SE: np.ndarray, tokens_S: np.ndarray, draws_RS: np.ndarray) -> np.ndarray:
    """Ends of the interval of sum(counts) / sum(tokens), by resampled sequences [2, E].

    Args:
        counts_SE: of each sequence.
        tokens_S: of each sequence.
        draws_RS: how often each resample took each sequence.
    """
    samples = (draws_RS @ counts_SE) / (draws_RS @ tokens_S.astype(np.float64))[:, None]
    return np.quantile(samples, TAILS, axis=0)


def draws(sequences: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """How often each of R bootstrap resamples takes each of S sequences [R, S]."""
    return rng.multinomial(sequences, np.full(sequences, 1 / sequences), resamples).astype(np.float64)


def wilson(counts: np.ndarray, tokens: np.ndarray | int) -> np.ndarray:
    """Ends of Wilson's score interval of counts / tokens [2, ...]."""
    share = counts / tokens
    scale = 1 + Z * Z / tokens
    middle = (share + Z * Z / (2 * tokens)) / scale
    half = Z * np.sqrt(share * (1 - share) / tokens + Z * Z / (4 * np.square(tokens))) / scale
    return np.stack([np.maximum(middle - half, 0), np.minimum(middle + half, 1)])


def permuted_sequences(
    counts_SE: np.ndarray, tokens_S: np.ndarray, labels_PS: np.ndarray, domains: int
) -> tuple[np.ndarray, np.ndarray]:
    """Counts [P, N, E] and tokens [P, N] of the domains when each permutation hands their labels to other sequences."""
    members = [(labels_PS == number).astype(np.float64) for number in range(domains)]
    counts = np.stack([member_PS @ counts_SE for member_PS in members], 1)
    return counts, np.stack([member_PS @ tokens_S for member_PS in members], 1)


def permuted_tokens(
    counts_NE: np.ndarray, tokens_N: np.ndarray, permutations: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The same when single tokens change places: each expert's tokens fall into domains at random (hypergeometric)."""
    total_E = counts_NE.sum(0).astype(np.int64)
    rest_E = int(tokens_N.sum()) - total_E
    drawn = [rng.hypergeometric(total_E, rest_E, int(tokens), (permutations, len(total_E))) for tokens in tokens_N]
    counts = np.stack(drawn, 1).astype(np.float64)
    return counts, np.broadcast_to(tokens_N.astype(np.float64), counts.shape[:2])


def p_value(value: np.ndarray, null_P: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Share of the null (first axis, the value itself counted in) that lies as far from `centre` as the value does."""
    further = np.abs(null_P - centre) >= np.abs(value - centre) - 1e-12
    return (1 + further.sum(0)) / (1 + len(null_P))
