"""trace(model, data) -> Trace: watch a model read a text and keep what its routers did.

One recorder serves both ways of running: streamed (layer by layer, one layer's weights in memory, as `measure`) and in
memory (the stock model, batch by batch). Its sums are those of `moekit.measurement`; with tokens it also puts every
token's experts in their place on disk at once, so that memory holds one batch, however long the text is.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from moekit.apply.live import live
from moekit.checkpoint.place import check_space
from moekit.data import Batch, Dataset
from moekit.families.model import Model
from moekit.layout import Layout
from moekit.measurement import gather, manifest_of
from moekit.plans import Plan
from moekit.progress import Progress, silent
from moekit.recording.recorder import (
    TRACED,
    WITH_OUTPUTS,
    Places,
    Recorder,
    check_domains,
    claimed_folder,
    fits_in_memory,
    head_columns,
    loaded_model,
    save_words,
    split,
    thinned,
    token_columns,
)
from moekit.stats import Stats
from moekit.stream import DEFAULT_SPILL_BYTES, Checkpoints, Stream
from moekit.trace import Trace
from moekit.trace.writer import TokenWriter, clear, load_layer_stats, save_head, save_layer_stats, seen_words
from moekit.view import MoEView

InMemory = bool | Literal["auto"]
Scored = Callable[[Batch], dict[str, np.ndarray]]  # what the model's head says of a batch, computed if asked


def trace(
    model: Model,
    data: Dataset,
    *,
    out: str | Path,
    tokens: bool = False,
    logits: bool = False,
    in_memory: InMemory = "auto",
    outputs: bool = False,
    plan: Plan | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    spill_bytes: int = DEFAULT_SPILL_BYTES,
    checkpoint_s: float = 60.0,
    progress: Progress = silent,
) -> Trace:
    """Record what a model's routers do as it reads `data`.

    Args:
        model: from `moekit.open`.
        data: from `moekit.data`.
        out: a new folder; what an interrupted recording left beside it (`OUT.partial`) is gone on with, when streamed.
        tokens: keep every token's experts and weights, and what the model predicted, not only sums.
        logits: with tokens, keep the router's logits too (E numbers a token and layer: large).
        in_memory: load the whole model; False: one layer at a time; "auto": whichever fits. The numbers are the same.
        outputs: also measure the experts' outputs (norms, peaks, means; slower).
        plan: a plan that is applied live: what the planned or steered model does.
        dtype: to run in; None for the model's own.
        device: "cpu" or "cuda".
        overwrite: a trace in `out` may be replaced.
        spill_bytes: hidden states beyond this wait on disk, when streamed.
        checkpoint_s: seconds between checkpoints, when streamed.
        progress: told as work goes on.

    Raises:
        DataError: a domain without tokens.
        ModelError: routing and experts do not agree (the family is not understood), or the model cannot be loaded.
        PlanError: the plan does not fit the model.
        CheckpointError: weights cannot be read.
        OutputError: `out` is taken, or the disk is too small.
    """
    layout, tokens = model.layout, tokens or logits
    check_domains(data.domains, data.tokens)
    if plan is not None:
        plan.check(layout)
    whole = fits_in_memory(model, dtype, device) if in_memory == "auto" else in_memory
    batches = split(data.batches, layout.vocab_size) if tokens or whole else data.batches
    groups = WITH_OUTPUTS if outputs else TRACED
    manifest = manifest_of(model, data.describe(), groups, dtype or model.dtype)
    manifest["plan"] = None if plan is None else plan.model_dump(mode="json")
    job = {**manifest, "tokens": tokens, "logits": logits}
    final = Path(out).absolute()
    with claimed_folder(final, job, overwrite) as folder:
        total = sum(data.tokens.values())
        writer = TokenWriter(folder, layout.routed, total, logits) if tokens else None
        check_space(folder, writer.bytes if writer else 0)
        recorder = Recorder(layout.routed, len(data.domains), groups, writer)
        places = Places.of(batches)
        recorder.first_rows = places.rows

        def after_layer(index: int) -> None:
            save_layer_stats(folder, "prefill", index, thinned(recorder.take(index, total), layout.by_index[index]))

        if whole:
            clear(folder)
            scores = _in_memory(model, layout, batches, recorder, plan, dtype, device, progress)
        else:
            work = Checkpoints(folder / "work", json.dumps(job, sort_keys=True), recorder.previous, checkpoint_s)
            stream = Stream(model.loader(dtype, device), spill_bytes=spill_bytes, checkpoints=work, progress=progress)
            scores = _streamed(stream, layout, batches, recorder, plan, after_layer, tokens)
        words = [np.unique(batch.ids[batch.mask].numpy()) for batch in batches]
        for number, scored in enumerate(scores):
            if writer is not None:
                columns = token_columns(batches[number], places.sequences[number])
                writer.write_tokens(places.rows[number], **columns, **scored(batches[number]))
        if whole:
            for layer in layout.routed:
                after_layer(layer.index)
        if writer is not None:
            writer.close()
            words.append(seen_words(folder))
        layers = {x.index: load_layer_stats(folder, "prefill", x.index) for x in layout.routed}
        counts = np.array([data.tokens[name] for name in data.domains], np.int64)
        sequences = np.bincount([x.domain for x in batches], [len(x.ids) for x in batches], len(data.domains))
        stats = Stats(layout.hash, tuple(data.domains), counts, sequences.astype(np.int64), layers, manifest)
        save_head(folder, {"prefill": stats}, manifest, has_tokens=tokens)
        save_words(folder, model, np.unique(np.concatenate(words)))
        shutil.rmtree(folder / "work", ignore_errors=True)
    return Trace.open(final)


def _streamed(
    stream: Stream,
    layout: Layout,
    batches: Sequence[Batch],
    recorder: Recorder,
    plan: Plan | None,
    after_layer: Callable[[int], None],
    head: bool,
) -> Iterator[Scored]:
    with live(MoEView(stream.model, layout), plan) if plan else contextlib.nullcontext():
        for logits in gather(stream, layout, batches, recorder, after_layer, head):
            yield partial(head_columns, logits)


def _in_memory(
    model: Model,
    layout: Layout,
    batches: Sequence[Batch],
    recorder: Recorder,
    plan: Plan | None,
    dtype: torch.dtype | None,
    device: str,
    progress: Progress,
) -> Iterator[Scored]:
    loaded = loaded_model(model, dtype, device)
    view = MoEView(loaded, layout)
    with live(view, plan) if plan else contextlib.nullcontext(), torch.inference_mode():
        for number, batch in enumerate(batches):
            recorder.batch = (number, batch)
            layers = [] if number else [x.index for x in layout.routed]
            with recorder.compared(view, layers), view.watch(recorder):
                logits = loaded(input_ids=batch.ids.to(device), use_cache=False).logits
            recorder.previous.clear()
            yield partial(head_columns, logits)
            progress("batches", number + 1, len(batches))
