"""Distillation: experts and routers learn together; the model's next-token distribution becomes the source's again.

    minimise   mean over t of  KL(p_t || q_t),   the KL of `router-distill`

p_t, q_t  next-token distributions of source and student; all tokens but the source's n likeliest count as one

The choice of experts is not differentiable; see `router-distill`. All experts of all layers are tuned at once, by Adam
in float32: memory of 16 bytes for each of their parameters, and the activations of the whole model. Where that is too
much, `reconstruct` goes layer by layer. Best after it: the layers then give nearly what they gave, and what is left of
the error is weighed by what it does to the model's answer.

Paper: none for this recipe; KL distillation from the source is the usual healing of pruned models. Deviations: none.
"""

from __future__ import annotations

from moekit.methods._registry import method
from moekit.methods.heal._tuning import Tuning


@method(
    "distill", kind="heal", summary="trains experts and routers together towards the source's next-token distribution"
)
def tuning(
    *,
    routers: bool = True,
    steps: int = 200,
    rate: float = 1e-3,
    sequences: int = 8,
    held_out: float = 0.1,
    top: int = 64,
    recompute: bool = False,
    teacher: str = "",
) -> Tuning:
    """What is tuned and how."""
    return Tuning(
        ("experts", "routers") if routers else ("experts",),
        "logits",
        steps=steps,
        rate=rate,
        sequences=sequences,
        held_out=held_out,
        top=top,
        recompute=recompute,
    )
