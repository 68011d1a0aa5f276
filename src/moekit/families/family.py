"""What moekit needs to know of a family's code: the general answer, which the few true exceptions override.

An exception is one small file in this package with a subclass of `Family` and one line in `_EXCEPTIONS`.
"""

from __future__ import annotations

import importlib
from typing import NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig

from moekit.families.stock import is_experts
from moekit.layout import Router


class Routing(NamedTuple):
    """What a router decided for T tokens: logits_TE (raw, before any score), weights_TK, ids_TK."""

    logits: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor


class Family:
    """The general family: experts by contract, a router that returns logits, weights and ids in some order.

    Attributes:
        unsupported: why the family cannot be used at all ("" when it can).
        extra_rows: router rows that are not routed experts (shared experts, a skip expert); they follow the experts'.
    """

    unsupported = ""
    extra_rows = 0

    def is_experts(self, module: nn.Module) -> bool:
        """Whether `module` holds stacked routed experts."""
        return is_experts(module)

    def routing(self, outputs: object, num_experts: int) -> Routing:
        """Find logits, weights and ids in what the router returned, by dtype and shape.

        Raises:
            TypeError: the outputs do not hold exactly one of each.
        """
        tensors = [x for x in outputs if isinstance(x, torch.Tensor)] if isinstance(outputs, tuple | list) else []
        ids = [x for x in tensors if not x.is_floating_point() and x.dim() == 2]
        floats = [x for x in tensors if x.is_floating_point()]
        if len(ids) != 1 or len(floats) < 2:
            raise TypeError(f"router returned {[tuple(x.shape) for x in tensors]}")
        weights = [x for x in floats if x.shape == ids[0].shape]
        logits = [x for x in floats if x.shape[-1] >= num_experts and x is not (weights[-1] if weights else None)]
        if not weights or not logits:
            raise TypeError(f"router returned {[tuple(x.shape) for x in tensors]}")
        return Routing(logits[0].reshape(-1, logits[0].shape[-1]), weights[-1], ids[0])

    def router(self, config: PretrainedConfig, layer: int) -> tuple[Router, int] | None:
        """(Router, top_k) read from the config, where probing the router's behaviour cannot tell; None to probe."""
        return None


_EXCEPTIONS: dict[str, str] = {}


def family_of(model_type: str) -> Family:
    """The family that answers for `model_type`."""
    entry = _EXCEPTIONS.get(model_type)
    if entry is None:
        return Family()
    module, name = entry.split(":")
    return getattr(importlib.import_module(f"moekit.families.{module}"), name)()
