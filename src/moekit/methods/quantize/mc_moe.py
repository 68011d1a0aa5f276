"""MC-MoE: experts that matter more get more bits, chosen so that the whole costs least.

    eps_ib   = Frobenius norm of the change of the block's output when expert i alone is kept in b bits
             = sqrt( sum over T_i of  g_i(t)^2 |f_i(x_t) - f_i^b(x_t)|^2 )
    cost_ib  = phi_i^alpha  w_i^beta  eps_ib^gamma
    minimise sum of cost_ib over one b for each i, with `bits` bits of a weight on average

phi_i    share of the layer's (token, expert) pairs that are expert i's
w_i      its share of the layer's gate weight
T_i      tokens routed to it, g_i(t) their gate weights, f_i its output and f_i^b that with weights of b bits

The integer program is solved exactly, for each layer by itself (`scope: layer`, as published) or for the whole model
(`scope: model`): what experts of different layers add to the residual stream ends in one sum.

Paper: W. Huang et al., "Mixture Compressor for Mixture-of-Experts LLMs Gains More", arXiv 2410.06270. Deviations: alpha
and beta are 0, not 1 and 1.5: phi and w are in eps already, through the tokens that count and their weights, and
counting them twice loses more on refmoe (docs/methods/mc-moe.md); eps is one norm over all
calibration tokens, not a sum of norms by batch; alpha, beta and gamma are exponents of what the paper says they are
(its code exchanges two); attention stays as it is unless `attention_bits` says otherwise.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from moekit.errors import RecipeError
from moekit.layout import MoELayer
from moekit.methods._registry import method
from moekit.methods.quantize._allocation import allocate
from moekit.plans import Quantize

PAPER = "Mixture Compressor for Mixture-of-Experts LLMs Gains More, arXiv 2410.06270"
POSSIBLE = (1, 2, 3, 4, 5, 6, 7, 8, 16)


@method("mc-moe", kind="quantize", summary="gives experts bits by what they cost, exactly within a budget", paper=PAPER)
def way(
    layer: MoELayer,
    size: int,
    *,
    bits: float = 2.5,
    widths: str = "1,2,3",
    scope: Literal["layer", "model"] = "layer",
    alpha: float = 0.0,
    beta: float = 0.0,
    gamma: float = 2.0,
    published: bool = False,
    rounding: Literal["gptq", "nearest"] = "gptq",
    sequential: bool = True,
    damping: float = 0.01,
    group_size: int = 128,
    format: Literal["compressed-tensors", "moekit"] = "moekit",
    attention_bits: int = 16,
    shared_bits: int = 16,
    dense_bits: int = 16,
    embedding_bits: int = 16,
    head_bits: int = 16,
) -> Quantize:
    """Bits of a layer's experts before errors are known: as large in all, the first experts getting more.

    Raises:
        RecipeError: widths that there are not, a budget below the smallest, the published setting without its widths.
    """
    choices = parsed(widths, bits)
    if published and not {2, 3} <= set(choices):
        raise RecipeError(
            "the published setting has experts of 2 and of 3 bits",
            where="options.widths",
            expected="2 and 3 among them",
            got=widths,
        )
    low, high = max(x for x in choices if x <= bits), min((x for x in choices if x >= bits), default=max(choices))
    more = round(layer.num_experts * (bits - low) / (high - low)) if high > low else 0
    supposed: Any = tuple(high if e < more else low for e in range(layer.num_experts))
    return Quantize(layer=layer.index, bits=supposed, group_size=size, scheme="fitted", format=format)


def parsed(widths: str, bits: float) -> tuple[int, ...]:
    """The widths of an option such as "1,2,3", ascending.

    Raises:
        RecipeError: they are no widths, or none is within the budget.
    """
    try:
        found = tuple(sorted({int(x) for x in str(widths).split(",")}))
    except ValueError:
        found = ()
    if not found or not set(found) <= set(POSSIBLE):
        raise RecipeError(
            "impossible widths",
            where="options.widths",
            expected=f"some of {', '.join(map(str, POSSIBLE))}, with commas between them",
            got=widths,
        )
    if bits < found[0]:
        raise RecipeError(
            "fewer bits than the smallest width",
            where="options.bits",
            expected=f"at least {found[0]}",
            got=bits,
            fix="give more bits, or add a smaller width to widths",
        )
    return found


def costs(
    error_sq_EB: np.ndarray, count_E: np.ndarray, mass_E: np.ndarray, alpha: float, beta: float, gamma: float
) -> np.ndarray:
    """cost_ib [E, B] of a layer.

    Args:
        error_sq_EB: squared eps_ib.
        count_E: tokens routed to each expert.
        mass_E: sums of its gate weights.
        alpha: exponent of frequency.
        beta: exponent of gate weight.
        gamma: exponent of eps.
    """
    phi_E, w_E = (x / (x.sum() or 1.0) for x in (count_E.astype(float), mass_E.astype(float)))
    return (phi_E**alpha * w_E**beta)[:, None] * error_sq_EB ** (gamma / 2)


def choose(
    costs_EB: Sequence[np.ndarray],
    sizes: Sequence[int],
    widths: tuple[int, ...],
    bits: float,
    *,
    scope: str,
    published: bool,
) -> list[tuple[int, ...]]:
    """Bits of each expert of each layer.

    Args:
        costs_EB: by layer.
        sizes: weights of an expert, by layer.
        widths: to choose from.
        bits: that a weight may have on average.
        scope: "layer": in every layer; "model": in all together.
        published: every layer has at least one expert of 3 and one of 2 bits.

    Raises:
        PlanError: no choice is small enough.
    """
    wanted = (3, 2) if published else ()
    if scope == "layer":
        return [
            allocate(x, widths, np.full(len(x), size), bits, [range(len(x))], wanted)
            for x, size in zip(costs_EB, sizes, strict=True)
        ]
    starts = np.cumsum([0, *(len(x) for x in costs_EB)]).tolist()
    layers = [range(a, b) for a, b in itertools.pairwise(starts)]
    weights_E = np.repeat(np.asarray(sizes, float), [len(x) for x in costs_EB])
    found = allocate(np.concatenate(costs_EB), widths, weights_E, bits, layers, wanted)
    return [tuple(found[e] for e in layer) for layer in layers]
