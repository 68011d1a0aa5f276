"""One batch on its way through a model's own forward, in a thread that stops at every decoder layer."""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass
from typing import Any

import torch


class Stopped(BaseException):
    """Ends a waiting thread; not an Exception, so that no family's code catches it."""


@dataclass
class Arrival:
    """A batch has reached a decoder layer."""

    layer: int
    args: tuple
    kwargs: dict


class Walk(threading.Thread):
    """One batch on its way through the model's own forward."""

    def __init__(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], current: threading.local):
        super().__init__(daemon=True)
        self._model, self.inputs, self._current = model, inputs, current
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue = queue.SimpleQueue()
        self.arrival: Arrival | None = None
        self.output: Any = None
        self.resident_bytes = 0

    def run(self) -> None:
        """In the thread: the model's own forward, to its end."""
        self._current.walk = self
        try:
            with torch.inference_mode():
                self._outbox.put(self._model(**self.inputs, use_cache=False))
        except Stopped:
            self._outbox.put(None)
        except BaseException as error:
            self._outbox.put(error)

    def at_layer(self, layer: int, args: tuple, kwargs: dict) -> object:
        """In the thread: hand over the layer's arguments, wait for its result."""
        self._outbox.put(Arrival(layer, args, kwargs))
        del args, kwargs
        answer = self._inbox.get()
        if isinstance(answer, Stopped):
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
        self.arrival, self.output = (event, None) if isinstance(event, Arrival) else (None, event)

    def advance(self, layer: int, answer: object) -> None:
        """In the driver: go on until layer `layer`, every stub before it answering `answer`."""
        self.proceed()
        while self.arrival is not None and self.arrival.layer < layer:
            self.proceed(answer)

    def stop(self) -> None:
        """In the driver: end the thread; one that runs (we were interrupted waiting for it) ends at its next stop."""
        if self.is_alive():
            self._inbox.put(Stopped())
            self.join()
        self.arrival = None
