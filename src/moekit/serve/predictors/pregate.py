"""Pregate: for every layer a linear gate of its own that looks one layer back, trained on the model's own choices.

    p_l = softmax(V_l (h_(l-1) - m) / s)      cross-entropy to the experts that the true router of layer l chose

h_(l-1)     input of the router of layer l-1, with mean m and deviation s over the trace

Paper: R. Hwang et al., "Pre-gated MoE: An Algorithm-System Co-Design for Fast and Scalable Mixture-of-Expert
Inference", ISCA 2024, arXiv 2308.12066. Deviation: there the pre-gate decides and the model is fine-tuned to live with
it; here it predicts and the model's router decides, so that no number changes and a wrong guess costs a read.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from moekit.serve.predictors.base import Predictor, Seen
from moekit.serve.routes import Routes

STEPS, BATCH = 400, 512


class Pregate(Predictor):
    """Pre-gated MoE's gates, as predictors."""

    needs = "hidden"
    watches_hidden = True

    def __init__(self, trace: Routes | None = None, routers: object = None):
        super().__init__(trace, None)
        assert trace is not None
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
            torch.manual_seed(0)
            self._gates = [_trained(trace, layer) for layer in range(1, trace.layers)]

    def scores(self, layer: int, seen: Seen) -> np.ndarray:
        """The gate's logits."""
        mean_D, scale_D, weight_ED, bias_E = self._gates[layer - 1]
        x_TD = (seen.hidden[layer - 1].float() - mean_D) / scale_D
        return (x_TD @ weight_ED.T + bias_E).numpy()


def _trained(trace: Routes, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(mean, scale, weight, bias) of the gate that tells `layer` from the layer before."""
    x_TD = trace.hidden[layer - 1].float().clone()
    mean_D, scale_D = x_TD.mean(0), x_TD.std(0) + 1e-6
    x_TD = (x_TD - mean_D) / scale_D
    chosen_TE = torch.as_tensor(trace.used(slice(None))[:, layer])
    target_TE = chosen_TE / chosen_TE.sum(1, keepdim=True).clamp_min(1)
    gate = nn.Linear(x_TD.shape[1], trace.experts)
    optimizer = torch.optim.AdamW(gate.parameters(), lr=1e-2, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=STEPS)
    for _ in range(STEPS):
        rows = torch.randint(len(x_TD), (BATCH,))
        loss = nn.functional.cross_entropy(gate(x_TD[rows]), target_TE[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return mean_D, scale_D, gate.weight.detach(), gate.bias.detach()
