"""Quantised weights back to numbers: fp8 with block scales, mxfp4 and packed integers, one tensor at a time.

Symbols: O output rows, I input columns, G groups of values that share a scale (32 in mxfp4), E experts.
"""

from __future__ import annotations

import torch

from moekit.errors import CheckpointError

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


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


def pack_integers(values_OI: torch.Tensor, bits: int) -> torch.Tensor:
    """Whole numbers side by side in int32 words, the first one lowest, as compressed-tensors' `pack-quantized` has it.

    Args:
        values_OI: in [-2^(bits-1), 2^(bits-1)).
        bits: of a number; must divide 32.

    Returns:
        int32, [O, ceil(I bits / 32)]; each number is stored with 2^(bits-1) added.
    """
    per_word = 32 // bits
    stored = values_OI.to(torch.int64) + 2 ** (bits - 1)
    stored = torch.nn.functional.pad(stored, (0, -stored.shape[1] % per_word)).unflatten(1, (-1, per_word))
    return (stored << bits * torch.arange(per_word)).sum(-1).to(torch.int32)


def dequantise_packed(
    packed: torch.Tensor, scale_OG: torch.Tensor, shape: tuple[int, ...], bits: int, dtype: torch.dtype, name: str = ""
) -> torch.Tensor:
    """Packed whole numbers times the scale of their group; the product is taken in the dtype of the scales.

    Args:
        packed: int32, from `pack_integers`.
        scale_OG: one for each run of I / G columns.
        shape: (O, I).
        bits: of a number.
        dtype: of the result.
        name: of the weight, for messages.

    Raises:
        CheckpointError: numbers or scales are not as many as the shape says.
    """
    rows, columns = shape if len(shape) == 2 else (0, 0)
    groups = scale_OG.shape[-1] if scale_OG.dim() == 2 else 0
    words = -(-columns * bits // 32)
    if packed.shape != (rows, words) or scale_OG.shape[0] != rows or not groups or columns % groups:
        raise CheckpointError(
            "packed numbers or scales do not fit their weight",
            where=name,
            expected=f"[{rows}, {words}] words and [{rows}, G] scales for a weight of {list(shape)} in {bits} bits",
            got=f"{list(packed.shape)} words, {list(scale_OG.shape)} scales",
            fix="check quantization_config in config.json",
        )
    values = (packed.unsqueeze(-1) >> bits * torch.arange(32 // bits, dtype=torch.int32)) & (2**bits - 1)
    values_OI = values.flatten(1)[:, :columns] - 2 ** (bits - 1)
    numbers = values_OI.unflatten(1, (groups, -1)).to(scale_OG.dtype) * scale_OG.unsqueeze(-1)
    return numbers.flatten(1).to(dtype)
