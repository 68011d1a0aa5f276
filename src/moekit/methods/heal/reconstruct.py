"""Layer-wise reconstruction: the experts that are left learn to give what all of the source's gave.

    minimise, one layer after the other,   mean over t of  |y'_t - y_t|^2 / (|y_t|^2 + median of |y|^2)

y_t, y'_t  the routed experts' sum (match = block), or the hidden states after the layer (match = hidden), of source and
           student on the same token
inputs     student: y'_t is of the student's own hidden states, whose layers before are healed already, so that what
           they still lack is made up for here; teacher: of the source's

The experts' weights are tuned by Adam, with `routers` the routers' rows too. A layer that is not better on held-out
text stays as it is.

Paper: none for this recipe; layer-wise reconstruction of outputs is the usual healing without a pass through the whole
model. Deviations: the error of a token is divided as above, so that tokens of massive activations do not decide alone.
"""

from __future__ import annotations

from typing import Literal

from moekit.methods._registry import method
from moekit.methods.heal._tuning import Tuning


@method("reconstruct", kind="heal", summary="tunes the experts layer by layer towards what the source's layers gave")
def tuning(
    *,
    routers: bool = False,
    match: Literal["hidden", "block"] = "hidden",
    inputs: Literal["student", "teacher"] = "student",
    steps: int = 100,
    rate: float = 1e-3,
    sequences: int = 8,
    held_out: float = 0.1,
    teacher: str = "",
) -> Tuning:
    """What is tuned and how."""
    return Tuning(("experts", "routers") if routers else ("experts",), match, inputs, steps, rate, sequences, held_out)
