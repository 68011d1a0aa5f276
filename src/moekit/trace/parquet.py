"""A trace as one wide Parquet table: a row a token, so that DuckDB, polars or pandas can ask it anything.

Columns: those of the tokens (domain and phase as names, with the token's text) and, for every MoE layer L, the lists
`ids_L` and `weights_L` of length k and the number `margin_L`. Written by row groups, so that memory holds one of them.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moekit.errors import DataError, OutputError
from moekit.trace.store import PHASES

if TYPE_CHECKING:
    from moekit.progress import Progress
    from moekit.trace.store import LayerTrace, Trace

ROWS = 1 << 15  # of a row group
WEIGHTS = ("float32", "uint8")


def library() -> tuple[Any, Any]:
    """pyarrow, and its module for Parquet.

    Raises:
        DataError: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        fix = 'pip install "moekit[parquet]"'
        raise DataError("the library that writes Parquet (pyarrow) is not installed", fix=fix) from None
    return pyarrow, pyarrow.parquet


def write(trace: Trace, file: Path, weights: str, progress: Progress | None) -> Path:
    """See `Trace.to_parquet`."""
    trace.need_tokens("a Parquet table")
    if weights not in WEIGHTS:
        raise DataError("weights cannot be written so", expected=" or ".join(WEIGHTS), got=weights)
    pa, pq = library()
    tokens, layers = trace.tokens(), [trace.layer(index) for index in trace.layers]
    scales = {x.index: _scale(x.weights) for x in layers} if weights == "uint8" else {}
    partial = file.with_name(file.name + ".partial")
    schema = _schema(pa, layers, scales, trace)
    whole, real = _encodings([x.index for x in layers], bool(scales))
    try:
        with pq.ParquetWriter(
            partial, schema, compression="zstd", use_dictionary=whole, use_byte_stream_split=real
        ) as out:
            for start in range(0, trace.token_count, ROWS):
                rows = slice(start, min(start + ROWS, trace.token_count))
                columns = _token_columns(pa, trace, tokens, rows)
                for layer in layers:
                    columns += _layer_columns(pa, layer, rows, scales)
                out.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=ROWS)
                if progress is not None:
                    progress("parquet", rows.stop, trace.token_count)
        partial.rename(file)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise OutputError(
            "the disk is full" if full else "the Parquet file cannot be written",
            where=file,
            got=error.strerror or error,
            fix="write it to another disk" if full else "choose a folder that exists and may be written to",
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return file


def _encodings(layers: list[int], quantised: bool) -> tuple[list[str], list[str]]:
    """Columns of few different values (a dictionary is smallest) and of real numbers (bytes of equal rank together)."""
    ids, weights = ([f"{name}_{index}.list.element" for index in layers] for name in ("ids", "weights"))
    whole, real = ["domain", "phase", "text", *ids], [f"margin_{index}" for index in layers]
    return (whole + weights, real) if quantised else (whole, real + weights)


def _schema(pa: Any, layers: list[LayerTrace], scales: Mapping[int, float], trace: Trace) -> Any:
    names = pa.dictionary(pa.int32(), pa.string())
    fields = [
        ("token", pa.int32()), ("text", pa.string()), ("domain", names), ("sequence", pa.int32()),
        ("position", pa.int32()), ("phase", names), ("predicted", pa.int32()), ("loss", pa.float32()),
    ]  # fmt: skip
    for x in layers:
        ids = pa.from_numpy_dtype(x.ids.dtype)
        fields += [
            (f"ids_{x.index}", pa.list_(ids, x.top_k)),
            (f"weights_{x.index}", pa.list_(pa.uint8() if scales else pa.float32(), x.top_k)),
            (f"margin_{x.index}", pa.float32()),
        ]
    facts = {"moekit.model": trace.model, "moekit.fingerprint": trace.fingerprint}
    facts |= {f"moekit.scale_{index}": repr(scale) for index, scale in scales.items()}
    return pa.schema(fields, metadata=facts)


def _token_columns(pa: Any, trace: Trace, tokens: Mapping[str, np.ndarray], rows: slice) -> list[Any]:
    def named(name: str, values: tuple[str, ...]) -> Any:
        return pa.DictionaryArray.from_arrays(
            pa.array(tokens[name][rows].astype(np.int32)), pa.array(values, pa.string())
        )

    return [
        pa.array(tokens["id"][rows]),
        pa.array(trace.text(tokens["id"][rows]), pa.string()),
        named("domain", tuple(trace.head["domains"])),
        pa.array(tokens["sequence"][rows]),
        pa.array(tokens["position"][rows]),
        named("phase", PHASES),
        pa.array(tokens["predicted"][rows]),
        pa.array(tokens["loss"][rows], from_pandas=True),
    ]


def _layer_columns(pa: Any, layer: LayerTrace, rows: slice, scales: Mapping[int, float]) -> list[Any]:
    weights = layer.weights[rows].astype(np.float32)
    if scales:
        weights = np.rint(weights / scales[layer.index]).astype(np.uint8)
    lists = [
        pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), layer.top_k) for x in (layer.ids[rows], weights)
    ]
    return [*lists, pa.array(layer.margin[rows].astype(np.float32))]


def _scale(weights: np.ndarray) -> float:
    """A 255th of the largest weight, found piece by piece."""
    largest = max((float(weights[i : i + ROWS].max()) for i in range(0, len(weights), ROWS)), default=0.0)
    return largest / 255 or 1.0
