"""What moekit needs to know of a family's code: the general answer, which the few true exceptions override.

An exception is one small file in this package with a subclass of `Family` and one line in `_EXCEPTIONS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PretrainedConfig

from moekit.families.seam import IMPLEMENTATION
from moekit.families.stock import is_experts
from moekit.layout import MoELayer

if TYPE_CHECKING:
    from moekit.families.probe import Probed
    from moekit.view import Call, MoEView, Observer


class Family:
    """The general family: experts by contract, a router that returns logits, weights and ids in some order.

    Attributes:
        unsupported: why the family cannot be used at all ("" when it can).
    """

    unsupported = ""

    def is_experts(self, module: nn.Module) -> bool:
        """Whether `module` holds stacked routed experts."""
        return is_experts(module)

    def routing(self, outputs: object) -> tuple[torch.Tensor, torch.Tensor]:
        """Find (weights_TK, ids_TK) in what the router returned, by dtype and shape.

        Raises:
            TypeError: the outputs do not hold exactly one of each.
        """
        tensors = [x for x in outputs if isinstance(x, torch.Tensor)] if isinstance(outputs, tuple | list) else []
        ids = [x for x in tensors if not x.is_floating_point() and x.dim() == 2]
        weights = [x for x in tensors if x.is_floating_point() and ids and x.shape == ids[0].shape]
        if len(ids) != 1 or not weights:
            raise TypeError(f"router returned {[tuple(x.shape) for x in tensors]}")
        return weights[-1], ids[0]

    def describe_router(self, config: PretrainedConfig, layer: int) -> Probed | None:
        """What probing the router's behaviour would tell, for routers that cannot be probed; None to probe."""
        return None

    @contextmanager
    def watch_experts(self, view: MoEView, layer: MoELayer, observer: Observer) -> Iterator[None]:
        """Show the calls of one layer's experts to `observer`; with outputs only if it wants them."""
        experts = view.experts(layer.index)
        calls: list[Call] = []

        def before(_module: nn.Module, args: tuple) -> None:
            hidden, ids, weights = args[:3]
            call = view.call(layer, hidden, ids, weights, observer.wants_residual)
            calls.append(call)
            if observer.wants_outputs:
                experts._moekit_watch = lambda rows: observer.expert(call, rows)
            observer.routed(call)

        def after(_module: nn.Module, _args: tuple, output: torch.Tensor) -> None:
            observer.finished(calls.pop(), output)

        handles = [experts.register_forward_pre_hook(before), experts.register_forward_hook(after)]
        old = experts.config._experts_implementation
        if observer.wants_outputs:
            experts.config._experts_implementation = IMPLEMENTATION
        try:
            yield
        finally:
            experts.config._experts_implementation = old
            vars(experts).pop("_moekit_watch", None)
            for handle in handles:
                handle.remove()


_EXCEPTIONS: dict[str, str] = {}


def family_of(model_type: str) -> Family:
    """The family that answers for `model_type`."""
    entry = _EXCEPTIONS.get(model_type)
    if entry is None:
        return Family()
    module, name = entry.split(":")
    return getattr(importlib.import_module(f"moekit.families.{module}"), name)()
