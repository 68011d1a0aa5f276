"""Inkling: the router also scores the S shared experts (its last S rows); all K + S weights are normalised together."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from moekit.families.family import Family

if TYPE_CHECKING:
    from moekit.families.probe import Probed


class Inkling(Family):
    """Sigmoid scores; a token's weights of chosen and shared experts sum to a constant."""

    def routing(self, outputs: tuple) -> tuple[torch.Tensor, torch.Tensor]:
        """The second and the third; the weights of shared experts behind them may have the same shape."""
        return outputs[1], outputs[2]

    def refine(self, probed: Probed) -> Probed:
        """Name the joint normalisation."""
        return replace(probed, router=replace(probed.router, score="sigmoid with shared experts"))
