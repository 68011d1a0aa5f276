"""Which expert gets how many bits: an integer program, solved exactly.

    minimise   sum over experts i and widths b of  c_ib x_ib
    such that  sum of n_i b x_ib <= B,   sum over b of x_ib = 1 for each i,   x_ib 0 or 1
    and, where asked for, in each layer at least one expert of some widths.

c_ib what expert i at b bits costs, n_i its weights, B the bits that there are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import csr_array, vstack

from moekit.errors import PlanError


def allocate(
    costs_EB: np.ndarray,
    widths: Sequence[int],
    weights_E: np.ndarray,
    average: float,
    groups: Sequence[Sequence[int]] = (),
    at_least_one: Sequence[int] = (),
) -> tuple[int, ...]:
    """The width of each expert.

    Args:
        costs_EB: of each expert at each width, not negative.
        widths: B of them, ascending.
        weights_E: numbers that an expert has.
        average: bits of a weight that the experts may have on average.
        groups: of experts (layers) that must have every width of `at_least_one`.
        at_least_one: widths.

    Raises:
        PlanError: no choice is small enough, or no costs are numbers.
    """
    experts, count = costs_EB.shape
    if not np.isfinite(costs_EB).all():
        raise PlanError("the errors of quantised experts are not all numbers", fix="measure in bfloat16 or float32")
    total = float(weights_E.sum())
    share_E = weights_E / total
    # Costs span many orders of magnitude, and the solver's tolerances are absolute: ranks between equal sums stay.
    scale = costs_EB.max() or 1.0
    one_each = csr_array((np.ones(experts * count), (np.repeat(np.arange(experts), count), np.arange(experts * count))))
    size = csr_array(np.kron(share_E, np.asarray(widths, float))[None])
    rows = [one_each, size]
    low, high = [*np.ones(experts), 0.0], [*np.ones(experts), average * (1 + 1e-12)]
    for width in at_least_one:
        for group in groups:
            row = np.zeros((experts, count))
            row[list(group), list(widths).index(width)] = 1
            rows.append(csr_array(row.reshape(1, -1)))
            low.append(1.0)
            high.append(np.inf)
    found = milp(
        1e3 * (costs_EB / scale).reshape(-1),
        integrality=np.ones(experts * count),
        bounds=(0, 1),
        constraints=LinearConstraint(vstack(rows), low, high),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise PlanError(
            "no choice of bits is small enough",
            where="bits",
            expected=f"at least {min(widths)} on average"
            + (f", with one expert of {' and of '.join(map(str, at_least_one))} bits a layer" if at_least_one else ""),
            got=average,
            fix="give more bits, or smaller widths",
        )
    return tuple(int(widths[b]) for b in found.x.reshape(experts, count).argmax(1))
