"""Choosing the next token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: logits are divided by it; 0: the likeliest token.
        top_p: only the likeliest tokens that together have this probability.
        seed: of the draws.
        presence_penalty: taken from the logit of each token that has been written.
        frequency_penalty: taken from a token's logit once for each time that it has been written.
        logit_bias: added to tokens' logits, by token id.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)


def adjusted(logits_V: torch.Tensor, sampling: Sampling, written: Mapping[int, int]) -> torch.Tensor:
    """Logits less penalties and plus biases.

    Args:
        logits_V: of the model.
        sampling: what is asked for.
        written: how often each token has been written so far.
    """
    changes = dict(sampling.logit_bias)
    if sampling.presence_penalty or sampling.frequency_penalty:
        for token, count in written.items():
            penalty = sampling.presence_penalty + count * sampling.frequency_penalty
            changes[token] = changes.get(token, 0.0) - penalty
    if not changes:
        return logits_V
    amounts = torch.tensor(list(changes.values()), dtype=torch.float32)
    return logits_V.float().index_add(0, torch.tensor(list(changes)), amounts)


def choose(logits_V: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token, of logits that are `adjusted` already."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    p_V = (logits_V.float() / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        ordered, where = p_V.sort(descending=True)
        ordered[ordered.cumsum(-1) - ordered > sampling.top_p] = 0.0
        p_V = torch.zeros_like(p_V).scatter_(0, where, ordered)
    return int(torch.multinomial(p_V, 1, generator=generator))


@dataclass(frozen=True)
class Likelihood:
    """How likely a token was, in the model's own distribution (temperature 1, nothing adjusted).

    Attributes:
        token: its id.
        logprob: natural logarithm of its probability.
        top: the likeliest tokens and theirs, likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def likelihood(logits_V: torch.Tensor, token: int, top: int) -> Likelihood:
    """How likely a token was, beside the `top` likeliest ones."""
    logprobs_V = logits_V.float().log_softmax(-1)
    best = logprobs_V.topk(min(top, len(logprobs_V)))
    pairs = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Likelihood(token, float(logprobs_V[token]), pairs)
