"""Hidden states of batches that wait: in memory up to a limit, on disk beyond it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.utils import _pytree as pytree

from moekit.stream.walk import Walk


class Spill:
    """Keeps hidden states of waiting batches on disk once they pass a limit; the tensors' memory is freed in place."""

    def __init__(self, limit_bytes: int):
        self._limit, self._resident = limit_bytes, 0
        self._folder: tempfile.TemporaryDirectory | None = None
        self._gone: dict[Walk, list[tuple[torch.UntypedStorage, Path]]] = {}

    def __enter__(self) -> Spill:
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def away(self, walk: Walk) -> None:
        """The batch waits at a layer: count its hidden states, and write them out if there are too many."""
        if walk.arrival is None:
            return
        arrival = walk.arrival
        first = arrival.args[0] if arrival.args else arrival.kwargs.get("hidden_states")
        tensors = [x for x in pytree.tree_leaves(first) if isinstance(x, torch.Tensor) and x.is_floating_point()]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors}
        size = sum(x.nbytes() for x in storages.values())
        if self._resident + size <= self._limit:
            self._resident += size
            walk.resident_bytes = size
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="moekit-spill-")
        self._gone[walk] = []
        for number, storage in enumerate(storages.values()):
            file = Path(self._folder.name) / f"{id(walk)}-{number}"
            data = _as_bytes(storage).clone().cpu()  # numpy would pin the storage itself to its size
            file.write_bytes(data.numpy().data)
            self._gone[walk].append((storage, file))
            storage.resize_(0)

    def back(self, walk: Walk) -> None:
        """The batch's turn has come: its hidden states are in memory again."""
        self._resident -= walk.resident_bytes
        walk.resident_bytes = 0
        for storage, file in self._gone.pop(walk, ()):
            storage.resize_(file.stat().st_size)
            _as_bytes(storage).copy_(torch.from_numpy(np.fromfile(file, np.uint8)))


def _as_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
