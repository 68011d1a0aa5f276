"""Texts for steering: each prompt is a row of its own, however short; two files, or one whose records have labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moekit.data import Dataset, load_tokenizer
from moekit.data.sources import Document, Source, labelled, parse_data, text_pieces
from moekit.errors import DataError, ModelError, did_you_mean
from moekit.families.model import Model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS, LENGTH = 65_536, 512
RECORDS = (".jsonl", ".ndjson", ".json")


def load_kinds(
    model: Model,
    a: str,
    b: str,
    *,
    data: str | Path | None = None,
    chat: bool = False,
    lines: bool = False,
    tokens: int = TOKENS,
    sequence_length: int = LENGTH,
) -> Dataset:
    """Two kinds of text, as the two domains of a dataset, kind `a` first.

    Args:
        model: whose tokenizer is used.
        a: a file (or NAME=FILE) of the one kind; with `data`, a label.
        b: the same of the other.
        data: JSON lines with "text" and "label".
        chat: put each text into the model's chat template, as what a user said.
        lines: each line of a text file is a text of its own. Else such a file is one text, cut into rows.
        tokens: of each kind, at most.
        sequence_length: longer texts are cut into rows of so many tokens.

    Raises:
        DataError: no text of a kind, one kind only, no such label, or what cannot be read or rendered.
        ModelError: no tokenizer, or one without chat template.
    """
    if data is None:
        return load_texts(
            model, parse_data([a, b]), chat=chat, lines=lines, tokens=tokens, sequence_length=sequence_length
        )
    found = labelled(data)
    if len(found) < 2:
        raise DataError(
            "steering needs texts with two labels",
            where=data,
            got=f"{len(found)} label: {', '.join(found)}" if found else "no text",
            fix="label what the model does otherwise too",
        )
    for label in (a, b):
        if label not in found:
            raise DataError(f"no text has the label {label!r}", where=data, fix=did_you_mean(label, found))
    if a == b:
        raise DataError("steering needs two kinds of text", got=f"{a} twice", fix=f"choose two of {', '.join(found)}")
    encoder = _Encoder(model, chat, tokens, sequence_length)
    rows = {label: encoder.rows(found[label]) for label in (a, b)}
    origins = {label: {"source": f"{data}, label {label}", "documents": len(found[label])} for label in (a, b)}
    return Dataset.of_rows(rows, encoder.pad, origins=origins)


def load_texts(
    model: Model,
    sources: Mapping[str, str],
    *,
    chat: bool = False,
    lines: bool = False,
    tokens: int = TOKENS,
    sequence_length: int = LENGTH,
) -> Dataset:
    """Texts by domain; arguments and errors as for `load_kinds`.

    Of a text file that is one text the rows are sampled as everywhere else; of records and lines the first are taken.
    """
    encoder = _Encoder(model, chat, tokens, sequence_length)
    rows = {name: encoder.of_source(name, spec, lines) for name, spec in sources.items()}
    return Dataset.of_rows(rows, encoder.pad, origins={name: {"source": spec} for name, spec in sources.items()})


class _Encoder:
    """Documents to rows of token ids."""

    def __init__(self, model: Model, chat: bool, tokens: int, length: int):
        if tokens < 2 or length < 2:
            raise DataError("a text needs two tokens at least", got=f"{tokens} tokens, rows of {length}")
        self._tokenizer: PreTrainedTokenizerBase = load_tokenizer(model.path, trust_remote_code=model.trust_remote_code)
        if chat and not self._tokenizer.chat_template:
            raise ModelError("this tokenizer has no chat template", where=model.name, fix="leave --chat out")
        self._chat, self._tokens, self._length = chat, tokens, length
        self.pad = self._tokenizer.pad_token_id or 0

    def of_source(self, name: str, spec: str, lines: bool) -> list[Sequence[int]]:
        kind = Path(spec.removesuffix(".gz")).suffix.lower()
        if not (self._chat or lines or kind in RECORDS):
            length = self._length
            try:
                data = Dataset.build({name: spec}, self._tokenizer, tokens=self._tokens, sequence_length=length)
            except DataError as error:
                if error.problem != f"domain {name!r} has fewer tokens than one sequence":
                    raise
                return self.rows(Source(spec))
            return [row[mask].tolist() for x in data.batches for row, mask in zip(x.ids, x.mask, strict=True)]
        return self.rows(_by_line(Source(spec)) if lines else Source(spec))

    def rows(self, documents: Iterable[Document]) -> list[Sequence[int]]:
        """Rows until there are enough tokens."""
        out: list[Sequence[int]] = []
        left = self._tokens
        for document in documents:
            ids = self._ids(document)[:left]
            out += [ids[i : i + self._length] for i in range(0, len(ids), self._length)]
            left -= len(ids)
            if left < 2:
                break
        return out

    def _ids(self, document: Document) -> list[int]:
        content: Any = document.content
        if isinstance(content, Path):
            content = "".join(text_pieces(content))
        if isinstance(content, str) and not self._chat:
            return list(self._tokenizer(content, verbose=False)["input_ids"])
        chat = [{"role": "user", "content": content}] if isinstance(content, str) else content
        try:  # a template is a program of the model's author and raises what it likes
            return self._tokenizer.apply_chat_template(
                chat, add_generation_prompt=chat[-1]["role"] != "assistant", return_dict=True
            )["input_ids"]
        except Exception as error:
            raise DataError(
                "chat cannot be rendered by the tokenizer's chat template",
                where=document.where,
                got=str(error)[:200],
                fix="give plain text, or a chat model",
            ) from None


def _by_line(documents: Iterable[Document]) -> Iterable[Document]:
    for document in documents:
        if not isinstance(document.content, Path):
            yield document
            continue
        rest, number = "", 0
        for piece in text_pieces(document.content):
            *whole, rest = (rest + piece).split("\n")
            for line in whole:
                number += 1
                if line.strip():
                    yield Document(f"{document.where}, line {number}", line)
        if rest.strip():
            yield Document(f"{document.where}, line {number + 1}", rest)
