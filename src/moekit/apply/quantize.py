"""Experts' weights as whole numbers: on disk as compressed-tensors' `pack-quantized`, live as they are read back.

The form is what stock transformers (with the package compressed-tensors) and moekit read: for each expert's
`gate_proj.weight` a `weight_packed`, a `weight_scale` and a `weight_shape`. All else of the model stays as it is.

Round to nearest, for a group of columns of one row of a weight W:

    s = max |W| / (2^(b-1) - 1)        (1 where all are zero)
    q = round(W / s)                   W is read back as q s

Symbols: O output rows, I input columns, G groups, b bits.
"""

from __future__ import annotations

import re
from functools import partial

import torch

from moekit.checkpoint.reader import DTYPES, Checkpoint, TensorInfo
from moekit.checkpoint.weights import pack_integers
from moekit.checkpoint.writer import Make, OutTensor
from moekit.errors import CheckpointError, PlanError
from moekit.families.detect import Understanding
from moekit.families.loader import Loader
from moekit.layout import Layout, MoELayer
from moekit.plans import Plan, Quantize

WEIGHT = ".weight"
FLOATS = ("F32", "BF16", "F16")
NOTE = "stock transformers needs the package compressed-tensors to load this model"


def round_to_nearest(weight: torch.Tensor, op: Quantize, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers and scales of a weight.

    Args:
        weight: [..., O, I]; I must be a multiple of the group size.
        op: bits and group size.
        dtype: of the scales.

    Returns:
        (float32 [..., O, I], scales [..., O, G]); scales are finite and above zero where the weight is finite.
    """
    groups = weight.float().unflatten(-1, (-1, op.group_size) if op.group_size > 0 else (1, -1))
    top = 2 ** (op.bits - 1) - 1
    scale = (groups.abs().amax(-1) / top).to(dtype)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    values = (groups / scale.float().unsqueeze(-1)).round_().clamp_(-top - 1, top)
    return values.flatten(-2), scale


def rounded(weight: torch.Tensor, op: Quantize, dtype: torch.dtype) -> torch.Tensor:
    """A weight as it is read back after quantising; scales and products are in `dtype`, the result in its own."""
    values, scale = round_to_nearest(weight, op, dtype)
    return (values.to(dtype).unflatten(-1, (scale.shape[-1], -1)) * scale.unsqueeze(-1)).flatten(-2).to(weight.dtype)


def quantised_parameters(
    loader: Loader, layout: Layout, plan: Plan, index: int, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What changes among a decoder layer's parameters when its experts are quantised: they, as they are read back.

    Args:
        loader: of the model.
        layout: of the model.
        plan: quantising or not.
        index: decoder layer index; -1 for what is in no decoder layer.
        tensors: the layer's parameters by key.
    """
    op = plan.quantised().get(index)
    if op is None:
        return {}
    path, out = layout.by_index[index].experts_path, {}
    swap = loader.expert_form(path).transposed
    for key, x in tensors.items():
        if key.startswith(path + ".") and x.dim() == 3:
            dtype = loader.on_disk(loader.placements(index)[key][0].name)
            made = rounded(x.transpose(1, 2) if swap else x, op, dtype)
            out[key] = made.transpose(1, 2).contiguous() if swap else made
    return out


def expert_weights(checkpoint: Checkpoint, layer: MoELayer) -> list[TensorInfo]:
    """The weights of a layer's experts, each a matrix of its own on disk.

    Raises:
        PlanError: experts are fused on disk, or their weights are not named or kept as those of linear layers.
    """
    out = []
    for tensor in layer.tensors:
        if tensor.role != "expert":
            continue
        info = checkpoint.info(tensor.name)
        matrix = len(info.shape) == 2 and info.name.endswith(WEIGHT) and info.dtype in FLOATS
        if tensor.expert is None or (len(info.shape) > 1 and not matrix):
            raise PlanError(
                "experts in this form on disk cannot be quantised",
                where=info.name,
                expected="a matrix of its own for each expert and projection, as experts.3.gate_proj.weight",
                got=f"{info.dtype} {list(info.shape)}" + (", all experts in one" if tensor.expert is None else ""),
                fix="prune or merge it instead, or use a checkpoint of the family with one tensor an expert",
            )
        if matrix:
            out.append(info)
    return out


def quantised_tensors(checkpoint: Checkpoint, layout: Layout, plan: Plan) -> dict[str, list[OutTensor]]:
    """What takes the place of each weight on disk, by its name; reads nothing.

    Raises:
        PlanError: see `expert_weights`.
    """
    out = {}
    for index, op in plan.quantised().items():
        for info in expert_weights(checkpoint, layout.by_index[index]):
            rows, columns = info.shape
            groups = columns // op.group_size if op.group_size > 0 else 1
            make = partial(_made, checkpoint, info, op)
            out[info.name] = [
                OutTensor(info.name + "_packed", "I32", (rows, -(-columns * op.bits // 32)), Make(partial(make, 0))),
                OutTensor(info.name + "_scale", info.dtype, (rows, groups), Make(partial(make, 1))),
                OutTensor(info.name + "_shape", "I64", (2,), Make(partial(torch.tensor, info.shape))),
            ]
    return out


def _made(checkpoint: Checkpoint, info: TensorInfo, op: Quantize, which: int) -> torch.Tensor:
    """The packed numbers (0) or the scales (1) of a weight."""
    weight = checkpoint.read(info.name)
    if not weight.isfinite().all():
        raise CheckpointError(
            "this weight has entries that are no numbers", where=f"{info.file}: {info.name}", fix="repair the source"
        )
    values, scale = round_to_nearest(weight, op, DTYPES[info.dtype])
    return scale if which else pack_integers(values, op.bits)


def quantisation_config(understanding: Understanding, plan: Plan, weights: dict[str, list[OutTensor]]) -> dict:
    """The `quantization_config` of config.json for a plan that quantises every layer in one way."""
    op = next(iter(plan.quantised().values()))
    modules = {re.sub(r"\d+", r"\\d+", re.escape(name.removesuffix(WEIGHT))) for name in weights}
    left = [f"re:{re.escape(layer.path)}\\..*" for layer in understanding.layout.layers if layer.mtp]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": [f"re:{x}$" for x in sorted(modules)],
                "weights": {
                    "num_bits": op.bits,
                    "type": "int",
                    "symmetric": True,
                    "dynamic": False,
                    "strategy": "group" if op.group_size > 0 else "channel",
                    "group_size": op.group_size if op.group_size > 0 else None,
                },
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": ["lm_head", *left],
    }
