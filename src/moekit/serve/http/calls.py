"""From a request to texts in the scheduler, and from their news to the event loop."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fastapi import Request as HttpRequest

from moekit.serve.batching import Ask, News, Text
from moekit.serve.engine import too_long
from moekit.serve.http.errors import ApiError, api_error
from moekit.serve.http.schemas import ChatRequest, CompletionRequest, Request
from moekit.serve.sampling import Sampling
from moekit.serve.scheduler import Scheduler

CUT_TOKENS = 16  # that a text may have more when it is cut in the middle of a word


@dataclass(frozen=True)
class Service:
    """What the routes work with.

    Attributes:
        scheduler: that computes.
        tokenizer: of the model.
        name: under which the model is offered.
        created: when the server was started, s since 1970.
        chat_template: instead of the tokenizer's own; None: that one.
        why_not_batched: why texts do not share forwards; None: they do.
    """

    scheduler: Scheduler
    tokenizer: Any
    name: str
    created: int
    chat_template: str | None = None
    why_not_batched: str | None = None

    def check_model(self, name: str) -> None:
        """Refuse a request for another model.

        Raises:
            ApiError: 404.
        """
        if name != self.name:
            raise ApiError(404, f"there is no model {name!r} here, only {self.name!r}", "model", "model_not_found")

    def ids(self, text: str, special: bool = True) -> list[int]:
        """Tokens of a text.

        A tokenizer needs about half a kilobyte for each: of a text that is far too long only a beginning is looked at.

        Args:
            text: any.
            special: put those around it that the tokenizer puts around texts.

        Raises:
            DataError: a beginning of it has more tokens than the context.
        """
        context = self.scheduler.batcher.engine.context
        size = 4 * context
        while size < len(text):
            count = len(self.tokenizer(text[:size], add_special_tokens=special).input_ids)
            if count > context + CUT_TOKENS:
                raise too_long(context, f"more than {count - CUT_TOKENS:,}")
            size *= 4
        return self.tokenizer(text, add_special_tokens=special).input_ids

    def chat_ids(self, request: ChatRequest) -> list[int]:
        """A talk as the model's chat template writes it.

        Raises:
            ApiError: 400, no chat template, or one that refuses these messages.
            DataError: see `ids`.
        """
        if not (self.chat_template or self.tokenizer.chat_template):
            raise ApiError(
                400,
                "this model has no chat template; use /v1/completions, or start the server with --chat-template",
                "messages",
                "no_chat_template",
            )
        talk = [message.plain() for message in request.messages]
        try:
            text = self.tokenizer.apply_chat_template(
                talk, chat_template=self.chat_template, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # templates are programs, and raise whatever they like
            raise ApiError(400, f"the chat template refuses this talk: {error}", "messages") from None
        return self.ids(text, special=False)  # the template has written them


def asks(request: Request, prompts: Sequence[Sequence[int]]) -> list[Ask]:
    """What a request asks for: `n` texts for each prompt, prompt after prompt."""
    top, most = None, None
    if isinstance(request, ChatRequest):
        most = request.max_completion_tokens or request.max_tokens
        top = (request.top_logprobs or 0) if request.logprobs else None
    elif isinstance(request, CompletionRequest):
        most, top = request.max_tokens, request.logprobs
    seed = secrets.randbits(48) if request.seed is None else request.seed
    out: list[Ask] = []
    for ids in prompts:
        for _ in range(request.n):
            sampling = Sampling(
                request.temperature,
                request.top_p,
                (seed + len(out)) % 2**63,  # what generators take; each text draws its own
                request.presence_penalty,
                request.frequency_penalty,
                request.logit_bias,
            )
            out.append(Ask(ids, most, sampling, request.stops, top, request.steer))
    return out


class Call:
    """The texts of one request.

    Args:
        scheduler: that computes them.
        wanted: what they are.
        http: the request; when its client goes, the texts are given up.

    Raises:
        DataError, RecipeError, QueueFullError, ClosedError: see `Scheduler.submit`.
    """

    def __init__(self, scheduler: Scheduler, wanted: Sequence[Ask], http: HttpRequest):
        self._scheduler, self._open = scheduler, len(wanted)
        self._news: asyncio.Queue[tuple[int, News]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(number: int, news: News) -> None:
            loop.call_soon_threadsafe(self._news.put_nowait, (number, news))

        self.texts: list[Text] = scheduler.submit(wanted, tell)
        self._watch = asyncio.create_task(self._until_gone(http))

    async def news(self) -> AsyncIterator[tuple[int, News]]:
        """(number of the text, news) until all have ended.

        Raises:
            ApiError: a text has failed; the others are given up.
        """
        try:
            while self._open:
                number, news = await self._news.get()
                if news.error is not None:
                    raise api_error(news.error)
                self._open -= news.finish is not None
                yield number, news
        finally:
            self.end()

    def end(self) -> None:
        """Give up what has not ended."""
        self._watch.cancel()
        self._scheduler.cancel(self.texts)

    async def _until_gone(self, http: HttpRequest) -> None:
        with suppress(ApiError):
            while (await http.receive())["type"] != "http.disconnect":
                pass
            self._scheduler.cancel(self.texts)
