"""Statistics from what a user points at: a trace, or a folder that `moekit measure` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moekit.errors import DataError

if TYPE_CHECKING:
    from moekit.families.model import Model
    from moekit.stats import Stats


def statistics(folder: Path, model: Model | None = None) -> Stats:
    """The sums in a folder; of a trace of generation, those of the prompts.

    Raises:
        DataError: neither a trace nor statistics, or of another model than `model`.
    """
    from moekit.stats import Stats
    from moekit.trace import Trace

    if (folder / "trace.json").exists():
        trace = Trace.open(folder)
        if model is not None:
            trace.check(model)
        return trace.phase_stats("prefill")
    stats = Stats.load(folder)
    if model is not None and stats.layout_hash != model.layout.hash:
        raise DataError(
            "the statistics are of another model", where=folder, expected=model.layout.hash, got=stats.layout_hash
        )
    return stats
