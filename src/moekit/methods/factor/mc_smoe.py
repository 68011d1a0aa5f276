"""MC-SMoE: each expert's matrix is a product of low rank and a sparse rest, healed by distillation if asked to.

    W  ~  L R + S        L = U sqrt(D_r)   R = sqrt(D_r) V'        U D V' the singular value decomposition of W
                         S = W - L R, of whose entries a share stays

Without healing (`steps` 0) the largest entries of S stay. With it, L, R and S are tuned together, and the entries that
matter most stay (`_healing`), while

    loss = T^2 KL(p_T || q_T)        T = 2

p_T, q_T  next-token distributions of source and student at temperature T, over the calibration text

Paper: P. Li et al., "Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy", arXiv
2310.01334 (the second half, after merging by m-smoe); the form and the schedule are those of Y. Li et al., "LoSparse",
arXiv 2306.11222.

Deviations: entries of S stay one by one; the published code scores whole rows by their mean, with one threshold for all
matrices, where here every matrix keeps the same share. The loss has no labels and sees the source's `top` likeliest
tokens one by one; there the task's loss is added, and all but the routers is tuned. Until a tenth of the steps is done
size decides, for lack of a gradient.
"""

from __future__ import annotations

from typing import Literal

from moekit.layout import MoELayer
from moekit.methods._registry import method
from moekit.plans import Factor


@method(
    "mc-smoe",
    kind="factor",
    summary="keeps experts' matrices as a product of low rank and a sparse rest",
    paper="Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy, arXiv 2310.01334",
)
def way(
    layer: MoELayer,
    *,
    rank: int = 32,
    density: float = 0.10,
    format: Literal["moekit", "dense"] = "moekit",
    steps: int = 0,
    rate: float = 1e-3,
    sequences: int = 8,
    temperature: float = 2.0,
    top: int = 256,
    held_out: float = 0.1,
    teacher: str = "",
) -> Factor:
    """The same rank and density for all experts of a layer, before any healing."""
    return Factor(layer=layer.index, rank=rank, density=density, format=format)
