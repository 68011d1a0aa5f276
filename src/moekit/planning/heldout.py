"""Text that decisions are tested on is not the text that they were made from: a part of the calibration is held out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moekit.data import Batch, Dataset

TOKENS = 2048  # held out of each domain, at most
SHARE = 0.25  # of its tokens, at most


def hold_out(data: Dataset) -> tuple[Dataset, Dataset]:
    """(what is left, what is held out): sequences of every domain, spread evenly over it.

    A domain of a single sequence is in both: there is nothing to hold out.
    """
    rest: list[Batch] = []
    held: list[Batch] = []
    for index, name in enumerate(data.domains):
        batches = [x for x in data.batches if x.domain == index]
        rows = sum(len(x.ids) for x in batches)
        if rows < 2:
            rest += batches
            held += batches
            continue
        share = min(SHARE, TOKENS / max(1, data.tokens[name]))
        count = max(1, round(rows * share))
        picked = {int(i) for i in np.linspace(0, rows - 1, count + 2)[1:-1].round()} or {rows - 1}
        first = 0
        for batch in batches:
            numbers = range(first, first + len(batch.ids))
            first += len(batch.ids)
            held += _rows(batch, [i for i, row in enumerate(numbers) if row in picked])
            rest += _rows(batch, [i for i, row in enumerate(numbers) if row not in picked])
    return replace(data, batches=rest), replace(data, batches=held)


def _rows(batch: Batch, rows: list[int]) -> list[Batch]:
    if not rows:
        return []
    mask = batch.mask[rows]
    length = int(mask.any(0).sum())
    return [Batch(batch.domain, batch.ids[rows, :length], mask[:, :length])]
