"""Answers in the shape of OpenAI's API, whole and in chunks."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Literal

from moekit.serve.batching import News
from moekit.serve.http.calls import Call
from moekit.serve.http.errors import ApiError
from moekit.serve.sampling import Likelihood
from moekit.serve.text import UNFINISHED

Kind = Literal["chat", "completion"]
FINISH = {"stop": "stop", "length": "length", "cancelled": "stop"}


class Reply:
    """Puts the news of a request's texts into answers.

    Args:
        kind: of the request.
        model: its name.
        tokenizer: of the model.
        prompt_tokens: of all prompts.
        choices: texts that are written.
        likely: whether likelihoods of tokens were asked for.
    """

    def __init__(self, kind: Kind, model: str, tokenizer: Any, prompt_tokens: int, choices: int, likely: bool):
        self.kind, self.model, self.tokenizer, self.likely = kind, model, tokenizer, likely
        self.prompt_tokens, self.counts = prompt_tokens, [0] * choices
        self.head = {
            "id": ("chatcmpl-" if kind == "chat" else "cmpl-") + secrets.token_hex(12),
            "object": "chat.completion" if kind == "chat" else "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._offsets = [0] * choices

    async def whole(self, call: Call) -> dict[str, Any]:
        """The answer when all texts have ended."""
        texts = [""] * len(self.counts)
        tokens: list[list[Likelihood]] = [[] for _ in self.counts]
        finish: list[str | None] = [None] * len(self.counts)
        async for number, news in call.news():
            texts[number] += news.text
            tokens[number] += news.tokens
            self.counts[number], finish[number] = news.count, news.finish
        choices = []
        for number, text in enumerate(texts):
            said = {"message": {"role": "assistant", "content": text}} if self.kind == "chat" else {"text": text}
            choices.append(self._choice(number, said, tokens[number], finish[number]))
        return {**self.head, "choices": choices, "usage": self.usage}

    async def chunks(self, call: Call, include_usage: bool) -> AsyncIterator[str]:
        """Server-sent events; the first comes when the first text has news."""
        usage = {"usage": None} if include_usage else {}
        began = False
        try:
            async for number, news in call.news():
                if not began:
                    began = True
                    for event in self._openings(usage):
                        yield event
                self.counts[number] = news.count
                for said, tokens, finish in self._pieces(news):
                    yield self._event([self._choice(number, said, tokens, finish)], usage)
        except ApiError as error:
            if not began:
                raise
            yield f"data: {json.dumps(error.body)}\n\n"
            return
        if include_usage:
            yield self._event([], {"usage": self.usage})
        yield "data: [DONE]\n\n"

    @property
    def usage(self) -> dict[str, int]:
        """Tokens so far."""
        written = sum(self.counts)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": written,
            "total_tokens": self.prompt_tokens + written,
        }

    def _openings(self, usage: dict[str, Any]) -> Iterator[str]:
        if self.kind == "chat":
            for number in range(len(self.counts)):
                delta = {"delta": {"role": "assistant", "content": ""}}
                yield self._event([self._choice(number, delta, (), None)], usage)

    def _pieces(self, news: News) -> Iterator[tuple[dict[str, Any], Sequence[Likelihood], str | None]]:
        """A chat's end comes in a chunk of its own, whose delta is empty."""
        if self.kind == "completion":
            yield {"text": news.text}, news.tokens, news.finish
            return
        if news.text or news.tokens:
            yield {"delta": {"content": news.text}}, news.tokens, None
        if news.finish:
            yield {"delta": {}}, (), news.finish

    def _event(self, choices: list[dict[str, Any]], more: dict[str, Any]) -> str:
        kind = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        return f"data: {json.dumps({**self.head, 'object': kind, 'choices': choices, **more}, ensure_ascii=False)}\n\n"

    def _choice(
        self, number: int, said: dict[str, Any], tokens: Sequence[Likelihood], finish: str | None
    ) -> dict[str, Any]:
        likely = None
        if self.likely and (tokens or "delta" not in said):
            likely = self._chat_likely(tokens) if self.kind == "chat" else self._likely(number, tokens)
        return {"index": number, **said, "logprobs": likely, "finish_reason": FINISH.get(finish or "")}

    def _word(self, token: int) -> str:
        return self.tokenizer.decode([token])

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        word = self._word(token)
        raw = None if UNFINISHED in word else list(word.encode())  # part of a character: its bytes are not known here
        return {"token": word, "logprob": logprob, "bytes": raw}

    def _chat_likely(self, tokens: Sequence[Likelihood]) -> dict[str, Any]:
        return {
            "content": [
                {**self._entry(x.token, x.logprob), "top_logprobs": [self._entry(*pair) for pair in x.top]}
                for x in tokens
            ]
        }

    def _likely(self, number: int, tokens: Sequence[Likelihood]) -> dict[str, Any]:
        words, offsets = [self._word(x.token) for x in tokens], []
        for word in words:
            offsets.append(self._offsets[number])
            self._offsets[number] += len(word)
        return {
            "tokens": words,
            "token_logprobs": [x.logprob for x in tokens],
            "top_logprobs": [{self._word(token): logprob for token, logprob in x.top} for x in tokens],
            "text_offset": offsets,
        }
