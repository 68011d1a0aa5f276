"""Text of tokens as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"  # what a tokenizer makes of bytes that are no whole character yet


class TextStream:
    """Turns tokens into text that may be shown, one token at a time.

    Only the tokens since the last whole character are decoded again, together with those of the piece before (whose
    neighbourhood decides about spaces).

    Args:
        tokenizer: of the model.
        stop: strings that end the text; neither they nor a beginning of one are ever given out.

    Attributes:
        stopped: whether a stop string has come.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, [x for x in stop if x]
        self._tokens: list[int] = []
        self._before = self._shown = 0  # where the piece before begins; up to where tokens have become text
        self._held = ""  # may be the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that is certain with this token; "" while it is not, and once the text has stopped."""
        self._tokens.append(token)
        return self._checked(self._decoded(final=False))

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        text = self._checked(self._decoded(final=True))
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _decoded(self, final: bool) -> str:
        before = self._text(self._before, self._shown)
        whole = self._text(self._before, len(self._tokens))
        if len(whole) <= len(before) or (whole.endswith(UNFINISHED) and not final):
            return ""
        self._before, self._shown = self._shown, len(self._tokens)
        return whole[len(before) :]

    def _text(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._tokens[start:end], skip_special_tokens=True)

    def _checked(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        places = [place for place in (text.find(x) for x in self._stop) if place >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        held = max((_overlap(text, x) for x in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
