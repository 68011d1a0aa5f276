"""Trace: what every router of a model did on a text, as a folder on disk.

    TRACE/trace.json                        what was recorded: model, layout, domains, phases, data, versions
          stats/prefill/, stats/decode/     sums by layer and domain (`moekit.stats`), one folder a phase
          vocabulary.json                   the text of every token id that occurs
          tokens/tokens.safetensors         every token: id, domain, sequence, position, phase, ...   (on request)
          layers/layer-0003.safetensors     its experts and their weights in that layer               (on request)

Rows of `tokens` and `layers` are tokens, ordered by domain, sequence and position, so that a domain and a sequence are
runs of rows. Everything large is memory-mapped. `docs/trace-format.md` says it all.

Symbols: T tokens, K chosen, E experts, N domains.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from moekit.arrays import Spec, read_arrays
from moekit.errors import DataError, did_you_mean
from moekit.layout import Layout, MoELayer
from moekit.stats import LayerStats, Stats

if TYPE_CHECKING:
    from moekit.progress import Progress

SCHEMA = 1
KEYS = {"model", "fingerprint", "layout", "domains", "tokens", "sequences", "phases", "layers", "has_tokens"}
PHASES = ("prefill", "decode")
TOKEN_ARRAYS: dict[str, tuple[type, str]] = {
    "id": (np.int32, "token id"),
    "domain": (np.uint16, "number in `Trace.domains`"),
    "sequence": (np.int32, "number of the sequence"),
    "position": (np.int32, "place in the sequence, from 0"),
    "phase": (np.uint8, "number in `PHASES`: 0 prefill, 1 decode"),
    "predicted": (np.int32, "the id that the model finds likeliest to come next; -1 where it was not computed"),
    "loss": (np.float32, "-log p of the token that came next, nats; NaN where there is none, or it was not computed"),
}


class Identified(Protocol):
    """A model as `moekit.open` gives it, as far as a trace cares."""

    name: str

    @property
    def fingerprint(self) -> str:
        """Names the weights."""

    @property
    def layout(self) -> Layout:
        """What the model is."""


@dataclass(frozen=True, eq=False)
class LayerTrace:
    """One MoE layer of a trace.

    Attributes:
        index: decoder layer.
        num_experts: E.
        top_k: K.
        stats: its sums, over all phases.
        ids: chosen experts [T, K], uint8 or uint16, in the model's order; E is a slot that stayed empty. Without
            tokens, T is 0, here and below.
        weights: what the model weighs them with [T, K], float16.
        margin: p_k - p_(k+1), by how much the last chosen expert beat the first that was not [T], float16.
        logits: the router's [T, E], float16; T is 0 unless they were asked for.
    """

    index: int
    num_experts: int
    top_k: int
    stats: LayerStats
    ids: np.ndarray
    weights: np.ndarray
    margin: np.ndarray
    logits: np.ndarray


class Trace:
    """A recorded trace; made by `Trace.open`.

    Attributes:
        path: its folder.
        head: all of trace.json.
        domains: names, in order.
        phases: those recorded: ("prefill",), or ("prefill", "decode") for generation.
        layers: decoder layer indices of the MoE layers.
        model: name of the traced model.
        fingerprint: of its weights.
        layout_hash: of its layout.
        has_tokens: every token was kept, not only the sums.
        rows: the rows of this view among all tokens.
    """

    def __init__(self, path: Path, head: dict, only: str | None = None):
        self.path, self.head, self._only = path, head, only
        self.domains: tuple[str, ...] = (only,) if only else tuple(head["domains"])
        self.phases: tuple[str, ...] = tuple(head["phases"])
        self.layers: tuple[int, ...] = tuple(head["layers"])
        self.model: str = head["model"]
        self.fingerprint: str = head["fingerprint"]
        self.layout_hash: str = head["layout"]["hash"]
        self.has_tokens: bool = head["has_tokens"]
        ends = np.cumsum([0, *(head["tokens"][name] for name in head["domains"])]).tolist()
        first = head["domains"].index(only) if only else 0
        self.rows = slice(ends[first], ends[first + 1] if only else ends[-1])

    @classmethod
    def open(cls, path: str | Path) -> Trace:
        """Open a trace; nothing large is read.

        Raises:
            DataError: no trace there, one of another schema version, or with missing, truncated or damaged files.
        """
        folder = Path(path)
        head = _read_head(folder)
        trace = cls(folder, head)
        for phase in trace.phases:
            stats = trace.phase_stats(phase)
            if stats.layout_hash != trace.layout_hash or tuple(sorted(stats.layers)) != trace.layers:
                raise DataError(
                    "the statistics in the trace are of another model",
                    where=folder / "stats" / phase,
                    expected=trace.layout_hash,
                    got=stats.layout_hash,
                    fix="record the trace again",
                )
        if trace.has_tokens:
            for file, names in [
                (tokens_path(folder), ("id",)),
                *((layer_path(folder, i), ("ids",)) for i in trace.layers),
            ]:
                _check_rows(file, read_arrays(file), names, sum(head["tokens"].values()))
        return trace

    @cached_property
    def layout(self) -> Layout:
        """The traced model's layout (without tensor lists)."""
        return Layout.from_dict(self.head["layout"])

    @property
    def token_count(self) -> int:
        """Tokens in this view."""
        return self.rows.stop - self.rows.start

    def moe_layer(self, index: int) -> MoELayer:
        """What the layout says of a layer.

        Raises:
            DataError: the layer has no experts, or was not traced.
        """
        if index not in self.layers:
            known = self.layout.num_layers
            raise DataError(
                f"layer {index} has no experts" if 0 <= index < known else f"the model has no layer {index}",
                where=self.path,
                expected=f"one of {', '.join(map(str, self.layers))}",
                fix="name an MoE layer",
            )
        return self.layout.by_index[index]

    def layer(self, index: int) -> LayerTrace:
        """One MoE layer: its sums and, with tokens, every token's experts and weights, memory-mapped.

        Raises:
            DataError: the layer has no experts, or its file is damaged.
        """
        layer = self.moe_layer(index)
        rows = {name: np.zeros((0, *shape[1:]), dtype) for name, (dtype, shape) in layer_spec(layer, 0, True).items()}
        if self.has_tokens:
            rows |= {name: array[self.rows] for name, array in read_arrays(layer_path(self.path, index)).items()}
        return LayerTrace(index, layer.num_experts, layer.top_k, self.stats.layers[index], **rows)

    def domain(self, name: str) -> Trace:
        """The same trace, of one domain only.

        Raises:
            DataError: no such domain, or it has no tokens.
        """
        if name not in self.domains:
            raise DataError(f"the trace has no domain {name!r}", where=self.path, fix=did_you_mean(name, self.domains))
        if not self.head["tokens"][name]:
            raise DataError(f"the domain {name!r} has no tokens", where=self.path, fix="give it text, and record again")
        return Trace(self.path, self.head, name)

    def tokens(self) -> dict[str, np.ndarray]:
        """Every token, by column (see `TOKEN_ARRAYS`), memory-mapped; the rows are those of `layer(i).ids`.

        Raises:
            DataError: only statistics were recorded.
        """
        self.need_tokens("every token")
        return {name: array[self.rows] for name, array in read_arrays(tokens_path(self.path)).items()}

    def need_tokens(self, what: str) -> None:
        """Refuse what statistics alone cannot answer.

        Raises:
            DataError: only statistics were recorded.
        """
        if not self.has_tokens:
            raise DataError(
                f"{what} needs every token, and this trace holds statistics only",
                where=self.path,
                fix="record it again with tokens (moekit trace ... --tokens)",
            )

    @cached_property
    def stats(self) -> Stats:
        """The sums over all phases, memory-mapped where there is one phase."""
        first, *others = [self.phase_stats(phase) for phase in self.phases]
        out = sum(others, first)
        out.sequences = first.sequences  # decoding goes on with the same ones
        return out

    def phase_stats(self, phase: str) -> Stats:
        """The sums of one phase.

        Raises:
            DataError: the phase was not recorded, or the files are damaged.
        """
        if phase not in self.phases:
            raise DataError(
                f"the trace has no phase {phase!r}",
                where=self.path,
                expected=" or ".join(self.phases),
                fix="record generation: moekit trace ... --generate PROMPTS" if phase == "decode" else "",
            )
        stats = Stats.load(self.path / "stats" / phase)
        return stats.select(self._only) if self._only else stats

    @cached_property
    def vocabulary(self) -> dict[int, str]:
        """The text of every token id that occurs; empty where the model came without a tokenizer."""
        file = self.path / "vocabulary.json"
        return {int(key): text for key, text in json.loads(file.read_text("utf-8")).items()} if file.exists() else {}

    def text(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """The text of each token id; `<12>` where it is not known."""
        return [self.vocabulary.get(int(x), f"<{int(x)}>") for x in ids]

    def check(self, model: Identified) -> None:
        """Refuse to be used with another model than the one traced.

        Raises:
            DataError: its layout or its weights differ.
        """
        same_layout = model.layout.hash == self.layout_hash
        if not same_layout or model.fingerprint != self.fingerprint:
            raise DataError(
                "the trace was recorded from another model"
                + (" (same structure, other weights)" if same_layout else ""),
                where=self.path,
                expected=f"{self.model}, fingerprint {self.fingerprint}, layout {self.layout_hash}",
                got=f"{model.name}, fingerprint {model.fingerprint}, layout {model.layout.hash}",
                fix="record a trace of this model",
            )

    def to_parquet(self, file: str | Path, *, weights: str = "float32", progress: Progress | None = None) -> Path:
        """Write every token as a wide Parquet table (zstd): token columns, and by layer the lists `ids` and `weights`.

        Args:
            file: to write; appears whole or not at all.
            weights: "float32" (exact), or "uint8" (a 255th of the layer's largest; the factor is in the metadata).
            progress: told in rows.

        Raises:
            DataError: only statistics were recorded, pyarrow is not installed, or `weights` is something else.
            OutputError: the file cannot be written.
        """
        from moekit.trace.parquet import write

        return write(self, Path(file), weights, progress)

    def __repr__(self) -> str:
        kept = "every token" if self.has_tokens else "statistics"
        return (
            f"<Trace {self.path}: {self.model}, {len(self.layers)} MoE layers, {self.token_count:,} tokens of "
            f"{', '.join(self.domains)} ({' and '.join(self.phases)}), {kept}>"
        )

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{self.head['tokens'][name]:,}</td>"
            f"<td>{self.head['sequences'][name]:,}</td></tr>"
            for name in self.domains
        )
        return (
            f"<p>{html.escape(repr(self)[1:-1])}</p><table><thead><tr><th>domain</th><th>tokens</th><th>sequences</th>"
            f"</tr></thead><tbody>{rows}</tbody></table>"
        )


def layer_path(folder: Path, index: int) -> Path:
    """The file of a layer's choices."""
    return folder / "layers" / f"layer-{index:04d}.safetensors"


def tokens_path(folder: Path) -> Path:
    """The file of what is known of every token."""
    return folder / "tokens" / "tokens.safetensors"


def token_spec(tokens: int) -> Spec:
    """The arrays of tokens.safetensors."""
    return {name: (dtype, (tokens,)) for name, (dtype, _) in TOKEN_ARRAYS.items()}


def layer_spec(layer: MoELayer, tokens: int, logits: bool = False) -> Spec:
    """The arrays of a layer's file; ids are one byte wide where every id fits, that of an empty slot (E) included."""
    highest = layer.num_experts - (layer.router_width <= layer.num_experts)
    ids = np.uint8 if highest < 256 else np.uint16
    shape = (tokens, layer.top_k)
    spec = {"ids": (ids, shape), "weights": (np.float16, shape), "margin": (np.float16, (tokens,))}
    return spec | ({"logits": (np.float16, (tokens, layer.num_experts))} if logits else {})


def _read_head(folder: Path) -> dict:
    file = folder / "trace.json"
    try:
        head = json.loads(file.read_text("utf-8"))
        if head["schema"] != SCHEMA:
            raise DataError(
                "trace of another version", where=file, expected=SCHEMA, got=head["schema"], fix="record it again"
            )
        if missing := KEYS - head.keys():
            raise ValueError(f"no {', '.join(sorted(missing))}")
    except FileNotFoundError:
        unfinished = folder.with_name(folder.name + ".partial").is_dir()
        fix = "its recording was not finished: run the same command again" if unfinished else "moekit trace makes one"
        raise DataError("this is no trace", where=folder, expected="a folder with trace.json", fix=fix) from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError("the trace is damaged", where=file, got=str(error)[:200], fix="record it again") from None
    return head


def _check_rows(file: Path, arrays: dict[str, np.ndarray], names: tuple[str, ...], rows: int) -> None:
    for name in names:
        if name not in arrays or len(arrays[name]) != rows:
            raise DataError(
                "a file of the trace does not hold its tokens",
                where=file,
                expected=f"{rows:,} rows of {name!r}",
                got=f"{len(arrays[name]):,} rows" if name in arrays else ", ".join(arrays) or "nothing",
                fix="record the trace again",
            )
