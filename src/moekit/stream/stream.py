"""Stream: drives batches through a model whose weights come and go."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from moekit.errors import ModelError
from moekit.families.loader import OUTER, Loader
from moekit.progress import Progress, silent
from moekit.stream.checkpoints import Checkpoints
from moekit.stream.spill import Spill
from moekit.stream.walk import Arrival, Walk

DEFAULT_SPILL_BYTES = 4 << 30


@dataclass
class Fork:
    """A second run of a batch: its layers give what the batch's give until it leaves, from then on it runs by itself.

    Attributes:
        batch: number of the batch.
        leaves: asked as leaves(layer) when the batch has passed that layer; the fork runs it anew if this is true.
        left: whether it has left; the logits of one that never does are its batch's, and are not given again.
    """

    batch: int
    leaves: Callable[[int], bool]
    left: bool = False


@dataclass
class Stop:
    """A pause before a layer: its weights are in, all batches wait at it.

    Attributes:
        layer: decoder layer index.
        forward: the layer's own forward.
    """

    layer: int
    _walks: Sequence[Walk]
    forward: Callable[..., Any]
    _spill: Spill

    def arguments(self, number: int) -> tuple[tuple, dict[str, Any]]:
        """What the layer will be called with for a batch, as (args, kwargs): copies, fit for autograd."""
        walk = self._walks[number]
        self._spill.back(walk)
        assert walk.arrival is not None, "batches wait while the stream pauses"
        copied = pytree.tree_map_only(torch.Tensor, torch.clone, (walk.arrival.args, walk.arrival.kwargs))
        self._spill.away(walk)
        return copied

    def run(self, number: int) -> object:
        """What the layer gives for a batch as it is now; the batch goes on waiting."""
        args, kwargs = self.arguments(number)
        return self.forward(*args, **kwargs)


class Stream:
    """Drives batches through a model whose weights come and go.

    Args:
        loader: of the model.
        spill_bytes: hidden states beyond this wait on disk.
        checkpoints: where to leave what a killed run needs to go on; None for nowhere.
        progress: told (stage, done, total) in units of batch x layer.
    """

    def __init__(
        self,
        loader: Loader,
        *,
        spill_bytes: int = DEFAULT_SPILL_BYTES,
        checkpoints: Checkpoints | None = None,
        progress: Progress = silent,
    ):
        self.loader, self.model = loader, loader.model
        self._spill_bytes, self._checkpoints, self._progress = spill_bytes, checkpoints, progress
        self._current = threading.local()
        self.resumed_at = 0

    def run(
        self,
        batches: Sequence[torch.Tensor],
        *,
        forks: Sequence[Fork] = (),
        around: Callable[[int, int], contextlib.AbstractContextManager] | None = None,
        passed: Callable[[int, int, object], None] | None = None,
        after_layer: Callable[[int], None] | None = None,
        last_layer: int | None = None,
    ) -> Iterator[torch.Tensor]:
        """Push all batches through the model.

        Args:
            batches: token ids [B, T], any shapes.
            forks: further runs of some of them; not together with checkpoints. Runs are numbered batches first.
            around: called as around(layer, run); the context holds while that layer runs on that run's hidden states.
            passed: called as passed(layer, run, output) with what a layer gave.
            after_layer: called when all batches have passed a layer (save what was gathered for it there).
            last_layer: stop after this layer; no logits then.

        Yields:
            Logits [B, T, vocabulary] of each batch, then of each fork that has left, in order; nothing with
            `last_layer`.

        Raises:
            ModelError: the model does not run its decoder layers one after the other.
            CheckpointError: weights cannot be read.
        """
        if forks and self._checkpoints:
            raise ValueError("forks cannot be resumed")
        end = len(self.loader.layers) if last_layer is None else last_layer + 1
        with self._begun(batches, forks) as (walks, stock, spill, start):
            for _ in self._layers(walks, forks, stock, spill, start, end, around, passed, after_layer):
                pass
            if last_layer is None:
                ended = [
                    *walks[: len(batches)],
                    *(x for x, y in zip(walks[len(batches) :], forks, strict=True) if y.left),
                ]
                for number, walk in enumerate(ended):
                    spill.back(walk)
                    yield self._logits(walk)
                    self._progress("head", number + 1, len(ended))

    def stops(
        self,
        batches: Sequence[torch.Tensor],
        *,
        around: Callable[[int, int], contextlib.AbstractContextManager] | None = None,
        passed: Callable[[int, int, object], None] | None = None,
        last_layer: int | None = None,
    ) -> Generator[Stop, None, None]:
        """As `run`, but pausing before each layer, when its weights are in and all batches wait at it.

        The layer may be run on any batch and its weights changed; going on runs all batches through it as it then is.
        Two models are run side by side by going on with one iterator and then with the other.

        Args:
            batches: token ids [B, T], any shapes.
            around: as for `run`.
            passed: as for `run`.
            last_layer: the last to run; no logits are made.

        Raises:
            ModelError: the model does not run its decoder layers one after the other.
            CheckpointError: weights cannot be read.
        """
        end = len(self.loader.layers) if last_layer is None else last_layer + 1
        with self._begun(batches, ()) as (walks, stock, spill, start):
            yield from self._layers(walks, (), stock, spill, start, end, around, passed, None)

    @contextlib.contextmanager
    def _begun(
        self, batches: Sequence[torch.Tensor], forks: Sequence[Fork]
    ) -> Iterator[tuple[list[Walk], list[Callable], Spill, int]]:
        """All runs at the first layer: (the runs, the layers' own forwards, what waits on disk, the first layer)."""
        stock = [layer.forward for layer in self.loader.layers]
        outer = self.loader.read(OUTER)
        self.loader.attach(OUTER, outer)
        walks: list[Walk] = []
        try:
            for ids in (*batches, *(batches[fork.batch] for fork in forks)):
                walks.append(Walk(self.model, {"input_ids": ids.to(self.loader.device)}, self._current))
            for index, layer in enumerate(self.loader.layers):
                layer.forward = self._stub(index)
            with Spill(self._spill_bytes) as spill:
                yield walks, stock, spill, self._begin(walks, spill)
        finally:
            for walk in walks:
                walk.stop()
            for layer in self.loader.layers:
                vars(layer).pop("forward", None)
            self.loader.detach(OUTER, outer)

    def _stub(self, index: int) -> Callable:
        def forward(*args, **kwargs):
            return self._current.walk.at_layer(index, args, kwargs)

        return forward

    def _begin(self, walks: list[Walk], spill: Spill) -> int:
        """Bring every batch to the first layer that is still to run."""
        start, files = self._checkpoints.load() if self._checkpoints else (0, [])
        if len(files) != len(walks):
            start, files = 0, []
        self.resumed_at = start
        for number, walk in enumerate(walks):
            output = torch.load(files[number], map_location=self.loader.device, weights_only=True) if files else None
            output = pytree.tree_map_only(torch.Tensor, torch.clone, output)  # loaded storages cannot be resized
            walk.advance(start, output)
            spill.away(walk)
        return start

    def _layers(
        self,
        walks: list[Walk],
        forks: Sequence[Fork],
        stock: list[Callable],
        spill: Spill,
        start: int,
        end: int,
        around: Callable[[int, int], contextlib.AbstractContextManager] | None,
        passed: Callable[[int, int, object], None] | None,
        after_layer: Callable[[int], None] | None,
    ) -> Iterator[Stop]:
        """Take every run through the layers start .. end - 1, pausing before each; it then waits behind the last."""
        store, saved_at, steps = self._checkpoints, time.monotonic(), 0
        batches = len(walks) - len(forks)
        followers = [[x for x, fork in enumerate(forks, batches) if fork.batch == i] for i in range(batches)]

        def step(index: int, number: int) -> object:
            arrival = walks[number].arrival
            if arrival is None or arrival.layer != index:
                raise ModelError("the model does not run its layers in order", where=type(self.model).__name__)
            with torch.inference_mode(), around(index, number) if around else contextlib.nullcontext():
                output = stock[index](*arrival.args, **arrival.kwargs)
            if passed is not None:
                passed(index, number, output)
            return output

        def go_on(index: int, number: int, output: object) -> None:
            nonlocal steps
            if index + 1 < end:
                walks[number].proceed(output)
            else:
                walks[number].arrival = Arrival(end, (output,), {})
            steps += 1
            self._progress("layers", start * len(walks) + steps, end * len(walks))

        with ThreadPoolExecutor(1, "moekit-read") as reader:
            reading: Future = reader.submit(self.loader.read, start)
            for index in range(start, end):
                tensors = reading.result()
                if index + 1 < end:
                    reading = reader.submit(self.loader.read, index + 1)
                due = store is not None and index + 1 < end and time.monotonic() - saved_at >= store.every_s
                saving = store if due else None
                with self._attached(index, tensors):
                    del tensors
                    yield Stop(index, walks[:batches], stock[index], spill)
                    for number in range(batches):
                        spill.back(walks[number])
                        output = step(index, number)
                        if saving:
                            saving.save_batch(number, output)
                        for follower in followers[number]:
                            fork = forks[follower - batches]
                            spill.back(walks[follower])
                            fork.left = fork.left or fork.leaves(index)
                            go_on(index, follower, step(index, follower) if fork.left else output)
                            if fork.left:  # before, its hidden states are the batch's
                                spill.away(walks[follower])
                        go_on(index, number, output)
                        if saving and number == 0 and not self._replays(walks[0], output):
                            saving = None
                        del output
                        spill.away(walks[number])
                if after_layer is not None:
                    after_layer(index)
                if saving:
                    saving.commit(index + 1)
                    saved_at = time.monotonic()

    @contextlib.contextmanager
    def _attached(self, index: int, tensors: dict[str, torch.Tensor]) -> Iterator[None]:
        self.loader.attach(index, tensors)
        try:
            yield
        finally:
            self.loader.detach(index, tensors)

    def _logits(self, walk: Walk) -> torch.Tensor:
        """Let a run that has passed all layers end."""
        assert walk.arrival is not None
        walk.proceed(walk.arrival.args[0])
        out, walk.output = walk.output, None
        if out is None:
            raise ModelError("the model runs its layers more than once", where=type(self.model).__name__)
        return out.logits

    def _replays(self, walk: Walk, output: object) -> bool:
        """Would a new walk, every stub answering `output`, arrive where this one stands? Else resuming is not exact."""
        again = Walk(self.model, walk.inputs, self._current)
        try:
            ours = walk.arrival
            assert ours is not None
            again.advance(ours.layer, output)
            theirs = again.arrival
            assert theirs is not None
            a, b = (pytree.tree_leaves((x.args, x.kwargs)) for x in (ours, theirs))
            return len(a) == len(b) and all(
                torch.equal(x, y) if isinstance(x, torch.Tensor) else not isinstance(x, int | float) or x == y
                for x, y in zip(a, b, strict=True)
            )
        finally:
            again.stop()
