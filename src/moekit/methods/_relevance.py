"""How much more experts are active in prompts of one kind: what fTRI shows and MoTE acts on."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from moekit.errors import DataError
from moekit.stats import Stats


def relevance(
    stats: Stats, layer: int, domain: str, against: str | Iterable[str] | None = None, by: str = "share"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean activity [E] in the prompts of a kind and in the others, and the standard error [E] of their difference.

    Raises:
        DataError: fewer than two kinds of prompts, an unknown one, one on both sides, or a quantity was not measured.
    """
    stats.domain_numbers(domain)
    rest = [x for x in stats.domains if x != domain] if against is None else against
    rest = [rest] if isinstance(rest, str) else list(rest)
    if not rest or domain in rest:
        raise DataError(
            "relevance compares two kinds of prompts",
            expected="at least two domains, each on one side",
            got=f"{domain} against {', '.join(rest) or 'nothing'}",
            fix="measure a second domain (--data NAME=PATH)",
        )
    (rate, error), (others, other_error) = (_mean(stats, layer, x, by) for x in ([domain], rest))
    return rate, others, np.hypot(error, other_error)


def _mean(stats: Stats, layer: int, domains: list[str], by: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean [E] over prompts and its standard error [E]."""
    count = int(stats.sequences[stats.domain_numbers(domains)].sum())
    if not count:
        raise DataError(f"the statistics hold no sequence of {', '.join(domains)}", fix="measure it again, with text")
    mean = stats.get(f"sequence_{by}", layer, domains) / count
    square = stats.get(f"sequence_{by}_sq", layer, domains) / count
    variance = np.maximum(square - mean**2, 0.0)
    return mean, np.sqrt(variance / (count - 1)) if count > 1 else np.full_like(mean, np.nan)
