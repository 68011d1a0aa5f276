"""A stock model of which some parameters stay empty: built from a config, filled by name, its experts run by others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.models.minimax.modeling_minimax import MiniMaxCache

from moekit.checkpoint.reader import read_config
from moekit.errors import CheckpointError
from moekit.families.detect import TOWERS
from moekit.families.stock import build, load_config
from moekit.layout import Layout


def skeleton(folder: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """The stock model of a folder's config.json, its parameters empty, what no checkpoint holds computed."""
    config = load_config(folder, read_config(folder), trust_remote_code)
    model = build(config, dtype, buffers=True, trust_remote_code=trust_remote_code)
    return model.requires_grad_(False)


def empty_cache(model: PreTrainedModel) -> DynamicCache:
    """A cache of keys and values (and whatever else the family's layers keep) with nothing in it."""
    config = model.config.get_text_config()
    if config.model_type == "minimax":  # takes no other than its own
        return MiniMaxCache()
    return DynamicCache(config=config)


def run_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a model whose weights are no longer quantised."""
    return {key: value for key, value in config.items() if key != "quantization_config"}


def put(model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Give parameters and buffers their values, by name."""
    for key, tensor in tensors:
        path, _, name = key.rpartition(".")
        module = model.get_submodule(path)
        if name in module._parameters:
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[name] = tensor


def move(model: nn.Module, device: torch.device) -> None:
    """Bring to a device what is not empty; what is there already stays."""
    for module in model.modules():
        for name, x in module._parameters.items():
            if x is not None and not x.is_meta and x.device != device:
                module._parameters[name] = nn.Parameter(x.to(device), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)


def experts_run_by(model: nn.Module, layout: Layout, implementation: str) -> dict[int, nn.Module]:
    """Let a registered function run all routed experts; the experts modules by decoder layer index."""
    out = {}
    for layer in layout.routed:
        experts = model.get_submodule(layer.experts_path)
        experts.config._experts_implementation = implementation
        out[layer.index] = experts
    return out


def check_filled(model: nn.Module, layout: Layout) -> None:
    """Refuse a model that lacks parameters other than the experts' own and those of towers, which text never meets.

    Raises:
        CheckpointError: a parameter is empty.
    """
    experts = tuple(layer.experts_path + "." for layer in layout.routed)
    for key, tensor in model.named_parameters():
        if tensor.is_meta and not key.startswith(experts) and not TOWERS.search(key):
            raise CheckpointError("a parameter is missing", where=key, fix="pack the model again")
