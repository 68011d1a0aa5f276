"""Every expert of a layer on the same tokens, whoever was chosen: what methods that try out sets of experts need.

Symbols: N tokens, E experts, D hidden.
"""

from __future__ import annotations

import torch
from torch import nn

from moekit.layout import MoELayer

WATCH = "_moekit_watch"


def each_output(experts: nn.Module, layer: MoELayer, hidden_ND: torch.Tensor, logits_NE: torch.Tensor) -> torch.Tensor:
    """What each expert makes of each token.

    Nobody who watches the experts sees these runs.

    Args:
        experts: the module, with its weights.
        layer: what it belongs to.
        hidden_ND: the experts' inputs.
        logits_NE: the router's raw logits for the same tokens; only read where the weight multiplies the input.

    Returns:
        [E, N, D] in the dtype of `hidden_ND`: unweighted outputs; where the weight multiplies the expert's input
        (Llama 4), its output on the input times the weight that the token gives it whenever it is chosen.
    """
    count, watch = layer.num_experts, vars(experts).pop(WATCH, None)
    try:
        if layer.router.weighs_input:
            weights_EN1 = logits_NE.float().sigmoid().to(hidden_ND.dtype).T[:, :, None]
            given = (hidden_ND * weights_EN1).reshape(count * len(hidden_ND), -1)
            return experts.forward(given).view(count, len(hidden_ND), -1)
        ids_E1 = torch.arange(count, device=hidden_ND.device)[:, None]
        ones = torch.ones(len(hidden_ND), 1, dtype=hidden_ND.dtype, device=hidden_ND.device)
        return torch.stack([experts.forward(hidden_ND, x.expand(len(hidden_ND), 1), ones) for x in ids_E1])
    finally:
        if watch is not None:
            setattr(experts, WATCH, watch)
