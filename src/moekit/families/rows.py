"""The rows of a router that stand for experts."""

from __future__ import annotations

import torch
from torch import nn

from moekit.errors import ModelError
from moekit.layout import MoELayer


def router_rows(router: nn.Module, layer: MoELayer) -> torch.Tensor:
    """The matrix of a router whose product with a token gives the experts' logits, float32 [E, D].

    Raises:
        ModelError: the router has no such matrix, or several.
    """
    found = [x for x in router.parameters() if x.dim() == 2 and len(x) == layer.router_width]
    if len(found) != 1:
        raise ModelError("this router has not one row for each expert", where=layer.router_path, got=f"{len(found)}")
    return found[0].detach()[: layer.num_experts].float()
