"""The teacher's next-token distributions, taken in one streamed pass and kept as likeliest tokens and a rest.

So teacher and student are never in memory together. A file a batch, which is not
written again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moekit.data import Batch
from moekit.evaluation.compare import LOGIT_BYTES
from moekit.families.model import Model
from moekit.methods.heal.router_distill import Top, top
from moekit.progress import Progress
from moekit.stream import Stream


def rows_at_once(vocab_size: int, length: int) -> int:
    """Sequences whose logits may be in memory together."""
    return max(1, LOGIT_BYTES // (4 * vocab_size * length))


@dataclass(frozen=True)
class Lesson:
    """One sequence and what the teacher says of every position of it.

    Attributes:
        ids: token ids [T].
        wanted: the teacher's distributions, [T, N].
    """

    ids: torch.Tensor
    wanted: Top


class Lessons:
    """All sequences of the text, by number; read when asked for.

    Args:
        folder: where the pass has left them.
    """

    def __init__(self, folder: Path):
        self._places: list[tuple[Path, int, int]] = []
        for file in sorted(folder.glob("teacher-*.safetensors")):
            with safe_open(file, "pt") as found:
                lengths = found.get_tensor("lengths").tolist()
            self._places += [(file, row, length) for row, length in enumerate(lengths)]

    def __len__(self) -> int:
        return len(self._places)

    def tokens(self, number: int) -> int:
        """Tokens of a sequence."""
        return self._places[number][2]

    def __getitem__(self, number: int) -> Lesson:
        file, row, length = self._places[number]
        with safe_open(file, "pt") as found:
            ids, top_ids, logs, rest = (found.get_slice(name)[row] for name in ("ids", "top_ids", "logs", "rest"))
        return Lesson(ids[:length], Top(top_ids[:length].long(), logs[:length], rest[:length]))


def take_lessons(
    teacher: Model,
    batches: Sequence[Batch],
    count: int,
    folder: Path,
    *,
    temperature: float = 1.0,
    dtype: torch.dtype | None,
    device: str,
    progress: Progress,
) -> Lessons:
    """Run the teacher over the text, unless that was done before.

    Args:
        teacher: streamed, one layer in memory.
        batches: of the text.
        count: likeliest tokens that are kept one by one.
        folder: where they are left.
        temperature: that logits are divided by.
        dtype: to run in; None for its own.
        device: "cpu" or "cuda".
        progress: told as layers pass.
    """
    parts = [
        Batch(batch.domain, batch.ids[i : i + rows], batch.mask[i : i + rows])
        for batch in batches
        for rows in [rows_at_once(teacher.layout.vocab_size, batch.ids.shape[1])]
        for i in range(0, len(batch.ids), rows)
    ]
    files = [folder / f"teacher-{number:05d}.safetensors" for number in range(len(parts))]
    if not all(file.is_file() for file in files):
        folder.mkdir(parents=True, exist_ok=True)
        stream = Stream(teacher.loader(dtype, device), progress=progress)
        for part, file, logits in zip(parts, files, stream.run([x.ids for x in parts]), strict=True):
            _write(file, part, top(logits / temperature, count))
    return Lessons(folder)


def _write(file: Path, part: Batch, found: Top) -> None:
    partial = file.with_name(file.name + ".partial")
    tensors = {
        "ids": part.ids,
        "lengths": part.mask.sum(1),
        "top_ids": found.ids.int(),
        "logs": found.logs,
        "rest": found.rest,
    }
    save_file({name: x.cpu().contiguous() for name, x in tensors.items()}, partial)
    os.replace(partial, file)
