"""GPTQ: columns are rounded one after the other, and what is not rounded yet makes up for each column's error.

    minimise  |X (W - Q)^T|^2  over what lies on the grid,   H = X^T X,   U^T U = H^-1 with U upper triangular
    for each column i:   q_i = nearest level to w_i,   e = (w_i - q_i) / U_ii,   w_j -= e U_ij for all j > i

The scale of a group is fitted when its first column comes up, to the columns as they are then. Errors are handed on
within a block of columns at once and to all later blocks together (the same numbers, fewer passes over the weight).

Symbols: E weights at once, O output rows, I input columns, G groups of a row, X inputs of the calibration tokens.

Paper: E. Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv
2210.17323. Deviations: a scale is the one of least squared error, not that of the extremes; a column whose inputs were
all zero is rounded to nearest, not set to zero.
"""

from __future__ import annotations

import torch

from moekit.checkpoint.grid import Grid, fitted_scale, nearest, read_back

BLOCK = 128  # columns whose errors are handed on at once


def gptq(
    weight_EOI: torch.Tensor,
    hessian_EII: torch.Tensor,
    grid: Grid,
    group_size: int,
    dtype: torch.dtype,
    damping: float = 0.01,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes and scales of weights for inputs with given second moments; what is said of one weight holds for each.

    Args:
        weight_EOI: the weights.
        hessian_EII: sums of x x^T over the inputs; any factor on one changes nothing.
        grid: of levels.
        group_size: columns that share a scale; must divide I; -1: all of them.
        dtype: of the scales.
        damping: share of the mean of H's diagonal that is added to it.

    Returns:
        (codes uint8 [E, O, I], scales [E, O, G], sound [E]); where H is singular even so, or not finite, `sound` is
        False and the weight is rounded to nearest.
    """
    upper_EII, sound_E = _inverse_roots(hessian_EII, damping)
    count, rows, columns = weight_EOI.shape
    size = columns if group_size < 0 else group_size
    block = size * max(1, BLOCK // size)
    left_EOI = weight_EOI.to(torch.float32, copy=True)
    codes_EOI = torch.empty(count, rows, columns, dtype=torch.uint8, device=left_EOI.device)
    scales_EOG = torch.empty(count, rows, columns // size, dtype=dtype, device=left_EOI.device)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        part_EOB, root_EBB = left_EOI[..., start:stop], upper_EII[:, start:stop, start:stop]
        error_EOB = torch.empty_like(part_EOB)
        for i in range(stop - start):
            if i % size == 0:
                scale_EO = fitted_scale(part_EOB[..., i : i + size], grid, dtype)
                scales_EOG[..., (start + i) // size] = scale_EO
            column_EO1 = part_EOB[..., i : i + 1]
            code_EO1 = nearest(column_EO1, scale_EO, grid)
            error_EO1 = (column_EO1 - read_back(code_EO1, scale_EO[..., None], grid)) / root_EBB[:, i, i, None, None]
            part_EOB[..., i:].baddbmm_(error_EO1, root_EBB[:, i : i + 1, i:], alpha=-1)
            error_EOB[..., i : i + 1] = error_EO1
            codes_EOI[..., start + i] = code_EO1[..., 0].to(torch.uint8)
        left_EOI[..., stop:].baddbmm_(error_EOB, upper_EII[:, start:stop, stop:], alpha=-1)
    return codes_EOI, scales_EOG, sound_E


def _inverse_roots(hessian_EII: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """U of the docstring above, float32, and where there is one; elsewhere the identity, which hands nothing on.

    Tried in float32, then in float64.
    """
    diagonal_EI = hessian_EII.diagonal(dim1=-2, dim2=-1)
    alive_EI = diagonal_EI > 0
    mean_E1 = (diagonal_EI * alive_EI).sum(-1, keepdim=True) / alive_EI.sum(-1, keepdim=True).clamp_min(1)
    ridge_EI = torch.where(alive_EI, damping * mean_E1, mean_E1)
    whole_E = hessian_EII.isfinite().flatten(1).all(-1) & alive_EI.any(-1)
    upper_EII = torch.eye(hessian_EII.shape[-1], device=hessian_EII.device).repeat(len(hessian_EII), 1, 1)
    sound_E = torch.zeros_like(whole_E)
    for dtype in (torch.float32, torch.float64):
        todo = (whole_E & ~sound_E).nonzero()[:, 0]
        if not len(todo):
            break
        lower_EII, failed_E = torch.linalg.cholesky_ex((hessian_EII[todo] + ridge_EI[todo].diag_embed()).to(dtype))
        lower_EII = lower_EII.where((failed_E == 0)[:, None, None], torch.eye(lower_EII.shape[-1]).to(lower_EII))
        root_EII, failed_too_E = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower_EII), upper=True)
        good_E = (failed_E == 0) & (failed_too_E == 0) & root_EII.isfinite().flatten(1).all(-1)
        upper_EII[todo[good_E]] = root_EII[good_E].float()
        sound_E[todo[good_E]] = True
    return upper_EII, sound_E
