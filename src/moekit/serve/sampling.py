"""Choosing the next token."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: logits are divided by it; 0: the likeliest token.
        top_p: only the likeliest tokens that together have this probability.
        seed: of the draws.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def choose(logits_V: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    p_V = (logits_V.float() / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        ordered, where = p_V.sort(descending=True)
        ordered[ordered.cumsum(-1) - ordered > sampling.top_p] = 0.0
        p_V = torch.zeros_like(p_V).scatter_(0, where, ordered)
    return int(torch.multinomial(p_V, 1, generator=generator))
