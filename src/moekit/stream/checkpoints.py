"""What a run leaves on disk so that it can go on after a kill."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch.utils import _pytree as pytree


@dataclass
class Checkpoints:
    """Where a run leaves what it needs to go on after a kill.

    Attributes:
        folder: a folder of its own.
        identity: names the job; what another job left is ignored.
        carry: plain data saved along with the hidden states, and restored into the same dict.
        every_s: seconds between checkpoints (at layer boundaries).
    """

    folder: Path
    identity: str
    carry: dict = field(default_factory=dict)
    every_s: float = 60.0

    def load(self) -> tuple[int, list[Path]]:
        """(layer to go on with, one file a batch); (0, []) when there is nothing to resume.

        What another job left, or what is damaged, is removed.
        """
        folder = self.folder / "hidden"
        try:
            saved = torch.load(folder / "state.pt", weights_only=True)
            if saved["identity"] == self.identity:
                self.carry.clear()
                self.carry.update(saved["carry"])
                return saved["next"], sorted(folder.glob("batch-*.pt"))
        except (OSError, RuntimeError, EOFError, KeyError, UnpicklingError):
            pass
        shutil.rmtree(folder, ignore_errors=True)
        return 0, []

    def save_batch(self, number: int, output: object) -> None:
        """Keep one batch's output of the layer that is running."""
        folder = self.folder / "hidden.next"
        if number == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        _save(pytree.tree_map_only(torch.Tensor, lambda x: x.cpu().clone(), output), folder / f"batch-{number:06d}.pt")

    def commit(self, following: int) -> None:
        """All batches of a layer are kept: this is the checkpoint now."""
        new, old = self.folder / "hidden.next", self.folder / "hidden"
        _save({"identity": self.identity, "next": following, "carry": self.carry}, new / "state.pt")
        shutil.rmtree(old, ignore_errors=True)
        new.rename(old)


def _save(value: object, file: Path) -> None:
    with file.open("wb") as stream:  # given a path, torch says of a full disk that it is torch's own failure
        torch.save(value, stream)
