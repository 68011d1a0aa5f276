"""Streamed, atomic, resumable writing of safetensors checkpoints.

An output checkpoint is known completely before a byte is written: every tensor with its dtype, shape and source. So
shards, headers, index and the space needed are computed first, and what can go wrong is refused first. Then bytes go
from file to file, inside the kernel where it can, into `OUT.partial/`: each shard under a temporary name until it is
complete and on the disk, then the small files; one rename makes OUT. A run that was killed goes on when the same job is
run again: finished shards are kept. Nobody ever sees a half-written OUT.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch

from moekit.checkpoint.place import (
    JOB,
    check_inputs,
    check_place,
    check_side_files,
    check_space,
    claimed,
    failed,
    move,
    sign,
    sync,
    take_over,
    write_text,
)
from moekit.checkpoint.reader import DTYPES, INDEX
from moekit.errors import CheckpointError, OutputError
from moekit.progress import Progress, silent

STEM = "model"  # of the files in which stock transformers looks for weights
BLOCK_BYTES = 1 << 24  # copied inside the kernel at a time
BUFFER_BYTES = 1 << 23  # copied through our own memory at a time
AHEAD_BYTES = 1 << 25  # read before its turn comes; written before it is sent to the disk
NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


@dataclass(frozen=True)
class Copy:
    """Bytes that lie in a file already.

    Attributes:
        file: the input file.
        spans: (start, end) byte ranges, laid one after the other.
    """

    file: Path
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Make:
    """A tensor that is computed when its turn comes; it must have the dtype and shape that were announced."""

    fn: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class OutTensor:
    """One tensor of the output.

    Attributes:
        name: in the output.
        dtype: safetensors' name for it ("BF16").
        shape: sizes.
        source: where its bytes come from.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: Copy | Make

    @property
    def bytes(self) -> int:
        """Size of its data."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Shard:
    """One safetensors file of the output.

    Attributes:
        name: of the file.
        tensors: as they lie in it.
        turns: the same in the order in which they are written: what is computed together has its turn together,
            wherever it lies, so that nothing waits in memory.
    """

    name: str
    tensors: tuple[OutTensor, ...]
    turns: tuple[OutTensor, ...]

    @cached_property
    def starts(self) -> dict[str, int]:
        """Where each tensor's data begin in the file, by name."""
        ends = itertools.accumulate((tensor.bytes for tensor in self.tensors), initial=len(self.header))
        return {tensor.name: start for tensor, start in zip(self.tensors, ends, strict=False)}

    @cached_property
    def header(self) -> bytes:
        """Length and JSON header, padded with spaces so that the data starts at a multiple of 8 bytes."""
        rows: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor in self.tensors:
            start, end = end, end + tensor.bytes
            rows[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (start, end)}
        text = json.dumps(rows, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(tensor.bytes for tensor in self.tensors)


@dataclass(frozen=True)
class Written:
    """What `write_checkpoint` did.

    Attributes:
        path: the output folder.
        bytes: of all tensors.
        shards: safetensors files.
        reused: how many of them an interrupted run had finished.
    """

    path: Path
    bytes: int
    shards: int
    reused: int


def plan_shards(tensors: Sequence[OutTensor], shard_bytes: int, stem: str = STEM) -> list[Shard]:
    """Cut a list of tensors, in order, into files of at most `shard_bytes` (a larger tensor has a file of its own).

    Inside a file tensors of wider dtypes come first, so that every one of them is aligned.
    """
    groups: list[list[OutTensor]] = [[]]
    room = shard_bytes
    for tensor in tensors:
        if groups[-1] and tensor.bytes > room:
            groups.append([])
            room = shard_bytes
        groups[-1].append(tensor)
        room -= tensor.bytes
    count = len(groups)
    numbers = [f"-{i:05}-of-{count:05}" for i in range(1, count + 1)] if count > 1 else [""]
    names = [f"{stem}{number}.safetensors" for number in numbers]
    return [
        Shard(name, tuple(sorted(group, key=lambda x: -DTYPES[x.dtype].itemsize)), tuple(group))
        for name, group in zip(names, groups, strict=True)
    ]


def write_checkpoint(
    out: str | Path,
    tensors: Sequence[OutTensor],
    config: dict,
    side_files: Iterable[tuple[Path, Path]] = (),
    *,
    job: dict,
    stem: str = STEM,
    shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    progress: Progress = silent,
    finish: Callable[[Path], object] | None = None,
) -> Written:
    """Write a checkpoint folder, or go on with one that the same job left unfinished.

    Args:
        out: the folder to make; its parent must exist.
        tensors: in the order in which their sources are best read.
        config: becomes config.json.
        side_files: (file, its name relative to `out`) of tokenizer, templates, licence ...: copied as they are.
        job: JSON data that names what is written (hashes of source and plan): equal jobs continue each other's work.
        stem: what the files' names start with; under another than "model" stock transformers finds no weights.
        shard_bytes: largest size of a file's tensors together.
        overwrite: replace `out` if it holds a model; drop what another job left unfinished.
        progress: told of "bytes".
        finish: called with the unfinished folder when all else is in it, to add files.

    Raises:
        OutputError: the place cannot be written to or is taken, the disk is too small or fills up.
        CheckpointError: an input file ends early.
    """
    out = Path(out).resolve()
    check_place(out, overwrite)
    partial = out.with_name(out.name + ".partial")
    if shard_bytes < 1:
        raise OutputError("impossible shard size", expected="at least 1 byte", got=shard_bytes)
    _check_consistent(tensors)
    shards = plan_shards(tensors, shard_bytes, stem)
    sides = [(Path(source), Path(relative)) for source, relative in side_files]
    check_side_files(sides, {shard.name for shard in shards} | {"config.json", INDEX, JOB})
    check_inputs(out, partial, {x.source.file for x in tensors if isinstance(x.source, Copy)} | {x for x, _ in sides})
    identity = json.loads(json.dumps({"job": job, "shard_bytes": shard_bytes, "tensors": _hash(tensors)}))
    try:
        with claimed(partial):
            take_over(partial, identity, overwrite)
            todo = [shard for shard in shards if not _is_finished(partial / shard.name, shard)]
            total, left = sum(x.bytes for x in shards), sum(x.bytes for x in todo)
            check_space(partial, left + sum(source.stat().st_size for source, _ in sides))
            sign(partial, identity)
            report = _Bytes(progress, total - left, total)
            for shard in todo:
                _write_shard(partial / shard.name, shard, report)
            _write_small_files(partial, shards, config, sides)
            if finish:
                finish(partial)
            for path in partial.rglob("*"):
                sync(path)
            move(partial, out)
    except OSError as error:
        raise failed(error, partial) from error
    return Written(out, sum(x.bytes for x in tensors), len(shards), len(shards) - len(todo))


class _Bytes:
    """Adds up bytes and tells the listener."""

    def __init__(self, listener: Progress, done: int, total: int):
        self.listener, self.done, self.total = listener, done, total
        self(0)

    def __call__(self, count: int) -> None:
        self.done += count
        self.listener("bytes", self.done, self.total)


def _check_consistent(tensors: Sequence[OutTensor]) -> None:
    """A mistake here is a bug of the caller's, not of the user's."""
    if len({x.name for x in tensors}) != len(tensors):
        raise ValueError("two output tensors have one name")
    for x in tensors:
        if isinstance(x.source, Copy) and sum(end - start for start, end in x.source.spans) != x.bytes:
            raise ValueError(f"{x.name}: spans do not add up to {x.dtype} {x.shape}")


def _hash(tensors: Sequence[OutTensor]) -> str:
    digest = hashlib.sha256()
    for x in tensors:
        source = (x.source.file.name, x.source.spans) if isinstance(x.source, Copy) else "made"
        digest.update(f"{x.name} {x.dtype} {x.shape} {source}\n".encode())
    return digest.hexdigest()[:16]


def _is_finished(file: Path, shard: Shard) -> bool:
    """A shard has its final name only when it was complete and on the disk."""
    return file.is_file() and file.stat().st_size == shard.bytes


def _write_shard(file: Path, shard: Shard, advance: Callable[[int], None]) -> None:
    temporary = file.with_name(file.name + ".tmp")
    with _Inputs(shard.turns) as inputs, temporary.open("wb", buffering=0) as target:
        _write_bytes(target.fileno(), 0, memoryview(shard.header), advance)
        for tensor in shard.turns:
            position = shard.starts[tensor.name]
            if isinstance(tensor.source, Make):
                data = _as_bytes(tensor, tensor.source.fn())
                _write_bytes(target.fileno(), position, data, advance)
            else:
                for block in _blocks(tensor):
                    inputs.copy(block, target.fileno(), position)
                    position += block.bytes
                    advance(block.bytes)
        os.fsync(target.fileno())
    temporary.rename(file)
    sync(file.parent)


class _Block(NamedTuple):
    """A run of bytes of an input file, short enough to report progress after it."""

    tensor: str
    file: Path
    start: int
    bytes: int


def _blocks(tensor: OutTensor) -> Iterator[_Block]:
    if isinstance(tensor.source, Copy):
        for start, end in tensor.source.spans:
            for at in range(start, end, BLOCK_BYTES):
                yield _Block(tensor.name, tensor.source.file, at, min(BLOCK_BYTES, end - at))


class _Inputs:
    """The input files of one shard.

    The kernel guesses what is read next from what was read last, which fails at every expert that is skipped; so it is
    told. It is told too that what was written is not needed soon, for then it goes to the disk at once and the wait at
    the shard's end is short.
    """

    def __init__(self, tensors: Sequence[OutTensor]):
        self._ahead = (block for tensor in tensors for block in _blocks(tensor))
        self._ahead_bytes = self._sent = 0
        self._open: dict[Path, int] = {}

    def copy(self, block: _Block, target: int, position: int) -> None:
        while self._ahead_bytes < AHEAD_BYTES and (coming := next(self._ahead, None)):
            self._ahead_bytes += coming.bytes
            _advise(self._handle(coming.file), coming.start, coming.bytes, "WILLNEED")
        self._ahead_bytes -= block.bytes
        done = 0
        while done < block.bytes:
            source = self._handle(block.file)
            count = copy_block(source, block.start + done, target, position + done, block.bytes - done)
            if count == 0:
                raise CheckpointError(
                    "checkpoint file ended early",
                    where=f"{block.file}: {block.tensor}",
                    fix="the file changed while it was read",
                )
            done += count
        if position + done - self._sent >= AHEAD_BYTES:
            _advise(target, self._sent, position + done - self._sent, "DONTNEED")
            self._sent = position + done

    def _handle(self, file: Path) -> int:
        if file not in self._open:
            self._open[file] = os.open(file, os.O_RDONLY)
        return self._open[file]

    def __enter__(self) -> _Inputs:
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            os.close(self._open.popitem()[1])


def _as_bytes(expected: OutTensor, made: torch.Tensor) -> memoryview:
    if made.dtype != DTYPES[expected.dtype] or tuple(made.shape) != expected.shape:
        raise ValueError(
            f"{expected.name}: announced {expected.dtype} {expected.shape}, made {made.dtype} {made.shape}"
        )
    return made.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write_bytes(target: int, position: int, data: memoryview, advance: Callable[[int], None]) -> None:
    while data:
        count = os.pwrite(target, data[:BLOCK_BYTES], position)
        data, position = data[count:], position + count
        advance(count)


def copy_block(source: int, start: int, target: int, position: int, count: int) -> int:
    """Copy up to `count` bytes from one open file to another, inside the kernel where it can.

    Returns:
        How many bytes were copied; 0 when the source ends at `start`.
    """
    try:
        if copied := os.copy_file_range(source, target, count, start, position):
            return copied
    except AttributeError:
        pass  # not Linux
    except OSError as error:
        if error.errno not in NO_KERNEL_COPY:
            raise
    return os.pwrite(target, os.pread(source, min(count, BUFFER_BYTES), start), position)


def _advise(handle: int, start: int, count: int, advice: str) -> None:
    """Tell the kernel what comes next, where it listens."""
    with suppress(AttributeError, OSError):
        os.posix_fadvise(handle, start, count, getattr(os, f"POSIX_FADV_{advice}"))


def _write_small_files(folder: Path, shards: list[Shard], config: dict, sides: list[tuple[Path, Path]]) -> None:
    for source, relative in sides:
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / relative)
    write_text(folder / "config.json", json.dumps(config, indent=2, ensure_ascii=False))
    if len(shards) > 1 and shards[0].name.startswith(STEM):
        weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
        size = sum(tensor.bytes for shard in shards for tensor in shard.tensors)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(folder / INDEX, json.dumps(index, indent=2, ensure_ascii=False))
