"""Router distillation: only the routers learn; the model's next-token distribution becomes the source's again.

    scope = model   minimise   mean over t of  KL(p_t || q_t)
                    KL = sum over the n likeliest v of  p_v log(p_v / q_v)  +  p_rest log(p_rest / q_rest)
    scope = layer   minimise, one layer after the other,
                    mean over t of  |h'_t - h_t|^2 / (|h_t|^2 + median of |h|^2)

p_t, q_t  next-token distributions of source and student; p_rest = 1 - sum of the n p_v
h_t, h'_t hidden states after the layer (match = hidden), or the routed experts' sum (match = block), of source, student

Everything but the routers' rows and logit biases is frozen. The weights of the chosen experts are differentiable
(score and normalisation), their choice is not: a gradient moves the weights of experts that a token has, and the choice
changes when a logit passes another. A correction bias changes the choice only: it has no gradient and stays.

Paper: none for this recipe; KL distillation from the source is the usual healing of pruned models. Deviations: none.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from moekit.methods._registry import method
from moekit.methods.heal._tuning import Tuning


class Top(NamedTuple):
    """Distributions by their likeliest tokens. Symbols: T positions, N likeliest tokens, V vocabulary.

    Attributes:
        ids: token ids, int64 [T, N].
        logs: their log-probabilities, float32 [T, N].
        rest: log-probability of all others together, float32 [T]; minus infinity where there are none.
    """

    ids: torch.Tensor
    logs: torch.Tensor
    rest: torch.Tensor


def top(logits_TV: torch.Tensor, count: int) -> Top:
    """The `count` likeliest tokens, or all if there are no more."""
    logs_TV = logits_TV.float().log_softmax(-1)
    logs_TN, ids_TN = logs_TV.topk(min(count, logs_TV.shape[-1]), -1)
    return Top(ids_TN, logs_TN, logs_TV.scatter(-1, ids_TN, -torch.inf).logsumexp(-1))


def divergence(logits_TV: torch.Tensor, teacher: Top) -> torch.Tensor:
    """KL(teacher || student) in nats [T], all but the teacher's likeliest tokens taken as one."""
    logs_TV = logits_TV.float().log_softmax(-1)
    q_TN, p_TN = logs_TV.gather(-1, teacher.ids), teacher.logs
    listed_T = (p_TN.exp() * (p_TN - q_TN)).sum(-1)
    if p_TN.shape[-1] == logs_TV.shape[-1]:
        return listed_T
    rest_T = logs_TV.scatter(-1, teacher.ids, -torch.inf).logsumexp(-1)
    some_T = teacher.rest.isfinite()
    p_T = teacher.rest.masked_fill(~some_T, 0.0)
    return listed_T + torch.where(some_T, p_T.exp() * (p_T - rest_T), 0.0)


@method("router-distill", kind="heal", summary="trains the routers alone towards the source's next-token distribution")
def tuning(
    *,
    scope: Literal["model", "layer"] = "model",
    match: Literal["hidden", "block"] = "hidden",
    inputs: Literal["student", "teacher"] = "student",
    steps: int = 200,
    rate: float = 1e-3,
    sequences: int = 8,
    held_out: float = 0.1,
    top: int = 64,
    recompute: bool = False,
    teacher: str = "",
) -> Tuning:
    """What is tuned and how; `match` and `inputs` are of scope "layer", `top` and `recompute` of "model"."""
    return Tuning(
        ("routers",), "logits" if scope == "model" else match, inputs, steps, rate, sequences, held_out, top, recompute
    )
