"""How the sparse rest of factored experts shrinks while it is tuned, and which of its entries stay.

    density(t) = d + (1 - d) (1 - t)^3        t from 0 to 1 between the first and the last part of the steps
    I <- b I + (1 - b) |S dL/dS|              importance of the entries of S, b = 0.85

At every step the most important entries of each matrix stay, as many as the density says; the others are set to zero,
and may come back while the density is above d.

A student that equals its teacher has no gradient to go by. Until `BY_SIZE` of the steps are done, importance is size.
"""

from __future__ import annotations

import torch

WHOLE, FINAL = 0.05, 0.25  # shares of the steps: with all of the rest at first, with what stays of it at last
BY_SIZE = 0.1
DECAY = 0.85


def density_at(step: int, steps: int, final: float) -> float:
    """The density after step 0, 1, ... of `steps`."""
    start, end = WHOLE * steps, (1 - FINAL) * steps
    if step + 1 >= end:
        return final
    passed = max(0.0, step + 1 - start) / (end - start)
    return final + (1 - final) * (1 - passed) ** 3


def importance(before: torch.Tensor, rest: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The moving average of |S dL/dS|; all of one shape."""
    return DECAY * before + (1 - DECAY) * (rest * gradient).abs()


def ranked_by(step: int, steps: int, rest: torch.Tensor, average: torch.Tensor) -> torch.Tensor:
    """What decides which entries stay after a step."""
    return rest.abs() if step < BY_SIZE * steps else average
