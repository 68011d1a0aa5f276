"""Edits of a router's decision, at the logits, of all or some of the tokens that run through it.

The router's own forward runs once for each set of edits that some token has (nearly always once), its raw logits
edited on their way and its correction biases and token tables swapped for as long; then each token's rows are taken
from the run with its edits. So groups, top-k and normalisation stay the family's own code, and a token outside an
edit's reach is routed as if there were none, even where a correction bias, which all tokens share, had to change.

    ban     logit and correction bias: the lowest number there is; a table from token ids gives its place to others
    force   logit: above every other of the token; correction bias: above every other; a table gives it a place. Where
            groups are chosen by their two best scores and no correction bias helps, its score is twice the best one's
    bias    logit: plus an amount. The correction bias, which is no logit, stays
    rewrite logits: what a function makes of them, before everything else. Correction biases stay

Symbols: T tokens, W rows of the router (E experts, or more), E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import nn

from moekit.families.seam import RouterTap, reroute
from moekit.layout import MoELayer

# Which tokens of the running forward an edit is for: a mask [T] for their number T; None for all of them.
Where = Callable[[int], torch.Tensor] | None


@dataclass(frozen=True, eq=False)
class RouterEdit:
    """One edit of one layer's router.

    Attributes:
        action: "ban", "force", "bias" or "rewrite".
        amounts: what is added for "bias", float32; not zero where an expert is banned or forced; not used to rewrite.
        where: the tokens that it is for.
        rewrite: raw logits [T, W] to others of the same shape and dtype.
    """

    action: Literal["ban", "force", "bias", "rewrite"]
    amounts: torch.Tensor
    where: Where = None
    rewrite: Callable[[torch.Tensor], torch.Tensor] | None = None

    @cached_property
    def experts(self) -> torch.Tensor:
        """Those that it is about, bool [W]."""
        return self.amounts != 0


def of_kind(edits: Sequence[RouterEdit], action: str) -> torch.Tensor | None:
    """The experts [W] that edits ban or force; None where none does."""
    found = [edit.experts for edit in edits if edit.action == action]
    return torch.stack(found).any(0) if len(found) > 1 else found[0] if found else None


def edited_logits(logits_TW: torch.Tensor, edits: Sequence[RouterEdit], lead: float = 0.0) -> torch.Tensor:
    """Raw logits after all edits: what rewrites them, biases, forced experts above the rest by over `lead`, bans."""
    out = logits_TW
    for edit in edits:
        if edit.rewrite is not None:
            out = edit.rewrite(out.reshape(-1, out.shape[-1])).view_as(out)
    for edit in edits:
        if edit.action == "bias":
            out = out + edit.amounts.to(out.device, out.dtype)
    if (forced_W := of_kind(edits, "force")) is not None:
        forced_W = forced_W.to(out.device)
        top = out.masked_fill(forced_W, torch.finfo(out.dtype).min).amax(-1, keepdim=True)
        margin = lead + FORCE_MARGIN * top.abs().clamp_min(1.0)
        out = torch.where(forced_W, torch.maximum(out, top + margin), out)
    if (banned_W := of_kind(edits, "ban")) is not None:
        out = out.masked_fill(banned_W.to(out.device), torch.finfo(out.dtype).min)
    return out


FORCE_MARGIN = 2**-6  # of the highest other logit: visible in bfloat16, and hardly a change of the weights


def edited_bias(bias: torch.Tensor, edits: Sequence[RouterEdit], experts: int) -> torch.Tensor:
    """A correction bias under which the choice follows bans and forced experts; biases leave it alone."""
    out = bias.detach().clone()
    flat_E = out.view(-1)[:experts]
    if (forced_W := of_kind(edits, "force")) is not None:
        # Scores are at most as far apart as the logits' function lets them (1 for sigmoid and softmax).
        flat_E[forced_W[:experts].to(out.device)] = flat_E.max() + FORCED_BIAS
    if (banned_W := of_kind(edits, "ban")) is not None:
        flat_E.masked_fill_(banned_W[:experts].to(out.device), torch.finfo(out.dtype).min)
    return out


FORCED_BIAS = 1e4


def edited_table(table_VK: torch.Tensor, edits: Sequence[RouterEdit], experts: int) -> torch.Tensor:
    """A table from token ids to experts under bans and forced experts; a forced one takes the last places first."""
    out_VK = table_VK
    banned_W, forced_W = of_kind(edits, "ban"), of_kind(edits, "force")
    if banned_W is not None:
        out_VK = reroute(out_VK, banned_W[:experts])
    if forced_W is not None:
        wanted = torch.nonzero(forced_W[:experts]).flatten().tolist()
        out_VK = out_VK.clone()
        for expert in wanted:
            lacking_V = ~(out_VK == expert).any(-1)
            free_VK = ~torch.isin(out_VK, torch.tensor(wanted, dtype=out_VK.dtype, device=out_VK.device))
            last_V = (free_VK * torch.arange(1, out_VK.shape[1] + 1, device=out_VK.device)).argmax(-1)
            out_VK[lacking_V, last_V[lacking_V]] = expert
    return out_VK


@contextmanager
def swapped(model: nn.Module, key: str, new: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Put another tensor in the place of a parameter or buffer; gives (old, new) as the module holds them."""
    path, _, name = key.rpartition(".")
    module = model.get_submodule(path)
    store = module._parameters if name in module._parameters else module._buffers
    old = store[name]
    store[name] = nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
    try:
        yield old, store[name]
    finally:
        store[name] = old


def prepared(layer: MoELayer, edits: Sequence[RouterEdit]) -> RouterTap | None:
    """A tap for edits that are for every token and touch nothing but logits: the quick way of `run_router`.

    Returns:
        None where it takes more than a tap.
    """
    acts = {edit.action for edit in edits}
    if any(edit.where is not None for edit in edits):
        return None
    if (layer.correction_biases or layer.tables) and acts & {"ban", "force"}:
        return None
    lead = _lead(layer)
    edit: Callable[[torch.Tensor], torch.Tensor] | None = None
    if edits:
        simple = len(edits) == 1 and _SIMPLE.get(edits[0].action)
        edit = simple(edits[0]) if simple else partial(edited_logits, edits=list(edits), lead=lead)
    return RouterTap(layer.router_width, edit)


def _banned(edit: RouterEdit) -> Callable[[torch.Tensor], torch.Tensor]:
    """One ban, as `edited_logits` does it, with nothing that is the same for every token."""
    mask_W = edit.experts
    low_W: torch.Tensor | None = None

    def changed(logits: torch.Tensor) -> torch.Tensor:
        nonlocal low_W
        if logits.dtype == torch.float16:  # whose lowest number is not far below what logits may be
            return logits.masked_fill(mask_W.to(logits.device), torch.finfo(logits.dtype).min)
        if low_W is None or logits.dtype != low_W.dtype or logits.device != low_W.device:
            low_W = torch.zeros_like(mask_W, dtype=logits.dtype, device=logits.device)
            low_W = low_W.masked_fill(mask_W.to(logits.device), torch.finfo(logits.dtype).min)
        return logits + low_W  # a logit disappears beside the lowest number: the same, in half the time

    return changed


def _biased(edit: RouterEdit) -> Callable[[torch.Tensor], torch.Tensor]:
    """One bias, likewise."""
    amounts_W = edit.amounts

    def changed(logits: torch.Tensor) -> torch.Tensor:
        nonlocal amounts_W
        if logits.dtype != amounts_W.dtype or logits.device != amounts_W.device:
            amounts_W = edit.amounts.to(logits.device, logits.dtype)
        return logits + amounts_W

    return changed


_SIMPLE = {"ban": _banned, "bias": _biased}


def _lead(layer: MoELayer) -> float:
    return math.log(2) if layer.router.groups > 1 and not layer.correction_biases else 0.0


def run_router(
    model: nn.Module,
    layer: MoELayer,
    router: nn.Module,
    stock: Callable[..., Any],
    args: tuple,
    kwargs: dict,
    edits: Sequence[RouterEdit],
) -> tuple[Any, torch.Tensor | None]:
    """What a router's forward gives under edits.

    Args:
        model: that the router belongs to.
        layer: of the router.
        router: the router.
        stock: the router's own forward.
        args: its arguments.
        kwargs: its named arguments.
        edits: of this layer.

    Returns:
        (its outputs, the edited raw logits [T, W]); None for logits that were not seen.
    """
    if all(edit.where is None for edit in edits):
        return _once(model, layer, router, stock, args, kwargs, edits)
    always = [edit for edit in edits if edit.where is None]
    scoped = [edit for edit in edits if edit.where is not None]
    return _by_token(model, layer, router, stock, args, kwargs, always, scoped)


def _once(
    model: nn.Module,
    layer: MoELayer,
    router: nn.Module,
    stock: Callable[..., Any],
    args: tuple,
    kwargs: dict,
    edits: Sequence[RouterEdit],
) -> tuple[Any, torch.Tensor | None]:
    """One run under edits that are for every token."""
    tap = RouterTap(layer.router_width, partial(edited_logits, edits=edits, lead=_lead(layer)) if edits else None)
    if not (layer.correction_biases or layer.tables) or not any(edit.action in ("ban", "force") for edit in edits):
        out = tap.run(router, stock, args, kwargs)
        return out, _flat(tap.logits)
    with ExitStack() as stack:
        for keys, change in ((layer.correction_biases, edited_bias), (layer.tables, edited_table)):
            for key in keys:
                path, _, name = key.rpartition(".")
                found = getattr(model.get_submodule(path), name)
                old, new = stack.enter_context(swapped(model, key, change(found, edits, layer.num_experts)))
                args = tuple(new if x is old else x for x in args)  # some blocks hand the bias to the router
                kwargs = {word: new if x is old else x for word, x in kwargs.items()}
        out = tap.run(router, stock, args, kwargs)
    return out, _flat(tap.logits)


def _flat(logits: torch.Tensor | None) -> torch.Tensor | None:
    return logits if logits is None or logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])


def _by_token(
    model: nn.Module,
    layer: MoELayer,
    router: nn.Module,
    stock: Callable[..., Any],
    args: tuple,
    kwargs: dict,
    always: list[RouterEdit],
    scoped: list[RouterEdit],
) -> tuple[Any, torch.Tensor | None]:
    """One run for each set of edits that some token has; each token's rows from its own."""
    out, logits = _once(model, layer, router, stock, args, kwargs, always)
    if logits is None:
        return out, None
    masks = [edit.where(len(logits)).cpu() for edit in scoped if edit.where is not None]
    sets, set_T = torch.stack(masks).unique(dim=1, return_inverse=True)  # which scoped edits are together for a token
    for number, theirs in enumerate(sets.T.tolist()):
        if any(theirs):
            edits = always + [edit for edit, its in zip(scoped, theirs, strict=True) if its]
            result, its_logits = _once(model, layer, router, stock, args, kwargs, edits)
            mask_T = (set_T == number).to(logits.device)
            out = _rows_from(out, result, mask_T)
            logits = logits if its_logits is None else torch.where(mask_T[:, None], its_logits, logits)
    return out, logits


def _rows_from(ours: Any, theirs: Any, mask_T: torch.Tensor) -> Any:
    """`ours` with the masked tokens' rows of `theirs`, in every tensor that has a row for each token."""
    if isinstance(ours, tuple | list):
        return type(ours)(_rows_from(a, b, mask_T) for a, b in zip(ours, theirs, strict=True))
    if not isinstance(ours, torch.Tensor) or ours.dim() == 0:
        return ours
    leading = 1 if len(ours) == len(mask_T) else 2
    if ours.shape[:leading].numel() != len(mask_T):
        return ours
    return torch.where(mask_T.view(*ours.shape[:leading], *[1] * (ours.dim() - leading)), theirs, ours)
