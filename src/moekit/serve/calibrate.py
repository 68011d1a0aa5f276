"""Which kernel multiplies how many rows, measured on this machine when an engine starts.

Packed numbers can be multiplied by moekit's kernel in C (`moekit.serve.native`), by PyTorch's kernels for few rows, or
unpacked for a matrix product. What wins depends on the CPU and on the sizes; measuring takes about half a second and is
done once for each size in a process.

Unpacked 16-bit numbers are multiplied by PyTorch alone, so that logits stay those of transformers bit for bit. With
`exact=False`, and in models whose experts are packed and so no longer exact, the native kernel may take them too, and
the other matrices (attention, vocabulary) when few rows are multiplied: the same numbers, summed in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import nn

from moekit.serve import forms
from moekit.serve.forms import packed_expert, product
from moekit.serve.machine import quickest
from moekit.serve.native import ACTS, Native, Weight, native, weight_of
from moekit.serve.rest import PackedLinear, weight_in

ROWS = (1, 2, 4, 8, 16, 32)  # that are tried
MARGIN = 1.1  # of PyTorch's time that a native kernel may take: it saves calls, too, which are not measured
LINEAR_ROWS = 4  # of attention and vocabulary that the native kernel takes


@dataclass(frozen=True)
class Kernels:
    """What runs the experts of one layer.

    Attributes:
        native: the kernels in C, None where they cannot be used.
        act: index of `moekit.serve.native.ACTS`.
        rows: by bits, up to how many rows an expert the native kernels take; 0: never.
        threads: for them.
    """

    native: Native | None = None
    act: int = 0
    rows: tuple[tuple[int, int], ...] = ()
    threads: int = 1

    def takes(self, bits: int) -> int:
        """Rows of an expert, at most."""
        return dict(self.rows).get(bits, 0) if self.native is not None else 0


def calibrate(experts: Iterable[nn.Module], bits: Iterable[int], exact: bool) -> Kernels:
    """Measure, and let experts modules use what is fastest.

    Args:
        experts: of a model, all of one size; their family's own activation is probed.
        bits: that experts of the store are kept in.
        exact: 16-bit experts are left to PyTorch.
    """
    found = Kernels()
    widths = tuple(sorted(x for x in set(bits) if not (exact and x == 16)))
    for module in experts:
        sizes = sizes_of(module)
        act = act_of(module, sizes)
        known = measured(sizes, bool(module.has_gate), widths, torch.get_num_threads())
        rows = known if act is not None else ()
        kernels = native()[0]
        found = Kernels(kernels, act or 0, rows, torch.get_num_threads())
        module._moekit_kernels = found
    return found


def sizes_of(experts: nn.Module) -> tuple[int, int, int]:
    """(D, rows of the first projection, columns of the second)."""
    up = experts.gate_up_proj if experts.has_gate else experts.up_proj
    first, second = (up.shape[2], up.shape[1]) if experts.is_transposed else (up.shape[1], up.shape[2])
    return second, first, experts.down_proj.shape[1 if experts.is_transposed else 2]


@torch.inference_mode()
def act_of(experts: nn.Module, sizes: tuple[int, int, int]) -> int | None:
    """Which of the native kernels' activations these experts apply; None: none of them, or more than that."""
    if experts.has_post_expert_norm or experts.is_transposed:
        return None
    up = 10 * torch.randn(3, sizes[1], generator=torch.Generator().manual_seed(0))
    mine = experts._apply_gate(up) if experts.has_gate else experts.act_fn(up)
    gate, other = up.chunk(2, -1) if experts.has_gate else (up, torch.ones(()))
    for number, values in enumerate(_acts(gate)):
        if mine.shape == values.shape and torch.allclose(mine, values * other, rtol=1e-5, atol=1e-6):
            return number
    return None


def act_like(act: Callable[[torch.Tensor], torch.Tensor]) -> int | None:
    """Which of the native kernels' activations a function is; None: none of them."""
    x = 10 * torch.randn(512, generator=torch.Generator().manual_seed(0))
    found = act(x)
    return next((i for i, y in enumerate(_acts(x)) if torch.allclose(found, y, rtol=1e-5, atol=1e-6)), None)


def _acts(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    f = nn.functional
    known = (f.silu(x), f.gelu(x, approximate="tanh"), f.gelu(x), f.relu(x), f.relu(x).square())
    assert len(known) == len(ACTS)
    return known


@lru_cache
@torch.inference_mode()
def measured(
    sizes: tuple[int, int, int], gated: bool, widths: tuple[int, ...], threads: int
) -> tuple[tuple[int, int], ...]:
    """(bits, rows that the native kernel takes) for experts of a size; sets `forms.FEW_ROWS` for PyTorch's own."""
    kernels = native()[0]
    out = []
    for bits in widths:
        one, group = _expert(sizes, bits)
        if bits < 16 and forms.has_kernel():
            forms.FEW_ROWS[bits] = max(ROWS)
            few = {rows: quickest(partial(_with_torch, one, sizes, gated, rows)) for rows in ROWS}
            forms.FEW_ROWS[bits] = 0
            many = {rows: quickest(partial(_with_torch, one, sizes, gated, rows)) for rows in ROWS}
            forms.FEW_ROWS[bits] = _last(few, many)
            others = {rows: min(few[rows], many[rows]) for rows in ROWS}
        else:
            others = {rows: quickest(partial(_with_torch, one, sizes, gated, rows)) for rows in ROWS}
        if kernels is not None:
            row = row_of(one, bits, group, True)
            mine = {rows: quickest(_native_call(kernels, row, sizes, gated, rows, threads)) for rows in ROWS}
            out.append((bits, _last({rows: x / MARGIN for rows, x in mine.items()}, others)))
    return tuple(out)


def row_of(tensors: dict[str, torch.Tensor], bits: int, group: int, gated: bool) -> list[int]:
    """What native kernels need to know of an expert; addresses of its tensors, which must stay where they are."""
    row = [bits, group]
    for name in ("gate_up_proj" if gated else "up_proj", "down_proj"):
        bias = tensors.get(name + "_bias")
        parts = (tensors[name], None) if bits == 16 else (tensors[name + ".q"], tensors[name + ".scale"])
        row += [0 if x is None else x.data_ptr() for x in (*parts, bias)]
    return row


def _expert(sizes: tuple[int, int, int], bits: int) -> tuple[dict[str, torch.Tensor], int]:
    """An expert of random numbers, under the names of gated ones."""
    hidden, up, inner = sizes
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate_up_proj": (up, hidden), "down_proj": (hidden, inner)}
    numbers = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    group, tensors = packed_expert(numbers, bits, False)
    return tensors, group


def _with_torch(tensors: dict[str, torch.Tensor], sizes: tuple[int, int, int], gated: bool, rows: int) -> None:
    hidden, up, inner = sizes
    mid = product(torch.ones(rows, hidden, dtype=torch.bfloat16), tensors, "gate_up_proj", "", False, up)
    mid = nn.functional.silu(mid[:, :inner]) * mid[:, inner:] if gated else nn.functional.silu(mid)
    product(mid, tensors, "down_proj", "", False, hidden)


def _native_call(
    kernels: Native, row: list[int], sizes: tuple[int, int, int], gated: bool, rows: int, threads: int
) -> Callable[[], None]:
    x, out = torch.ones(rows, sizes[0], dtype=torch.bfloat16), torch.empty(rows, sizes[0])
    return lambda: kernels.experts(row, [0, rows], range(rows), x, sizes, gated, 0, out, threads)


def _last(mine: dict[int, float], others: dict[int, float]) -> int:
    """Up to how many rows mine is faster throughout; 0: not even for one."""
    rows = 0
    for count in ROWS:
        if mine[count] > others[count]:
            break
        rows = count
    return rows


def few_rows_call(sizes: tuple[int, int, int], bits: int) -> Callable[[], object]:
    """A product of one row with an expert of random numbers, by what a calibrated engine would take."""
    tensors, group = _expert(sizes, bits)
    gated, threads = sizes[1] == 2 * sizes[2], torch.get_num_threads()
    kernels = native()[0]
    if kernels is None or bits == 16 or not dict(measured(sizes, gated, (bits,), threads))[bits]:
        return partial(_with_torch, tensors, sizes, gated, 1)
    call = _native_call(kernels, row_of(tensors, bits, group, True), sizes, gated, 1, threads)
    return lambda held=tensors: call()  # type: ignore[misc]  # the tensors live as long as the call


def linear_call(width: int, quick: bool) -> Callable[[], object]:
    """A product of one row with a square bfloat16 matrix; `quick`: by native kernels where they pay."""
    weight, x = torch.ones(width, width, dtype=torch.bfloat16), torch.ones(1, width, dtype=torch.bfloat16)
    kernels, threads = native()[0], torch.get_num_threads()
    if kernels is not None and quick and _pays((width, width), threads):
        return lambda held=weight: kernels.linear(x, weight_of(held), threads)  # type: ignore[misc]
    return partial(nn.functional.linear, x, weight)


def quicken_linears(model: nn.Module) -> int:
    """Let the native kernel multiply few rows by a model's bfloat16 matrices; how many it will.

    Sums are taken in another order than PyTorch's, so logits change in their last bits.
    """
    kernels = native()[0]
    if kernels is None:
        return 0
    count, threads = 0, torch.get_num_threads()
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.native = kernels, weight_in(module), threads
        elif type(module) is nn.Linear and _fits(module.weight) and _pays(tuple(module.weight.shape), threads):
            module.forward = partial(_linear, module, weight_of(module.weight, module.bias), kernels, threads)
            count += 1
    return count


def _fits(weight: torch.Tensor) -> bool:
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and weight.is_contiguous()


def _linear(module: nn.Module, weight: Weight, kernels: Native, threads: int, x: torch.Tensor) -> torch.Tensor:
    rows = x.numel() // x.shape[-1]
    if rows > LINEAR_ROWS or x.dtype != torch.bfloat16 or not x.is_contiguous():
        return nn.functional.linear(x, module.weight, module.bias)
    return kernels.linear(x.view(rows, -1), weight, threads).view(*x.shape[:-1], -1)


@lru_cache
@torch.inference_mode()
def _pays(shape: tuple[int, int], threads: int) -> bool:
    kernels = native()[0]
    if kernels is None:
        return False
    weight, x = torch.ones(shape, dtype=torch.bfloat16), torch.ones(1, shape[1], dtype=torch.bfloat16)
    mine = quickest(partial(kernels.linear, x, weight_of(weight), threads))
    return mine < MARGIN * quickest(partial(nn.functional.linear, x, weight))
