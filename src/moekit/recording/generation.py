"""trace_generation(model, prompts) -> Trace: watch a model write, its prompts (prefill) apart from the rest (decode).

The stock `generate()` runs on the loaded model, greedily. It calls the model once on the prompts and then once for each
new token; a hook on the model tells the recorders which call is which. Padding is masked out, and so is all that
`generate()` feeds for a row after its last token. The last token written is never fed, so it has no experts.

Symbols: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from moekit.arrays import read_arrays
from moekit.checkpoint.place import check_space
from moekit.data import Batch
from moekit.errors import DataError, ModelError
from moekit.families.model import Model
from moekit.families.seam import ExpertRows
from moekit.layout import MoELayer
from moekit.measurement import manifest_of
from moekit.progress import Progress, silent
from moekit.recording.prompts import Prompt, encode_prompts
from moekit.recording.recorder import (
    TRACED,
    WITH_OUTPUTS,
    Recorder,
    check_domains,
    claimed_folder,
    loaded_model,
    save_words,
    thinned,
)
from moekit.stats import Stats
from moekit.trace import Trace
from moekit.trace.store import PHASES, layer_path, tokens_path
from moekit.trace.words import count_words
from moekit.trace.writer import TokenWriter, clear, load_layer_stats, save_head, save_layer_stats, seen_words
from moekit.view import Call, MoEView, Observer

PREFILL, DECODE = 0, 1


@dataclass(frozen=True, eq=False)
class Step(Batch):
    """What one call of `generate()` feeds; nothing follows within it that the model did not choose itself.

    Args:
        start: tokens of each row that came before [rows].
    """

    start: torch.Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))

    @property
    def positions(self) -> torch.Tensor:
        """The place of each real token in its row, from 0."""
        return self.start[:, None] + self.mask.cumsum(1) - 1

    @property
    def following(self) -> torch.Tensor:
        """Not known yet: counted when the row is complete."""
        return torch.full_like(self.ids, -1)


class _Phases(Observer):
    """Hands every call to the recorder of the phase that runs."""

    def __init__(self, recorders: Sequence[Recorder]):
        self.recorders, self.phase = recorders, PREFILL
        self.wants_outputs, self.wants_residual = recorders[0].wants_outputs, recorders[0].wants_residual

    def routed(self, call: Call) -> None:
        """Routing is known."""
        self.recorders[self.phase].routed(call)

    def expert(self, call: Call, rows: ExpertRows) -> None:
        """One expert has run."""
        self.recorders[self.phase].expert(call, rows)

    def finished(self, call: Call, output: torch.Tensor) -> None:
        """All experts have run."""
        self.recorders[self.phase].finished(call, output)


class _Steps:
    """Follows one `generate()`: tells the recorders what each call feeds, and notes the tokens in the order of rows."""

    def __init__(self, phases: _Phases, writer: TokenWriter, ends: frozenset[int]):
        self.phases, self.writer, self.ends = phases, writer, ends
        self.row = 0

    def begin(self, domain: int, sequences: np.ndarray, ids: torch.Tensor, mask: torch.Tensor) -> None:
        """A new batch of prompts [B, T], padded on the left."""
        self.domain, self.sequences, self.prompt = domain, sequences, (ids, mask)
        self.seen = torch.zeros(len(ids), dtype=torch.int64)
        self.active = torch.ones(len(ids), dtype=torch.bool)
        self.phases.phase = PREFILL

    def before(self, _module: nn.Module, _args: tuple, kwargs: dict) -> None:
        """A call of the model begins."""
        ids = kwargs["input_ids"].cpu()
        if not self.seen.any():
            ids, mask = self.prompt
        else:
            self.phases.phase = DECODE
            self.active &= torch.tensor([int(x) not in self.ends for x in ids[:, -1]])
            mask = torch.zeros(ids.shape, dtype=torch.bool)
            mask[:, -1] = self.active
        step = Step(self.domain, ids, mask, self.seen.clone())
        recorder = self.phases.recorders[self.phases.phase]
        recorder.batch, recorder.first_rows = (0, step), [self.row]
        self.writer.write_tokens(
            self.row,
            id=ids[mask].numpy(),
            domain=np.full(step.tokens, self.domain),
            sequence=np.repeat(self.sequences, mask.sum(1).numpy()),
            position=step.positions[mask].numpy(),
            phase=np.full(step.tokens, self.phases.phase),
        )
        self.row += step.tokens
        self.seen += mask.sum(1)


def trace_generation(
    model: Model,
    prompts: Mapping[str, Sequence[Prompt]],
    *,
    out: str | Path,
    max_new_tokens: int = 128,
    tokens: bool = False,
    logits: bool = False,
    outputs: bool = False,
    batch_size: int = 1,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress = silent,
) -> Trace:
    """Record what a model's routers do as it reads prompts and continues them, greedily.

    Args:
        model: from `moekit.open`; it is loaded into memory.
        prompts: by domain: texts, chats (rendered with the tokenizer's template), or token ids.
        out: a new folder.
        max_new_tokens: of each continuation, at most.
        tokens: keep every token's experts and weights, not only sums.
        logits: with tokens, keep the router's logits too.
        outputs: also measure the experts' outputs.
        batch_size: prompts that run together, padded on the left; with 1 nothing is padded, which is exact for every
            family.
        dtype: to run in; None for the model's own.
        device: "cpu" or "cuda".
        overwrite: a trace in `out` may be replaced.
        progress: told in prompts.

    Raises:
        DataError: a domain without prompts, an empty prompt, or a setting out of range.
        ModelError: routing and experts do not agree, no tokenizer for texts, or the model cannot be loaded.
        OutputError: `out` is taken, or the disk is too small.
    """
    if max_new_tokens < 2 or batch_size < 1:
        raise DataError(
            "too few new tokens or prompts in a batch",
            expected="at least 2 new tokens (the last one is never fed back) and 1 prompt",
            got=f"{max_new_tokens} and {batch_size}",
        )
    layout, tokens = model.layout, tokens or logits
    ids = {name: encode_prompts(model, name, texts) for name, texts in prompts.items()}
    check_domains(tuple(ids), {name: sum(map(len, rows)) for name, rows in ids.items()})
    groups = WITH_OUTPUTS if outputs else TRACED
    manifest = manifest_of(model, _describe(ids, max_new_tokens), groups, dtype or model.dtype)
    manifest["plan"] = None
    limit = sum(len(row) + max_new_tokens - 1 for rows in ids.values() for row in rows)
    final = Path(out).absolute()
    with claimed_folder(final, {**manifest, "tokens": tokens, "logits": logits, "generate": True}, overwrite) as folder:
        clear(folder)
        writer = TokenWriter(folder, layout.routed, limit, logits)
        check_space(folder, 2 * writer.bytes)  # rows are put in order in a copy
        recorders = [Recorder(layout.routed, len(ids), groups, writer) for _ in PHASES]
        loaded = loaded_model(model, dtype, device)
        steps = _Steps(_Phases(recorders), writer, _end_tokens(loaded))
        written = _generate(loaded, MoEView(loaded, layout), steps, ids, max_new_tokens, batch_size, device, progress)
        following = _arrange(writer, steps.row, ids, written)
        stats = _phase_stats(folder, layout.routed, recorders, following, list(ids), layout.hash, manifest)
        save_words(folder, model, seen_words(folder))
        if not tokens:
            writer.remove()
        save_head(folder, stats, manifest, has_tokens=tokens)
    return Trace.open(final)


def _describe(ids: Mapping[str, list[list[int]]], max_new_tokens: int) -> dict[str, Any]:
    domains = {name: {"prompts": len(rows), "tokens": sum(map(len, rows))} for name, rows in ids.items()}
    return {"generated": True, "max_new_tokens": max_new_tokens, "domains": domains}


def _end_tokens(loaded: nn.Module) -> frozenset[int]:
    ends = loaded.generation_config.eos_token_id
    return frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)


def _generate(
    loaded: nn.Module,
    view: MoEView,
    steps: _Steps,
    prompts: Mapping[str, list[list[int]]],
    max_new_tokens: int,
    batch_size: int,
    device: str,
    progress: Progress,
) -> list[list[int]]:
    """What the model wrote for each prompt, in order."""
    pad = loaded.generation_config.pad_token_id
    pad = pad if pad is not None else min(steps.ends, default=0)
    written: list[list[int]] = []
    total = sum(len(rows) for rows in prompts.values())
    first_call = True
    with _announced(loaded, steps), torch.inference_mode():
        for domain, rows in enumerate(prompts.values()):
            for start in range(0, len(rows), batch_size):
                ids, mask = _padded(rows[start : start + batch_size], pad)
                steps.begin(domain, np.arange(len(written), len(written) + len(ids)), ids, mask)
                prefill = steps.phases.recorders[PREFILL]
                layers = [x.index for x in view.layout.routed] if first_call else []
                with prefill.compared(view, layers), view.watch(steps.phases):
                    out = loaded.generate(
                        input_ids=ids.to(device),
                        attention_mask=mask.long().to(device),
                        max_new_tokens=max_new_tokens,
                        do_sample=False,
                        num_beams=1,
                        pad_token_id=pad,
                        return_dict_in_generate=False,
                    )
                first_call = False
                written += [_until_end(row.tolist(), steps.ends) for row in out[:, ids.shape[1] :].cpu()]
                progress("prompts", len(written), total)
    return written


@contextmanager
def _announced(loaded: nn.Module, steps: _Steps) -> Iterator[None]:
    handle = loaded.register_forward_pre_hook(steps.before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [B, T], padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    return ids, mask


def _until_end(row: list[int], ends: frozenset[int]) -> list[int]:
    """The tokens up to the first that ends the text, that one included."""
    return next((row[: place + 1] for place, word in enumerate(row) if word in ends), row)


def _arrange(
    writer: TokenWriter, rows: int, prompts: Mapping[str, list[list[int]]], written: Sequence[Sequence[int]]
) -> np.ndarray:
    """Put rows in the order of sequence and position; returns the token that followed each, which was predicted there.

    Raises:
        ModelError: `generate()` fed other tokens than those of prompts and continuations.
    """
    writer.close()
    columns = {name: np.asarray(array[:rows]) for name, array in read_arrays(tokens_path(writer.folder)).items()}
    order = np.lexsort((columns["position"], columns["sequence"]))
    whole = [[*prompt, *text] for prompt, text in zip(chain(*prompts.values()), written, strict=True)]
    fed = np.array([word for row in whole for word in row[:-1]])
    if not np.array_equal(columns["id"][order], fed):
        raise ModelError(
            "generate() fed the model other tokens than it returned", expected=f"{len(fed):,} tokens", got=f"{rows:,}"
        )
    following = np.array([word for row in whole for word in row[1:]])
    lengths = np.array([len(prompt) for prompt in chain(*prompts.values())])
    chosen = columns["position"][order] >= lengths[columns["sequence"][order]] - 1
    writer.arrange(order, predicted=np.where(chosen, following, -1), loss=np.full(rows, np.nan, np.float32))
    return following


def _phase_stats(
    folder: Path,
    layers: Sequence[MoELayer],
    recorders: Sequence[Recorder],
    following: np.ndarray,
    names: Sequence[str],
    layout_hash: str,
    manifest: dict,
) -> dict[str, Stats]:
    """Save each phase's sums by layer, what followed counted in, and return them."""
    columns = read_arrays(tokens_path(folder))
    out = {}
    for phase, recorder in enumerate(recorders):
        members = [np.flatnonzero((columns["phase"] == phase) & (columns["domain"] == x)) for x in range(len(names))]
        counts = np.array([len(rows) for rows in members], np.int64)
        for layer in layers:
            ids = read_arrays(layer_path(folder, layer.index))["ids"]
            words = [count_words(ids[rows], following[rows]) for rows in members]
            numbered = [np.insert(found, 0, domain, axis=1) for domain, found in enumerate(words)]
            stats = replace(recorder.take(layer.index, int(counts.sum())), following=np.concatenate(numbered))
            if phase == DECODE:  # steps are no sequences
                stats.arrays = {name: x for name, x in stats.arrays.items() if not name.startswith("sequence_")}
            save_layer_stats(folder, PHASES[phase], layer.index, thinned(stats, layer))
        sequences = np.array([len(np.unique(columns["sequence"][rows])) for rows in members], np.int64)
        kept = {x.index: load_layer_stats(folder, PHASES[phase], x.index) for x in layers}
        out[PHASES[phase]] = Stats(layout_hash, tuple(names), counts, sequences, kept, manifest)
    return out
