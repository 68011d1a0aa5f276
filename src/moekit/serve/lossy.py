"""Ways to run and read fewer experts that change what the model says: all are off unless asked for by name.

    drop=F         an expert that is not in memory is left out where every token weighs it under F/k
    substitute=F   such an expert's place is taken by the most similar one that is in memory and that the token does
                   not run yet; similarity: cosine of the router's rows, less their mean
    adaptive-k=P   a token runs the fewest of its experts that together have the share P of its weight
    odp=PLAN       online dynamic pruning by the thresholds of a plan (`moekit.methods.live.odp`)

k is the number of experts that the model gives a token; weights are shares of the token's sum. A token's first expert
always runs. What is left of a token's weights keeps their sum where the family's router normalises them. An expert that
one token of a batch needs is read anyway, so then it is left out for none.

docs/lossy.md has what each costs. Symbols: T tokens, K chosen, E experts.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from moekit.apply.dynamic import changes
from moekit.errors import ModelError, PlanError, RecipeError, did_you_mean
from moekit.families.rows import router_rows
from moekit.families.seam import rescaled
from moekit.plans import Plan
from moekit.view import MoEView

if TYPE_CHECKING:
    from moekit.serve.cache import ExpertCache


@dataclass(frozen=True)
class Lossy:
    """What may be lost.

    Attributes:
        drop: F; 0: nothing is dropped.
        substitute: F; 0: nothing is substituted. Experts under both limits are dropped.
        adaptive_k: P; 1: every chosen expert runs.
        odp: a plan of `Odp` ops, or its file.

    Raises:
        RecipeError: a limit below 0, a share outside of 0 to 1.
    """

    drop: float = 0.0
    substitute: float = 0.0
    adaptive_k: float = 1.0
    odp: str | Path | Plan | None = None

    def __post_init__(self) -> None:
        for name, low, high in (("drop", 0.0, 16.0), ("substitute", 0.0, 16.0), ("adaptive_k", 0.0, 1.0)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise RecipeError(
                    "impossible setting", where=f"lossy {name}", expected=f"{low:g} to {high:g}", got=value
                )

    @classmethod
    def parse(cls, text: str) -> Lossy:
        """Read "drop=1.0,adaptive-k=0.9,odp=plan.json".

        Raises:
            RecipeError: an unknown name, or a value that is no number.
        """
        names = [x.name.replace("_", "-") for x in fields(cls)]
        found: dict[str, float | str] = {}
        for part in text.split(","):
            name, _, value = (x.strip() for x in part.partition("="))
            if name not in names:
                raise RecipeError(f"there is no lossy setting {name!r}", where="lossy", fix=did_you_mean(name, names))
            try:
                found[name.replace("-", "_")] = value if name == "odp" else float(value)
            except ValueError:
                raise RecipeError("not a number", where=f"lossy {name}", got=value or "nothing") from None
        return cls(**found)  # type: ignore[arg-type]


@dataclass
class Lost:
    """What was lost so far.

    Attributes:
        tokens: that ran, once a layer.
        dropped: sum over them of the share of weight that was left out.
        substituted: the same, of what other experts took over.
        avoided: reads that would have been made without.
    """

    tokens: int = 0
    dropped: float = 0.0
    substituted: float = 0.0
    avoided: int = 0

    def describe(self) -> str:
        """One line for people."""
        count = max(1, self.tokens)
        return (
            f"lossy: {self.dropped / count:.1%} of router weight left out, {self.substituted / count:.1%} given to "
            f"other experts, {self.avoided:,} reads avoided"
        )


class Losses:
    """Applies the settings, layer by layer; `stored_experts` asks it.

    Args:
        settings: what may be lost.
        view: of the running model.

    Attributes:
        lost: what was.

    Raises:
        PlanError: a plan for another model, or without Odp ops.
        ModelError: a family whose experts do not follow the contract of transformers 5; substitution where a router has
            not one row for each expert.
    """

    def __init__(self, settings: Lossy, view: MoEView):
        if not view.family.by_contract:
            raise ModelError("lossy settings are not made for this family", got=view.layout.family)
        self.settings, self.lost, self._view = settings, Lost(), view
        self._layers = view.layout.by_index
        self._stack = ExitStack()
        self._odp = (
            self._stack.enter_context(changes(view, _plan(settings.odp, view).dynamic())) if settings.odp else {}
        )
        self._similar: dict[int, list[list[int]]] = {}
        for layer in view.layout.routed if settings.substitute else ():
            rows_ED = router_rows(view.router(layer.index), layer)
            rows_ED = torch.nn.functional.normalize(rows_ED - rows_ED.mean(0), dim=1)
            self._similar[layer.index] = (rows_ED @ rows_ED.T).argsort(1, descending=True).tolist()

    def attach(self) -> Losses:
        """Be asked by the model's experts from now on, instead of others."""
        for layer in self._view.layout.routed:
            self._view.experts(layer.index)._moekit_losses = self
        return self

    def change(
        self, index: int, cache: ExpertCache, hidden_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts that run, with E in places that stay empty, and their weights.

        Args:
            index: decoder layer index.
            cache: says which experts are in memory.
            hidden_TD: inputs of the experts.
            ids_TK: chosen experts.
            weights_TK: their weights.
        """
        layer, settings = self._layers[index], self.settings
        count = layer.num_experts
        old, share = ids_TK.numpy(), weights_TK.float().numpy()
        real = old < count
        share = np.where(real, share, 0.0)
        total = share.sum(-1, keepdims=True)
        share = share / np.where(total == 0, 1.0, total)
        keep = real.copy()
        if index in self._odp:
            keep &= self._odp[index](hidden_TD, ids_TK, weights_TK).float().numpy() != 0
        if settings.adaptive_k < 1:
            order = np.argsort(-share, axis=-1, kind="stable")
            ordered = np.take_along_axis(share, order, -1)
            enough = np.cumsum(ordered, -1) - ordered >= settings.adaptive_k
            np.put_along_axis(enough, order, enough.copy(), -1)
            keep &= ~enough
        first = share == share.max(-1, keepdims=True)
        keep |= first & real
        new = old.copy()
        largest = np.zeros(count + 1)  # of each expert over the tokens that want it
        np.maximum.at(largest, np.where(keep, old, count), np.where(first, np.inf, share))
        wanted = set(old[real].tolist())
        missing = {e for e in wanted if not cache.holds(index, e)}
        limit = {name: getattr(settings, name) / old.shape[1] for name in ("drop", "substitute")}
        dropped = {e for e in missing if 0 < largest[e] < limit["drop"]}
        replaced = {e for e in missing - dropped if 0 < largest[e] < limit["substitute"]}
        for t, k in np.argwhere(keep & np.isin(old, list(dropped | replaced))) if dropped or replaced else ():
            expert = int(old[t, k])
            other = self._other(index, expert, new[t], missing, cache) if expert in replaced else None
            if other is None:
                keep[t, k] = False
            else:
                new[t, k] = other
                self.lost.substituted += float(share[t, k])
        runs = set(new[keep].tolist())
        self.lost.tokens += len(old)
        self.lost.dropped += float(share[real & ~keep].sum())
        self.lost.avoided += len(missing - runs)
        if keep.sum() == real.sum() and not replaced:
            return ids_TK, weights_TK
        kept = torch.from_numpy(keep)
        weights = rescaled(weights_TK, kept.float(), layer.router.renormalised)
        return torch.from_numpy(new).masked_fill(~kept & torch.from_numpy(real), count), weights

    def _other(self, index: int, expert: int, taken: np.ndarray, missing: set[int], cache: ExpertCache) -> int | None:
        """The most similar expert that is in memory and that the token does not run."""
        chosen = set(taken.tolist()) | missing
        return next((e for e in self._similar[index][expert] if e not in chosen and cache.holds(index, e)), None)

    def close(self) -> None:
        """Be asked no more, and take away what a plan put into the model."""
        for layer in self._view.layout.routed:
            self._view.experts(layer.index)._moekit_losses = None
        self._stack.close()


def _plan(given: str | Path | Plan | None, view: MoEView) -> Plan:
    plan = given if isinstance(given, Plan) else Plan.load(Path(str(given)))
    plan.check(view.layout)
    if not plan.dynamic():
        raise PlanError("the plan prunes nothing dynamically", where="lossy odp", fix="moekit.plan('odp', stats)")
    return plan
