"""Weight matrices one at a time, [outputs, inputs], however disk and stock model keep them.

On disk an expert's projection is a tensor of its own (`experts.3.gate_proj.weight`) or a slice of one that holds all
experts; in the stock model it is some rows of a slice of a fused parameter, there maybe turned. What is done to weights
one matrix at a time (rounding, factors) sees [O, I] and a name.

Symbols: E experts, O outputs, I inputs of a projection.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from moekit.checkpoint.reader import Checkpoint
from moekit.errors import PlanError
from moekit.families.constants import is_constant
from moekit.families.detect import TOWERS, Understanding
from moekit.families.parts import part_of
from moekit.layout import MoELayer

WEIGHT = ".weight"
FLOATS = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class Matrix:
    """One projection of one expert, or the weight of one linear map or embedding that every token uses.

    Attributes:
        name: of the weight, ending in ".weight": the disk's, or one made of the tensor's that holds all experts.
        source: the tensor on disk that it lies in.
        key: the stock model's parameter that it is (a part of).
        expert: its expert; None for what every token uses.
        start: first output row of it in the expert's slice of that parameter.
        rows: outputs.
        columns: inputs.
        dtype: safetensors' name of the dtype on disk.
        fused: the tensor on disk holds all experts.
        turned: the stock model (and a fused tensor on disk) keeps [I, O].
    """

    name: str
    source: str
    key: str
    expert: int | None
    start: int
    rows: int
    columns: int
    dtype: str
    fused: bool = False
    turned: bool = False

    def view(self, parameter: torch.Tensor) -> torch.Tensor:
        """Its [O, I] in the stock model's parameter; writing to it writes there."""
        if self.expert is None:
            return parameter
        part = parameter[self.expert]
        return (part.T if self.turned else part)[self.start : self.start + self.rows]

    def read(self, checkpoint: Checkpoint) -> torch.Tensor:
        """Its [O, I] from disk, in the dtype that it has there; reads nothing else."""
        if not self.fused or self.expert is None:
            return checkpoint.read(self.source)
        part = checkpoint.read_rows(self.source, self.expert, self.expert + 1)[0]
        return part.T if self.turned else part

    def part(self, tensor: torch.Tensor) -> torch.Tensor:
        """Its [O, I] in the disk's tensor `source`."""
        if not self.fused:
            return tensor
        return tensor[self.expert].T if self.turned else tensor[self.expert]


def expert_matrices(checkpoint: Checkpoint, understanding: Understanding, layer: MoELayer) -> list[Matrix]:
    """The matrices of a layer's experts in the order of their parameters, then of experts, then of rows.

    Raises:
        PlanError: the disk keeps them in a form that has no such matrices.
    """
    experts = understanding.model.get_submodule(layer.experts_path)
    shapes = {f"{layer.experts_path}.{name}": tuple(x.shape) for name, x in experts.named_parameters()}
    form = understanding.family.expert_form(experts)
    out = []
    for tensor in layer.tensors:
        if tensor.role != "expert" or is_constant(tensor.name):
            continue
        info, placement = checkpoint.info(tensor.name), understanding.placed[tensor.name]
        shape = shapes[placement.key]
        if len(shape) < 3:
            continue  # a bias
        fused = tensor.expert is None
        plain = info.dtype in FLOATS and not placement.suffix
        if fused:
            plain = plain and placement.converter is None and info.shape == shape
        else:
            plain = plain and placement.stacks and len(info.shape) == 2 and info.name.endswith(WEIGHT)
        if not plain:
            raise PlanError(
                "experts in this form on disk cannot be quantised or factored",
                where=info.name,
                expected="a matrix of its own for each expert and projection, as experts.3.gate_proj.weight, "
                "or the stock model's own parameters",
                got=f"{info.dtype} {list(info.shape)}" + (", all experts in one" if fused else ""),
                fix="prune or merge it instead, or use a checkpoint of the family in another form",
            )
        turned = form.transposed and placement.converter is None  # what moekit wrote of such a tensor is [O, I] too
        rows, columns = (info.shape[2], info.shape[1]) if turned and fused else info.shape[-2:]
        start = placement.sources.index(placement.pattern) * rows if placement.converter else 0
        for expert in range(layer.num_experts) if fused else (tensor.expert,):
            name = f"{info.name}.{expert}{WEIGHT}" if fused else info.name
            out.append(Matrix(name, info.name, placement.key, expert, start, rows, columns, info.dtype, fused, turned))
    return sorted(out, key=lambda x: (x.key, x.expert or 0, x.start))


def dense_matrices(
    checkpoint: Checkpoint, understanding: Understanding, index: int, parts: Collection[str]
) -> dict[str, list[Matrix]]:
    """The linear maps and embeddings that every token uses, by part, in the order of the disk's names.

    Routers and what gives one number (the gate of a shared expert) are left out, and so is what transformers makes of
    several tensors on disk.

    Args:
        checkpoint: headers are enough.
        understanding: of it.
        index: decoder layer index; -1 for what is in no decoder layer.
        parts: of "attention", "shared experts", "dense MLP", "embeddings" (of the input), "head".
    """
    layers_path = understanding.experts[0].layers_path
    stem = f"{layers_path}.{index}."
    taken = {x.name for layer in understanding.layout.layers for x in layer.tensors}
    out: dict[str, list[Matrix]] = {part: [] for part in parts}
    for name, placement in sorted(understanding.placed.items()):
        inside = placement.key.startswith(stem) if index >= 0 else not placement.key.startswith(layers_path + ".")
        if name in taken or not inside or not placement.key.endswith(WEIGHT) or TOWERS.search(placement.key):
            continue
        info, part = checkpoint.info(name), part_of(placement.key, layers_path)
        module = understanding.model.get_submodule(placement.key.removesuffix(WEIGHT))
        part = "head" if part == "embeddings" and isinstance(module, nn.Linear) else part
        if part not in out or placement.converter or placement.suffix or len(info.shape) != 2 or info.shape[0] < 2:
            continue
        if name.endswith(WEIGHT) and info.dtype in FLOATS and isinstance(module, nn.Linear | nn.Embedding):
            out[part].append(Matrix(name, name, placement.key, None, 0, *info.shape, info.dtype))
    return out
