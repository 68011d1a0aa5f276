"""Quantised weights back to numbers: fp8 with block scales and mxfp4, one tensor at a time.

Symbols: O output rows, I input columns, G groups of 32 values, E experts.
"""

from __future__ import annotations

import torch

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def dequantise_fp8(
    weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """fp8 values times the scale of their block.

    Args:
        weight: fp8, [..., O, I].
        scale: fp32, [..., ceil(O / block[0]), ceil(I / block[1])], or one number.
        block: rows and columns that share a scale.
        dtype: of the result.
    """
    values = weight.to(torch.float32)
    if scale.numel() == 1:
        return (values * scale.reshape(()).float()).to(dtype)
    rows, columns = weight.shape[-2:]
    full = scale.float().repeat_interleave(block[0], -2)[..., :rows, :].repeat_interleave(block[1], -1)[..., :columns]
    return values.mul_(full).to(dtype)


def dequantise_mxfp4(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """mxfp4 to numbers: two 4-bit floats a byte (low nibble first), one power of two for 32 of them.

    Args:
        blocks: uint8, [E, O, G, 16].
        scales: uint8, [E, O, G]; exponent with bias 127.
        dtype: of the result.

    Returns:
        [E, I, O] with I = 32 G: the transposed orientation that gpt-oss keeps its experts in.
    """
    table = torch.tensor(FP4_VALUES, dtype=dtype)
    pairs = torch.stack((blocks & 0x0F, blocks >> 4), -1).flatten(-2)
    values = torch.ldexp(table[pairs.int()], (scales.int() - 127).unsqueeze(-1)).to(dtype)
    return values.flatten(-2).transpose(-1, -2).contiguous()
