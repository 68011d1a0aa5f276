"""The two seams through which a live stock model is watched and changed, for every family alike.

Router: while its forward runs, the first linear map as wide as the router has rows yields the raw logits; they can be
noted and edited there, and the family's own code then does groups, top-k and normalisation. Experts: the function
registered here runs the routed (token, expert) pairs as transformers' eager loop does, in the same order
(bit-identical in fp32), and shows every expert's unweighted output on its way.

Symbols: T tokens, K chosen, E experts, D hidden, N rows of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moekit.families.products import Products
from moekit.layout import MoELayer

IMPLEMENTATION = "moekit_observed"
_LINEAR = {linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.addmm}


class RouterTap(TorchFunctionMode):
    """While active, notes the router's raw logits and lets `edit` change them.

    Args:
        width: rows of the router (E, or more where it also scores shared or null experts).
        edit: logits [T, width] to logits of the same shape; None only notes them.

    Attributes:
        logits: what the router computed, after `edit`; None before.
    """

    def __init__(self, width: int, edit: Callable[[torch.Tensor], torch.Tensor] | None = None):
        super().__init__()
        self.width, self.edit = width, edit
        self.logits: torch.Tensor | None = None
        self._rows: torch.Tensor | None = None
        self._tapped: Any = None
        self._place: tuple[dict[str, Any], str] | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return self.see(out) if func in _LINEAR else out

    def see(self, out: torch.Tensor) -> torch.Tensor:
        """A linear map's output, edited if it is the first that is as wide as the router."""
        if self.logits is None and out.shape[-1] == self.width:
            self.logits = out = out if self.edit is None else self.edit(out)
        return out

    def run(self, router: nn.Module, stock: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """What a router's forward gives, tapped: at the product with its rows or, where it is not known which those
        are, at every operation, which costs ten times as much.
        """
        alone = torch._C._len_torch_function_stack() == 0  # else somebody outside must see what the router computes
        self._place = self._place or rows_of(router, self.width)
        place = self._place if alone else None
        if place is not None and not ((rows := place[0][place[1]]).requires_grad and torch.is_grad_enabled()):
            parameters, name = place
            if rows is not self._rows:
                self._rows, self._tapped = rows, rows.detach().as_subclass(_TappedRows)
                self._tapped.tap = self
            parameters[name] = self._tapped
            try:
                out = stock(*args, **kwargs)
            finally:
                parameters[name] = rows
            if self.logits is not None:
                return out
        with self:
            return stock(*args, **kwargs)


class _TappedRows(torch.Tensor):
    """A router's rows that show their product with the hidden states to a tap, and casts of them."""

    tap: RouterTap

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # noqa: ANN206
        if func is linear and len(args) == 2 and not kwargs and type(args[1]) is cls and type(args[0]) is torch.Tensor:
            mine = args[1].tap
            if mine._tapped is args[1]:  # the usual case, and the quickest way
                return mine.see(linear(args[0], mine._rows))
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs) if kwargs else func(*args)
        if func is linear and type(args[1]) is cls:
            return args[1].tap.see(out)
        tap = next((x.tap for x in args if type(x) is cls), None)
        if tap is None or tap.logits is not None or not isinstance(out, torch.Tensor):
            return out
        if func in _LINEAR:
            return tap.see(out)
        if out.dim() == 2 and tap.width in out.shape:
            out = out.as_subclass(cls)
            out.tap = tap
        return out


def rows_of(router: nn.Module, width: int) -> tuple[dict[str, Any], str] | None:
    """The parameters that a router's rows are among, and their name, where only one can be those; looked for once."""
    known = vars(router).get("_moekit_rows")
    if known is None or known[0] != width:
        found = [
            (module._parameters, name)
            for module in router.modules()
            for name, x in module._parameters.items()
            if x is not None and x.dim() == 2 and width in x.shape
        ]
        known = width, found[0] if len(found) == 1 else None
        vars(router)["_moekit_rows"] = known
    return known[1]


@dataclass
class ExpertRows:
    """One expert's share of a call: tokens_N (which of the T tokens), ranks_N (which of the K slots), output_ND."""

    expert: int
    tokens: torch.Tensor
    ranks: torch.Tensor
    output: torch.Tensor


@dataclass
class Call:
    """One call of one MoE layer.

    Attributes:
        layer: decoder layer index.
        hidden: the experts' input [T, D].
        ids: chosen experts [T, K]; E where a token skips its experts (Zaya).
        weights: what the model weighs them with [T, K].
        logits: the router's raw logits [T, E] (as edited by bans).
        residual: the residual stream before the block [T, D]; None unless asked for.
    """

    layer: MoELayer
    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    logits: torch.Tensor | None = None
    residual: torch.Tensor | None = None


class Observer:
    """What `MoEView.watch` calls. Override what is needed; set the flags for what costs time.

    Attributes:
        wants_outputs: call `expert` with every expert's output.
        wants_residual: fill `Call.residual`.
    """

    wants_outputs = False
    wants_residual = False

    def routed(self, call: Call) -> None:
        """Routing is known, experts have not run."""

    def expert(self, call: Call, rows: ExpertRows) -> None:
        """One expert's unweighted output; it lives only during the call."""

    def finished(self, call: Call, output: torch.Tensor) -> None:
        """All experts have run; `output` [T, D] is their weighted sum, shared experts left out."""


def observed_experts(
    experts: nn.Module, hidden_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """Routed experts by the contract of transformers 5, showing each expert's output to `experts._moekit_watch`.

    Experts of `experts._moekit_constants` ({expert: vector [D]}) are not run: their output is the vector.

    Args:
        experts: a module with the contract (`down_proj`, `gate_up_proj` or `up_proj`, `_apply_gate`, flags).
        hidden_TD: inputs.
        ids_TK: chosen experts; ids >= E are skipped.
        weights_TK: their weights.

    Returns:
        The weighted sum of the outputs [T, D], in the dtype of `hidden_TD`.
    """
    watch: Callable[[ExpertRows], None] | None = getattr(experts, "_moekit_watch", None)
    constants: Mapping[int, torch.Tensor] = getattr(experts, "_moekit_constants", {})
    up = experts.gate_up_proj if experts.has_gate else experts.up_proj
    up_bias = (experts.gate_up_proj_bias if experts.has_gate else experts.up_proj_bias) if experts.has_bias else None
    down_bias = experts.down_proj_bias if experts.has_bias else None
    flat = ids_TK.t().reshape(-1).long()  # slot-major, as transformers' eager loop visits the pairs
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=experts.num_experts).tolist()[: experts.num_experts]
    all_tokens, all_ranks = order % len(hidden_TD), order // len(hidden_TD)
    products = Products(hidden_TD, max(up[0].numel(), experts.down_proj[0].numel()))
    out = torch.zeros_like(hidden_TD, dtype=products.dtype)
    start = 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        tokens, ranks = all_tokens[start : start + count], all_ranks[start : start + count]
        start += count
        if expert in constants:
            result = constants[expert].to(out.device, hidden_TD.dtype).repeat(count, 1)
        else:
            mid = products.linear(
                products.rows(tokens), up[expert], None if up_bias is None else up_bias[expert], experts.is_transposed
            )
            mid = experts._apply_gate(mid) if experts.has_gate else experts.act_fn(mid)
            result = products.linear(
                mid, experts.down_proj[expert], None if down_bias is None else down_bias[expert], experts.is_transposed
            )
            if experts.has_post_expert_norm:
                result = experts.post_expert_norm(result)
            result = result[:count]
        if watch is not None:
            watch(ExpertRows(expert, tokens, ranks, result))
        out.index_add_(0, tokens, result.mul_(weights_TK[tokens, ranks, None]).to(out.dtype))
    return out.to(hidden_TD.dtype)


def reroute(table_VK: torch.Tensor, banned_E: torch.Tensor) -> torch.Tensor:
    """A table from token ids to experts without some of the experts.

    What a banned expert had goes to the next one, counting up and round, that is not banned and not yet in its row.

    Args:
        table_VK: expert numbers, of any integer dtype.
        banned_E: True for experts that must not appear; at least K are False.

    Returns:
        A new table of the same shape and dtype.
    """
    out_VK, banned_E = table_VK.to(torch.long, copy=True), banned_E.to(table_VK.device)
    for slot in range(out_VK.shape[1]):
        others = [x for x in range(out_VK.shape[1]) if x != slot]
        moving_V = banned_E[out_VK[:, slot]]
        while moving_V.any():
            expert_V = torch.where(moving_V, (out_VK[:, slot] + 1) % len(banned_E), out_VK[:, slot])
            out_VK[:, slot] = expert_V
            moving_V &= banned_E[expert_V] | (out_VK[:, others] == expert_V[:, None]).any(-1)
    return out_VK.to(table_VK.dtype)


def rescaled(weights_TK: torch.Tensor, factors_TK: torch.Tensor, renormalise: bool) -> torch.Tensor:
    """A token's weights times factors; with `renormalise` they keep their sum, where any weight is left.

    Args:
        weights_TK: of the chosen experts; any dtype, which the result has too.
        factors_TK: float32.
        renormalise: divide by the new sum, multiply by the old one.
    """
    scaled = weights_TK.float() * factors_TK
    if renormalise:
        total = scaled.sum(-1, keepdim=True)
        scaled *= torch.where(total == 0, 1.0, weights_TK.float().sum(-1, keepdim=True) / total)
    return scaled.to(weights_TK.dtype)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, observed_experts)
