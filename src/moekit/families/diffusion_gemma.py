"""DiffusionGemma: a block-diffusion model, which has no next-token distribution to measure or to keep."""

from __future__ import annotations

from moekit.families.family import Family


class DiffusionGemma(Family):
    """Two stacks of layers with tied weights: an encoder of the prompt, a decoder that refines a canvas of tokens."""

    unsupported = (
        "a block-diffusion model: an encoder and a decoder with tied experts and a random canvas, no next-token logits"
    )
