"""Matrices outside the routed experts kept in few bits: attention, shared experts, dense MLPs, the vocabulary's.

A linear layer whose weight a store holds packed becomes a `PackedLinear`. Its form is that of experts
(`moekit.serve.forms`): the store has `NAME.weight.q` and `NAME.weight.scale` in place of `NAME.weight`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from moekit.families.detect import TOWERS
from moekit.families.resident import put
from moekit.layout import Layout
from moekit.serve.forms import packed_expert, product, unpacked
from moekit.serve.native import Native, Weight, weight_of

LEAST_ROWS = 64  # of a matrix that is packed: smaller ones (gates) weigh nothing and matter
OUTPUT_BITS = 8  # of the vocabulary's matrix, at least
FEW = 8  # rows that the native kernel is given


class PackedLinear(nn.Module):
    """A linear layer whose numbers stay packed.

    Args:
        q: as `moekit.serve.forms` packs them.
        scale: theirs.
        outputs: O.
        bias_O: or None.
    """

    q: torch.Tensor
    scale: torch.Tensor

    def __init__(self, q: torch.Tensor, scale: torch.Tensor, outputs: int, bias_O: torch.Tensor | None):
        super().__init__()
        self.register_buffer("q", q)
        self.register_buffer("scale", scale)
        self.register_parameter("bias", None if bias_O is None else nn.Parameter(bias_O, requires_grad=False))
        self.bits = 8 if q.dtype == torch.int8 else 4
        self.out_features, self.in_features = outputs, q.shape[1] * (1 if self.bits == 8 else 2)
        self.native: tuple[Native, Weight, int] | None = None

    @property
    def weight(self) -> torch.Tensor:
        """The numbers [O, I], unpacked for once."""
        return unpacked({"w.q": self.q, "w.scale": self.scale}, "w", self.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rows [..., I] times the weight [..., O]."""
        rows = x.reshape(-1, self.in_features)
        if self.native is not None and len(rows) <= FEW and x.dtype == torch.bfloat16:
            native, weight, threads = self.native
            out = native.linear(rows.contiguous(), weight, threads)
        else:
            tensors = {"w.q": self.q, "w.scale": self.scale}
            if self.bias is not None:
                tensors["b"] = self.bias
            out = product(rows, tensors, "w", "b", False, self.out_features)
        return out.view(*x.shape[:-1], -1)


def rest_widths(model: PreTrainedModel, layout: Layout, bits: int) -> dict[str, tuple[str, int]]:
    """Which parameters of a model are packed: their linear layer's weight by name, to what name and how many bits.

    Linear layers outside experts and routers, of at least `LEAST_ROWS`; the vocabulary's matrix, and those that are no
    multiple of 32 wide, with at least `OUTPUT_BITS`. Where it is the embedding too, that stays beside it as it was.

    Args:
        model: the stock model; its parameters may be empty.
        layout: of the model.
        bits: 16 for none.
    """
    if bits >= 16:
        return {}
    output = model.get_output_embeddings()
    away = tuple(x.experts_path + "." for x in layout.routed) + tuple(x.router_path for x in layout.routed)
    out = {}
    for path, module in model.named_modules():
        if type(module) is not nn.Linear or path.startswith(away) or module.out_features < LEAST_ROWS:
            continue
        if TOWERS.search(path + "."):
            continue
        source = path + ".weight"
        if module is output and layout.tied_embeddings:
            embedding = model.get_input_embeddings()
            source = next(name for name, x in model.named_modules() if x is embedding) + ".weight"
        more = module is output or module.in_features % 32
        out[source] = path + ".weight", max(bits, OUTPUT_BITS) if more else bits
    return out


def packed_rest(tensors: dict[str, torch.Tensor], widths: dict[str, tuple[str, int]]) -> dict[str, torch.Tensor]:
    """A layer's parameters, those of `widths` packed."""
    out = {}
    for name, x in tensors.items():
        target, bits = widths.get(name, (name, 16))
        if target != name or bits == 16:
            out[name] = x
        if bits < 16:
            _, parts = packed_expert({target: x}, bits, False)
            out |= parts
    return out


def put_rest(model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
    """Give a model what a store keeps of it beside experts, by name; what is packed is returned, for `put_packed`."""
    packed: dict[str, dict[str, torch.Tensor]] = {}
    plain = []
    for key, tensor in tensors:
        path, _, part = key.rpartition(".")
        if part in ("q", "scale") and path.endswith(".weight"):
            packed.setdefault(path.removesuffix(".weight"), {})[part] = tensor
        else:
            plain.append((key, tensor))
    put(model, plain)
    return packed


def put_packed(model: nn.Module, packed: dict[str, dict[str, torch.Tensor]], device: torch.device) -> None:
    """Replace linear layers by packed ones, once biases are filled and tied parameters tied."""
    for path, parts in packed.items():
        linear = model.get_submodule(path)
        q, scale = (parts[name].to(device) for name in ("q", "scale"))
        model.set_submodule(path, PackedLinear(q, scale, linear.out_features, linear.bias))


def weight_in(module: nn.Module, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None) -> Weight:
    """A linear layer's weight as native kernels know it.

    Args:
        module: a linear layer, packed or not.
        weight: of a module that is none.
        bias: its bias.

    Raises:
        ValueError: a layer or dtype that they do not know.
    """
    if isinstance(module, PackedLinear):
        at = None if module.bias is None else module.bias.data_ptr()
        group = 2 * module.q.shape[1] // len(module.scale) if module.bits == 4 else 0
        parts = (module.q.data_ptr(), module.scale.data_ptr(), at, module.bits, group)
        return Weight(*parts, module.out_features, module.in_features)
    if weight is None and type(module) is nn.Linear:
        weight, bias = module.weight, module.bias
    known = weight is not None and weight.dtype in (torch.bfloat16, torch.float32) and weight.is_contiguous()
    if weight is None or not known or (bias is not None and bias.dtype != torch.bfloat16):
        raise ValueError("a matrix that kernels do not know")
    return weight_of(weight, bias)
