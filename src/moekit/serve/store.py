"""The expert store: a model on disk so that one expert is one read.

    STORE/store.json               what lies where, of which model, with a checksum for every record
    STORE/experts-00003.bin        the experts of layer 3, one record each, aligned to 4 KiB
    STORE/rest-00003.safetensors   the layer's other parameters, by their name in the stock model (router, attention)
    STORE/rest-outer.safetensors   what is in no layer; packed matrices as NAME.weight.q and NAME.weight.scale
    STORE/config.json, tokenizer   as in the checkpoint

A record holds one expert's parameters one after the other, each aligned to 64 bytes, in the orientation of the stock
model, so that what was read is used where it lies.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moekit.checkpoint.reader import DTYPES
from moekit.errors import CheckpointError
from moekit.layout import Layout

MANIFEST = "store.json"
VERSION = 3
READABLE = (2, 3)  # 2: without packed matrices beside the experts
PAGE_BYTES = 4096
ALIGNMENT = 64
DIRECT = getattr(os, "O_DIRECT", 0)  # reads past the page cache; not on every system


@dataclass(frozen=True)
class Piece:
    """One tensor of a record.

    Attributes:
        name: of the parameter in the experts module, or of a part of it ("down_proj.scale").
        dtype: as safetensors names it.
        shape: of one expert.
        offset: in the record, bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def bytes(self) -> int:
        """Its size."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize

    def view(self, record: torch.Tensor) -> torch.Tensor:
        """The tensor in a record's bytes (uint8), not copied."""
        part = record[self.offset : self.offset + self.bytes]
        return part.view(DTYPES[self.dtype]).view(self.shape)


@dataclass(frozen=True)
class Form:
    """How an expert is kept.

    Attributes:
        bits: of a weight.
        group_size: input columns that share a scale; 0 for unquantised ones.
        pieces: its tensors.
        record_bytes: of a record, a multiple of 4 KiB.
    """

    bits: int
    group_size: int
    pieces: tuple[Piece, ...]
    record_bytes: int

    def views(self, record: torch.Tensor) -> dict[str, torch.Tensor]:
        """An expert's tensors by name, in a record's bytes."""
        return {piece.name: piece.view(record) for piece in self.pieces}


def checksum(record: torch.Tensor) -> int:
    """CRC-32 of the sums of a record's rows and columns, its words of 64 bits laid out in rows of 4 KiB.

    Any page or word that is damaged changes two sums, and pages that changed places change the order of the rows'. It
    takes a fifth of the time of a CRC of everything, which each read would wait for.

    Args:
        record: uint8, whole pages.
    """
    words_PW = record.numpy().view(np.uint64).reshape(-1, PAGE_BYTES // 8)
    rows = zlib.crc32(words_PW.sum(1, dtype=np.uint64).data)
    return zlib.crc32(words_PW.sum(0, dtype=np.uint64).data, rows)


def form_of(bits: int, group_size: int, tensors: dict[str, torch.Tensor]) -> Form:
    """The form of a record that holds these tensors."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    pieces, end = [], 0
    for name, x in tensors.items():
        start = -(-end // ALIGNMENT) * ALIGNMENT
        pieces.append(Piece(name, codes[x.dtype], tuple(x.shape), start))
        end = start + x.nbytes
    return Form(bits, group_size, tuple(pieces), -(-end // PAGE_BYTES) * PAGE_BYTES)


@dataclass(frozen=True)
class StoredLayer:
    """The records of one MoE layer.

    Attributes:
        file: their file's name.
        forms: the forms that occur.
        form: which of them each expert has [E].
        offsets: where each expert's record starts [E], bytes.
        checksums: `checksum` of each record [E].
    """

    file: str
    forms: tuple[Form, ...]
    form: tuple[int, ...]
    offsets: tuple[int, ...]
    checksums: tuple[int, ...]

    def of(self, expert: int) -> Form:
        """An expert's form."""
        return self.forms[self.form[expert]]


class ExpertStore:
    """A store that was packed by `moekit.serve.packing.pack`.

    Args:
        folder: where it lies.

    Raises:
        CheckpointError: not a store, one of another version, or files are missing or too short.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder)
        try:
            self.manifest: dict[str, Any] = json.loads((self.path / MANIFEST).read_text())
        except FileNotFoundError:
            raise CheckpointError(
                "this is no expert store", where=self.path, fix="make one: moekit pack MODEL --out STORE"
            ) from None
        except (OSError, ValueError) as error:
            raise CheckpointError("the store's manifest cannot be read", where=self.path, got=str(error)) from None
        if self.manifest.get("version") not in READABLE:
            raise CheckpointError(
                "a store of another version",
                where=self.path / MANIFEST,
                expected=" or ".join(map(str, READABLE)),
                got=self.manifest.get("version"),
                fix="pack the model again",
            )
        self.layout = Layout.from_dict(self.manifest["layout"])
        self.layers = {int(index): _layer(row) for index, row in self.manifest["layers"].items()}
        self._files: dict[str, int] = {}
        self._direct = bool(DIRECT)
        for name, size in self.manifest["sizes"].items():
            file = self.path / name
            found = file.stat().st_size if file.is_file() else None
            if found != size:
                raise CheckpointError(
                    "a file of the store is not whole",
                    where=file,
                    expected=f"{size:,} bytes",
                    got="no file" if found is None else f"{found:,} bytes",
                    fix="pack the model again",
                )

    @cached_property
    def expert_bytes(self) -> int:
        """Bytes of all records."""
        return sum(layer.of(e).record_bytes for layer in self.layers.values() for e in range(len(layer.offsets)))

    @cached_property
    def rest_bytes(self) -> int:
        """Bytes of everything that is no expert."""
        return sum(size for name, size in self.manifest["sizes"].items() if name.startswith("rest-"))

    @property
    def lossless(self) -> bool:
        """Whether every expert, and all else, has the numbers of the checkpoint."""
        return self.rest_bits >= 16 and all(form.bits >= 16 for layer in self.layers.values() for form in layer.forms)

    @property
    def rest_bits(self) -> int:
        """Bits of a weight of the large matrices beside the experts."""
        return self.manifest.get("rest_bits", 16)

    def read(self, layer: int, expert: int, into: torch.Tensor) -> Form:
        """Read one record; may run in several threads at once.

        Args:
            layer: decoder layer index.
            expert: its number.
            into: uint8, at least the record's bytes, that start at a multiple of 4 KiB.

        Returns:
            The record's form.

        Raises:
            CheckpointError: it cannot be read, or is shorter than it should be.
        """
        stored = self.layers[layer]
        form, offset = stored.of(expert), stored.offsets[expert]
        view = memoryview(into.numpy().data)[: form.record_bytes]
        done = 0
        try:
            while done < form.record_bytes:
                count = os.preadv(self._fd(stored.file), [view[done:]], offset + done)
                done += count
                if count == 0 or (self._direct and count % PAGE_BYTES):
                    break  # the end of the file: a direct read goes on at whole pages only
        except OSError as error:
            raise CheckpointError(
                "an expert cannot be read",
                where=f"{self.path / stored.file}: layer {layer}, expert {expert}",
                got=error.strerror or error,
                fix="check the disk; pack the model again",
            ) from None
        if done < form.record_bytes:
            raise CheckpointError(
                "an expert's record ends early",
                where=f"{self.path / stored.file}: layer {layer}, expert {expert}",
                expected=f"{form.record_bytes:,} bytes",
                got=f"{done:,}",
                fix="pack the model again",
            )
        return form

    def handle(self, layer: int) -> int:
        """The open file of a layer's records."""
        return self._fd(self.layers[layer].file)

    def check(self, layer: int, expert: int, record: torch.Tensor) -> None:
        """Refuse a record whose bytes are not those that were packed.

        Raises:
            CheckpointError: they are not.
        """
        stored = self.layers[layer]
        if checksum(record[: stored.of(expert).record_bytes]) != stored.checksums[expert]:
            raise CheckpointError(
                "an expert's record is damaged",
                where=f"{self.path / stored.file}: layer {layer}, expert {expert}",
                expected="the checksum that was written along with it",
                fix="check the disk; pack the model again",
            )

    def rest(self, layer: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The other parameters of a layer (-1: those of no layer), by name."""
        from safetensors import safe_open

        with safe_open(self.path / rest_name(layer), "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                yield name, file.get_tensor(name)

    def _fd(self, name: str) -> int:
        if name not in self._files:
            path = self.path / name
            try:
                self._files[name] = os.open(path, os.O_RDONLY | (DIRECT if self._direct else 0))
            except OSError:
                self._direct = False  # some file systems have no direct reads
                self._files[name] = os.open(path, os.O_RDONLY)
        return self._files[name]

    @property
    def direct(self) -> bool:
        """Whether reads go past the page cache."""
        if self.layers:
            self._fd(next(iter(self.layers.values())).file)
        return self._direct

    def close(self) -> None:
        """Close its files."""
        while self._files:
            os.close(self._files.popitem()[1])


def rest_name(layer: int) -> str:
    """File of the parameters of a layer that are no experts'."""
    return "rest-outer.safetensors" if layer < 0 else f"rest-{layer:05d}.safetensors"


def experts_name(layer: int) -> str:
    """File of a layer's records."""
    return f"experts-{layer:05d}.bin"


def to_row(layer: StoredLayer) -> dict[str, Any]:
    """A layer's records as JSON has them."""
    return asdict(layer)


def _layer(row: dict[str, Any]) -> StoredLayer:
    forms = tuple(
        Form(
            x["bits"],
            x["group_size"],
            tuple(Piece(p["name"], p["dtype"], tuple(p["shape"]), p["offset"]) for p in x["pieces"]),
            x["record_bytes"],
        )
        for x in row["forms"]
    )
    return StoredLayer(row["file"], forms, tuple(row["form"]), tuple(row["offsets"]), tuple(row["checksums"]))
