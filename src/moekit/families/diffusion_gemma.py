"""DiffusionGemma: a block-diffusion model, which has no next-token distribution to measure or to keep."""

from __future__ import annotations

from moekit.families.family import Family


class DiffusionGemma(Family):
    """Two stacks of layers with tied weights, the prompt's encoder and the decoder; the layout has the decoder's."""

    cannot_run = "a block-diffusion model: it refines a random canvas of tokens and has no next-token logits"
