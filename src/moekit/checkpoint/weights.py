"""Quantised weights back to numbers: fp8 with block scales and mxfp4, one tensor at a time (packed codes: `packing`);
and whether weights are numbers at all.

Symbols: O output rows, I input columns, G groups of values that share a scale (32 in mxfp4), E experts.
"""

from __future__ import annotations

import torch

from moekit.errors import CheckpointError

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no entry is NaN or infinity: the smallest and the largest tell, fifty times as fast as `isfinite`."""
    return not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())


def dequantise_fp8(
    weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], dtype: torch.dtype, name: str = ""
) -> torch.Tensor:
    """fp8 values times the scale of their block.

    Args:
        weight: fp8, [..., O, I].
        scale: [..., ceil(O / block[0]), ceil(I / block[1])], or one number; fp32, or powers of two as float8_e8m0fnu
            or its bytes.
        block: rows and columns that share a scale.
        dtype: of the result.
        name: of the weight, for messages.

    Raises:
        CheckpointError: the scales are not as many as the blocks.
    """
    values = weight.to(torch.float32)
    scale = (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).to(torch.float32)
    if scale.numel() == 1:
        return (values * scale.reshape(())).to(dtype)
    rows, columns = weight.shape[-2:]
    expected = (*weight.shape[:-2], -(-rows // block[0]), -(-columns // block[1]))
    if tuple(scale.shape) != expected:
        raise CheckpointError(
            "fp8 scales do not fit their weight",
            where=name,
            expected=f"{list(expected)} for blocks of {block[0]} x {block[1]}",
            got=list(scale.shape),
            fix="check quantization_config.weight_block_size in config.json",
        )
    full = scale.repeat_interleave(block[0], -2)[..., :rows, :].repeat_interleave(block[1], -1)[..., :columns]
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
    values = torch.tensor(FP4_VALUES)
    pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), -1)  # both values of each byte
    experts, rows, groups, _ = blocks.shape
    out = torch.empty(experts, 32 * groups, rows, dtype=dtype)
    for expert in range(experts):  # one at a time: numbers take eight times the room of the bytes
        numbers_OGV = pairs[blocks[expert].int()].flatten(-2)
        numbers_OGV = torch.ldexp(numbers_OGV, scales[expert].int().unsqueeze(-1) - 127)
        out[expert] = numbers_OGV.flatten(-2).T.to(dtype)
    return out
