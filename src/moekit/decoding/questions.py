"""Questions with right answers: JSON lines with "prompt" and "answer", and what counts as right."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moekit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Question:
    """A prompt and its right answer ("" where it is not known)."""

    prompt: str
    answer: str = ""


def load_questions(file: str | Path, answers: bool = True) -> list[Question]:
    """Questions from JSON lines.

    Args:
        file: each line an object with "prompt" and "answer", both texts.
        answers: every question must have an answer.

    Raises:
        DataError: no such file, a line that is not such an object, or no questions.
    """
    path = Path(file)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("the questions cannot be read", where=path, got=str(error)[:200]) from None
    expected = '{"prompt": "...", "answer": "..."}' if answers else '{"prompt": "..."}'
    out = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        keys = ("prompt", "answer") if answers or (isinstance(row, dict) and "answer" in row) else ("prompt",)
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) and row[key].strip() for key in keys):
            raise DataError(
                "a question has not the right form", where=f"{path}, line {number}", expected=expected, got=line[:80]
            )
        out.append(Question(row["prompt"], row.get("answer", "")))
    if not out:
        raise DataError("the file has no questions", where=path, expected=f"lines like {expected}")
    return out


@dataclass(frozen=True)
class Marking:
    """Where an answer ends, and what of it counts.

    Attributes:
        stop: the answer ends before this text; "": at the end of the text only.
        extract: a regular expression; its last match (the first group, if there is one) is compared; "": all of it.
    """

    stop: str = "\n"
    extract: str = ""

    def check(self) -> None:
        """Refuse a broken expression.

        Raises:
            DataError: `extract` is no regular expression.
        """
        try:
            re.compile(self.extract)
        except re.error as error:
            raise DataError("this is no regular expression", where="extract", got=f"{self.extract}: {error}") from None

    def given(self, text: str) -> str:
        """The answer in what was written."""
        text = text.lstrip("\n").partition(self.stop)[0] if self.stop else text
        if self.extract:
            found = [match[1] if match.re.groups else match[0] for match in re.finditer(self.extract, text)]
            return found[-1].strip() if found else ""
        return text.strip()

    def right(self, text: str, answer: str) -> bool:
        """Whether what was written gives this answer."""
        return self.given(text) == answer.strip()

    def finished(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[int]], bool] | None:
        """Whether tokens that were written hold the stop."""
        if not self.stop:
            return None
        return lambda ids: self.stop in tokenizer.decode(ids).lstrip("\n")


def unescaped(text: str) -> str:
    r"""What a text typed in a shell means: \n is a new line, \t a tab."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def accuracy(texts: Sequence[str], questions: Sequence[Question], marking: Marking) -> list[bool]:
    """Which texts answer their questions right."""
    return [marking.right(text, question.answer) for text, question in zip(texts, questions, strict=True)]
