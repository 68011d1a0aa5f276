"""What a cache policy is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from moekit.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from moekit.serve.routes import Routes

Key = tuple[int, int]  # (MoE layer, counted from 0; expert)

POLICIES = {
    "lru": "moekit.serve.policies.lru:Lru",
    "lfu": "moekit.serve.policies.lfu:Lfu",
    "arc": "moekit.serve.policies.arc:Arc",
    "fate": "moekit.serve.policies.fate:Fate",
    "edgemoe": "moekit.serve.policies.edgemoe:EdgeMoE",
    "moe-infinity": "moekit.serve.policies.moe_infinity:MoEInfinity",
    "static": "moekit.serve.policies.static:Static",
    "reuse": "moekit.serve.policies.reuse:Reuse",
    "belady": "moekit.serve.policies.belady:Belady",
}


@dataclass(frozen=True)
class Sizes:
    """What there is to hold, and where.

    Attributes:
        slots: experts that fit in memory.
        layers: L, MoE layers.
        experts: E, of a layer.
        top_k: chosen for a token.
    """

    slots: int
    layers: int
    experts: int
    top_k: int

    @property
    def cycle(self) -> int:
        """Experts that one token needs: L k."""
        return self.layers * self.top_k


class Policy(ABC):
    """Decides what stays. It never loads or frees anything.

    Attributes:
        needs: "trace" or "future" where it cannot work without; "" where it can.

    Args:
        sizes: of the model and the memory.
        trace: routes of other texts, from which it may learn beforehand.
        future: the very routes that will be replayed (only the simulator has them).
    """

    needs: ClassVar[str] = ""

    def __init__(self, sizes: Sizes, trace: Routes | None = None, future: Routes | None = None):
        self.sizes = sizes
        if (self.needs == "trace" and trace is None) or (self.needs == "future" and future is None):
            raise RecipeError(
                "this cache policy cannot work from what has been seen so far alone",
                where="policy",
                expected="a trace of the model on other texts" if self.needs == "trace" else "moekit simulate",
                fix="give a trace (--trace)" if self.needs == "trace" else "choose another policy to run with",
            )

    def begin(self) -> None:  # noqa: B027 (most need not know)
        """A new text begins."""

    def step(self) -> None:  # noqa: B027
        """A forward of the model begins: the next token of a text (or of several), or a chunk of a prompt."""

    @abstractmethod
    def used(self, layer: int, experts: np.ndarray, counts: np.ndarray) -> None:
        """A layer's experts are needed now, resident or not.

        Args:
            layer: MoE layer, counted from 0.
            experts: each once [n].
            counts: tokens that need each [n].
        """

    @abstractmethod
    def victim(self, incoming: Key, resident_LE: np.ndarray) -> Key | None:
        """Which resident expert gives its place to one that was needed and is not resident.

        Args:
            incoming: the newcomer; `used` has been told of it.
            resident_LE: what is in memory, True where it is; full.

        Returns:
            A resident expert; None: none, the newcomer is used and forgotten.
        """

    def came(self, key: Key) -> None:  # noqa: B027
        """An expert has become resident."""

    def left(self, key: Key) -> None:  # noqa: B027
        """An expert is resident no more."""


class Scored(Policy):
    """A policy that gives every expert a number: those with the highest stay, newcomers included.

    A newcomer that scores below all residents is not kept (bypass), unless `admits` says so.
    """

    always_admits: ClassVar[bool] = False

    @abstractmethod
    def scores(self, layer: int) -> np.ndarray:
        """What each expert is worth keeping for [L, E], while `layer` runs."""

    def victim(self, incoming: Key, resident_LE: np.ndarray) -> Key | None:
        """The resident with the lowest score, if it is not above the newcomer's."""
        scores = self.scores(incoming[0])
        flat = np.where(resident_LE, scores, np.inf).argmin()
        layer, expert = divmod(int(flat), self.sizes.experts)
        if not self.always_admits and scores[incoming] <= scores[layer, expert]:
            return None
        return layer, expert


def policy_named(name: str, sizes: Sizes, trace: Routes | None = None, **settings: Any) -> Policy:
    """A policy by its name.

    Args:
        name: one of `POLICIES`.
        sizes: of the model and the memory.
        trace: routes of other texts.
        settings: the policy's own.

    Raises:
        RecipeError: no such policy, or it needs what is not there.
    """
    if name not in POLICIES:
        raise RecipeError(f"there is no cache policy {name!r}", where="policy", fix=did_you_mean(name, POLICIES))
    module, _, attribute = POLICIES[name].partition(":")
    return getattr(import_module(module), attribute)(sizes, trace=trace, **settings)
