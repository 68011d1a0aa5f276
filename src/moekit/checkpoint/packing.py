"""Codes of 1 to 8 bits side by side in 32-bit words, and packed weights back to numbers.

The code of column i of a row takes the bits i b to i b + b of the row, lowest first, over word borders: 32 codes fill b
words exactly. This is the form `pack-quantized` of compressed-tensors since its release 0.18 (before, widths that do
not divide 32 left bits of a word empty).

Symbols: O output rows, I input columns, G groups of a row, b bits.
"""

from __future__ import annotations

import torch

from moekit.checkpoint.grid import Grid, read_back
from moekit.errors import CheckpointError

WORD = 32


def pack(codes_OI: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes in [0, 2^bits), of any dtype, into int32 words [O, ceil(I bits / 32)]."""
    rows, columns = codes_OI.shape
    codes = torch.nn.functional.pad(codes_OI.to(torch.uint8), (0, -columns % WORD)).unflatten(1, (-1, WORD))
    words = torch.zeros(rows, codes.shape[1], bits, dtype=torch.int64)
    for i in range(WORD):
        word, shift = divmod(i * bits, WORD)
        code = codes[..., i].long()
        words[..., word] |= (code << shift) & 0xFFFFFFFF
        if shift + bits > WORD:
            words[..., word + 1] |= code >> (WORD - shift)
    return words.to(torch.int32).flatten(1)[:, : -(-columns * bits // WORD)].contiguous()


def unpack(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Codes uint8 [O, columns] of words that `pack` made."""
    words = torch.nn.functional.pad(packed, (0, -packed.shape[1] % bits)).unflatten(1, (-1, bits))
    words = words.long() & 0xFFFFFFFF
    codes = torch.empty(*words.shape[:2], WORD, dtype=torch.uint8)
    for i in range(WORD):
        word, shift = divmod(i * bits, WORD)
        code = words[..., word] >> shift
        if shift + bits > WORD:
            code = code | words[..., word + 1] << (WORD - shift)
        codes[..., i] = code & (2**bits - 1)
    return codes.flatten(1)[:, :columns]


def dequantise_packed(
    packed: torch.Tensor, scale_OG: torch.Tensor, shape: tuple[int, ...], grid: Grid, name: str = ""
) -> torch.Tensor:
    """Packed codes times the scale of their group.

    Args:
        packed: int32, from `pack`.
        scale_OG: one for each run of I / G columns.
        shape: (O, I).
        grid: of the codes.
        name: of the weight, for messages.

    Returns:
        [O, I] in the dtype of `moekit.checkpoint.grid.read_back`.

    Raises:
        CheckpointError: codes or scales are not as many as the shape says, or no integers.
    """
    rows, columns = shape if len(shape) == 2 else (0, 0)
    groups = scale_OG.shape[-1] if scale_OG.dim() == 2 else 0
    words = -(-columns * grid.bits // WORD)
    fits = packed.dtype == torch.int32 and tuple(packed.shape) == (rows, words)
    if not fits or scale_OG.shape[0] != rows or not groups or columns % groups:
        raise CheckpointError(
            "packed numbers or scales do not fit their weight",
            where=name,
            expected=f"[{rows}, {words}] words, [{rows}, G] scales for a weight of {list(shape)} in {grid.bits} bits",
            got=f"{list(packed.shape)} words, {list(scale_OG.shape)} scales",
            fix="check quantization_config in config.json",
        )
    return read_back(unpack(packed, grid.bits, columns), scale_OG, grid)
