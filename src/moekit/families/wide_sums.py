"""Families whose eager experts add up in a wider dtype than the hidden states: Nemotron-H in that of the weights."""

from __future__ import annotations

import torch

from moekit.families.family import Family


class WeightsDtype(Family):
    """Sums in the dtype of the routing weights."""

    def sum_dtype(self, hidden: torch.dtype, weights: torch.dtype) -> torch.dtype:
        """That of the weights."""
        return weights


class Float32(Family):
    """Sums in float32."""

    def sum_dtype(self, hidden: torch.dtype, weights: torch.dtype) -> torch.dtype:
        """float32."""
        return torch.float32
