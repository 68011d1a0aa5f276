"""Large numpy arrays in safetensors files: made at their full size, filled row by row in any order, read memory-mapped.

A file is a plain safetensors file from its first moment on, which any safetensors library reads; memory holds only the
rows at hand, however long the arrays are.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np

from moekit.errors import DataError

Spec = Mapping[str, tuple[np.dtype | type, tuple[int, ...]]]  # name -> (dtype, shape)

_CODES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "uint64": "U64", "int64": "I64", "float16": "F16", "float32": "F32", "float64": "F64",
}  # fmt: skip
_DTYPES = {code: np.dtype(name) for name, code in _CODES.items()}
_ALIGNMENT = 64


def spec_bytes(spec: Spec) -> int:
    """Bytes of these arrays."""
    return sum(np.dtype(dtype).itemsize * prod(shape) for dtype, shape in spec.values())


def header_of(spec: Spec) -> bytes:
    """Length and JSON header of a safetensors file with these arrays; wide dtypes first, so that all are aligned."""
    rows: dict[str, object] = {}
    end = 0
    for name, (dtype, shape) in sorted(spec.items(), key=lambda item: (-np.dtype(item[1][0]).itemsize, item[0])):
        start, end = end, end + np.dtype(dtype).itemsize * prod(shape)
        rows[name] = {"dtype": _CODES[np.dtype(dtype).name], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(rows, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


class ArrayFile:
    """A safetensors file that is filled piece by piece.

    Args:
        path: the file; one that holds exactly these arrays already is gone on with, any other is replaced.
        spec: dtype and shape of each array.
    """

    def __init__(self, path: Path, spec: Spec):
        header = header_of(spec)
        size = len(header) + spec_bytes(spec)
        with path.open("ab"):
            pass
        self._file: BinaryIO = path.open("r+b", buffering=0)
        if self._file.read(len(header)) != header or path.stat().st_size != size:
            self._file.truncate(0)
            self._file.seek(0)
            self._file.write(header)
            self._file.truncate(size)
        rows = json.loads(header[8:])
        self._places = {
            name: (len(header) + rows[name]["data_offsets"][0], np.dtype(dtype), tuple(shape))
            for name, (dtype, shape) in spec.items()
        }

    def write(self, name: str, row: int, values: np.ndarray) -> None:
        """Put `values` [n, ...] into rows `row` to `row + n` of an array."""
        offset, dtype, shape = self._places[name]
        if values.shape[1:] != shape[1:] or row < 0 or row + len(values) > shape[0]:
            raise ValueError(f"{name}: rows {row} + {values.shape} do not fit into {shape}")
        data = np.ascontiguousarray(values, dtype).reshape(-1).view(np.uint8).data
        self._file.seek(offset + row * prod(shape[1:]) * dtype.itemsize)
        while len(data):
            data = data[self._file.write(data) :]

    def close(self) -> None:
        """No more is written."""
        self._file.close()


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """A safetensors file of whole arrays."""
    path.unlink(missing_ok=True)
    file = ArrayFile(path, {name: (array.dtype, array.shape) for name, array in arrays.items()})
    for name, array in arrays.items():
        file.write(name, 0, array)
    file.close()


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, memory-mapped and read-only: what is not looked at is not read.

    Raises:
        DataError: no such file, not safetensors, or truncated.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > size:
                raise ValueError(f"header of {length:,} bytes in a file of {size:,}")
            rows = {name: row for name, row in json.loads(file.read(length)).items() if name != "__metadata__"}
        end = 8 + length + max((row["data_offsets"][1] for row in rows.values()), default=0)
        if size != end:
            raise DataError(
                "a file is truncated" if size < end else "a file is longer than its header says",
                where=path,
                expected=f"{end:,} bytes",
                got=f"{size:,} bytes",
                fix="record or measure again, or copy the file again",
            )
        data = np.memmap(path, np.uint8, "r") if rows else np.empty(0, np.uint8)
        return {name: _slice(data, 8 + length, row) for name, row in rows.items()}
    except FileNotFoundError:
        raise DataError("a file is missing", where=path, fix="record or measure again, or copy it again") from None
    except (ValueError, KeyError, TypeError, struct.error, OSError) as error:
        raise DataError("a file is damaged", where=path, expected="safetensors", got=str(error)[:200]) from None


def _slice(data: np.ndarray, base: int, row: dict) -> np.ndarray:
    start, end = row["data_offsets"]
    if base + start > base + end:
        raise ValueError("offsets run backwards")
    return np.asarray(data[base + start : base + end]).view(_DTYPES[row["dtype"]]).reshape(row["shape"])
