"""How does this router choose? Asked of the router itself, not of its config or its name.

The stock router module is filled with random numbers and run on random tokens; the order of its calls, the weights that
it returns and its answer to a changed bias tell everything. Config fields lie (DeepSeek-V2 ignores `norm_topk_prob`,
Mixtral has no such field and always renormalises); behaviour does not.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import logsigmoid, softplus
from torch.overrides import TorchFunctionMode

from moekit.families.family import Family
from moekit.families.seam import RouterTap
from moekit.layout import Router

TOKENS = 256
SCORES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "softplus-sqrt": lambda logits: softplus(logits).sqrt(),
}
SOFTPLUS_IS_EXP = -20.0  # below, log(1 + e^x) and e^x are one float32


def log_scores(score: str, logits: torch.Tensor) -> torch.Tensor:
    """Logarithms of a router's scores, up to a constant for each token.

    Args:
        score: `Router.score`; what is not a plain function of one logit ("sparsemixer", unknown ones) counts as
            "softmax".
        logits: raw, float32, any shape; of experts that a plan bans the lowest number there is.

    Returns:
        The same shape; finite where the logits are.
    """
    if score.startswith("sigmoid"):
        return logsigmoid(logits)
    if score.startswith("softplus-sqrt"):
        return 0.5 * torch.where(logits < SOFTPLUS_IS_EXP, logits, softplus(logits.clamp_min(SOFTPLUS_IS_EXP)).log())
    if score.startswith("relu"):
        return logits.clamp_min(torch.finfo(logits.dtype).tiny).log()
    return logits


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
        tables: names of tables inside the router that say which experts a token id gets.
    """

    router: Router
    top_k: int
    width: int
    own_biases: tuple[str, ...] = ()
    borrowed_biases: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()

    def bias_keys(self, router_path: str) -> tuple[str, ...]:
        """Model keys of the correction biases of the router at `router_path`."""
        block = router_path.rpartition(".")[0]
        return (*(f"{router_path}.{x}" for x in self.own_biases), *(f"{block}.{x}" for x in self.borrowed_biases))


class _Calls(TorchFunctionMode):
    """Notes the names of torch functions in the order of their calls, and the shapes of what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(getattr(func, "__name__", ""))
        if isinstance(out, torch.Tensor):
            self.shapes.add(tuple(out.shape))
        return out


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
    extra = {name: torch.empty(tensor.shape) for name, tensor in borrowed_arguments(module, block).items()}
    axes = axes | dict.fromkeys(extra, 0)
    biases, tables = {}, {}
    width = num_experts
    for name, tensor in (*router.named_parameters(), *router.named_buffers(), *extra.items()):
        if not tensor.is_floating_point():
            if tensor.dim() == 2:
                tables[name] = tensor
            tensor.data.copy_(_random_table(tensor.shape, num_experts, generator))
        elif tensor.dim() > 1 and tensor.shape[-1] > 1 and tensor.numel() > 2 * num_experts:
            tensor.data = torch.randn(tensor.shape, generator=generator) * tensor.shape[-1] ** -0.5
            width = max(width, tensor.shape[axes[name]] if name in axes else 0)
        elif name in axes:  # zero keeps a correction bias out of the way
            tensor.data.zero_()
            biases[name] = tensor
        else:
            tensor.data.fill_(1.0)
    arguments: dict[str, torch.Tensor] = dict(extra)
    if "input_ids" in inspect.signature(type(module).forward).parameters:
        rows = min((len(x) for x in tables.values()), default=1)
        arguments["input_ids"] = torch.randint(0, rows, (TOKENS,), generator=generator)
    hidden = torch.randn(TOKENS, hidden_size, generator=generator)

    @torch.no_grad()
    def run() -> tuple[Routing, _Calls]:
        nonlocal hidden
        try:
            return _ask(family, router, hidden, arguments, width)
        except (ValueError, IndexError):  # some routers take [batch, T, D] only
            hidden = hidden[None]
            return _ask(family, router, hidden, arguments, width)

    base, _ = run()
    correction, logit_bias, expert_scale = [], False, False
    for name, tensor in biases.items():
        first = tensor.data.view(-1)[:1]
        first.fill_(100.0)
        moved, _ = run()
        first.zero_()
        if (moved.logits[:, 0] - base.logits[:, 0]).abs().min() > 1:
            logit_bias = True
        elif (moved.ids == 0).any(-1).all():
            correction.append(name)
        else:  # multiplies the weights
            expert_scale = expert_scale or not torch.equal(moved.weights, base.weights)
            tensor.data.fill_(1.0)
    base, calls = run()
    by_table = [x for x, table in tables.items() if torch.equal(base.ids, table[arguments["input_ids"]].long())]
    score, known, renormalised, scaling = _weighing(calls.names, base)
    grouped = any(shape[-2:] == (groups[0], num_experts // groups[0]) for shape in calls.shapes)
    grouped = grouped and groups[0] > 1 and _within_groups(base.ids, num_experts, *groups)
    return Probed(
        Router(
            score=score if known else f"{score}, special",
            order="table, score" if by_table else _order(calls.names),
            renormalised=renormalised,
            scaling=scaling,
            groups=groups[0] if grouped else 1,
            groups_kept=groups[1] if grouped else 1,
            correction_bias=bool(correction),
            logit_bias=logit_bias,
            expert_scale=expert_scale,
        ),
        base.ids.shape[-1],
        width,
        tuple(x for x in correction if x not in extra),
        tuple(x for x in correction if x in extra),
        tuple(by_table),
    )


def _random_table(shape: torch.Size, num_experts: int, generator: torch.Generator) -> torch.Tensor:
    """Random expert numbers, no two alike in a row of a table as wide as it may be."""
    if len(shape) != 2 or shape[1] > num_experts:
        return torch.zeros(shape, dtype=torch.long)
    return torch.rand(shape[0], num_experts, generator=generator).argsort(-1)[:, : shape[1]]


def _ask(
    family: Family, router: nn.Module, hidden: torch.Tensor, arguments: dict[str, torch.Tensor], width: int
) -> tuple[Routing, _Calls]:
    with RouterTap(width) as tap, _Calls() as calls:
        weights, ids = family.routing(router(hidden, **arguments))
    if tap.logits is None:
        raise TypeError("no linear map as wide as the router has rows")
    return Routing(tap.logits.reshape(-1, width).float(), weights.float(), ids.long()), calls


def borrowed_arguments(router: nn.Module, block: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors of the block that the router's forward takes as arguments (a correction bias kept outside of it)."""
    names = list(inspect.signature(type(router).forward).parameters)[2:]
    return {name: x for name in names if isinstance(x := getattr(block, name, None), torch.Tensor)}


def _score(names: list[str]) -> tuple[str, int]:
    """(the score function that was called first, its place among the calls)."""
    found = next(((x, i) for i, x in enumerate(names) if x in (*SCORES, "softplus")), ("unknown", len(names)))
    return ("softplus-sqrt" if found[0] == "softplus" and "sqrt" in names else found[0]), found[1]


def _order(names: list[str]) -> str:
    return "top-k, score" if "topk" in names and names.index("topk") < _score(names)[1] else "score, top-k"


def _weighing(names: list[str], routing: Routing) -> tuple[str, bool, bool, float]:
    """(score, whether the following explain the weights: renormalised, scaling)."""
    score, _ = _score(names)
    used = (routing.weights != 0).all(-1)  # a token may choose no expert
    weights, ids = routing.weights[used], routing.ids[used]
    if score in SCORES:
        chosen = SCORES[score](routing.logits[used]).gather(1, ids)
        shares = chosen / chosen.sum(-1, keepdim=True)
        for renormalised, expected in ((True, shares), (False, chosen)):
            ratio = weights / expected.clamp_min(1e-12)
            if renormalised and ids.shape[-1] == 1 and not torch.allclose(weights, weights[:1]):
                continue  # a share of one alone is one
            if (ratio / ratio.mean() - 1).abs().max() < 2e-3:
                return score, True, renormalised, round(float(ratio.mean()), 4)
    return score, False, False, 1.0


def _within_groups(ids: torch.Tensor, num_experts: int, groups: int, kept: int) -> bool:
    """Whether no token ever chose from more than `kept` groups."""
    group = ids // (num_experts // groups)
    used = torch.zeros(len(ids), groups, dtype=torch.bool).scatter_(1, group, True)
    return bool((used.sum(-1) <= kept).all())
