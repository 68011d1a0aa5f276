"""Online dynamic pruning on a live model, for as long as the context lasts.

    run expert of weight w_r  iff  w_r >= beta max w      or the token is one of the most important of its text
    importance                     |x|_1  mean over heads and over the queries at or behind the token of its attention

x is the input of the MoE block. The important tokens are the `protect` largest share of those that run together, so
that one which runs alone, as in decoding, is not protected; nor is padding, where `MoEView.at` tells it. Where a layer
computes no attention weights (linear attention) |x|_1 alone decides.

Symbols: B texts, S places, T = B S tokens, K chosen, D hidden, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from moekit.families.attention import eager_attention, watch_attention
from moekit.families.family import Change
from moekit.families.seam import rescaled
from moekit.layout import MoELayer
from moekit.plans import Odp
from moekit.view import MoEView


@contextmanager
def changes(view: MoEView, ops: Mapping[int, Odp]) -> Iterator[dict[int, Change]]:
    """What makes the weights of each layer's experts new, for as long as the context lasts; nothing calls it yet.

    Args:
        view: of the model.
        ops: by decoder layer index. One whose importance is attention makes the whole model compute its attention in
            the plain way, at S x S of memory for each head.
    """
    with ExitStack() as stack:
        pruners = {index: _Pruner(view, view.layout.by_index[index], op) for index, op in ops.items()}
        if any(x.sees_attention for x in pruners.values()):
            stack.enter_context(eager_attention(view.model))
        for pruner in pruners.values():
            stack.enter_context(pruner.watching())
        yield {index: x.weights for index, x in pruners.items()}


@contextmanager
def pruning(view: MoEView, ops: Mapping[int, Odp]) -> Iterator[None]:
    """Leave out, token by token, experts that weigh little: `changes` applied."""
    with changes(view, ops) as found, view.adapt(found):
        yield


class _Pruner:
    """One layer's pruning.

    Attributes:
        sees_attention: it needs the attention weights.
    """

    def __init__(self, view: MoEView, layer: MoELayer, op: Odp):
        self._view, self._op = view, op
        self._module = view.model.get_submodule(layer.path)
        self._protects = op.protect > 0 and op.importance != "none"
        self.sees_attention = self._protects and op.importance == "attention"
        self._shape: tuple[int, int] | None = None
        self._attention: torch.Tensor | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note what the layer computes before its experts run: how many texts there are, and their attention."""

        def look(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            hidden = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.dim() > 2), None)
            if hidden is not None and hidden.is_floating_point():
                self._shape = hidden.shape[0], hidden.shape[1]

        def see(weights: torch.Tensor) -> None:
            self._attention = weights

        with ExitStack() as stack:
            if self._protects:
                # The layer's own hooks are not run when it is streamed; those of its parts are.
                for part in self._module.children():
                    stack.callback(part.register_forward_pre_hook(look, with_kwargs=True).remove)
            if self.sees_attention:
                for part in self._module.children():
                    stack.enter_context(watch_attention(part, see))
            yield

    def weights(self, hidden_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """The weights [T, K], zero where an expert is left out."""
        size_TK = weights_TK.float()
        runs_TK = size_TK >= self._op.beta * size_TK.amax(-1, keepdim=True)
        if self._protects:
            runs_TK |= self._protected(hidden_TD).to(runs_TK.device)[:, None]
        return rescaled(weights_TK, runs_TK.float(), self._op.renormalise)

    def _protected(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Which tokens keep all their experts [T]."""
        count, attention = len(hidden_TD), self._attention
        shape = self._shape if self._shape and self._shape[0] * self._shape[1] == count else (1, count)
        self._shape = self._attention = None
        tokens = self._view.running
        known = tokens is not None and len(tokens.positions) == count
        real_BS = (tokens.positions >= 0 if tokens and known else torch.ones(count, dtype=torch.bool)).view(shape)
        real_BS = real_BS.to(hidden_TD.device)
        score_BS = hidden_TD.abs().sum(-1, dtype=torch.float32).view(shape)
        if attention is not None and attention.shape[0] == shape[0] and attention.shape[-1] == shape[1]:
            score_BS = score_BS * received(attention, real_BS).to(score_BS.device)
        order_BS = score_BS.masked_fill(~real_BS, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        rank_BS = order_BS.argsort(-1)
        return (rank_BS < (real_BS.sum(-1, keepdim=True) * self._op.protect).floor()).reshape(-1)


def received(attention_BHSS: torch.Tensor, real_BS: torch.Tensor) -> torch.Tensor:
    """Mean attention that each token gets, over heads and over the real queries at or behind it, float32 [B, S]."""
    real = real_BS.to(attention_BHSS.device)
    total_BS = (attention_BHSS * real[:, None, :, None]).sum((1, 2), dtype=torch.float32) / attention_BHSS.shape[1]
    queries_BS = real.flip(-1).cumsum(-1).flip(-1).clamp_min(1)
    return total_BS / queries_BS
