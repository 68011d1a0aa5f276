"""Models that speak together must mean the same by every token: compared by their tokenizers, before any is loaded."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moekit.data import load_tokenizer
from moekit.errors import ModelError
from moekit.families.model import Model


def check_same_vocabulary(models: Sequence[Model]) -> None:
    """Refuse models whose tokens differ.

    Raises:
        ModelError: a tokenizer has other tokens than the first one's, or a model has no tokenizer.
    """
    known = {}
    for model in models:
        tokenizer = load_tokenizer(model.path, trust_remote_code=model.trust_remote_code)
        known[model.name] = tokenizer.get_vocab()
    first = known[models[0].name]
    for name, words in known.items():
        if words != first:
            alike = sum(first.get(word) == number for word, number in words.items())
            raise ModelError(
                "the models have not the same vocabulary, so their logits cannot be added",
                where=name,
                expected=f"the {len(first):,} tokens of {models[0].name}",
                got=f"{len(words):,} tokens, {alike:,} of them the same",
                fix="take models of one family of tokenizers",
            )


def cut_alike(logits: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Logits [B, V] of models whose output is padded to different widths, cut to the least: no token is behind it."""
    width = min(x.shape[-1] for x in logits)
    return [x[..., :width] for x in logits]
