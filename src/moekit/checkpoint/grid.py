"""Numbers as codes times scales: the grids of levels that quantised weights lie on, and how a scale is chosen.

A code of b bits is a whole number c in [0, 2^b). It stands for the level

    whole    c - 2^(b-1)              ..., -1, 0, 1, ...      what compressed-tensors reads; needs two bits
    half     c - 2^(b-1) + 1/2        ..., -1/2, 1/2, ...     as many levels on either side: one bit is a sign

and a weight is read back as level times the scale of its group. At two bits `whole` has three levels to speak of (a
scale that clips nothing never uses the fourth), `half` has four.

Symbols: O output rows, I input columns, G groups of a row, N numbers of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SHRINK = tuple(1.0 - 0.06 * i for i in range(12))  # scales tried, as shares of the one that clips nothing


@dataclass(frozen=True)
class Grid:
    """The levels of a code.

    Attributes:
        bits: of a code, 1 to 8.
        half: levels lie at odd multiples of one half.
    """

    bits: int
    half: bool

    @property
    def offset(self) -> float:
        """What is added to a level to make it a code."""
        return 2 ** (self.bits - 1) - (0.5 if self.half else 0.0)

    @property
    def reach(self) -> float:
        """The largest level that has one of the same size on the other side."""
        return 2 ** (self.bits - 1) - (0.5 if self.half else 1.0)

    def codes(self, ratio: torch.Tensor) -> torch.Tensor:
        """The code of the level nearest to each number; float32, whole."""
        return (ratio + self.offset).round_().clamp_(0, 2**self.bits - 1)

    def levels(self, codes: torch.Tensor) -> torch.Tensor:
        """The level of each code, float32."""
        return codes.float() - self.offset


def widest_scale(groups: torch.Tensor, grid: Grid, dtype: torch.dtype) -> torch.Tensor:
    """The smallest scale [...] of groups [..., N] that clips nothing."""
    return usable(groups.float().abs().amax(-1) / grid.reach, grid, dtype)


def usable(scale: torch.Tensor, grid: Grid, dtype: torch.dtype) -> torch.Tensor:
    """A scale in the dtype that it is kept in: finite, and never such that a group of zeros is read back otherwise.

    Where a scale is zero, `whole` gets 1 (its level zero is zero), `half` keeps 0 (it has no level zero).
    """
    scale = scale.clamp(max=torch.finfo(dtype).max).to(dtype)
    return scale if grid.half else torch.where(scale > 0, scale, torch.ones_like(scale))


def nearest(groups: torch.Tensor, scale: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Codes [..., N] of groups [..., N] for scales [...]; float32, whole."""
    scale = scale.float().unsqueeze(-1)
    return grid.codes(groups.float() / torch.where(scale == 0, torch.ones_like(scale), scale))


def fitted_scale(
    groups: torch.Tensor, grid: Grid, dtype: torch.dtype, importance: torch.Tensor | None = None
) -> torch.Tensor:
    """The scale [...] of groups [..., N] whose nearest levels have (nearly) the least squared error.

    For each of `SHRINK`, weights are assigned to levels l, the scale that is best for them is the regression
    sum(h w l) / sum(h l^2), and the one with the smallest sum(h (w - s l)^2) wins.

    Args:
        groups: weights.
        grid: of levels.
        dtype: that the scale is kept in.
        importance: h, broadcasts against `groups`; None: all alike.
    """
    groups = groups.float()
    weight = torch.ones((), device=groups.device) if importance is None else importance.float()
    start = groups.abs().amax(-1) / grid.reach
    best = usable(start, grid, dtype)
    least = _error(groups, best, grid, weight)
    for share in SHRINK:
        levels = grid.levels(nearest(groups, share * start, grid))
        power = (weight * levels.square()).sum(-1)
        regressed = (weight * groups * levels).sum(-1) / torch.where(power == 0, torch.ones_like(power), power)
        scale = usable(regressed.clamp_min(0), grid, dtype)
        error = _error(groups, scale, grid, weight)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


def _error(groups: torch.Tensor, scale: torch.Tensor, grid: Grid, weight: torch.Tensor) -> torch.Tensor:
    back = grid.levels(nearest(groups, scale, grid)) * scale.float().unsqueeze(-1)
    return (weight * (groups - back).square()).sum(-1)


def split(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """A weight [..., O, I] as its groups [..., O, G, N]; -1: a row is one group."""
    return weight.unflatten(-1, (-1, group_size) if group_size > 0 else (1, -1))


def quantised(
    weight: torch.Tensor, grid: Grid, group_size: int, dtype: torch.dtype, fitted: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight rounded to nearest.

    Args:
        weight: [..., O, I]; I must be a multiple of the group size.
        grid: of levels.
        group_size: columns that share a scale; -1: all of a row.
        dtype: of the scales.
        fitted: choose scales by `fitted_scale` instead of clipping nothing.

    Returns:
        (codes uint8 [..., O, I], scales [..., O, G]); both finite where the weight is.
    """
    groups = split(weight, group_size)
    scale = (fitted_scale if fitted else widest_scale)(groups, grid, dtype)
    return nearest(groups, scale, grid).to(torch.uint8).flatten(-2), scale


def read_back(codes: torch.Tensor, scale: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The weight that codes [..., O, I] and scales [..., O, G] stand for.

    Returns:
        [..., O, I]: for `whole` the product taken in the dtype of the scales, as compressed-tensors does; for `half` in
        float32.
    """
    levels = split(grid.levels(codes), codes.shape[-1] // scale.shape[-1])
    return (levels * scale.float().unsqueeze(-1)).flatten(-2).to(torch.float32 if grid.half else scale.dtype)
