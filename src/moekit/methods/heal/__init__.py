"""Healing: new numbers for what is left of a model, so that it does again what the source did.

A healing method is a function of its options that returns what is fitted and how: sums to be filled with what a pass
shows (`router-lstsq`), or a `Tuning`, by which an engine of `moekit.fitting` runs Adam (`router-distill`,
`reconstruct`). The source is the teacher: the model before all steps, or the one that the option `teacher` names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moekit.errors import RecipeError

_ABOVE_ZERO = ("steps", "rate", "sequences", "top", "ridge")


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse numbers that no healing method can work with.

    Raises:
        RecipeError: with the option.
    """
    for name in _ABOVE_ZERO:
        if name in settings and not settings[name] > 0:
            raise RecipeError(f"impossible {name}", where=f"options.{name}", expected="above 0", got=settings[name])
    if not 0 < (share := settings.get("held_out", 0.5)) < 1:
        raise RecipeError("impossible held_out", where="options.held_out", expected="a share in (0, 1)", got=share)
