"""How experts are kept in a store, and multiplied as they lie: 16 bits as in the model, 8 and 4 bits rounded.

    16   the model's own numbers: the product is `torch.nn.functional.linear`'s, bit for bit
     8   q = round(W / s), s = max |W| / 127 for each output row
     4   q = round(W / s), s = max |W| / 7 for each group of columns of an output row; stored with 8 added

Few rows (decoding) are multiplied by the packed numbers; many (a prompt) by numbers unpacked once, since a matrix
product is then cheaper by far than reading nibbles again for each row (where few ends is measured: see
moekit.serve.calibrate). Four-bit numbers lie as the CPU kernel of torch has them on AVX-512: blocks of 64 output rows,
for each column 32 bytes, row n in the low and row n + 32 in the high half; on a CPU without that kernel, and without
our own (moekit.serve.native), they are unpacked.

Symbols: N rows, I input columns, O output rows, G groups.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch.nn.functional import linear, pad

BITS = (4, 8, 16)
GROUP_SIZE = 64
BLOCK_ROWS = 64
TORCH_COLUMNS = 32  # of an eight-bit matrix are multiplied together by torch's kernel
FEW_ROWS = {8: 8, 4: 8}  # by bits: up to here packed numbers are multiplied as they lie; measured by `calibrate`


class Held(dict[str, torch.Tensor]):
    """One expert's tensors by name, as its record holds them, where they lie.

    Attributes:
        row: what native kernels need to know of them, once they have asked.
    """

    row: list[int] | None = None


def packed_expert(tensors: dict[str, torch.Tensor], bits: int, transposed: bool) -> tuple[int, dict[str, torch.Tensor]]:
    """One expert's parameters as its record holds them.

    Args:
        tensors: by name: weights [O, I] (or [I, O] if transposed), biases [O].
        bits: 16, 8 or 4, of weights; biases stay.
        transposed: how the model keeps weights. Packed ones are always [O, I].

    Returns:
        (columns that share a scale, 0 for all or none; tensors by name, of packed weights ".q" and ".scale").
    """
    if bits == 16:
        return 0, {name: x.contiguous() for name, x in tensors.items()}
    out: dict[str, torch.Tensor] = {}
    widths = [x.shape[0 if transposed else 1] for x in tensors.values() if x.dim() == 2]
    group = _group_size(math.gcd(*widths))
    for name, x in tensors.items():
        if x.dim() != 2:
            out[name] = x.contiguous()
            continue
        weight = (x.T if transposed else x).float()
        quantised = _eight(weight, x.dtype) if bits == 8 else _four(weight, x.dtype, group)
        out[name + ".q"], out[name + ".scale"] = quantised
    return group if bits == 4 else 0, out


def _group_size(width: int) -> int:
    """The largest of 32, 64 columns that divides all widths (what the kernel takes); else the largest divisor of 32."""
    return next((size for size in (GROUP_SIZE, 32) if width % size == 0), math.gcd(width, 32))


def _eight(weight_OI: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    scale_O = (weight_OI.abs().amax(-1) / 127).to(dtype)
    scale_O = torch.where(scale_O > 0, scale_O, torch.ones_like(scale_O))
    return (weight_OI / scale_O.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scale_O


def _four(weight_OI: torch.Tensor, dtype: torch.dtype, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = weight_OI.shape
    weight_OI = pad(weight_OI, (0, 0, 0, -rows % BLOCK_ROWS))
    groups_OGS = weight_OI.unflatten(1, (-1, group))
    scale_OG = (groups_OGS.abs().amax(-1) / 7).to(dtype)
    scale_OG = torch.where(scale_OG > 0, scale_OG, torch.ones_like(scale_OG))
    q_OI = ((groups_OGS / scale_OG.float()[..., None]).round().clamp(-8, 7) + 8).to(torch.uint8).flatten(1)
    blocks = q_OI.view(-1, 2, BLOCK_ROWS // 2, columns)
    nibbles = blocks[:, 0] | blocks[:, 1] << 4  # [O / 64, 32, I]
    return nibbles.transpose(1, 2).reshape(len(weight_OI), columns // 2).contiguous(), scales_of(scale_OG)


def scales_of(scale_OG: torch.Tensor) -> torch.Tensor:
    """Scales and zeros [G, O, 2] as the kernel takes them."""
    return torch.stack([scale_OG, torch.zeros_like(scale_OG)], -1).transpose(0, 1).contiguous()


def unpacked(tensors: dict[str, torch.Tensor], name: str, rows: int) -> torch.Tensor:
    """A packed weight as numbers [O, I], in the dtype of its scales.

    Args:
        tensors: of the expert.
        name: of the weight.
        rows: O; four-bit weights are padded to blocks of rows.
    """
    q, scale = tensors[name + ".q"], tensors[name + ".scale"]
    if q.dtype == torch.int8:
        return q.to(scale.dtype) * scale[:, None]
    columns = 2 * q.shape[1]
    nibbles = q.view(-1, columns, BLOCK_ROWS // 2)
    values_OI = torch.stack([nibbles & 15, nibbles >> 4], 1).transpose(2, 3).reshape(-1, columns)
    scale_OG = scale[..., 0].T
    numbers = (values_OI.to(scale.dtype) - 8).unflatten(1, (scale_OG.shape[1], -1)) * scale_OG[..., None]
    return numbers.flatten(1)[:rows]


def product(
    x_NI: torch.Tensor, tensors: dict[str, torch.Tensor], name: str, bias_name: str, transposed: bool, outputs: int
) -> torch.Tensor:
    """Rows times one weight of an expert, plus its bias where there is one.

    Args:
        x_NI: rows.
        tensors: of the expert, as its record holds them.
        name: of the weight.
        bias_name: of its bias.
        transposed: how the model keeps its weights; only for unpacked ones.
        outputs: O.

    Returns:
        [N, O].
    """
    bias = tensors.get(bias_name)
    weight = tensors.get(name)
    if weight is not None:
        if not transposed:
            return linear(x_NI, weight, bias)
        out = torch.matmul(x_NI, weight)
        return out if bias is None else out + bias
    q, scale = tensors[name + ".q"], tensors[name + ".scale"]
    bits = 8 if q.dtype == torch.int8 else 4
    if len(x_NI) <= FEW_ROWS[bits] and x_NI.dtype == scale.dtype == torch.bfloat16 and has_kernel() and q.is_cpu:
        if bits == 8:
            if q.shape[1] % TORCH_COLUMNS:  # torch's kernel reads past the end of shorter rows
                return linear(x_NI, unpacked(tensors, name, outputs), bias)
            out = torch.ops.aten._weight_int8pack_mm(x_NI, q, scale)
        else:
            group = 2 * q.shape[1] // len(scale)
            if group < 32:
                return linear(x_NI, unpacked(tensors, name, outputs), bias)
            out = torch.ops.aten._weight_int4pack_mm_for_cpu(x_NI, q, group, scale)[:, :outputs]
        return out if bias is None else out + bias
    return linear(x_NI, unpacked(tensors, name, outputs).to(x_NI.dtype), bias)


@lru_cache
def has_kernel() -> bool:
    """Whether torch multiplies packed numbers on this CPU, in the order in which stores have them."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"
