"""What is known of how experts compute their outputs."""

from __future__ import annotations

from torch import nn

from moekit.families.family import Family


def proportional(family: Family, experts: nn.Module) -> bool:
    """Whether an expert's output is proportional to its last projection (and the bias of it)."""
    return family.by_contract and not experts.has_post_expert_norm
