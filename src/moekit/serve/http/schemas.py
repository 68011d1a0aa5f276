"""What requests may say: the part of OpenAI's API that a text model can do, and `steer`.

What is accepted and makes no difference is in `IGNORED`; everything else that is not known is refused by name, so that
nobody gets an answer to another question than the one that was asked.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

IGNORED = frozenset(
    ["user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"]
)
MAX_CHOICES, MAX_STOPS, MAX_TOP = 16, 16, 20


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _given(cls, data: Any) -> Any:
        """Null means not given."""
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None and key not in IGNORED}


class StreamOptions(_Strict):
    """How a stream is sent.

    Attributes:
        include_usage: end with a chunk that counts tokens.
        include_obfuscation: accepted; nothing is padded.
    """

    include_usage: bool = False
    include_obfuscation: bool = False


class TextFormat(_Strict):
    """The only format of an answer: text."""

    type: Literal["text"]


class Part(_Strict):
    """A part of a message."""

    type: Literal["text", "input_text"]
    text: str


class Message(_Strict):
    """One turn of a talk.

    Attributes:
        role: who speaks; "developer" is told to the model as "system".
        content: text, or parts of text that are put together.
        name: of the speaker.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] = ""
    name: str = ""

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        named = {"name": self.name} if self.name else {}
        return {"role": "system" if self.role == "developer" else self.role, "content": text, **named}


class Request(_Strict):
    """What both kinds of requests have; fields are OpenAI's.

    Attributes:
        steer: name of a plan that the server was started with, for this request only.
    """

    model: str
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int | None = None
    stop: str | list[str] = []
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    logit_bias: dict[int, float] = {}
    steer: str | None = None

    @model_validator(mode="after")
    def _bounded(self) -> Request:
        if len(self.stops) > MAX_STOPS:
            raise ValueError(f"stop: at most {MAX_STOPS} strings")
        if any(abs(x) > 100 for x in self.logit_bias.values()):
            raise ValueError("logit_bias: -100 to 100")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class ChatRequest(Request):
    """Body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP)
    response_format: TextFormat | None = None

    @model_validator(mode="after")
    def _logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs")
        return self


class CompletionRequest(Request):
    """Body of /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int = Field(default=16, ge=1)
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP)
    echo: Literal[False] = False
    best_of: Literal[1] = 1

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[x for x in self.prompt if isinstance(x, int)]]
        return [x for x in self.prompt if not isinstance(x, int)]
