"""Inkling: the router also scores the S shared experts (its last S rows); all K + S weights are normalised together."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from moekit.families.family import Family

if TYPE_CHECKING:
    from moekit.families.probe import Probed


class Inkling(Family):
    """Sigmoid scores; a token's weights of chosen and shared experts sum to a constant."""

    def refine(self, probed: Probed) -> Probed:
        """Name the joint normalisation."""
        return replace(probed, router=replace(probed.router, score="sigmoid with shared experts"))
