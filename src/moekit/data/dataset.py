"""Domains of text as batches of token ids: cut, sampled to a budget, padded and masked, always the same way.

A row is a run of at most `sequence_length` tokens of ONE document. Documents are never packed into one row, so nothing
attends across a border; the tokenizer's own first token (bos) stands where the tokenizer puts it, at the beginning of
a document, and later rows of that document go on without one. Rows of one token are dropped: they predict nothing.

Sampling. Rows are numbered in reading order and row i gets the rank frac(u + i / golden ratio), u drawn from the seed.
The rows of lowest rank that fill the budget are kept, the last of them cut to fit. Multiples of the golden ratio
spread evenly whatever their number (the three-gap theorem), so any budget takes rows spread evenly over the whole
text, in one pass, with no more in memory than the budget; a smaller budget's sample is a part of a larger one's.

A large text is not tokenised whole for a small budget: above 8 MB, or 32 bytes a budgeted token if that is more,
pieces of about 100 KB (or whole short documents) are left out by the same rule, and no row runs across the gap; only
if that yields too few tokens is all of it tokenised. A Hugging Face dataset, whose size is unknown, is read from its
(shuffled) beginning up to 8 times the budget.

Texts are tokenised in pieces of about 100 KB that end at line ends. Where a tokenizer joins text across such a line
end, or marks the beginning of a text by a space of its own (SentencePiece), the ids at a border can differ from those
of the text tokenised whole.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from moekit.data.sources import Document, Source, parse_data, text_pieces
from moekit.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = NDArray[np.int32]

READ_FACTOR = 8  # tokens read at most for each token of the budget
BYTES_A_TOKEN = 4  # a guess, for that limit only
FREE_BYTES = 8_000_000  # sources up to this size are always tokenised whole
VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, odd


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of one domain, padded on the right.

    Args:
        domain: index into `Dataset.domains`.
        ids: int64 [rows, positions].
        mask: bool [rows, positions], True where a token is real.
    """

    domain: int
    ids: torch.Tensor
    mask: torch.Tensor

    @property
    def tokens(self) -> int:
        """Real tokens, without padding."""
        return int(self.mask.sum())

    @property
    def positions(self) -> torch.Tensor:
        """The place of each real token in its row, from 0; int64 [rows, positions]."""
        return self.mask.cumsum(1) - 1

    @property
    def following(self) -> torch.Tensor:
        """The token that comes next in the row, -1 where there is none; int64 [rows, positions]."""
        following = torch.full_like(self.ids, -1)
        following[:, :-1] = self.ids[:, 1:].masked_fill(~self.mask[:, 1:], -1)
        return following


@dataclass(frozen=True, eq=False)
class Dataset:
    """Batches of one or more domains, in the order of `domains`, long rows first.

    Args:
        domains: names.
        batches: all batches; 9 bytes a position.
        sequence_length: tokens of a row at most.
        budget: tokens a domain at most; None: all.
        seed: of the sampling.
        origins: by domain, where it came from: `source`, `documents` (read), `skipped` (files of a folder, by reason).
    """

    domains: tuple[str, ...]
    batches: list[Batch]
    sequence_length: int
    budget: int | None = None
    seed: int = 0
    origins: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        domains: Sequence[str] | Mapping[str, str | Path],
        tokenizer: PreTrainedTokenizerBase,
        *,
        tokens: int | None = None,
        sequence_length: int = 512,
        seed: int = 0,
        batch_size: int = 8,
        tokens_per_batch: int | None = None,
    ) -> Dataset:
        """Read, tokenise, sample and batch every domain.

        Args:
            domains: path or dataset by name, or `NAME=PATH` items (see `moekit.data.sources`).
            tokenizer: the model's; chats go through its chat template.
            tokens: budget of each domain, reached to within a token where the text suffices; None: all of it.
            sequence_length: tokens of a row at most.
            seed: shifts which rows a budget keeps.
            batch_size: rows of a batch.
            tokens_per_batch: positions (padding counted) of a batch instead, at least one row.

        Raises:
            DataError: a source that cannot be read, a domain with fewer tokens than one sequence, chats that the
                tokenizer cannot render, or a setting out of range.
        """
        _check(tokens=tokens, sequence_length=sequence_length, batch_size=batch_size, tokens_per_batch=tokens_per_batch)
        sources = {name: Source(spec, seed) for name, spec in parse_data(domains).items()}
        encoder = _Encoder(tokenizer)
        pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        batches: list[Batch] = []
        origins = {}
        for index, (name, source) in enumerate(sources.items()):
            read = _Reading(source, encoder, tokens, sequence_length, seed)
            rows = _sample(read, tokens, seed)
            if read.share < 1 and read.tokens < max(tokens or 0, sequence_length):
                read = _Reading(source, encoder, None, sequence_length, seed)
                rows = _sample(read, tokens, seed)
            if read.tokens < sequence_length:
                raise _too_short(name, source, read.tokens, sequence_length)
            rows = sorted((row for row in rows if len(row) > 1), key=len, reverse=True)  # the cut one may be too short
            batches += _batches(index, rows, pad, batch_size, tokens_per_batch)
            origins[name] = {"source": source.spec, "documents": read.documents, "skipped": dict(source.skipped)}
        return cls(tuple(sources), batches, sequence_length, tokens, seed, origins)

    @classmethod
    def of_rows(
        cls,
        rows: Mapping[str, Sequence[Sequence[int]]],
        pad: int = 0,
        *,
        tokens_per_batch: int = 8_192,
        origins: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Dataset:
        """Token rows as they are, by domain, as batches; rows of one token, which predict nothing, are left out.

        Args:
            rows: token ids of each row, by domain.
            pad: id of what fills batches up.
            tokens_per_batch: positions (padding counted) of a batch, at least one row.
            origins: where each domain came from.
        """
        batches: list[Batch] = []
        longest = 2
        for index, (name, of_domain) in enumerate(rows.items()):
            kept = sorted((np.asarray(x, np.int32) for x in of_domain if len(x) > 1), key=len, reverse=True)
            if not kept:
                raise DataError(f"domain {name!r} has no text of two tokens", fix="give some, or longer ones")
            batches += _batches(index, kept, pad, 1, tokens_per_batch)
            longest = max(longest, len(kept[0]))
        return cls(tuple(rows), batches, longest, origins=origins or {})

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    @cached_property
    def tokens(self) -> dict[str, int]:
        """Real tokens by domain."""
        return {name: sum(b.tokens for b in self.batches if b.domain == i) for i, name in enumerate(self.domains)}

    @cached_property
    def hash(self) -> str:
        """16 hex digits of the ids, their arrangement in batches, the domains' names and the settings."""
        digest = hashlib.sha256(repr((self.domains, self.sequence_length, self.budget, self.seed)).encode())
        for batch in self.batches:
            digest.update(repr((batch.domain, tuple(batch.ids.shape))).encode())
            digest.update(batch.ids.numpy().astype("<i8", copy=False).tobytes())
            digest.update(batch.mask.numpy().tobytes())
        return digest.hexdigest()[:16]

    def select(self, domain: str) -> Dataset:
        """One domain alone (its batches then say domain 0).

        Raises:
            DataError: no such domain.
        """
        if domain not in self.domains:
            raise DataError(f"no such domain {domain!r}", expected=", ".join(self.domains))
        index = self.domains.index(domain)
        batches = [replace(batch, domain=0) for batch in self.batches if batch.domain == index]
        origins = {domain: self.origins.get(domain, {})}
        return replace(self, domains=(domain,), batches=batches, origins=origins)

    def describe(self) -> dict[str, Any]:
        """What a manifest records, as plain data: the settings, the hash, and by domain its origin, size and hash."""
        domains = {}
        for name in self.domains:
            part = self.select(name)
            sequences = sum(len(batch.ids) for batch in part.batches)
            domains[name] = {
                **self.origins.get(name, {}),
                "sequences": sequences,
                "tokens": self.tokens[name],
                "hash": part.hash,
            }
        settings = {"sequence_length": self.sequence_length, "budget": self.budget, "seed": self.seed}
        return {"hash": self.hash, **settings, "domains": domains}


def load_tokenizer(folder: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a local model folder; code that comes with it runs only if `trust_remote_code`.

    Raises:
        ModelError: no folder, no tokenizer in it, or one that transformers cannot load.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError("no such model folder", where=folder, fix="give the folder that holds the tokenizer's files")
    if not any(file for pattern in VOCABULARIES for file in folder.glob(pattern)):
        expected = " or ".join(VOCABULARIES)
        raise ModelError("folder holds no tokenizer", where=folder, expected=expected, fix="download the tokenizer too")
    from transformers import AutoTokenizer

    try:  # a broken file comes out as nearly any kind of exception
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
        fix = "download its files again"
        if "trust_remote_code" in got:
            fix = "it brings code of its own, which runs only with trust_remote_code: read that code before"
        raise ModelError("tokenizer cannot be loaded", where=folder, got=got[:300], fix=fix) from None


def _check(**settings: int | None) -> None:
    least = {"tokens": 2, "sequence_length": 2}
    for name, value in settings.items():
        if value is not None and value < least.get(name, 1):
            raise DataError(f"{name} is too small", expected=f"at least {least.get(name, 1)}", got=value)


def _too_short(name: str, source: Source, tokens: int, sequence_length: int) -> DataError:
    lower = f"pass a sequence length of at most {tokens}, or more text" if tokens > 1 else "give more text"
    return DataError(
        f"domain {name!r} has fewer tokens than one sequence",
        where=source.spec,
        expected=f"at least {sequence_length:,} tokens",
        got=f"{tokens:,} tokens",
        fix=lower,
    )


class _Encoder:
    """Documents to token ids, piece by piece."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.prefix, self.suffix = self._special_ids()

    def pieces(self, document: Document) -> Iterator[str]:
        content = document.content
        if not isinstance(content, list):
            return text_pieces(content)
        try:  # a template is a program of the model's author and raises what it likes
            return text_pieces(cast(str, self.tokenizer.apply_chat_template(content, tokenize=False)))
        except Exception as error:
            fix = "give plain text, or mend the chat (roles, their order)"
            if not self.tokenizer.chat_template:
                fix = "this tokenizer has no chat template: give plain text, or a chat model"
            raise DataError(
                "chat cannot be rendered by the tokenizer's chat template",
                where=document.where,
                got=str(error)[:200],
                fix=fix,
            ) from None

    def ids(self, text: str, where: str) -> Ids:
        try:
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        except (TypeError, UnicodeError):  # a lone surrogate, out of a JSON escape
            raise DataError(
                "text holds characters that are not Unicode", where=where, got=r"\ud800 to \udfff"
            ) from None
        return np.asarray(ids, dtype=np.int32)

    def _special_ids(self) -> tuple[list[int], list[int]]:
        """What the tokenizer itself puts before and after a text."""
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        full = self.tokenizer("a")["input_ids"]
        starts = [i for i in range(len(full)) if full[i : i + len(bare)] == bare]
        return (full[: starts[0]], full[starts[0] + len(bare) :]) if starts else ([], [])


class _Reading:
    """One pass over a source: its rows (two tokens at least, never across documents or gaps), counted on the way."""

    def __init__(self, source: Source, encoder: _Encoder, budget: int | None, length: int, seed: int):
        self.source, self.encoder, self.length, self.seed = source, encoder, length, seed
        self.documents = self.tokens = 0
        self.limit, self.share = float("inf"), 1.0
        if budget and source.bytes is None:
            self.limit = max(READ_FACTOR * budget, length)
        elif budget and source.bytes:
            self.share = max(READ_FACTOR * BYTES_A_TOKEN * budget, FREE_BYTES) / source.bytes

    def __iter__(self) -> Iterator[Ids]:
        ranks = _ranks(self.seed)
        for document in self.source:
            self.documents += 1
            for row in _cut(self._pieces(document, ranks), self.length):
                if len(row) > 1:
                    self.tokens += len(row)
                    yield row
            if self.tokens >= self.limit:
                return

    def _pieces(self, document: Document, ranks: Iterator[int]) -> Iterator[Ids | None]:
        """The ids of each piece of a document; None for a piece that is left out."""
        chat = isinstance(document.content, list)  # its template writes the special tokens
        if not chat:
            yield np.array(self.encoder.prefix, dtype=np.int32)
        for piece in self.encoder.pieces(document):
            taken = next(ranks) < self.share * 2**64
            yield self.encoder.ids(piece, document.where) if taken else None
        if not chat:
            yield np.array(self.encoder.suffix, dtype=np.int32)


def _ranks(seed: int) -> Iterator[int]:
    """frac(u + i / golden ratio) for i = 0, 1, ..., in units of 2**-64."""
    return ((i * _GOLDEN) % 2**64 for i in count(random.Random(seed).getrandbits(64)))


def _cut(pieces: Iterable[Ids | None], length: int) -> Iterator[Ids]:
    """Consecutive rows of `length` ids, a shorter one at the end and before each gap (None)."""
    rest = np.empty(0, dtype=np.int32)
    for piece in pieces:
        if piece is None:
            if len(rest):
                yield rest
            rest = rest[:0]
            continue
        rest = np.concatenate([rest, piece])
        full = len(rest) // length * length
        yield from rest[:full].reshape(-1, length)
        rest = rest[full:]
    if len(rest):
        yield rest


def _sample(rows: Iterable[Ids], budget: int | None, seed: int) -> list[Ids]:
    """The rows of lowest rank that fill the budget, in reading order; the one of highest rank is cut to fit."""
    kept: list[tuple[int, int, Ids]] = []  # a heap, the highest rank on top
    total = 0
    for index, (row, rank) in enumerate(zip(rows, _ranks(seed), strict=False)):
        heapq.heappush(kept, (-rank, index, row.copy()))  # a copy: a view would hold the whole piece
        total += len(row)
        while budget is not None and total - len(kept[0][2]) >= budget:
            total -= len(heapq.heappop(kept)[2])
    if budget is not None and total > budget:
        rank, index, row = kept[0]
        kept[0] = (rank, index, row[: len(row) - (total - budget)])
    return [row for _, _, row in sorted(kept, key=lambda item: item[1])]


def _batches(
    domain: int, rows: Sequence[Ids], pad: int, batch_size: int, tokens_per_batch: int | None
) -> Iterator[Batch]:
    """Consecutive rows (longest first) together, padded to the first of them."""
    start = 0
    while start < len(rows):
        width = len(rows[start])
        group = rows[start : start + (max(1, tokens_per_batch // width) if tokens_per_batch else batch_size)]
        ids = np.full((len(group), width), pad, dtype=np.int64)
        mask = np.arange(width) < np.array([len(row) for row in group])[:, None]
        ids[mask] = np.concatenate(group)
        yield Batch(domain, torch.from_numpy(ids), torch.from_numpy(mask))
        start += len(group)
