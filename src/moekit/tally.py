"""Tally: how often each of very many keys came, in bounded memory."""

from __future__ import annotations

import tempfile
from typing import IO

import numpy as np

PENDING_KEYS = 1 << 16  # keys kept as they came before they are counted


class Tally:
    """Counts integer keys: kept raw first, then as one sorted run, then as runs in an anonymous file.

    Args:
        memory_keys: distinct keys held in memory; 16 bytes each, half as much again while they are being counted.
    """

    def __init__(self, memory_keys: int):
        self._limit = memory_keys
        self._pending: list[np.ndarray] = []
        self._waiting = 0
        self._keys, self._counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._file: IO[bytes] | None = None

    def add(self, keys: np.ndarray) -> None:
        """Count these int64 keys, one each time that they occur."""
        self._pending.append(keys)
        self._waiting += len(keys)
        if self._waiting >= max(PENDING_KEYS, len(self._keys) // 2):
            self._count()
            if len(self._keys) > self._limit:
                self._spill()

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """(keys, counts), both int64, keys ascending and distinct."""
        self._count()
        if self._file is not None:
            self._spill()
            end = self._file.tell()
            self._file.seek(0)
            while self._file.tell() < end:
                self._merge(np.load(self._file), np.load(self._file))
            self._file.close()
            self._file = None
        return self._keys, self._counts

    def _count(self) -> None:
        if self._waiting:
            keys = np.sort(np.concatenate(self._pending))
            self._pending, self._waiting = [], 0
            self._merge(keys, np.ones(len(keys), np.int64))

    def _merge(self, keys: np.ndarray, counts: np.ndarray) -> None:
        keys, counts = np.concatenate([self._keys, keys]), np.concatenate([self._counts, counts])
        order = np.argsort(keys, kind="stable")  # merges sorted runs in linear time
        keys = keys[order]
        starts = np.flatnonzero(np.diff(keys, prepend=keys[:1] - 1))
        self._keys, self._counts = keys[starts], np.add.reduceat(counts[order], starts)

    def _spill(self) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="moekit-tally-")  # noqa: SIM115 (lives as long as the tally)
        np.save(self._file, self._keys)
        np.save(self._file, self._counts)
        self._keys, self._counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
