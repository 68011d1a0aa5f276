"""What a cache policy is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from moekit.errors import RecipeError, did_you_mean

Key = tuple[int, int]  # (MoE layer, counted from 0; expert)

POLICIES = {
    "lru": "moekit.serve.policies.lru:Lru",
    "lfu": "moekit.serve.policies.lfu:Lfu",
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


class Policy(ABC):
    """Decides what stays.

    Args:
        sizes: of the model and the memory.
    """

    def __init__(self, sizes: Sizes):
        self.sizes = sizes

    @abstractmethod
    def used(self, key: Key) -> None:
        """An expert is needed now, resident or not; called in the order in which experts run."""

    @abstractmethod
    def victim(self, incoming: Key, resident: Collection[Key]) -> Key | None:
        """Which of the resident experts that are not in use gives its place to `incoming`; None: none of them."""


def policy_named(name: str, sizes: Sizes, **settings: Any) -> Policy:
    """A policy by its name.

    Raises:
        RecipeError: no such policy.
    """
    if name not in POLICIES:
        raise RecipeError(f"there is no cache policy {name!r}", where="policy", fix=did_you_mean(name, POLICIES))
    module, _, attribute = POLICIES[name].partition(":")
    return getattr(import_module(module), attribute)(sizes, **settings)
