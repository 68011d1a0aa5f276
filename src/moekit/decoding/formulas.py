"""The arithmetic of next-token logits: what several passes, or several models, say together.

Symbols: B rows, V tokens of the vocabulary. What is not plausible gets minus infinity, so that it is never chosen.
"""

from __future__ import annotations

import math

import torch


def plausible(logits_BV: torch.Tensor, alpha: float) -> torch.Tensor:
    """The tokens whose probability is at least `alpha` times that of the likeliest one, bool [B, V].

    Li et al., "Contrastive Decoding", 2023: V = {z >= log(alpha) + max z}. 0: all tokens.
    """
    if alpha == 0:
        return torch.ones_like(logits_BV, dtype=torch.bool)
    return logits_BV >= math.log(alpha) + logits_BV.amax(-1, keepdim=True)


def self_contrast(strong_BV: torch.Tensor, weak_BV: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    """SCMoE: (1 + beta) z_strong - beta z_weak on the plausible tokens.

    Shi et al., "Unchosen Experts Can Contribute Too", 2024, equation 5. Tokens that end the text take part like others:
    the published code sets them to minus infinity, so that texts go on to their longest.

    Args:
        strong_BV: logits of the model as it is.
        weak_BV: logits of its weak pass.
        alpha: least probability, as a share of the likeliest token's (strong pass).
        beta: strength of the contrast.
    """
    scores = (1 + beta) * strong_BV.float() - beta * weak_BV.float()
    return scores.masked_fill(~plausible(strong_BV.float(), alpha), -math.inf)


def guided(
    logits_BV: torch.Tensor, plus_BV: torch.Tensor, minus_BV: torch.Tensor, strength: float, alpha: float = 0.0
) -> torch.Tensor:
    """Contrastive expert guidance: z + strength (z_plus - z_minus).

    Liu et al., "DExperts", 2021, equation 2. The experts may be other models, or the same model steered or behind
    another prompt (a negative prompt for z_minus: Sanchez et al., "Stay on topic with Classifier-Free Guidance", 2023).

    Args:
        logits_BV: of the model that writes.
        plus_BV: of the expert to follow.
        minus_BV: of the anti-expert to leave.
        strength: how much.
        alpha: least probability, as a share of the likeliest token's (of the model that writes); 0: no limit.
    """
    scores = logits_BV.float() + strength * (plus_BV.float() - minus_BV.float())
    return scores.masked_fill(~plausible(logits_BV.float(), alpha), -math.inf)


def emulated(large_base_BV: torch.Tensor, small_tuned_BV: torch.Tensor, small_base_BV: torch.Tensor) -> torch.Tensor:
    """Emulated fine-tuning: log p_large_base + log p_small_tuned - log p_small_base, up to a constant for each row.

    Mitchell et al., "An Emulator for Fine-Tuning Large Language Models using Small Language Models", 2024, equation 4:
    the scale of pretraining from the large model, what tuning changed from the small pair.
    """
    large, tuned, base = (x.float().log_softmax(-1) for x in (large_base_BV, small_tuned_BV, small_base_BV))
    return large + tuned - base
