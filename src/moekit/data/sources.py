"""Where text comes from: files, folders, records of text or chat, Hugging Face datasets; all as a stream of documents.

| what is given | documents |
|---|---|
| a text file (any suffix) | one, read piece by piece |
| `.jsonl`, `.ndjson` | one a line, each a record |
| `.json` | one an item of its list of records |
| a folder | those of all its files, sorted, at any depth; hidden, binary and empty files are skipped and counted |
| `hf:NAME[:CONFIG][:SPLIT]` | one a row, the columns as in a record; also `ORG/NAME` when there is no such path |

A record is `{"text": ...}`, `{"messages": [{"role": ..., "content": ...}]}`, or `{"prompt": ...}` with `"completion"`
or `"response"`: one user's and one assistant's turn. Each file may be compressed (`.gz`). In a folder a `.json` file
that is not a list of records is plain text (settings, code). Text is UTF-8 and is not changed, but that a byte order
mark is left out.
"""

from __future__ import annotations

import codecs
import gzip
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from moekit.errors import DataError, did_you_mean

T = TypeVar("T")
Message = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
PIECE_CHARS = 100_000  # text is read, cut and tokenised in pieces of about this size
SNIFF_BYTES = 65_536
SHUFFLE_ROWS = 1_000

_RECORD_KEYS = {"text", "messages", "prompt"}
_RECORD_FORMS = (
    '{"text": "..."}, {"messages": [{"role": ..., "content": ...}]} or {"prompt": "...", "completion": "..."}'
)
_HUB_NAME = re.compile(r"[\w-]+/[\w.-]+(:[\w.-]*){0,2}")
_LINE_END = re.compile(r"(?s:.*)\S\r?\n(?=\S)")  # up to the last single line end that has text on both sides
_FIXES = {
    "empty": "give a file with text in it",
    "binary": "give plain text, JSONL, or a folder of such files",
    "not UTF-8": "convert it, e.g. iconv -f LATIN1 -t UTF-8",
}


def parse_data(items: str | Sequence[str] | Mapping[str, str | Path]) -> dict[str, str]:
    """Domains by name from `NAME=PATH` items; a bare PATH is named by its stem, a bare dataset by its last part.

    Raises:
        DataError: nothing given, an empty name or path, or one name twice.
    """
    if isinstance(items, Mapping):
        pairs = [(name, str(path)) for name, path in items.items()]
    else:
        pairs = [_pair(item) for item in ([items] if isinstance(items, str) else items)]
    if not pairs:
        raise DataError("no text is given", expected="NAME=PATH for each domain", fix="e.g. --data python=texts/python")
    for name, path in pairs:
        if not name or not path:
            raise DataError("a domain needs a name and a path", expected="NAME=PATH", got=f"{name}={path}")
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twice:
        paths = ", ".join(path for name, path in pairs if name == twice[0])
        raise DataError(f"domain {twice[0]!r} is given twice", got=paths, fix="name them apart: NAME=PATH")
    return dict(pairs)


def _pair(item: str) -> tuple[str, str]:
    name, equals, path = item.partition("=")
    if equals and "/" not in name:
        return name.strip(), path
    if item.startswith("hf:") or (_is_hub_name(item) and not Path(item).exists()):
        return item.removeprefix("hf:").split(":")[0].rpartition("/")[2], item
    place = Path(item).expanduser().resolve()
    return (place.name if place.is_dir() else Path(place.name.removesuffix(".gz")).stem), item


@dataclass(frozen=True)
class Document:
    """One text or chat.

    Args:
        where: file, file and line, or dataset and row, for messages.
        content: the text; or the chat's messages; or the file that holds the text, so that it need not fit in memory.
    """

    where: str
    content: str | list[Message] | Path


def load_documents(spec: str | Path) -> Iterator[str | list[Message]]:
    """Every document of a source, whole: text, or a chat's messages.

    Raises:
        DataError: nothing there, not text, or a malformed record (named by file and line).
    """
    for document in Source(spec):
        content = document.content
        yield "".join(text_pieces(content)) if isinstance(content, Path) else content


def labelled(file: str | Path) -> dict[str, list[Document]]:
    """Records of a JSON lines file by their "label", in the order in which labels appear.

    Raises:
        DataError: the file cannot be read, a record has no label, or no known form.
    """
    path, out = Path(file).expanduser(), dict[str, list[Document]]()
    if not path.is_file():
        raise _missing(path)
    with _open(path) as stream:
        for number, line in enumerate(iter(lambda: _guard(stream.readline, path), b""), 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            record = _parsed(line, where)
            label = record.get("label") if isinstance(record, dict) else None
            if not isinstance(label, str | int):
                expected = '{"text": "...", "label": "..."}'
                raise DataError("record has no label", where=where, expected=expected, got=_shape(record))
            out.setdefault(str(label), []).append(_document(record, where))
    return out


class Source:
    """The documents behind one spec; what can be checked without reading on is checked when it is made.

    Args:
        spec: path or dataset, see the table above.
        seed: shuffles the rows of a Hugging Face dataset (which is streamed) within a buffer of 1,000.

    Attributes:
        bytes: size of the files on disk; None for a Hugging Face dataset.
        skipped: how many files of a folder were passed over, by reason.

    Raises:
        DataError: here or while iterating, see `load_documents`.
    """

    def __init__(self, spec: str | Path, seed: int = 0):
        self.spec = str(spec)
        self.bytes: int | None = None
        self.skipped: Counter[str] = Counter()
        self._files: list[Path] = []
        self._rows: Iterable[Any] = ()
        path = Path(self.spec).expanduser()
        self._in_folder = path.is_dir()
        if self._in_folder:
            self._files = self._fit_files(path)
        elif path.is_file():
            if reason := _unfit(path):
                raise DataError(f"file is {reason}", where=path, expected="UTF-8 text", fix=_FIXES[reason])
            self._files = [path]
        elif self.spec.startswith("hf:") or _is_hub_name(self.spec):
            self._rows = _open_hub(self.spec, seed)
            return
        else:
            raise _missing(path)
        self.bytes = sum(file.stat().st_size for file in self._files)

    def _fit_files(self, folder: Path) -> list[Path]:
        found = []
        for root, folders, files in os.walk(folder):
            self.skipped["hidden"] += sum(name.startswith(".") for name in folders + files)
            folders[:] = [name for name in folders if not name.startswith(".")]
            found += [Path(root, name) for name in files if not name.startswith(".")]
        reasons = {file: _unfit(file) for file in sorted(found)}
        self.skipped = +(self.skipped + Counter(reason for reason in reasons.values() if reason))
        fit = [file for file, reason in reasons.items() if not reason]
        if not fit:
            skipped = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items())
            raise DataError(
                "folder holds no text", where=folder, expected="UTF-8 text files", got=skipped or "no files"
            )
        return fit

    def __iter__(self) -> Iterator[Document]:
        count = 0
        for file in self._files:
            for document in _file_documents(file, self._in_folder):
                count += 1
                yield document
        for number, row in enumerate(_hub_rows(self._rows, self.spec), 1):
            count += 1
            yield _document(row, f"{self.spec}, row {number}")
        if not count:
            raise DataError("there is not one record", where=self.spec, expected=_RECORD_FORMS, got="nothing")


def text_pieces(text: str | Path) -> Iterator[str]:
    """A text, or a file's text, in pieces of about 100,000 characters that end at line ends where there are any.

    Raises:
        DataError: the file turns out not to be UTF-8 text, or cannot be read.
    """
    rest = ""
    for part in _decoded(text) if isinstance(text, Path) else _slices(text):
        rest += part
        if len(rest) >= PIECE_CHARS:
            border = _LINE_END.match(rest)
            cut = border.end() if border else rest.rfind("\n") + 1 or len(rest)
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def _slices(text: str) -> Iterator[str]:
    return (text[start : start + PIECE_CHARS] for start in range(0, len(text), PIECE_CHARS))


def _decoded(file: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    position, data = 0, b"-"
    with _open(file) as stream:
        while data:
            data = _guard(lambda: stream.read(PIECE_CHARS), file)
            if b"\0" in data:
                got = f"a NUL byte at {position + data.index(0):,}"
                raise DataError("file is binary", where=file, expected="UTF-8 text", got=got, fix=_FIXES["binary"])
            try:
                yield decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                place = position + len(data) - len(error.object) + error.start  # the object begins with held back bytes
                got, fix = f"byte 0x{error.object[error.start]:02x} at {place:,}", _FIXES["not UTF-8"]
                raise DataError("file is not UTF-8", where=file, expected="UTF-8 text", got=got, fix=fix) from None
            position += len(data)


def _open(file: Path) -> IO[bytes]:
    return _guard(lambda: cast(IO[bytes], gzip.open(file)) if file.suffix == ".gz" else file.open("rb"), file)


def _guard(read: Callable[[], T], file: Path) -> T:
    """`read()`, with whatever the disk or gzip say as a DataError."""
    try:
        return read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            "file cannot be read", where=file, got=error, fix="check the file and its permissions"
        ) from None


def _unfit(file: Path) -> str:
    """Why a file is no text, judged by its first 64 KiB: `empty`, `binary`, ...; or "" when it is."""
    if not file.is_file():
        return "not a regular file"  # a broken link, a pipe
    with _open(file) as stream:
        head = _guard(lambda: stream.read(SNIFF_BYTES), file)
    if b"\0" in head:
        return "binary"
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head, final=len(head) < SNIFF_BYTES)
    except UnicodeDecodeError:
        return "not UTF-8"
    return "empty" if len(head) < SNIFF_BYTES and not text.strip() else ""


def _file_documents(file: Path, in_folder: bool) -> Iterator[Document]:
    kind = Path(file.name.removesuffix(".gz")).suffix.lower()
    if kind in (".jsonl", ".ndjson"):
        with _open(file) as stream:
            lines = iter(lambda: _guard(stream.readline, file), b"")
            for number, line in enumerate(lines, 1):
                if line.strip():
                    where = f"{file}, line {number}"
                    yield _document(_parsed(line, where), where)
    elif kind == ".json" and (records := _listed_records(file, in_folder)) is not None:
        for number, record in enumerate(records, 1):
            yield _document(record, f"{file}, item {number}")
    else:
        yield Document(str(file), file)


def _parsed(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.removeprefix(codecs.BOM_UTF8))
    except (ValueError, RecursionError) as error:
        raise DataError(
            "JSON cannot be parsed", where=where, got=error, fix="one valid JSON value is expected"
        ) from None


def _listed_records(file: Path, in_folder: bool) -> list[Any] | None:
    """The records of a .json file; None for one of a folder that holds something else."""
    with _open(file) as stream:
        data = _guard(stream.read, file)
    try:
        value = _parsed(data, str(file))
        if not isinstance(value, list):
            expected = f"a list of {_RECORD_FORMS}"
            raise DataError(
                "a .json file must hold a list of records", where=file, expected=expected, got=_shape(value)
            )
    except DataError:
        if in_folder:
            return None
        raise
    is_record = bool(value) and isinstance(value[0], dict) and bool(_RECORD_KEYS & value[0].keys())
    return None if in_folder and not is_record else value


def _document(record: Any, where: str) -> Document:
    match record:
        case {"messages": list(messages)}:
            _check_messages(messages, where)
            return Document(where, messages)
        case {"text": str(text)}:
            return Document(where, text)
        case {"prompt": str(prompt), "completion": str(answer)} | {"prompt": str(prompt), "response": str(answer)}:
            return Document(where, [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}])
    raise DataError("record has no known form", where=where, expected=_RECORD_FORMS, got=_shape(record))


def _shape(value: Any) -> str:
    keys = [f"{key!r}: {type(inner).__name__}" for key, inner in value.items()] if isinstance(value, dict) else []
    return f"{type(value).__name__} {{{', '.join(keys)}}}"[:300] if keys else type(value).__name__


def _check_messages(messages: list[Any], where: str) -> None:
    if not messages:
        raise DataError("chat has no messages", where=where)
    for number, message in enumerate(messages, 1):
        match message:
            case {"role": str(role)} if role not in ROLES:
                place, roles = f"{where}, message {number}", ", ".join(ROLES)
                fix = did_you_mean(role, ROLES)
                raise DataError(f"unknown role {role!r}", where=place, expected=roles, got=role, fix=fix)
            case {"role": str(), "content": str()} | {"role": "assistant", "tool_calls": list()}:
                continue
        expected = '{"role": "...", "content": "..."}'
        raise DataError(
            "message has no known form", where=f"{where}, message {number}", expected=expected, got=_shape(message)
        )


def _is_hub_name(spec: str) -> bool:
    """Whether ORG/NAME can only be a dataset: no folder of that name here, and no suffix of a text file."""
    is_file = re.search(r"\.(txt|md|py|jsonl?|ndjson|gz|csv)$", spec)
    return bool(_HUB_NAME.fullmatch(spec)) and not is_file and not Path(spec).parent.is_dir()


def _open_hub(spec: str, seed: int) -> Iterable[Any]:
    name, config, split = [*spec.removeprefix("hf:").split(":", 2), "", ""][:3]
    if not name or ":" in split:
        raise DataError("a dataset cannot be named so", expected="hf:NAME[:CONFIG][:SPLIT]", got=spec)
    try:
        import datasets
    except ImportError:
        fix = 'pip install "moekit[data]"; or give a file or a folder that exists'
        raise DataError("the library that reads Hugging Face datasets is not installed", where=spec, fix=fix) from None
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        return rows.shuffle(seed=seed, buffer_size=SHUFFLE_ROWS)
    except Exception as error:
        raise _hub_error(error, spec) from None


def _hub_rows(rows: Iterable[Any], spec: str) -> Iterator[Any]:
    try:
        yield from rows
    except Exception as error:
        raise _hub_error(error, spec) from None


def _hub_error(error: Exception, spec: str) -> DataError:
    """Dozens of kinds reach us: no network, unknown name, config or split, gated access, broken files."""
    got = f"{type(error).__name__}: {error}"[:300]
    fix = "check the name (hf:NAME[:CONFIG][:SPLIT]) and the network; or give a file or a folder that exists"
    return DataError("Hugging Face dataset cannot be read", where=spec, got=got, fix=fix)


def _missing(path: Path) -> DataError:
    """The nearest thing that does exist, beside the first part of `path` that does not."""
    if path.exists():
        return DataError("not a file or a folder", where=path)
    gone = path
    while not gone.parent.is_dir():
        gone = gone.parent
    siblings = [entry.name for entry in gone.parent.iterdir() if not entry.name.startswith(".")]
    near = did_you_mean(gone.name, siblings)[:300] if siblings else f"{gone.parent} is empty"
    fix = f"{near} (a Hugging Face dataset is written hf:NAME)"
    return DataError("no such file or folder", where=path, got=f"{gone.name!r} is not in {gone.parent}", fix=fix)
