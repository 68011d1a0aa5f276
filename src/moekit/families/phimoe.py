"""PhiMoE: sparsemixer. Each of two choices is weighed by a softmax over the experts whose logits come near to it.

The first choice is the best expert, the second the best of the rest; always two, whatever `num_experts_per_tok` says.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from moekit.families.family import Family

if TYPE_CHECKING:
    from moekit.families.probe import Probed


class PhiMoE(Family):
    """Weights that do not sum to one and depend on the experts that were not chosen."""

    def refine(self, probed: Probed) -> Probed:
        """Name the score."""
        return replace(probed, router=replace(probed.router, score="sparsemixer", order="score, top-k"))
