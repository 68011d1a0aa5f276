"""A payload of plain values and arrays as one compressed blob for the page, or as plain numbers for report.json.

The blob is gzip of: length of the JSON (uint32, little-endian), JSON, arrays one after another. In the JSON an array is
{"at", "bits", "shape"} with its first byte counted from the end of the JSON, and for floating-point numbers also
{"low", "step"}: number = low + code * step (2 to that power where "log" is true); the highest code stands for none.
"""

from __future__ import annotations

import gzip
import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

DIGITS = 6  # significant digits in report.json


@dataclass(frozen=True, eq=False)
class Packed:
    """An array and how finely the page holds it.

    Attributes:
        values: whole numbers, which are kept exactly, or floating-point numbers, which are spread evenly over
            2^bits - 1 levels between the smallest and the largest: half a level is the largest error. NaN for none.
        bits: 8, 16 or 32 a number.
        log: spread the logarithms of positive numbers; what is not positive counts as none.
    """

    values: np.ndarray
    bits: int = 16
    log: bool = False

    def encode(self) -> tuple[dict[str, Any], bytes]:
        """The description without "at", and the codes.

        Raises:
            ValueError: a whole number does not fit.
        """
        head: dict[str, Any] = {"bits": self.bits, "shape": list(self.values.shape)}
        none = 2**self.bits - 1
        codes = self.values
        if codes.dtype.kind == "f":
            numbers = np.log2(codes, out=np.full(codes.shape, np.nan), where=codes > 0) if self.log else codes
            finite = numbers[np.isfinite(numbers)].astype(np.float64)
            low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
            step = (high - low) / (none - 1) or 1.0
            codes = np.where(np.isfinite(numbers), np.rint((numbers - low) / step), none)
            head |= {"low": low, "step": step, "log": self.log}
        elif codes.size and (codes.min() < 0 or codes.max() > none):
            raise ValueError(f"{codes.min()} to {codes.max()} in {self.bits} bits")
        return head, np.ascontiguousarray(codes.astype(f"<u{self.bits // 8}")).tobytes()


def to_blob(payload: Any) -> bytes:
    """A payload as the page reads it."""
    arrays = bytearray()

    def place(array: Packed) -> dict[str, Any]:
        arrays.extend(b"\0" * (-len(arrays) % 4))
        head, data = array.encode()
        head["at"] = len(arrays)
        arrays.extend(data)
        return head

    text = json.dumps(_walk(payload, place), separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-len(text) % 4)
    return gzip.compress(struct.pack("<I", len(text)) + text + bytes(arrays), mtime=0)


def from_blob(blob: bytes) -> Any:
    """What the page will show of a payload: arrays as numpy, NaN for none."""
    data = gzip.decompress(blob)
    (length,) = struct.unpack_from("<I", data)

    def read(node: dict) -> Any:
        if "bits" not in node:
            return node
        count = math.prod(node["shape"])
        codes = np.frombuffer(data, f"<u{node['bits'] // 8}", count, 4 + length + node["at"]).reshape(node["shape"])
        if "step" not in node:
            return codes
        numbers = np.where(codes == 2 ** node["bits"] - 1, np.nan, node["low"] + codes * node["step"])
        return np.exp2(numbers) if node["log"] else numbers

    return json.loads(data[4 : 4 + length], object_hook=read)


def to_plain(payload: Any) -> Any:
    """A payload as report.json holds it: every number, to six digits."""
    return _walk(payload, lambda array: _walk(array.values.tolist(), None))


def _walk(node: Any, array: Callable[[Packed], Any] | None) -> Any:
    if isinstance(node, Packed) and array:
        return array(node)
    if isinstance(node, dict):
        return {str(key): _walk(value, array) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_walk(value, array) for value in node]
    if isinstance(node, np.generic):
        node = node.item()
    if isinstance(node, float):
        return float(f"{node:.{DIGITS}g}") if math.isfinite(node) else None
    return node
