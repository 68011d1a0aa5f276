"""What methods share."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

Domain = str | Iterable[str] | None  # the domains whose statistics count; None: all that were measured


def per_token(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Means [E] from sums [E] over the tokens routed to each expert; 0 for an expert never routed to."""
    return np.divide(total, count, out=np.zeros(len(total)), where=count > 0)
