"""measure(model, data) -> Stats: one streamed pass over the data that takes every statistic that methods ask for.

Symbols: T tokens of a batch, K chosen, E experts, D hidden, N domains.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from moekit.data import Batch, Dataset
from moekit.errors import ModelError
from moekit.families.model import Model
from moekit.layout import Layout
from moekit.measurement.gatherer import Gatherer
from moekit.measurement.origin import manifest_of
from moekit.progress import Progress, silent
from moekit.stats import (
    GROUPS,
    LayerStats,
    Stats,
)
from moekit.stream import DEFAULT_SPILL_BYTES, Checkpoints, Stream
from moekit.subsets import SubsetErrors
from moekit.view import MoEView


def measure(
    model: Model,
    data: Dataset,
    *,
    groups: Sequence[str] = GROUPS,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    workdir: str | Path | None = None,
    spill_bytes: int = DEFAULT_SPILL_BYTES,
    checkpoint_s: float = 60.0,
    progress: Progress = silent,
) -> Stats:
    """Take statistics of `model` on `data` in one pass, one layer's weights in memory.

    Args:
        model: from `moekit.open`.
        data: from `moekit.data`.
        groups: which quantities, of `moekit.stats.ALL_GROUPS`; as a rule all but "subsets".
        dtype: to run in; None for the model's own.
        device: "cpu" or "cuda".
        workdir: where an interrupted pass leaves what it needs to go on; None for nowhere.
        spill_bytes: hidden states beyond this wait on disk.
        checkpoint_s: seconds between checkpoints.
        progress: told as layers pass.

    Raises:
        ModelError: routing and experts do not agree (the family is not understood).
        CheckpointError: weights cannot be read.
    """
    layout = model.layout
    layers = layout.routed
    loader = model.loader(dtype, device)
    gatherer = Gatherer(layers, len(data.domains), groups)
    manifest = manifest_of(model, data.describe(), groups, loader.dtype)
    identity = json.dumps(manifest, sort_keys=True)
    work = None if workdir is None else Path(workdir)
    store = None if work is None else Checkpoints(work, identity, gatherer.previous, checkpoint_s)
    done: dict[int, LayerStats] = {}
    tokens = sum(data.tokens.values())

    def after_layer(index: int) -> None:
        done[index] = gatherer.take(index, tokens)
        if work is not None:
            _keep(work, identity, index, done[index])

    stream = Stream(loader, spill_bytes=spill_bytes, checkpoints=store, progress=progress)
    for _ in gather(stream, layout, data.batches, gatherer, after_layer):
        pass
    for layer in layers:
        if layer.index not in done:
            done[layer.index] = _kept(work, layer.index)
    if work is not None:
        _forget(work)
    sequences = np.zeros(len(data.domains), np.int64)
    for batch in data.batches:
        sequences[batch.domain] += len(batch.ids)
    counts = np.array([data.tokens[name] for name in data.domains], np.int64)
    return Stats(layout.hash, tuple(data.domains), counts, sequences, dict(sorted(done.items())), manifest)


def gather(
    stream: Stream,
    layout: Layout,
    batches: Sequence[Batch],
    gatherer: Gatherer,
    after_layer: Callable[[int], None],
    logits: bool = False,
) -> Iterator[torch.Tensor]:
    """Show every MoE layer's work on every batch to `gatherer`, layer by layer.

    Args:
        stream: of the model.
        layout: of the model.
        batches: what runs through it.
        gatherer: watches.
        after_layer: called when all batches have passed an MoE layer.
        logits: run on to the model's head; else stop after the last MoE layer.

    Yields:
        With `logits`, those of each batch [B, T, vocabulary].

    Raises:
        ModelError: routing and experts do not agree.
    """
    view = MoEView(stream.model, layout)

    @contextlib.contextmanager
    def around(index: int, number: int) -> Iterator[None]:
        if index not in layout.by_index:
            yield
            return
        gatherer.batch = (number, batches[number])
        with contextlib.ExitStack() as stack:
            stack.enter_context(gatherer.compared(view, [index] if number == 0 else []))
            stack.enter_context(view.watch(gatherer, layers=[index]))
            if (errors := gatherer.sums[index].get("subset_error")) is not None:
                batch = batches[number]
                tried = SubsetErrors(view, layout.by_index[index], batch, errors[batch.domain])
                stack.enter_context(tried.watching())
            yield

    yield from stream.run(
        [x.ids for x in batches],
        around=around,
        after_layer=lambda index: after_layer(index) if index in layout.by_index else None,
        last_layer=None if logits else layout.routed[-1].index,
    )


def _keep(work: Path, identity: str, index: int, stats: LayerStats) -> None:
    one = Stats(identity, (), np.zeros(0, np.int64), np.zeros(0, np.int64), {index: stats})
    one.save(work / f"layer-{index:04d}")


def _forget(work: Path) -> None:
    """Remove what a pass has left in `work`, and the folder unless it holds something else."""
    for path in (work / "hidden", work / "hidden.next", *work.glob("layer-[0-9][0-9][0-9][0-9]")):
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        work.rmdir()


def _kept(work: Path | None, index: int) -> LayerStats:
    if work is None:
        raise ModelError("a MoE layer was never run", where=f"layer {index}")
    return Stats.load(work / f"layer-{index:04d}").layers[index]
