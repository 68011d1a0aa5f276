"""Run a stock model layer by layer: one layer's weights in memory, the next being read, all batches through each.

The model's own forward runs once per batch, each in a thread of its own that stops at every decoder layer: the layer's
forward is a stub that hands its arguments over and waits. When all batches have arrived at layer i, its weights are
put in, the real layer runs on each batch's arguments in turn, and every thread goes on with its result to layer i + 1.
So whatever a family does before, between and after its layers (masks, positions, hyper-connections, pairs passed from
layer to layer) is done by the family's own code, and the result is the stock forward, bit for bit (that with
transformers' eager experts; its grouped ones round sums elsewhere). Only one thread runs at a time.

Hidden states that pass `spill_bytes` wait on disk. A checkpoint after a layer holds every batch's output; on resume
each thread walks again with all earlier stubs answering that output, which is exact where a layer's arguments depend
on the last output only. That is checked on the first batch before any checkpoint is written.

A fork is a second run of a batch that differs from some layer on (an expert is switched off there). Until then it is a
thread that is handed its batch's outputs, which costs nothing; so many changes are tried in one pass, each costing only
the layers behind it.
"""

from __future__ import annotations

import contextlib
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from moekit.errors import ModelError
from moekit.families.loader import OUTER, Loader
from moekit.progress import Progress, silent

DEFAULT_SPILL_BYTES = 4 << 30


class _Stopped(BaseException):
    """Ends a waiting thread; not an Exception, so that no family's code catches it."""


@dataclass
class _Arrival:
    """A batch has reached a decoder layer."""

    layer: int
    args: tuple
    kwargs: dict


class _Walk(threading.Thread):
    """One batch on its way through the model's own forward."""

    def __init__(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], current: threading.local):
        super().__init__(daemon=True)
        self._model, self.inputs, self._current = model, inputs, current
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue = queue.SimpleQueue()
        self.arrival: _Arrival | None = None
        self.output: Any = None
        self.resident_bytes = 0

    def run(self) -> None:
        self._current.walk = self
        try:
            with torch.inference_mode():
                self._outbox.put(self._model(**self.inputs, use_cache=False))
        except _Stopped:
            self._outbox.put(None)
        except BaseException as error:
            self._outbox.put(error)

    def at_layer(self, layer: int, args: tuple, kwargs: dict) -> object:
        """In the thread: hand over the layer's arguments, wait for its result."""
        self._outbox.put(_Arrival(layer, args, kwargs))
        del args, kwargs
        answer = self._inbox.get()
        if isinstance(answer, _Stopped):
            raise answer
        return answer

    def proceed(self, answer: object = None) -> None:
        """In the driver: let the thread go on until it stops at a layer or ends."""
        if self.ident is None:
            self.start()
        else:
            self.arrival = None
            self._inbox.put(answer)
        del answer
        event = self._outbox.get()
        if isinstance(event, BaseException):
            raise event
        self.arrival, self.output = (event, None) if isinstance(event, _Arrival) else (None, event)

    def advance(self, layer: int, answer: object) -> None:
        """In the driver: go on until layer `layer`, every stub before it answering `answer`."""
        self.proceed()
        while self.arrival is not None and self.arrival.layer < layer:
            self.proceed(answer)

    def stop(self) -> None:
        """In the driver: end the thread; one that runs (we were interrupted waiting for it) ends at its next stop."""
        if self.is_alive():
            self._inbox.put(_Stopped())
            self.join()
        self.arrival = None


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
class Checkpoints:
    """Where a run leaves what it needs to go on after a kill.

    Attributes:
        folder: a folder of its own.
        identity: names the job; what another job left is ignored.
        carry: plain data saved along with the hidden states, and restored into the same dict.
        every_s: seconds between checkpoints (at layer boundaries).
    """

    folder: Path
    identity: str
    carry: dict = field(default_factory=dict)
    every_s: float = 60.0

    def load(self) -> tuple[int, list[Path]]:
        """(layer to go on with, one file a batch); (0, []) when there is nothing to resume.

        What another job left, or what is damaged, is removed.
        """
        folder = self.folder / "hidden"
        try:
            saved = torch.load(folder / "state.pt", weights_only=True)
            if saved["identity"] == self.identity:
                self.carry.clear()
                self.carry.update(saved["carry"])
                return saved["next"], sorted(folder.glob("batch-*.pt"))
        except (OSError, RuntimeError, EOFError, KeyError, UnpicklingError):
            pass
        shutil.rmtree(folder, ignore_errors=True)
        return 0, []

    def save_batch(self, number: int, output: object) -> None:
        """Keep one batch's output of the layer that is running."""
        folder = self.folder / "hidden.next"
        if number == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        _save(pytree.tree_map_only(torch.Tensor, lambda x: x.cpu().clone(), output), folder / f"batch-{number:06d}.pt")

    def commit(self, following: int) -> None:
        """All batches of a layer are kept: this is the checkpoint now."""
        new, old = self.folder / "hidden.next", self.folder / "hidden"
        _save({"identity": self.identity, "next": following, "carry": self.carry}, new / "state.pt")
        shutil.rmtree(old, ignore_errors=True)
        new.rename(old)


def _save(value: object, file: Path) -> None:
    with file.open("wb") as stream:  # given a path, torch says of a full disk that it is torch's own failure
        torch.save(value, stream)


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
        stock = [layer.forward for layer in self.loader.layers]
        end = len(stock) if last_layer is None else last_layer + 1
        outer = self.loader.read(OUTER)
        self.loader.attach(OUTER, outer)
        walks: list[_Walk] = []
        try:
            for ids in (*batches, *(batches[fork.batch] for fork in forks)):
                walks.append(_Walk(self.model, {"input_ids": ids.to(self.loader.device)}, self._current))
            for index, layer in enumerate(self.loader.layers):
                layer.forward = self._stub(index)
            with _Spill(self._spill_bytes) as spill:
                start = self._begin(walks, spill)
                self._layers(walks, forks, stock, spill, start, end, around, passed, after_layer)
                if last_layer is None:
                    ended = [
                        *walks[: len(batches)],
                        *(x for x, y in zip(walks[len(batches) :], forks, strict=True) if y.left),
                    ]
                    for number, walk in enumerate(ended):
                        spill.back(walk)
                        yield self._logits(walk)
                        self._progress("head", number + 1, len(ended))
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

    def _begin(self, walks: list[_Walk], spill: _Spill) -> int:
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
        walks: list[_Walk],
        forks: Sequence[Fork],
        stock: list[Callable],
        spill: _Spill,
        start: int,
        end: int,
        around: Callable[[int, int], contextlib.AbstractContextManager] | None,
        passed: Callable[[int, int, object], None] | None,
        after_layer: Callable[[int], None] | None,
    ) -> None:
        """Take every run through the layers start .. end - 1; it then waits behind the last."""
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
                walks[number].arrival = _Arrival(end, (output,), {})
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

    def _logits(self, walk: _Walk) -> torch.Tensor:
        """Let a run that has passed all layers end."""
        assert walk.arrival is not None
        walk.proceed(walk.arrival.args[0])
        out, walk.output = walk.output, None
        if out is None:
            raise ModelError("the model runs its layers more than once", where=type(self.model).__name__)
        return out.logits

    def _replays(self, walk: _Walk, output: object) -> bool:
        """Would a new walk, every stub answering `output`, arrive where this one stands? Else resuming is not exact."""
        again = _Walk(self.model, walk.inputs, self._current)
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


class _Spill:
    """Keeps hidden states of waiting batches on disk once they pass a limit; the tensors' memory is freed in place."""

    def __init__(self, limit_bytes: int):
        self._limit, self._resident = limit_bytes, 0
        self._folder: tempfile.TemporaryDirectory | None = None
        self._gone: dict[_Walk, list[tuple[torch.UntypedStorage, Path]]] = {}

    def __enter__(self) -> _Spill:
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def away(self, walk: _Walk) -> None:
        """The batch waits at a layer: count its hidden states, and write them out if there are too many."""
        if walk.arrival is None:
            return
        arrival = walk.arrival
        first = arrival.args[0] if arrival.args else arrival.kwargs.get("hidden_states")
        tensors = [x for x in pytree.tree_leaves(first) if isinstance(x, torch.Tensor) and x.is_floating_point()]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors}
        size = sum(x.nbytes() for x in storages.values())
        if self._resident + size <= self._limit:
            self._resident += size
            walk.resident_bytes = size
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="moekit-spill-")
        self._gone[walk] = []
        for number, storage in enumerate(storages.values()):
            file = Path(self._folder.name) / f"{id(walk)}-{number}"
            data = _as_bytes(storage).clone().cpu()  # numpy would pin the storage itself to its size
            file.write_bytes(data.numpy().data)
            self._gone[walk].append((storage, file))
            storage.resize_(0)

    def back(self, walk: _Walk) -> None:
        """The batch's turn has come: its hidden states are in memory again."""
        self._resident -= walk.resident_bytes
        walk.resident_bytes = 0
        for storage, file in self._gone.pop(walk, ()):
            storage.resize_(file.stat().st_size)
            _as_bytes(storage).copy_(torch.from_numpy(np.fromfile(file, np.uint8)))


def _as_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
