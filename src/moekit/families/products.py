"""The matrix products of one expert after the other, in the dtype in which this kind of machine is fastest.

Symbols: T tokens, N rows of one expert, D hidden, I inner, O out.
"""

from __future__ import annotations

import platform
from functools import lru_cache

import torch
from torch.nn.functional import linear

# oneDNN compiles a 16-bit kernel for every distinct number of rows, so numbers are padded to a multiple. AMX multiplies
# 16 rows in the time of one. Where float32 takes over at WIDE_ROWS (copying the weight then costs less than it saves),
# only few numbers are left.
ROW_BLOCK, WIDE_ROW_BLOCK, WIDE_ROWS = 32, 8, 64


class Products:
    """Gathers an expert's rows and multiplies them by its weights.

    On a CPU that multiplies float32 faster than the model's own 16-bit dtype, experts with many rows are run in
    float32, from inputs and weights of the model's dtype: fewer roundings than in the model itself. A model in float32
    gets the numbers of `torch.nn.functional.linear`, bit for bit.

    Args:
        hidden_TD: what rows are taken from.
        largest: elements of the largest weight.
    """

    def __init__(self, hidden_TD: torch.Tensor, largest: int):
        narrow = hidden_TD.device.type == "cpu" and hidden_TD.dtype in (torch.bfloat16, torch.float16)
        self._hidden_TD = hidden_TD
        wide = narrow and float32_is_faster(hidden_TD.dtype)
        self._block = WIDE_ROW_BLOCK if wide else ROW_BLOCK if narrow else 1
        self._copy = torch.empty(largest) if wide else None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype to add up results in."""
        return self._hidden_TD.dtype if self._copy is None else torch.float32

    def rows(self, tokens_N: torch.Tensor) -> torch.Tensor:
        """The inputs of one expert, in the dtype that it is best run in; rows of zeros may follow."""
        count, hidden_TD = len(tokens_N), self._hidden_TD
        if self._copy is not None and count >= WIDE_ROWS:
            return hidden_TD.index_select(0, tokens_N).float()
        rows = hidden_TD.new_empty(count + -count % self._block, hidden_TD.shape[1])
        torch.index_select(hidden_TD, 0, tokens_N, out=rows[:count])
        rows[count:] = 0
        return rows

    def linear(
        self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool
    ) -> torch.Tensor:
        """rows [N, D] times a weight [O, D], or [D, O] if `transposed`."""
        if self._copy is not None and rows.dtype != weight.dtype:
            weight = self._copy[: weight.numel()].view(weight.shape).copy_(weight)
            bias = None if bias is None else bias.to(rows.dtype)
        if not transposed:
            return linear(rows, weight, bias)
        out = torch.matmul(rows, weight)
        return out if bias is None else out + bias


@lru_cache
def float32_is_faster(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies in float32, conversion of the weight included, faster than in a 16-bit dtype.

    So it is on x86 without AMX, whatever other 16-bit instructions it has (docs/LOG.md). A rule and no race: timing
    would decide otherwise on a busy machine, and the last digits of every number with it.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    amx = torch.cpu._is_amx_tile_supported if dtype == torch.bfloat16 else torch.cpu._is_amx_fp16_supported
    return not amx()
