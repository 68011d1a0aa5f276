"""ERNIE 4.5 VL: every MoE layer has two sets of experts, one for text tokens and one for image tokens.

moekit sees the text set. Both sets have the number of experts that one config key states, so the text set cannot
shrink alone.
"""

from __future__ import annotations

from moekit.families.family import Family


class Ernie45VL(Family):
    """The text experts of a model that has vision experts too."""

    cannot_drop = "its vision experts are as many as its text experts by one config key, and vision is not measured"
