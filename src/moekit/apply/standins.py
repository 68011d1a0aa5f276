"""Vectors in the place of experts, live and on disk.

Live, an expert's slots add their weight times the vector (`MoEView.replace`). In the stock form its weights are zero,
and the bias behind them is the vector, which is the same by arithmetic. In moekit's own form its weights are left out,
and the vector lies on disk instead; a tensor that held all experts becomes one tensor for each that has weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch

from moekit.checkpoint.reader import DTYPES, Checkpoint
from moekit.checkpoint.writer import Make, OutTensor
from moekit.errors import PlanError
from moekit.families.constants import is_constant
from moekit.families.detect import Understanding
from moekit.families.matrices import WEIGHT, expert_matrices
from moekit.layout import Layout, MoELayer
from moekit.plans import Plan, PlanTensors, Replace, constant_name

Readers = Callable[[int], Mapping[str, Callable[[], torch.Tensor]]]
NOTE = "in moekit's own form, with vectors in the place of experts: moekit runs it, stock transformers finds no weights"
_NAMES = {torch_dtype: name for name, torch_dtype in reversed(DTYPES.items())}


def vectors(plan: Plan, layout: Layout) -> dict[int, dict[int, torch.Tensor]]:
    """The vectors that stand for experts, by layer and expert, each [D].

    Raises:
        PlanError: the numbers are not there, or of another width.
    """
    store, out = PlanTensors(plan.tensors), {}
    for index, op in plan.replaced().items():
        layer = layout.by_index[index]
        out[index] = {expert: _vector(store, layer, expert) for expert in op.experts}
    return out


def _vector(store: PlanTensors, layer: MoELayer, expert: int) -> torch.Tensor:
    found = store.read(layer.index, constant_name(layer, expert))
    if found.shape != (layer.width,) or not found.isfinite().all():
        raise PlanError(
            "a vector of the plan cannot stand for an expert",
            where=constant_name(layer, expert),
            expected=f"{layer.width} finite numbers",
            got=list(found.shape),
            fix="make the plan again for this model",
        )
    return found


def with_stand_ins(readers: Readers, checkpoint: Checkpoint, understanding: Understanding, plan: Plan) -> Readers:
    """Readers of the disk tensors that a plan makes anew, those in which it writes stand-ins in the stock form added.

    Nothing is read now; a quantised tensor is not dequantised, its codes of zero are zero.
    """

    def all_readers(index: int) -> dict[str, Callable[[], torch.Tensor]]:
        out = dict(readers(index))
        op = plan.replaced().get(index)
        if op is None or op.format != "stock":
            return out
        layer = understanding.layout.by_index[index]
        for tensor in layer.tensors:
            if tensor.role == "expert" and (tensor.expert is None or tensor.expert in op.experts):
                bias = understanding.placed[tensor.name].key.endswith("down_proj_bias")
                read = out.get(tensor.name) or partial(checkpoint.read, tensor.name)
                rows = op.experts if tensor.expert is None else (tensor.expert,)
                axis = None if tensor.expert is not None else tensor.axis or 0
                store = PlanTensors(plan.tensors) if bias else None
                out[tensor.name] = partial(_stood_in, read, layer, rows, axis, store)
        return out

    return all_readers


def _stood_in(
    read: Callable[[], torch.Tensor],
    layer: MoELayer,
    experts: Iterable[int],
    axis: int | None,
    store: PlanTensors | None,
) -> torch.Tensor:
    """A disk tensor with zeros at the place of experts, or their vectors from `store`."""
    out = read().clone()
    if out.numel() == 1:
        return out  # one scale for all
    rows = out.unsqueeze(0) if axis is None else out.movedim(axis, 0).unflatten(0, (layer.num_experts, -1))
    for expert in experts:
        place = rows[0 if axis is None else expert]
        if store is None:
            (place.view(torch.uint8) if place.element_size() == 1 else place).zero_()
        else:
            place.copy_(_vector(store, layer, expert).view_as(place))
    return out


def own_tensors(
    checkpoint: Checkpoint,
    understanding: Understanding,
    plan: Plan,
    of_one_expert: Mapping[int, Iterable[tuple[str, int]]],
) -> dict[str, list[OutTensor]]:
    """What takes the place of tensors on disk, by their name, for stand-ins in moekit's own form; reads no weights.

    Args:
        checkpoint: the source.
        understanding: of it.
        plan: what to do.
        of_one_expert: by layer, (name, expert) of every tensor that holds one expert.

    Raises:
        PlanError: experts lie on disk in a form that one cannot be taken from.
    """
    out: dict[str, list[OutTensor]] = {}
    store = PlanTensors(plan.tensors)
    for index, op in plan.replaced().items():
        if op.format == "stock":
            continue
        layer = understanding.layout.by_index[index]
        new = []
        for expert in op.experts:
            vector = _vector(store, layer, expert)
            make = Make(partial(_vector, store, layer, expert))
            new.append(OutTensor(constant_name(layer, expert), _NAMES[vector.dtype], tuple(vector.shape), make))
        places = _cut(checkpoint, understanding, layer, op, of_one_expert)
        first = next(iter(places))
        out |= places | {first: [*new, *places[first]]}
    return out


def _cut(
    checkpoint: Checkpoint,
    understanding: Understanding,
    layer: MoELayer,
    op: Replace,
    of_one_expert: Mapping[int, Iterable[tuple[str, int]]],
) -> dict[str, list[OutTensor]]:
    """The layer's expert tensors that go, or fall into one for each expert that stays."""
    check_separable(understanding, layer)
    out: dict[str, list[OutTensor]] = {}
    fused = [x for x in layer.tensors if x.role == "expert" and x.expert is None]
    gone = {*op.experts, *layer.constants}
    if fused:
        for matrix in expert_matrices(checkpoint, understanding, layer):
            if matrix.fused and matrix.expert not in gone:
                name = f"{matrix.source}.{matrix.expert}{WEIGHT}"
                read = Make(partial(matrix.read, checkpoint))
                out.setdefault(matrix.source, []).append(
                    OutTensor(name, matrix.dtype, (matrix.rows, matrix.columns), read)
                )
    out |= {name: [] for name, expert in of_one_expert[layer.index] if expert in op.experts}
    return out


def check_separable(understanding: Understanding, layer: MoELayer) -> None:
    """Refuse experts on disk that one cannot be taken from: those that transformers does more with than stack them.

    Raises:
        PlanError: there is such a tensor.
    """
    for tensor in layer.tensors:
        if tensor.role != "expert" or is_constant(tensor.name):
            continue
        placement = understanding.placed[tensor.name]
        if not (placement.stacks if tensor.expert is not None else placement.converter is None):
            raise PlanError(
                "no expert can be taken from this form of experts on disk",
                where=tensor.name,
                fix="prune the experts instead, or use a checkpoint of the family in another form",
            )
