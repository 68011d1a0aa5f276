"""The weak pass of SCMoE: other experts than the router's choice run, in every layer, for some rows of a batch.

    rank:R      only the expert with the R-th highest score
    random      one expert, drawn anew for every token and layer
    top-1       only the best of the chosen ones
    fewer:N     the best N of the chosen ones

What the expert weighs follows the published code, and so the family's own convention: where the weights of the chosen
experts are normalised, the weak experts share the same sum (1, or the family's routed scaling factor); where they are
not, each has its own score times that factor. A random expert gets the strong experts' sum. Where the score is no plain
function of the logits (sparsemixer, sigmoid with shared experts), or experts have learned scales, the sum is kept too.

Ranks are by score over all experts of the layer. Groups, correction biases and tables, which decide the strong pass's
choice beside the score, do not limit them: the published models have none.

Symbols: T tokens, K slots, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from moekit.errors import RecipeError
from moekit.families.probe import SCORES
from moekit.families.seam import Call
from moekit.families.tokens import Reach
from moekit.layout import Layout, MoELayer
from moekit.view import MoEView


@dataclass(frozen=True)
class Weak:
    """Which experts a weak pass runs.

    Attributes:
        kind: "rank", "random" or "fewer".
        number: the rank, from 1; or how many of the chosen experts run.
        seed: of what is drawn.
    """

    kind: Literal["rank", "random", "fewer"]
    number: int = 1
    seed: int = 0

    @classmethod
    def parse(cls, text: str, seed: int = 0) -> Weak:
        """A rule as it is written: "rank:3", "random", "top-1", "fewer:2".

        Raises:
            RecipeError: no such rule.
        """
        if text == "random":
            return cls("random", seed=seed)
        if text == "top-1":
            return cls("fewer", 1)
        if found := re.fullmatch(r"(rank|fewer):([1-9]\d*)", text):
            return cls("rank" if found[1] == "rank" else "fewer", int(found[2]))
        raise RecipeError(
            f"there is no weak pass {text!r}", where="weak", expected="rank:R, random, top-1 or fewer:N, as rank:3"
        )

    def check(self, layout: Layout) -> None:
        """Refuse what the layers cannot do.

        Raises:
            RecipeError: a rank beyond the experts of a layer, or more experts than a token chooses.
        """
        most = min(x.num_experts if self.kind == "rank" else x.top_k for x in layout.routed)
        if self.kind != "random" and self.number > most:
            what = "experts in a layer" if self.kind == "rank" else "experts that a token chooses"
            raise RecipeError(
                "the weak pass asks for more than there is", where="weak", expected=f"{most} {what}", got=self.number
            )


def weak_routing(
    weak: Weak, layer: MoELayer, call: Call, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What runs instead of the router's choice.

    Args:
        weak: the rule.
        layer: the layer.
        call: what its router decided, with logits.
        generator: for "random".

    Returns:
        (ids_TK, weights_TK), the slots behind the weak experts empty (id E, weight 0).
    """
    assert call.logits is not None, "the router is tapped"
    total_T1 = call.weights.float().sum(-1, keepdim=True)
    if weak.kind == "fewer":
        values_TN, slots_TN = call.weights.topk(weak.number, dim=-1)
        chosen_TN, weights_TN = call.ids.gather(1, slots_TN), values_TN.float()
        if layer.router.renormalised:
            weights_TN = weights_TN / weights_TN.sum(-1, keepdim=True) * total_T1
    elif weak.kind == "random":
        drawn = torch.randint(layer.num_experts, (len(call.ids), 1), generator=generator)
        chosen_TN, weights_TN = drawn.to(call.ids.device), total_T1
    else:
        logits_TE = call.logits.float()
        chosen_TN = logits_TE.topk(weak.number, dim=-1).indices[:, -1:]
        weights_TN = _own_weight(layer, logits_TE, chosen_TN, total_T1)
    ids_TK, weights_TK = torch.full_like(call.ids, layer.num_experts), torch.zeros_like(call.weights)
    ids_TK[:, : chosen_TN.shape[1]] = chosen_TN.to(ids_TK.dtype)
    weights_TK[:, : chosen_TN.shape[1]] = weights_TN.to(weights_TK.dtype)
    return ids_TK, weights_TK


def _own_weight(
    layer: MoELayer, logits_TE: torch.Tensor, chosen_T1: torch.Tensor, total_T1: torch.Tensor
) -> torch.Tensor:
    router = layer.router
    if router.renormalised or router.expert_scale or router.score not in SCORES:
        return total_T1
    return router.scaling * SCORES[router.score](logits_TE).gather(1, chosen_T1)


@contextmanager
def weakened(view: MoEView, weak: Weak, tag: int) -> Iterator[None]:
    """Run the weak pass for the rows that have a tag; all others run as ever.

    Args:
        view: of the model.
        weak: which experts run.
        tag: of the rows (`moekit.families.tokens.Tokens.tags`).

    Raises:
        RecipeError: more than the layers have.
    """
    weak.check(view.layout)
    generator = torch.Generator().manual_seed(weak.seed)
    changes = {x.index: partial(weak_routing, weak, x, generator=generator) for x in view.layout.routed}
    with view.reroute(changes, Reach(tag=tag)):
        yield
