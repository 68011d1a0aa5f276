"""Writing a trace: files of known size, filled row by row in any order, so that memory holds one batch at most.

Symbols: T tokens, K chosen, E experts.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from moekit.arrays import ArrayFile, read_arrays, spec_bytes, write_arrays
from moekit.errors import ModelError
from moekit.layout import MoELayer
from moekit.stats import LayerStats, Stats, layer_file
from moekit.trace.store import SCHEMA, TOKEN_ARRAYS, layer_path, layer_spec, token_spec, tokens_path


class TokenWriter:
    """Takes every token's experts and puts them in their place on disk.

    Args:
        folder: of the trace, still without its final name.
        layers: MoE layers.
        tokens: T, of all domains together (or an upper limit, see `arrange`).
        logits: keep the router's logits too, [T, E] float16 a layer.
    """

    def __init__(self, folder: Path, layers: Sequence[MoELayer], tokens: int, logits: bool = False):
        self.folder, self.logits = folder, logits
        self._files: dict[Path, ArrayFile] = {}
        self._specs = {layer_path(folder, x.index): layer_spec(x, tokens, logits) for x in layers}
        self._specs[tokens_path(folder)] = token_spec(tokens)

    @property
    def bytes(self) -> int:
        """Bytes on disk."""
        return sum(spec_bytes(spec) for spec in self._specs.values())

    def write_layer(self, layer: int, row: int, **arrays: np.ndarray) -> None:
        """Put `ids` [n, K], `weights` [n, K], `margin` [n] (and `logits` [n, E]) into rows `row` to `row + n`.

        Raises:
            ModelError: an id that the file's type cannot hold.
        """
        path = layer_path(self.folder, layer)
        widest = np.iinfo(self._specs[path]["ids"][0]).max
        if arrays["ids"].size and int(arrays["ids"].max()) > widest:
            raise ModelError("the router chose an expert that it does not have", where=f"layer {layer}")
        self._write(path, row, arrays)

    def write_tokens(self, row: int, **columns: np.ndarray) -> None:
        """Put columns of `TOKEN_ARRAYS` into rows `row` to `row + n`."""
        self._write(tokens_path(self.folder), row, columns)

    def close(self) -> None:
        """Every row is written."""
        for file in self._files.values():
            file.close()
        self._files = {}

    def arrange(self, order: np.ndarray, **columns: np.ndarray) -> None:
        """Keep the rows `order`, in that order, replace these columns of the tokens, and close."""
        self.close()
        for path in self._specs:
            arrays = {name: array[order] for name, array in read_arrays(path).items()}
            if path == tokens_path(self.folder):
                arrays |= {name: column.astype(TOKEN_ARRAYS[name][0]) for name, column in columns.items()}
            write_arrays(path, arrays)

    def remove(self) -> None:
        """Keep no tokens after all."""
        self.close()
        for path in self._specs:
            shutil.rmtree(path.parent, ignore_errors=True)

    def _write(self, path: Path, row: int, arrays: Mapping[str, np.ndarray]) -> None:
        if path not in self._files:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._files[path] = ArrayFile(path, self._specs[path])
        for name, values in arrays.items():
            self._files[path].write(name, row, values)


def clear(folder: Path) -> None:
    """Remove all that an earlier attempt left of a trace."""
    for name in ("layers", "tokens", "stats", "work"):
        shutil.rmtree(folder / name, ignore_errors=True)


def save_layer_stats(folder: Path, phase: str, index: int, stats: LayerStats) -> None:
    """Write one layer's sums of a phase."""
    file = folder / "stats" / phase / layer_file(index)
    file.parent.mkdir(parents=True, exist_ok=True)
    stats.save(file)


def load_layer_stats(folder: Path, phase: str, index: int) -> LayerStats:
    """One layer's sums of a phase, memory-mapped."""
    return LayerStats.load(folder / "stats" / phase / layer_file(index))


def save_head(folder: Path, stats: Mapping[str, Stats], manifest: Mapping, *, has_tokens: bool) -> None:
    """Write trace.json, and stats.json of each phase; the layers' files are there already.

    Args:
        folder: of the trace, still without its final name.
        stats: by phase.
        manifest: where the trace comes from.
        has_tokens: every token was kept.
    """
    for phase, part in stats.items():
        part.save_head(folder / "stats" / phase)
    first = next(iter(stats.values()))
    tokens = np.sum([part.tokens for part in stats.values()], 0)
    head = {
        "schema": SCHEMA,
        **manifest,
        "domains": list(first.domains),
        "tokens": dict(zip(first.domains, tokens.tolist(), strict=True)),
        "sequences": dict(zip(first.domains, first.sequences.tolist(), strict=True)),
        "phases": list(stats),
        "phase_tokens": {
            phase: dict(zip(part.domains, part.tokens.tolist(), strict=True)) for phase, part in stats.items()
        },
        "layers": sorted(first.layers),
        "has_tokens": has_tokens,
    }
    (folder / "trace.json").write_text(json.dumps(head, indent=1) + "\n", encoding="utf-8")


def save_vocabulary(folder: Path, texts: Mapping[int, str]) -> None:
    """Write vocabulary.json: the text of each token id."""
    rows = {str(key): texts[key] for key in sorted(texts)}
    (folder / "vocabulary.json").write_text(json.dumps(rows, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")


def seen_words(folder: Path, columns: Iterable[str] = ("id", "predicted")) -> np.ndarray:
    """Token ids that occur in columns of tokens.safetensors, ascending."""
    arrays = read_arrays(tokens_path(folder))
    found = np.unique(np.concatenate([np.unique(arrays[name]) for name in columns]))
    return found[found >= 0]
