"""Matrices outside the routed experts kept in few bits: attention, shared experts, dense MLPs, the vocabulary's.

A linear layer whose weight a store holds packed becomes a `PackedLinear`. Its form is that of experts
(`moekit.serve.forms`): the store has `NAME.weight.q` and `NAME.weight.scale` in place of `NAME.weight`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from moekit.families.resident import put
from moekit.serve.forms import packed_expert, product, unpacked
from moekit.serve.native import Native, Weight, weight_of

LEAST_NUMBERS = 1 << 16  # of a matrix that is packed: smaller ones (gates) weigh nothing and matter
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


def pack_linear(weight_OI: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    """A weight's numbers packed: "q" and "scale"."""
    _, tensors = packed_expert({"w": weight_OI}, bits, False)
    return {"q": tensors["w.q"], "scale": tensors["w.scale"]}


def put_rest(model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Give a model what a store keeps of it beside experts, by name; linear layers of packed weights are replaced."""
    packed: dict[str, dict[str, torch.Tensor]] = {}
    plain = []
    for key, tensor in tensors:
        path, _, part = key.rpartition(".")
        if part in ("q", "scale") and path.endswith(".weight"):
            packed.setdefault(path.removesuffix(".weight"), {})[part] = tensor
        else:
            plain.append((key, tensor))
    put(model, plain)
    for path, parts in packed.items():
        linear = model.get_submodule(path)
        model.set_submodule(path, PackedLinear(parts["q"], parts["scale"], linear.out_features, linear.bias))


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
