"""What a predictor is.

Symbols: T tokens, L MoE layers, E experts, K chosen, D hidden.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from moekit.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from moekit.serve.predictors.routers import Routers
    from moekit.serve.routes import Routes

PREDICTORS = {
    "gate": "moekit.serve.predictors.gate:Gate",
    "paths": "moekit.serve.predictors.paths:Paths",
    "activations": "moekit.serve.predictors.activations:Activations",
    "flow": "moekit.serve.predictors.flow:Flow",
    "pregate": "moekit.serve.predictors.pregate:Pregate",
}
WHERE = "predictor"


@dataclass(frozen=True, eq=False)
class Seen:
    """What is known of T tokens when a layer's experts are to be told.

    Attributes:
        tokens: the tokens and the two before each, -1 where a text begins [T, 3], the token itself first.
        counts: tokens of each token's text so far, by layer and expert, itself left out [T, L, E], or [1, L, E] where
            all tokens share one.
        ids: chosen experts of the layers that have run, by MoE layer [T, K]; E where a slot stayed empty.
        hidden: what routers were given, by MoE layer [T, D].
    """

    tokens: np.ndarray
    counts: np.ndarray
    ids: Mapping[int, np.ndarray]
    hidden: Mapping[int, torch.Tensor]

    def before(self, layer: int) -> Seen:
        """What is known before a layer runs."""
        ids = {number: x for number, x in self.ids.items() if number < layer}
        return Seen(self.tokens, self.counts, ids, {number: x for number, x in self.hidden.items() if number < layer})


class Predictor(ABC):
    """Tells which experts a layer will choose, from what ran before it.

    Attributes:
        needs: what it is made of: "trace" (routes of other texts), "hidden" (the trace with what routers were given),
            "routers" (those of the model).
        watches_hidden: looks at what routers are given.
        first: the first MoE layer that it can tell.

    Args:
        trace: routes of other texts.
        routers: of the model.
    """

    needs: ClassVar[str] = "trace"
    watches_hidden: ClassVar[bool] = False
    first: ClassVar[int] = 1

    def __init__(self, trace: Routes | None = None, routers: Routers | None = None):
        lacking = {
            "trace": trace is None,
            "hidden": trace is None or not trace.hidden,
            "routers": routers is None,
        }[self.needs]
        if lacking:
            expected = {
                "trace": "a trace of the model on other texts",
                "hidden": "a trace of the model on other texts, and the model to record what its routers are given",
                "routers": "the model, whose routers it asks",
            }[self.needs]
            raise RecipeError(
                "this predictor lacks what it is made of", where=WHERE, expected=expected, fix=f"give {expected}"
            )

    @abstractmethod
    def scores(self, layer: int, seen: Seen) -> np.ndarray:
        """How likely each token is to choose each expert [T, E]; higher is likelier.

        Args:
            layer: MoE layer, from `first` on.
            seen: of the layers before it.
        """


def predictor_named(name: str, trace: Routes | None = None, routers: Routers | None = None) -> Predictor:
    """A predictor by its name, trained where it must be.

    Raises:
        RecipeError: no such predictor, or it lacks what it is made of.
    """
    if name not in PREDICTORS:
        raise RecipeError(f"there is no predictor {name!r}", where=WHERE, fix=did_you_mean(name, [*PREDICTORS, "none"]))
    module, _, attribute = PREDICTORS[name].partition(":")
    return getattr(import_module(module), attribute)(trace, routers)


def top(scores_TE: np.ndarray, count: int) -> np.ndarray:
    """The experts with the highest scores, best first [T, count]; of equal ones the lower number."""
    return np.argsort(-scores_TE, axis=1, kind="stable")[:, :count]
