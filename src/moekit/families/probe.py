"""How does this router choose? Asked of the router itself, not of its config or its name.

The stock router module is filled with random numbers and run on random tokens; the order of its calls, the weights that it
returns and its answer to a changed bias tell everything. Config fields lie (DeepSeek-V2 ignores `norm_topk_prob`,
Mixtral has no such field and always renormalises); behaviour does not.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from moekit.families.family import Family
from moekit.families.seam import RouterTap
from moekit.layout import Router

TOKENS = 256


class Routing(NamedTuple):
    """What a router decided for T tokens: logits_TE (raw, before any score), weights_TK, ids_TK."""

    logits: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor


@dataclass(frozen=True)
class Probed:
    """What a router's behaviour showed.

    Attributes:
        router: score, order, normalisation, groups, biases.
        top_k: experts chosen per token.
        width: rows of the router.
        own_biases: names of correction biases inside the router.
        borrowed_biases: names of correction biases that the block passes to it.
    """

    router: Router
    top_k: int
    width: int
    own_biases: tuple[str, ...] = ()
    borrowed_biases: tuple[str, ...] = ()

    def bias_keys(self, router_path: str) -> tuple[str, ...]:
        """Model keys of the correction biases of the router at `router_path`."""
        block = router_path.rpartition(".")[0]
        return (*(f"{router_path}.{x}" for x in self.own_biases), *(f"{block}.{x}" for x in self.borrowed_biases))


class _CallOrder(TorchFunctionMode):
    """Notes the names of torch functions in the order of their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def probe_router(
    family: Family,
    module: nn.Module,
    block: nn.Module,
    num_experts: int,
    hidden_size: int,
    groups: tuple[int, int],
    axes: dict[str, int],
) -> Probed:
    """Describe a stock router by what it does.

    Args:
        family: knows how to read the router's outputs.
        module: the (weightless) router.
        block: the module that calls it; its tensors are passed to routers that ask for them by name.
        num_experts: E.
        hidden_size: d.
        groups: (groups, groups_kept) that the config claims; (1, 1) for none.
        axes: expert axis of the module's own parameters and buffers, by local name.

    Raises:
        TypeError, RuntimeError, ...: the router cannot be run alone, or its outputs are not understood.
    """
    router = copy.deepcopy(module).to_empty(device="cpu").float().eval()
    generator = torch.Generator().manual_seed(0)
    biases = {}
    passed = borrowed_arguments(module, block)
    extra = {name: torch.empty(tensor.shape) for name, tensor in passed.items()}
    axes = axes | dict.fromkeys(extra, 0)
    for name, tensor in (*router.named_parameters(), *router.named_buffers(), *extra.items()):
        if not tensor.is_floating_point():
            tensor.data.zero_()
        elif tensor.dim() > 1 and tensor.shape[-1] > 1 and tensor.numel() > 2 * num_experts:
            tensor.data = torch.randn(tensor.shape, generator=generator) * tensor.shape[-1] ** -0.5
        elif name in axes:
            tensor.data.zero_()
            biases[name] = tensor
        else:
            tensor.data.fill_(1.0)
    width = max(
        (
            x.shape[axes[name]]
            for name, x in router.named_parameters()
            if name in axes and x.dim() > 1 and x.numel() > 2 * num_experts
        ),
        default=num_experts,
    )
    hidden = torch.randn(TOKENS, hidden_size, generator=generator)

    @torch.no_grad()
    def run() -> tuple[Routing, list[str]]:
        nonlocal hidden
        try:
            return _ask(family, router, hidden, extra, width)
        except (ValueError, IndexError):  # some routers take [batch, T, D] only
            hidden = hidden[None]
            return _ask(family, router, hidden, extra, width)

    # A bias of zero keeps a correction bias out of the way; a per-expert scale must be one to leave the weights alone.
    base, calls = run()
    correction, logit_bias = [], False
    for name, tensor in biases.items():
        flat = tensor.data.view(-1)
        flat[0] = 100.0
        moved, _ = run()
        flat[0] = 0.0
        if (moved.logits[:, 0] - base.logits[:, 0]).abs().min() > 1:
            logit_bias = True
        elif (moved.ids == 0).any(-1).all():
            correction.append(name)
        else:  # multiplies the weights
            tensor.data.fill_(1.0)
    base, calls = run()
    top_k = base.ids.shape[-1]
    score = next(
        (name for name in calls if name in ("softmax", "sigmoid", "softplus", "logsigmoid", "relu")), "unknown"
    )
    first = calls.index(score) if score in calls else 0
    order = "top-k, score" if "topk" in calls and calls.index("topk") < first else "score, top-k"
    renormalised, scaling, known = _normalisation(score, base, num_experts)
    kept = groups if groups[0] > 1 and _within_groups(base.ids, num_experts, *groups) else (1, 1)
    return Probed(
        Router(
            score=score if known else f"{score}, special",
            order=order,
            renormalised=renormalised,
            scaling=scaling,
            groups=kept[0],
            groups_kept=kept[1],
            correction_bias=bool(correction),
            logit_bias=logit_bias,
        ),
        top_k,
        width,
        tuple(x for x in correction if x not in extra),
        tuple(x for x in correction if x in extra),
    )


def _ask(
    family: Family, router: nn.Module, hidden: torch.Tensor, extra: dict[str, torch.Tensor], width: int
) -> tuple[Routing, list[str]]:
    with RouterTap(width) as tap, _CallOrder() as order:
        weights, ids = family.routing(router(hidden, **extra))
    if tap.logits is None:
        raise TypeError("no linear map as wide as the router has rows")
    return Routing(tap.logits.reshape(-1, width).float(), weights.float(), ids.long()), order.names


def borrowed_arguments(router: nn.Module, block: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors of the block that the router's forward takes as arguments (a correction bias kept outside of the router)."""
    names = list(inspect.signature(type(router).forward).parameters)[2:]
    return {name: x for name in names if isinstance(x := getattr(block, name, None), torch.Tensor)}


def _normalisation(score: str, routing: Routing, num_experts: int) -> tuple[bool, float, bool]:
    """(renormalised, scaling, whether score, renormalisation and scaling together explain the weights)."""
    logits = routing.logits[:, :num_experts]
    scores = {"softmax": lambda x: x.softmax(-1), "sigmoid": torch.sigmoid, "relu": torch.relu}.get(score)
    if scores is None:
        total = routing.weights.sum(-1)
        constant = bool((total - total.mean()).abs().max() < 1e-3)
        return constant, round(float(total.mean()), 4) if constant else 1.0, False
    chosen = scores(logits).gather(1, routing.ids)
    plain = routing.weights / chosen.clamp_min(1e-12)
    normed = routing.weights / (chosen / chosen.sum(-1, keepdim=True)).clamp_min(1e-12)
    for renormalised, ratio in ((True, normed), (False, plain)):
        if (ratio / ratio.mean() - 1).abs().max() < 2e-3:
            return renormalised, round(float(ratio.mean()), 4), True
    return False, 1.0, False


def _within_groups(ids: torch.Tensor, num_experts: int, groups: int, kept: int) -> bool:
    """Whether no token ever chose from more than `kept` groups."""
    group = ids // (num_experts // groups)
    used = torch.zeros(len(ids), groups, dtype=torch.bool).scatter_(1, group, True)
    return bool((used.sum(-1) <= kept).all())
