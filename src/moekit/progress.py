"""How long work tells where it is: a callable that any caller may give and nobody needs."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called as work goes on: `progress("layers", 3, 48)` after the third of 48 units of a stage."""

    def __call__(self, stage: str, done: int, total: int, /) -> None:
        """Tell that `done` of `total` units of `stage` are done."""
        ...


def silent(stage: str, done: int, total: int, /) -> None:
    """Says nothing."""
