"""Tensors of a layer that is filled up with experts of zeros (see `moekit.plans.padding`).

Symbols: E experts on disk, n places in the new layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import prod

import torch

from moekit.checkpoint.reader import DTYPES, Checkpoint, TensorInfo
from moekit.checkpoint.writer import Make, OutTensor
from moekit.errors import ModelError
from moekit.families.detect import Understanding
from moekit.layout import ExpertTensor, MoELayer
from moekit.plans.padding import BIAS, Slots


def bias_names(understanding: Understanding, layer: MoELayer) -> set[str]:
    """Disk names of the biases that keep experts from being chosen: those of the router's logits or scores."""
    rows = [x.name for x in layer.tensors if x.role == "router"]
    model = understanding.model.state_dict()
    found = set()
    for name in rows:
        key = understanding.placed[name].key
        one_for_each = prod(model[key].shape) == model[key].shape[-1]
        if key in layer.correction_biases or (layer.router.logit_bias and one_for_each and key.endswith("bias")):
            found.add(name)
    return found


def fused(
    checkpoint: Checkpoint,
    layer: MoELayer,
    tensor: ExpertTensor,
    places: Slots,
    bias: bool,
    made: Callable[[], torch.Tensor] | None,
) -> OutTensor:
    """A tensor with an expert axis, with the experts of `places`; what lies behind the experts stays.

    Args:
        checkpoint: the source.
        layer: that it belongs to.
        tensor: which.
        places: of the new layer.
        bias: experts of zeros get `BIAS` in it.
        made: gives the tensor where it is not the one on disk.

    Raises:
        ModelError: it has no place for each expert.
    """
    info, axis, count = checkpoint.info(tensor.name), tensor.axis or 0, layer.num_experts
    each = info.shape[axis] // count if tensor.role == "expert" and info.shape[axis] % count == 0 else 1
    tail = info.shape[axis] - count * each
    if tail < 0:
        raise ModelError("this tensor has fewer rows than there are experts", where=f"{info.file}: {info.name}")
    shape = (*info.shape[:axis], len(places) * each + tail, *info.shape[axis + 1 :])
    read = made or partial(checkpoint.read, info.name)
    return OutTensor(info.name, info.dtype, shape, Make(partial(_filled, read, axis, each, count, places, bias)))


def _filled(
    read: Callable[[], torch.Tensor], axis: int, each: int, count: int, places: Slots, bias: bool
) -> torch.Tensor:
    tensor = read()
    plain = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor  # fp8 knows few operations
    blank = torch.full_like(plain.narrow(axis, 0, each), BIAS if bias else 0)
    parts = [blank if e is None else plain.narrow(axis, e * each, each) for e in places]
    out = torch.cat([*parts, plain.narrow(axis, count * each, plain.shape[axis] - count * each)], axis)
    return out.view(tensor.dtype)


def of_zeros(info: TensorInfo, name: str) -> OutTensor:
    """The tensor of an expert of zeros, like that of another expert."""
    return OutTensor(name, info.dtype, info.shape, Make(partial(_zeros, info.shape, DTYPES[info.dtype])))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    plain = torch.zeros(shape, dtype=torch.uint8 if dtype.itemsize == 1 else dtype)
    return plain.view(dtype)


def empty_places(places: Slots) -> Iterator[int]:
    """The numbers of the experts of zeros."""
    return (place for place, expert in enumerate(places) if expert is None)
