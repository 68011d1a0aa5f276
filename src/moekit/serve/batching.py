"""Continuous batching: texts join and leave between tokens, and each token of all of them is one forward.

A turn runs at most a chunk of prompts and then one token of every text that is being written: a long prompt holds the
others up for a chunk at a time, several short ones for as many as should take no longer than a token. Keys and values
of all texts lie in one padded cache, as far as a trial at the start has shown that this model gives the same logits so;
otherwise each text has its own cache and its own forward.

A text that no longer fits, and one whose neighbour has failed, is put off: its cache goes, and it is run again from its
first token. So a failing request (a damaged expert) ends alone.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from moekit.errors import DataError, RecipeError, did_you_mean
from moekit.families.caches import join, keep
from moekit.families.resident import empty_cache
from moekit.serve.device import held, trim
from moekit.serve.engine import CHUNK_TOKENS, SLACK_BYTES, Engine, too_long
from moekit.serve.sampling import Likelihood, Sampling, adjusted, choose, likelihood
from moekit.serve.steering import Steering
from moekit.serve.text import TextStream

ROOM_TOKENS = 32  # that a text must be able to write before it is let in beside others


@dataclass(frozen=True)
class Ask:
    """What is asked for.

    Attributes:
        ids: the prompt.
        max_tokens: of the answer, at most; None: as many as the context holds.
        sampling: how tokens are chosen.
        stop: strings that end the answer.
        top_logprobs: likeliest tokens to tell with each; None: tell nothing.
        steer: name of a loaded plan; None: none.
    """

    ids: Sequence[int]
    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    steer: str | None = None


@dataclass(frozen=True)
class News:
    """What has become of a text since the last time.

    Attributes:
        text: new text.
        tokens: new tokens, if their likelihoods were asked for; with those whose text is still held back.
        count: tokens written so far.
        finish: "stop", "length", "cancelled" or "error" with the last news; None before.
        error: what went wrong.
    """

    text: str
    tokens: tuple[Likelihood, ...]
    count: int
    finish: str | None = None
    error: Exception | None = None


@dataclass(eq=False)
class Text:
    """A text in the works.

    Attributes:
        ask: what it is.
        tell: is called with news, in the thread that computes.
        ids: prompt and what is written.
        past: its cache while it is read; None before, and once it has joined others.
        done: how many of `ids` have been run.
        cancelled: set by whoever no longer wants it.
    """

    ask: Ask
    tell: Callable[[News], None]
    ids: list[int]
    stream: TextStream
    generator: torch.Generator
    arrived_s: float
    past: Any = None
    done: int = 0
    cancelled: bool = False
    written: Counter[int] = field(default_factory=Counter)
    likelihoods: list[Likelihood] = field(default_factory=list)
    token_at_s: float | None = None

    @property
    def count(self) -> int:
        """Tokens written."""
        return len(self.ids) - len(self.ask.ids)


@dataclass
class Group:
    """Texts whose next tokens are one forward."""

    past: Any
    texts: list[Text]


class Batcher:
    """Writes several texts at once; all of it in one thread.

    Args:
        engine: made for as many texts as are to be written at once.
        tokenizer: of the model.
        steering: plans that texts may choose; None: none.
        batched: whether texts share forwards; `moekit.serve.trial.why_not` says whether they can.

    Attributes:
        waiting: texts that have not begun, and those put off.
        kept: texts that have a cache, in the order in which they came in.
    """

    def __init__(self, engine: Engine, tokenizer: Any, steering: Steering | None = None, batched: bool = True):
        self.engine, self.tokenizer, self.steering, self.batched = engine, tokenizer, steering, batched
        self.waiting: deque[Text] = deque()
        self.kept: list[Text] = []
        self._groups: list[Group] = []
        self._token_s = 0.0  # that the last token of all texts took
        self._prompt_token_s = 0.0  # that a token of the prompt that was read last took
        self._least_held = 0  # bytes, since memory was given back last
        self._ends = engine.ends

    def check(self, ask: Ask) -> None:
        """Refuse what cannot be answered; may be called from any thread.

        Raises:
            DataError: an empty prompt, one that leaves no room in the context, or tokens that do not exist.
            RecipeError: no such plan.
        """
        context, vocabulary = self.engine.context, self.engine.layout.vocab_size
        if not 0 < len(ask.ids) < context:
            raise too_long(context, f"{len(ask.ids):,}")
        tokens = [*ask.ids, *ask.sampling.logit_bias]
        if min(tokens) < 0 or max(tokens) >= vocabulary:
            raise DataError(
                "there is no such token",
                expected=f"0 to {vocabulary - 1:,}",
                got=next(x for x in tokens if not 0 <= x < vocabulary),
            )
        names = self.steering.names if self.steering else []
        if ask.steer is not None and ask.steer not in names:
            fix = did_you_mean(ask.steer, names) if names else "start the server with --steer NAME=plan.json"
            raise RecipeError(f"there is no loaded plan {ask.steer!r}", where="steer", fix=fix)

    def make(self, ask: Ask, tell: Callable[[News], None]) -> Text:
        """A text that can be put into `waiting`; may be called from any thread.

        Raises:
            DataError, RecipeError: see `check`.
        """
        self.check(ask)
        generator = torch.Generator().manual_seed(ask.sampling.seed)
        return Text(
            ask, tell, list(ask.ids), TextStream(self.tokenizer, ask.stop), generator, arrived_s=time.perf_counter()
        )

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.waiting and not self.kept

    def turn(self) -> None:
        """Run some of the prompts, then one token of every text that is being written."""
        gone = [x for x in (*self.waiting, *self.kept) if x.cancelled]
        for text in gone:
            self._end(text, "cancelled")
        self._leave(gone)
        self._make_room()
        while self.waiting and self._fits(self.waiting[0]):
            self.kept.append(self.waiting.popleft())
        if self.steering:
            self.steering.use({x.ask.steer for x in self.kept if x.ask.steer})
        writing = list(self._groups)
        self._read()
        started = time.perf_counter()
        for group in writing:
            if group in self._groups:
                self._write(group)
        self._token_s = time.perf_counter() - started if writing else 0.0
        self._relieve()

    def fail(self, error: Exception) -> None:
        """End all texts with an error."""
        self._groups.clear()
        for text in (*self.waiting, *self.kept):
            self._end(text, "error", error)

    def _relieve(self) -> None:
        """Give freed memory back before the holes that prompts of all lengths leave fill up the budget."""
        device = self.engine.device
        now = held(device)
        self._least_held = min(self._least_held, now)
        if now > max(self.engine.memory.budget - SLACK_BYTES, self._least_held + SLACK_BYTES // 4):
            trim(device)
            self._least_held = held(device)

    def _cost(self, texts: Sequence[Text], room: int) -> int:
        """Tokens whose keys and values these texts take up, padding included, when each has `room` more."""
        lengths = [min(len(x.ids) + room, self.engine.context) for x in texts]
        return len(lengths) * max(lengths) if self.batched else sum(lengths)

    def _fits(self, text: Text) -> bool:
        if not self.kept:
            return True
        fits = self._cost([*self.kept, text], ROOM_TOKENS) <= self.engine.kept_tokens
        return len(self.kept) < self.engine.texts and fits

    def _make_room(self) -> None:
        """Put the last texts off until the others' next tokens fit."""
        late = []
        while len(self.kept) > 1 and self._cost(self.kept, 1) > self.engine.kept_tokens:
            late.append(self.kept[-1])
            self._put_off(self.kept[-1])
        self.waiting.extendleft(late)

    def _put_off(self, text: Text) -> None:
        """Take a text's cache from it; it begins again when it is read again."""
        self._leave([text])
        self.kept.remove(text)
        text.past, text.done = None, 0

    def _read(self) -> None:
        """Run some tokens of texts that have not joined yet, in the order in which they came."""
        joined, budget = [text for group in self._groups for text in group.texts], CHUNK_TOKENS
        began = time.perf_counter()
        for text in [x for x in self.kept if x not in joined]:
            part, started = text.ids[text.done : text.done + budget], time.perf_counter()
            late = started + len(part) * self._prompt_token_s > began + self._token_s
            if not part or (joined and budget < CHUNK_TOKENS and late):
                return
            try:
                if text.past is None:
                    text.past = empty_cache(self.engine.model)
                    self.engine.begin()
                logits = self._forward([text], torch.tensor([part]), text.past, "prefill")
            except Exception as error:
                self._end(text, "error", error)
                continue
            self._prompt_token_s = (time.perf_counter() - started) / len(part)
            budget -= len(part)
            text.done += len(part)
            if text.done == len(text.ids):
                self._next(text, logits[0])
                if text in self.kept:
                    self._join(text)

    def _write(self, group: Group) -> None:
        """One token of each of a group's texts."""
        texts = list(group.texts)
        try:
            ids_B1 = torch.tensor([[x.ids[-1]] for x in texts])
            logits_BV = self._forward(texts, ids_B1, group.past, "decode")
        except Exception as error:
            self._groups.remove(group)
            if len(texts) == 1:
                self._end(texts[0], "error", error)
                return
            for text in texts:  # whose fault it was shows when each is run alone
                self._put_off(text)
            self.waiting.extendleft(reversed(texts))
            return
        for text, logits_V in zip(texts, logits_BV, strict=True):
            text.done += 1
            self._next(text, logits_V)
        self._leave([x for x in texts if x not in self.kept])

    def _forward(self, texts: list[Text], ids_BS: torch.Tensor, past: Any, kind: str) -> torch.Tensor:
        starts = [x.done for x in texts]
        if self.steering is None:
            return self.engine.forward(ids_BS, past, kind, starts)
        prompts, names = [len(x.ask.ids) for x in texts], [x.ask.steer for x in texts]
        with self.steering.running(names, starts, prompts, ids_BS.shape[1]):
            return self.engine.forward(ids_BS, past, kind, starts)

    def _next(self, text: Text, logits_V: torch.Tensor) -> None:
        """Choose a text's next token, and tell."""
        ask, now = text.ask, time.perf_counter()
        try:
            token = choose(adjusted(logits_V, ask.sampling, text.written), ask.sampling, text.generator)
        except RuntimeError as error:  # logits that are no numbers
            self._end(text, "error", error)
            return
        telemetry = self.engine.telemetry
        if text.token_at_s is None:
            telemetry.first.add(now - text.arrived_s)
        else:
            telemetry.token.add(now - text.token_at_s)
        text.token_at_s = now
        if token in self._ends:
            self._end(text, "stop")
            return
        if ask.top_logprobs is not None:
            text.likelihoods.append(likelihood(logits_V, token, ask.top_logprobs))
        text.ids.append(token)
        text.written[token] += 1
        shown = text.stream.push(token)
        most = self.engine.context - len(ask.ids)
        if text.stream.stopped:
            self._end(text, "stop", shown=shown)
        elif text.count >= (most if ask.max_tokens is None else min(most, ask.max_tokens)):
            self._end(text, "length", shown=shown)
        elif shown:
            self._say(text, News(shown, self._told(text), text.count))

    def _told(self, text: Text) -> tuple[Likelihood, ...]:
        told, text.likelihoods = tuple(text.likelihoods), []
        return told

    def _end(self, text: Text, finish: str, error: Exception | None = None, shown: str = "") -> None:
        """Tell a text's last news and forget it; its row leaves its group when the running token is done."""
        (self.kept if text in self.kept else self.waiting).remove(text)
        text.past = None
        self.engine.telemetry.finished[finish] += 1
        rest = text.stream.finish() if finish in ("stop", "length") else ""
        self._say(text, News(shown + rest, self._told(text), text.count, finish, error))

    def _say(self, text: Text, news: News) -> None:
        try:
            text.tell(news)
        except RuntimeError:  # nobody listens any more: an event loop that is closed
            text.cancelled = True

    def _join(self, text: Text) -> None:
        """Let a text whose prompt has been run write along with the others."""
        past, text.past = text.past, None
        if self.batched and self._groups:
            group = self._groups[0]
            group.past = join([group.past, past])
            group.texts.append(text)
        else:
            self._groups.append(Group(past, [text]))

    def _leave(self, texts: Sequence[Text]) -> None:
        """Take texts' rows out of their groups."""
        for group in list(self._groups):
            rows = [row for row, text in enumerate(group.texts) if text not in texts]
            if len(rows) == len(group.texts):
                continue
            group.texts = [group.texts[row] for row in rows]
            if rows:
                keep(group.past, rows, max(x.done for x in group.texts))
            else:
                self._groups.remove(group)
