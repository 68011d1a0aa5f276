"""Bootstrap confidence intervals over sequences, the unit that may be taken as independent.

Tokens of one sequence are not independent; resampling tokens would give intervals that are far too narrow.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
BLOCK = 1 << 20  # sequences drawn at once
LEVEL = 0.95


class Interval(NamedTuple):
    """An estimate with its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def ratio_interval(
    numerators: np.ndarray, denominators: np.ndarray, *, exponential: bool = False, seed: int = 0
) -> Interval:
    """sum(numerators) / sum(denominators) with a percentile bootstrap over sequences.

    Args:
        numerators: by sequence, such as summed negative log-likelihood.
        denominators: by sequence, such as number of predicted tokens.
        exponential: report exp of the ratio (perplexity).
        seed: of the resampling.

    Returns:
        The estimate; its interval is the estimate itself where there is one sequence only.
    """
    rng, count = np.random.default_rng(seed), len(numerators)
    block = max(1, BLOCK // count)
    samples = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, block):
        draws = rng.integers(0, count, (len(samples[start : start + block]), count))
        samples[start : start + block] = numerators[draws].sum(1) / denominators[draws].sum(1)
    tail = (1 - LEVEL) / 2
    values = np.array([numerators.sum() / denominators.sum(), *np.quantile(samples, (tail, 1 - tail))])
    return Interval(*(np.exp(values) if exponential else values).tolist())
