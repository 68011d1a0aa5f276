"""Lazy reading of safetensors checkpoints: headers first, then any tensor, any run of rows, straight from the file.

Files are read with `preadv` into memory that we own. Memory-mapping (what the safetensors library does) would count
every touched page as resident and reads cold files at a fraction of the disk's speed; a bounded-memory tool can afford
neither. Only headers are parsed here; the format is safetensors': 8 bytes of header length (little-endian), a JSON
header, then the data, tensors packed in C order.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import torch

from moekit.errors import CheckpointError, ModelError, did_you_mean

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own library
MAX_AXES = 64
FINGERPRINT_STEP, FINGERPRINT_BYTES = 8 << 20, 1 << 10
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor on disk: its file, dtype (safetensors' name for it), shape, and byte range in the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def bytes(self) -> int:
        """Size of its data."""
        return self.end - self.start

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first axis."""
        return self.bytes // self.shape[0] if self.shape and self.shape[0] else self.bytes


def parse_header(
    file: Path, raw_length: bytes, read_header: Callable[[int], bytes], data_bytes: int | None
) -> dict[str, TensorInfo]:
    """Check and parse one safetensors header.

    Args:
        file: name for messages and for the tensors' `file`.
        raw_length: the first 8 bytes.
        read_header: callable(length) that returns the next `length` bytes.
        data_bytes: size of the whole file, or None when unknown (remote).

    Raises:
        CheckpointError: anything that the format does not allow.
        ModelError: a dtype that is not supported.
    """
    fix = "download or copy this file again; it is not what its writer wrote"
    if len(raw_length) < 8:
        raise CheckpointError(
            "safetensors file is truncated",
            where=file,
            expected="at least 8 bytes",
            got=f"{len(raw_length)} bytes",
            fix=fix,
        )
    (length,) = struct.unpack("<Q", raw_length)
    if length > MAX_HEADER_BYTES or (data_bytes is not None and 8 + length > data_bytes):
        raise CheckpointError(
            "safetensors header has an impossible length", where=file, got=f"{length:,} bytes of header", fix=fix
        )
    raw = read_header(length)
    try:
        header = json.loads(raw)
        if not isinstance(header, dict):
            raise ValueError("not an object")
        header.pop("__metadata__", None)
        infos = {name: _tensor_info(name, row, file, 8 + length) for name, row in header.items()}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            "safetensors header cannot be parsed", where=file, got=str(error)[:200], fix=fix
        ) from None
    position = 8 + length
    for info in sorted(infos.values(), key=lambda x: (x.start, x.end)):
        if info.dtype not in DTYPES:
            raise ModelError(
                f"tensor dtype {info.dtype[:20]!r} is not supported",
                where=f"{file}: {info.name}",
                expected=", ".join(DTYPES),
                fix="convert the checkpoint",
            )
        size = prod(info.shape) * DTYPES[info.dtype].itemsize
        if info.start != position or info.bytes != size:
            raise CheckpointError(
                "safetensors header contradicts itself",
                where=f"{file}: {info.name}",
                expected=f"{size:,} bytes of {info.dtype} {list(info.shape)} at {position:,}",
                got=f"bytes {info.start:,} to {info.end:,}",
                fix=fix,
            )
        position = info.end
    if data_bytes is not None and position != data_bytes:
        raise CheckpointError(
            "safetensors file is truncated"
            if data_bytes < position
            else "safetensors file has bytes after its last tensor",
            where=file,
            expected=f"{position:,} bytes",
            got=f"{data_bytes:,} bytes",
            fix=fix,
        )
    return infos


def _tensor_info(name: str, row: dict, file: Path, data_start: int) -> TensorInfo:
    dtype, shape, (start, end) = row["dtype"], row["shape"], row["data_offsets"]
    lists = type(dtype) is str and type(shape) is list and len(shape) <= MAX_AXES
    if not lists or any(type(n) is not int or not 0 <= n < 1 << 63 for n in (*shape, start, end)):
        raise ValueError(f"{name!r}: {row}")
    return TensorInfo(name, file, dtype, tuple(shape), data_start + start, data_start + end)


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one local safetensors file, checked against the file's size.

    Raises:
        CheckpointError: the file cannot be read, or its header or size is wrong.
    """
    try:
        with file.open("rb") as stream:
            return parse_header(file, stream.read(8), stream.read, os.fstat(stream.fileno()).st_size)
    except OSError as error:
        raise _unreadable(file, error) from None


def _unreadable(where: object, error: OSError) -> CheckpointError:
    return CheckpointError(
        "checkpoint file cannot be read",
        where=where,
        got=error.strerror or str(error),
        fix="check the disk and the file's permissions",
    )


class Checkpoint:
    """A folder with config.json and safetensors files; nothing is loaded until it is read.

    Args:
        path: the folder.
        tensors: by name.
        config: config.json as a dict.
        local: False when only headers were fetched (from a hub); reading data then raises ModelError.
    """

    def __init__(self, path: Path, config: dict, tensors: dict[str, TensorInfo], local: bool = True):
        self.path, self.config, self.tensors, self.local = path, config, tensors, local
        self._files: dict[Path, int] = {}

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Read config and headers of a local folder.

        Raises:
            ModelError: not a model folder, or a pickle checkpoint.
            CheckpointError: files missing, corrupt, truncated, or contradicting the index.
        """
        path = Path(folder)
        return cls(path, read_config(path), _local_tensors(path))

    @property
    def files(self) -> list[Path]:
        """The safetensors files, sorted."""
        return sorted({info.file for info in self.tensors.values()})

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.bytes for info in self.tensors.values())

    def info(self, name: str) -> TensorInfo:
        """Where tensor `name` lies; CheckpointError with the nearest name when there is none."""
        if name not in self.tensors:
            near = did_you_mean(name, self.tensors) if len(self.tensors) < 100_000 else ""
            raise CheckpointError(f"checkpoint has no tensor {name!r}", where=self.path, fix=near[:300])
        return self.tensors[name]

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, on CPU, in its disk dtype."""
        info = self.info(name)
        return self.read_into(info, torch.empty(info.shape, dtype=DTYPES[info.dtype]))

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the first axis; reads only their bytes."""
        info = self.info(name)
        if not info.shape or not 0 <= start <= stop <= info.shape[0]:
            raise IndexError(f"rows {start} to {stop} of {name!r}, which has the shape {list(info.shape)}")
        out = torch.empty((stop - start, *info.shape[1:]), dtype=DTYPES[info.dtype])
        return self.read_into(info, out, start * info.row_bytes)

    def read_into(self, info: TensorInfo, out: torch.Tensor, offset: int = 0) -> torch.Tensor:
        """Fill the contiguous CPU tensor `out` with the tensor's bytes from `offset` on; returns `out`.

        Raises:
            CheckpointError: the file ends early or cannot be read.
        """
        if out.numel() == 0:
            return out
        if not self.local:
            raise ModelError(
                "only this model's headers were fetched",
                where=self.path,
                fix="download the checkpoint first, or give its local folder",
            )
        view = memoryview(out.reshape(-1).view(torch.uint8).numpy().data)
        position, fd = info.start + offset, self._fd(info.file)
        while view:
            try:
                count = os.preadv(fd, [view], position)
            except OSError as error:
                raise _unreadable(f"{info.file}: {info.name}", error) from None
            if count == 0:
                raise CheckpointError(
                    "checkpoint file ended early",
                    where=f"{info.file}: {info.name}",
                    fix="the file changed while it was read",
                )
            view, position = view[count:], position + count
        return out

    def _fd(self, file: Path) -> int:
        if file not in self._files:
            try:
                self._files[file] = os.open(file, os.O_RDONLY)
            except OSError as error:
                raise _unreadable(file, error) from None
        return self._files[file]

    def close(self) -> None:
        """Close the open files (they are opened again when needed)."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if os is not None:  # as it is when the interpreter ends, which closes files itself
            self.close()

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that name config, headers and weights.

        Of the weights, 1 KiB in the middle of each 8 MiB of a tensor is read, and of each tensor at least that: no
        tensor changes unseen in training, and a checkpoint of 700 GB takes seconds.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name, info in sorted(self.tensors.items()):
            digest.update(f"{name} {info.dtype} {info.shape} {info.start}".encode())
            for start in range(info.start, info.end, FINGERPRINT_STEP) if self.local else ():
                middle = (start + min(start + FINGERPRINT_STEP, info.end)) // 2
                first = max(start, middle - FINGERPRINT_BYTES // 2)
                count = min(FINGERPRINT_BYTES, info.end - first)
                digest.update(os.pread(self._fd(info.file), count, first))
        return digest.hexdigest()[:16]

    def side_files(self) -> Iterator[Path]:
        """Every other file that belongs to the model (tokenizer, templates, licence ...), relative to the folder."""
        weights = {file.name for file in self.files} | {INDEX, "config.json"}
        for file in sorted(self.path.rglob("*")):
            relative = file.relative_to(self.path)
            if (
                file.is_file()
                and not relative.parts[0].startswith(".")
                and not (len(relative.parts) == 1 and relative.name in weights)
            ):
                yield relative


def read_config(folder: Path) -> dict:
    """config.json of a folder.

    Raises:
        ModelError: no such folder, or no (valid) config.json in it.
    """
    if not folder.exists():
        raise ModelError(
            "no such model folder",
            where=folder,
            fix="give a folder, a hub id such as 'Qwen/Qwen3-30B-A3B', or 'refmoe'",
        )
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(
            "folder holds no config.json" if folder.is_dir() else "this is a file, not a model's folder",
            where=folder,
            expected="a model in Hugging Face format",
            fix="point at the folder that holds config.json",
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError("config.json is not valid JSON", where=file, got=error, fix="download it again") from None
    except OSError as error:
        raise ModelError(
            "config.json cannot be read", where=file, got=error.strerror, fix="check its permissions"
        ) from None
    if not isinstance(config, dict):
        raise ModelError("config.json is not an object", where=file, got=type(config).__name__, fix="download it again")
    return config


def _local_tensors(folder: Path) -> dict[str, TensorInfo]:
    if (folder / SINGLE).is_file():  # before an index, as stock transformers chooses
        return read_header(folder / SINGLE)
    if (folder / INDEX).is_file():
        return _indexed_tensors(folder)
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found = read_header(file)
        if twice := sorted(tensors.keys() & found.keys()):
            raise CheckpointError(
                "two files hold the same tensor, and no index says which counts",
                where=folder,
                got=f"{twice[0]!r} in {tensors[twice[0]].file.name} and {file.name}",
                fix=f"remove the files that do not belong to the model, or add {INDEX}",
            )
        tensors |= found
    if tensors:
        return tensors
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles:
        raise ModelError(
            "pickle checkpoints are refused: loading one can run any code",
            where=folder,
            expected="*.safetensors",
            got=", ".join(pickles[:3]),
            fix="convert it once with a tool that you trust, e.g. load and save_pretrained() in a sandbox",
        )
    raise ModelError(
        "folder holds no safetensors files",
        where=folder,
        expected=f"{SINGLE} or {INDEX}",
        fix="download the weights too",
    )


def _indexed_tensors(folder: Path) -> dict[str, TensorInfo]:
    index = folder / INDEX
    try:
        text = index.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError("shard index cannot be read", where=index, got=error, fix="download it again") from None
    weight_map = parse_index(text, index)
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            missing = next(name for name, file in weight_map.items() if file == shard)
            raise CheckpointError(
                "a shard is missing",
                where=folder / shard,
                got=f"the index needs it for {missing!r} and others",
                fix="download this file",
            )
        tensors |= {name: info for name, info in read_header(folder / shard).items() if weight_map.get(name) == shard}
    check_index(weight_map, tensors, index)
    return tensors


def parse_index(text: str, index: object) -> dict[str, str]:
    """The shard of each tensor, from the text of an index.

    Raises:
        CheckpointError: not an index, or one that points outside the model's folder.
    """
    try:
        weight_map = dict(json.loads(text)["weight_map"])
        shards = set(weight_map.values())
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            "shard index cannot be parsed", where=index, got=repr(error)[:200], fix="download it again"
        ) from None
    for shard in shards:
        if not isinstance(shard, str) or "\0" in shard or Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise CheckpointError(
                "the index points outside its folder: refused",
                where=index,
                got=repr(shard)[:200],
                fix="do not trust this checkpoint",
            )
    return weight_map


def check_index(weight_map: dict[str, str], tensors: dict[str, TensorInfo], index: object) -> None:
    """Refuse an index that names tensors which its shards do not hold."""
    absent = sorted(set(weight_map) - set(tensors))
    if absent:
        raise CheckpointError(
            f"{len(absent)} tensors of the index are not in the shards that it names",
            where=index,
            got=absent[0],
            fix="download index and shards again",
        )
