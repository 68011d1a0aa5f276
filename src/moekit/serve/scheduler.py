"""The thread that computes, and the queue before it."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from moekit.serve.batching import Ask, Batcher, News, Text

LOG = logging.getLogger("moekit.serve")


class QueueFullError(Exception):
    """There are more requests than may wait.

    Attributes:
        retry_s: when it may be worth another try, s.
    """

    def __init__(self, retry_s: int):
        super().__init__(f"too many requests are waiting; try again in {retry_s} s")
        self.retry_s = retry_s


class ClosedError(Exception):
    """The server is going down."""


class Scheduler:
    """Runs a batcher in a thread of its own until it is closed.

    Args:
        batcher: only this thread touches it from now on (but for `check` and `make`).
        queue: texts that may wait beside those that are being written.
    """

    def __init__(self, batcher: Batcher, queue: int = 64):
        self.batcher, self.queue = batcher, queue
        self._inbox: deque[Text] = deque()
        self._wake = threading.Condition()
        self._closing = self._abandoning = False
        self._thread = threading.Thread(target=self._run, name="moekit-serve", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Texts that have a cache."""
        return len(self.batcher.kept)

    @property
    def waiting(self) -> int:
        """Texts that have none yet."""
        return len(self.batcher.waiting) + len(self._inbox)

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return self._thread.is_alive() and not self._closing

    def submit(self, asks: Sequence[Ask], tell: Callable[[int, News], None]) -> list[Text]:
        """Queue several texts, or none of them.

        Args:
            asks: what they are.
            tell: is called with a text's number and its news, in the thread that computes.

        Raises:
            DataError, RecipeError: see `Batcher.check`.
            QueueFullError: too many are waiting.
            ClosedError: after `close`.
        """
        texts = [self.batcher.make(ask, partial(tell, number)) for number, ask in enumerate(asks)]
        with self._wake:
            if not self.alive:
                raise ClosedError("the server is shutting down")
            if self.running + self.waiting + len(texts) > self.batcher.engine.texts + self.queue:
                raise QueueFullError(self._retry_s())
            self._inbox.extend(texts)
            self._wake.notify()
        return texts

    def cancel(self, texts: Sequence[Text]) -> None:
        """Give texts up: their places are free before the next token."""
        for text in texts:
            text.cancelled = True

    def close(self, grace_s: float = 30.0) -> None:
        """Take no more requests, let those that are here come to their end, and end the thread.

        Args:
            grace_s: after which they are given up.
        """
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(grace_s)
        self._abandoning = True
        self._thread.join()

    def _retry_s(self) -> int:
        """About when a place should be free: the first token of those that wait takes so long."""
        first = self.batcher.engine.telemetry.first.quantiles()[0.5]
        return max(1, min(60, round(first))) if first == first else 1

    def _run(self) -> None:
        batcher = self.batcher
        while True:
            with self._wake:
                while not self._inbox and batcher.idle and not self._closing:
                    self._wake.wait()
                if self._abandoning or (self._closing and not self._inbox and batcher.idle):
                    break
                while self._inbox:
                    batcher.waiting.append(self._inbox.popleft())
            try:
                batcher.turn()
            except Exception as error:  # ours, not a request's: what was in the works is lost, the server goes on
                LOG.exception("a turn has failed")
                batcher.fail(error)
        batcher.fail(ClosedError("the server is shutting down"))
        if batcher.steering:
            batcher.steering.close()
