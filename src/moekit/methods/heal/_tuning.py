"""How parameters are tuned by gradient, whatever is tuned: which, towards what, for how long, and when it was no good.

Symbols: T tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

WARMUP = 0.05  # share of the steps in which the rate rises
CHECKS = 10  # times that the held-out text is looked at, if tuning is not stopped before
PATIENCE = 3  # checks without a gain after which it is
BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Tuning:
    """What an engine is to do.

    Attributes:
        parts: what is tuned: "routers" (their rows and logit biases), "experts" (their weights).
        match: what is made alike: "logits" (the model's next-token distribution), "block" (the routed experts' sum) or
            "hidden" (the hidden states after the layer).
        inputs: whose hidden states a layer is tuned on: the "student"'s, as the layers before it, already healed, give
            them, or the "teacher"'s.
        steps: of Adam, at most; of each layer, or of the whole model.
        rate: learning rate at its highest.
        sequences: of text, in a step.
        held_out: share of the text that is not tuned on and says what was best.
        top: likeliest tokens of the teacher that are compared one by one (with "logits").
        recompute: run layers again for the gradient instead of keeping what they computed (with "logits").
    """

    parts: tuple[Literal["routers", "experts"], ...]
    match: Literal["logits", "block", "hidden"]
    inputs: Literal["student", "teacher"] = "student"
    steps: int = 100
    rate: float = 1e-3
    sequences: int = 8
    held_out: float = 0.1
    top: int = 64
    recompute: bool = False


def rate_at(step: int, tuning: Tuning) -> float:
    """The learning rate of step 0, 1, ...: a short linear rise, then half a cosine down to zero."""
    warmup = max(1, round(WARMUP * tuning.steps))
    return tuning.rate * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / tuning.steps))


def check_every(tuning: Tuning) -> int:
    """Steps between two looks at the held-out text."""
    return max(1, tuning.steps // CHECKS)


def no_longer_better(history: Sequence[float]) -> bool:
    """Whether the last `PATIENCE` of some errors are none of them below the lowest before."""
    return len(history) > PATIENCE and min(history[-PATIENCE:]) >= min(history[:-PATIENCE])


def held_out(count: int, share: float) -> frozenset[int]:
    """Which of `count` things, numbered in order, are held out: evenly spread, at least one, at most all but one."""
    wanted = min(max(1, round(count * share)), count - 1)
    return frozenset(int((i + 0.5) * count / wanted) for i in range(wanted))


def squared_error(found_TD: torch.Tensor, wanted_TD: torch.Tensor, scale: float) -> torch.Tensor:
    """Mean over tokens of |found - wanted|^2 / (|wanted|^2 + scale), float32.

    Args:
        found_TD: of the student.
        wanted_TD: of the teacher.
        scale: the median of |wanted|^2: tokens of massive activations count relative to their size, else they would be
            all that counts; the others nearly alike.
    """
    distance_T = (found_TD.float() - wanted_TD.float()).square().sum(-1)
    return (distance_T / (wanted_TD.float().square().sum(-1) + scale)).mean()
