"""What reaches the experts of one layer from all of the text: inputs, choices, weights, kept until the layer is done.

Inputs of many tokens wait in a file instead of in memory; an expert's are read together.

Symbols: T real tokens of all batches, K chosen, D hidden, N tokens of one expert, I inputs of a linear map.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from moekit.data import Batch
from moekit.layout import MoELayer
from moekit.stream import Stop
from moekit.view import Call, MoEView, Observer

MEMORY_BYTES = 2 << 30  # of inputs that are kept in memory
CHUNK = 4096  # tokens whose second moments are taken at once


class Routed(Observer):
    """The calls of one MoE layer, end to end; padding is left out.

    Args:
        layer: which.
        tokens: how many real ones will come.

    Attributes:
        batch: what runs now; to be set before each forward.
    """

    def __init__(self, layer: MoELayer, tokens: int):
        self.layer, self._tokens, self._seen = layer, tokens, 0
        self.batch: Batch
        self._hidden_TD: torch.Tensor | None = None
        self._ids: list[torch.Tensor] = []
        self._weights: list[torch.Tensor] = []

    def routed(self, call: Call) -> None:
        """Keep inputs, ids and weights."""
        real_T = self.batch.mask.reshape(-1).to(call.hidden.device)
        hidden = call.hidden[real_T]
        if self._hidden_TD is None:
            self._hidden_TD = self._room(hidden)
        self._hidden_TD[self._seen : self._seen + len(hidden)] = hidden.cpu()
        self._seen += len(hidden)
        self._ids.append(call.ids[real_T].long().cpu())
        self._weights.append(call.weights[real_T].float().cpu())

    def _room(self, hidden: torch.Tensor) -> torch.Tensor:
        shape = (self._tokens, hidden.shape[1])
        size = shape[0] * shape[1]
        if size * hidden.element_size() <= MEMORY_BYTES:
            return torch.empty(shape, dtype=hidden.dtype)
        with tempfile.NamedTemporaryFile(prefix="moekit-routed-") as file:  # it lives as long as it is mapped
            return torch.from_file(file.name, shared=True, size=size, dtype=hidden.dtype).view(shape)

    def close(self) -> None:
        """All calls are in."""
        self._ids_TK, self._weights_TK = torch.cat(self._ids), torch.cat(self._weights)

    def of(self, expert: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs [N, D] of an expert and their weights [N], float32.

        Where the weight multiplies the input, it is in the input, and the weights are ones.
        """
        assert self._hidden_TD is not None, "no batch has passed the layer"
        tokens_N, ranks_N = torch.where(self._ids_TK == expert)
        hidden_ND = self._hidden_TD[tokens_N].to(device)
        weights_N = self._weights_TK[tokens_N, ranks_N].to(device)
        if self.layer.router.weighs_input:
            return hidden_ND * weights_N[:, None].to(hidden_ND.dtype), torch.ones_like(weights_N)
        return hidden_ND, weights_N


class Moments:
    """Second moments of what reaches linear maps that every token uses; padding is left out.

    Args:
        modules: by the name that the sums are to have.

    Attributes:
        batch: what runs now; to be set before each forward.
        sums: of x x^T [I, I], float32, by name; nothing for a map whose forward was not called.
    """

    def __init__(self, modules: Mapping[str, nn.Module]):
        self._modules = modules
        self.batch: Batch
        self.sums: dict[str, torch.Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While this holds, what is run is added up."""
        handles = [
            module.register_forward_pre_hook(lambda _, args, name=name: self._add(name, args[0]))
            for name, module in self._modules.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, name: str, given: torch.Tensor) -> None:
        rows = given.reshape(-1, given.shape[-1])
        real = self.batch.mask.reshape(-1)
        rows = rows[real.to(rows.device)] if len(rows) == len(real) else rows
        self.sums[name] = second_moments(rows) + self.sums.get(name, 0)


def second_moments(given_NI: torch.Tensor) -> torch.Tensor:
    """Sum of x x^T [I, I], float32."""
    out = torch.zeros(given_NI.shape[1], given_NI.shape[1], device=given_NI.device)
    for part in given_NI.split(CHUNK):
        part = part.float()
        out += part.T @ part
    return out


def gather(
    view: MoEView, stop: Stop, layer: MoELayer | None, batches: Sequence[Batch], moments: Moments | None = None
) -> Routed | None:
    """Run a layer on all batches that wait at it, keeping what reaches its experts; the batches go on waiting.

    Args:
        view: of the model.
        stop: at the layer.
        layer: its experts; None where it has none, or none that matter.
        batches: that wait.
        moments: what else is looked at.
    """
    routed = Routed(layer, sum(x.tokens for x in batches)) if layer else None
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        if routed and layer:
            stack.enter_context(view.watch(routed, layers=[layer.index]))
        if moments:
            stack.enter_context(moments.watching())
        for number, batch in enumerate(batches):
            for watching in (routed, moments):
                if watching is not None:
                    watching.batch = batch
            stop.run(number)
    if routed:
        routed.close()
    return routed
