"""Text input: what is read, what is refused, and that rows are cut, sampled, padded and masked as documented."""

from __future__ import annotations

import gzip
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from moekit.data import Batch, Dataset, load_documents, load_tokenizer, parse_data, sources
from moekit.data import dataset as dataset_module
from moekit.errors import DataError, ModelError, UserError

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards brew strange potions in towers"
TEMPLATE = (
    "{% for m in messages %}<|bos|>{{ m['role'] }}:\n{{ m['content'] }}\n"
    "{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}{% endfor %}"
)


def prose(words: int, seed: int = 0) -> str:
    rng = np.random.default_rng(seed)
    picked = [str(word) for word in rng.choice(WORDS.split(), words)]
    return "".join(f"{word}\n" if i % 9 == 8 else f"{word} " for i, word in enumerate(picked))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A tiny byte-level BPE that begins each text with <|bos|>, as Llama's does, with a chat template."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|bos|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([prose(2_000)], trainer)
    raw.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<|bos|>", pad_token="<|pad|>", model_max_length=64)
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def bare(tokenizer, tmp_path_factory) -> PreTrainedTokenizerFast:
    """The same without bos, pad and chat template."""
    raw = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    raw.post_processor = processors.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def rows_of(data: Dataset) -> list[list[int]]:
    return [row[keep].tolist() for batch in data for row, keep in zip(batch.ids, batch.mask, strict=True)]


def joined(data: Dataset) -> list[int]:
    return [token for row in rows_of(data) for token in row]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def jsonl(path: Path, *records: object) -> Path:
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


@contextmanager
def refused(*parts: str, kind: type[UserError] = DataError) -> Iterator[None]:
    """The block raises `kind` with every one of `parts` in its message."""
    with pytest.raises(kind) as caught:
        yield
    missing = [part for part in parts if part not in str(caught.value)]
    assert not missing, f"{missing} not in:\n{caught.value}"


# --- domains ---------------------------------------------------------------------------------------------------------


def test_domains_are_named(tmp_path):
    folder = tmp_path / "v1.5"
    folder.mkdir()
    items = ["python=a/b=c.py", "texts/kjv.txt", "chat.jsonl.gz", str(folder), "hf:org/some-set:en:train", "org/other"]
    assert parse_data(items) == {
        "python": "a/b=c.py",
        "kjv": "texts/kjv.txt",
        "chat": "chat.jsonl.gz",
        "v1.5": str(folder),
        "some-set": "hf:org/some-set:en:train",
        "other": "org/other",
    }
    assert parse_data("a=b.txt") == {"a": "b.txt"}
    assert parse_data({"x": Path("y")}) == {"x": "y"}
    assert parse_data(["./a=b.txt"]) == {"a=b": "./a=b.txt"}, "a slash before the sign: it belongs to the path"


def test_bad_domains_are_refused():
    with refused("'a' is given twice", "x/a.txt, y/a.txt", "NAME=PATH"):
        parse_data(["x/a.txt", "y/a.txt"])
    with refused("needs a name and a path", "got:      =x.txt"):
        parse_data(["=x.txt"])
    with refused("needs a name and a path", "a="):
        parse_data(["a="])
    for nothing in ([], {}):
        with refused("no text is given"):
            parse_data(nothing)


# --- documents -------------------------------------------------------------------------------------------------------


def test_a_text_file_is_one_document_unchanged(tmp_path):
    text = "naïve\r\n\r\n  line – two\n" * 20_000
    assert list(load_documents(write(tmp_path / "a.txt", text))) == [text]
    assert list(load_documents(write(tmp_path / "bom.txt", b"\xef\xbb\xbf" + text.encode()))) == [text]
    assert list(load_documents(write(tmp_path / "a.txt.gz", gzip.compress(text.encode())))) == [text]


def test_pieces_end_at_line_ends(monkeypatch):
    monkeypatch.setattr(sources, "PIECE_CHARS", 200)
    for end in ("\n", "\r\n"):
        text = (prose(40) + "fox\n\n\n").replace("\n", end) * 10
        pieces = list(sources.text_pieces(text))
        assert "".join(pieces) == text
        assert len(pieces) > 10
        borders = pairwise(pieces)
        assert all(re.search(rf"\S{end}$", left) and right[0] not in "\r\n" for left, right in borders), "not in a gap"


@given(text=st.text(alphabet="ab \n\r", max_size=200), size=st.integers(1, 30))
def test_pieces_make_the_text_whatever_its_lines(text, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE_CHARS", size)
        pieces = list(sources.text_pieces(text))
    assert "".join(pieces) == text
    assert all(0 < len(piece) < 2 * size for piece in pieces)


def test_records_of_every_form(tmp_path):
    chat = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
    call = [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}, {"role": "tool", "content": "3"}]
    turns = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]
    records = [
        {"text": "one", "other": 1},
        {"messages": chat, "text": "both: the chat counts"},
        {"messages": call},
        {"prompt": "p", "completion": "a"},
        {"prompt": "p", "response": "a"},
    ]
    documents = ["one", chat, call, turns, turns]
    file = jsonl(tmp_path / "a.jsonl", *records)
    assert list(load_documents(file)) == documents
    assert list(load_documents(write(tmp_path / "a.ndjson.gz", gzip.compress(file.read_bytes())))) == documents
    assert list(load_documents(write(tmp_path / "a.json", json.dumps(records)))) == documents
    spaced = write(tmp_path / "b.jsonl", b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n\r\n"))
    assert list(load_documents(spaced)) == documents


def test_bad_records_are_named_by_line(tmp_path):
    good = {"text": "good"}

    def read(*records):
        return list(load_documents(jsonl(tmp_path / "x.jsonl", *records)))

    with refused("no known form", "x.jsonl, line 2", "'body': str"):
        read(good, {"body": "b"})
    with refused("no known form", "line 1", "got:      list"):
        read(["text"])
    with refused("no known form", "line 1", "'text': int"):
        read({"text": 3})
    with refused("unknown role 'asistant'", "line 2, message 1", "did you mean 'assistant'?"):
        read(good, {"messages": [{"role": "asistant", "content": "x"}]})
    with refused("message has no known form", "line 1, message 2", "'role': str"):
        read({"messages": [{"role": "user", "content": "x"}, {"role": "user"}]})
    with refused("chat has no messages", "line 1"):
        read({"messages": []})
    with refused("JSON cannot be parsed", "x.jsonl, line 3"):
        list(load_documents(write(tmp_path / "x.jsonl", '{"text": "a"}\n\n{"text": \n')))
    with refused("JSON cannot be parsed", "x.jsonl, line 7001", "0xff"):  # behind the part that is looked at first
        list(load_documents(write(tmp_path / "x.jsonl", b'{"text": "a"}\n' * 7_000 + b'{"text": "\xff"}')))
    with refused("a .json file must hold a list", "'text': str"):
        list(load_documents(write(tmp_path / "x.json", '{"text": "a"}')))
    with refused("no known form", "x.json, item 2"):
        list(load_documents(write(tmp_path / "x.json", '[{"text": "a"}, 5]')))
    with refused("there is not one record", "x.json"):
        list(load_documents(write(tmp_path / "x.json", "[]")))


def test_files_that_are_no_text_are_refused(tmp_path):
    refusals = {
        b"": "file is empty",
        b" \n\t\n": "file is empty",
        b"\xef\xbb\xbf": "file is empty",
        b"\x89PNG\r\n\x1a\n\x00\x00": "file is binary",
        "caf\u00e9".encode("utf-16"): "file is binary",
        "caf\u00e9 au lait".encode("latin-1"): "file is not UTF-8",
        "caf\u00e9".encode()[:-1]: "file is not UTF-8",
    }
    for content, problem in refusals.items():
        with refused(problem, "x.txt", "UTF-8 text", "fix:"):
            list(load_documents(write(tmp_path / "x.txt", content)))


def test_bad_bytes_far_into_a_file_are_found(tmp_path):
    good = "\u00e9".encode() * 60_000
    for bad, problem, got in [
        (b"\xe9!", "not UTF-8", "byte 0xe9 at 120,000"),
        (b"\xe9", "not UTF-8", "byte 0xe9 at 120,000"),
        (b"ab\0", "binary", "a NUL byte at 120,002"),
    ]:
        with refused(f"file is {problem}", got):
            list(load_documents(write(tmp_path / "x.txt", good + bad)))
    with refused("not UTF-8", "byte 0xe9 at 120,003"):
        list(load_documents(write(tmp_path / "x.txt", b"\xef\xbb\xbf" + good + b"\xe9")))


def test_broken_gzip_is_refused(tmp_path):
    packed = gzip.compress(os.urandom(100).hex().encode() * 5_000)
    for content in (packed[:-20], b"not gzip", packed[:50] + b"garbage" * 20):
        with refused("file cannot be read", "x.txt.gz"):
            list(load_documents(write(tmp_path / "x.txt.gz", content)))


def test_a_folder_is_read_sorted_and_skips_what_is_no_text(tmp_path):
    write(tmp_path / "b.md", "B")
    write(tmp_path / "a" / "z.py", "Z")
    write(tmp_path / "a" / "settings.json", '{"x": 1}')
    write(tmp_path / "a" / "comments.json", "// no JSON")
    write(tmp_path / "a" / "numbers.json", "[1, 2]")
    write(tmp_path / "a" / "records.json", '[{"text": "R1"}, {"text": "R2"}]')
    jsonl(tmp_path / "c.jsonl", {"text": "C1"}, {"text": "C2"})
    write(tmp_path / "picture.png", b"\x89PNG\0")
    write(tmp_path / "latin.txt", b"\xe9\xe9")
    write(tmp_path / "__init__.py", "")
    write(tmp_path / ".git" / "config", "hidden")
    write(tmp_path / "a" / ".secret", "hidden")
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nowhere")
    assert list(load_documents(tmp_path)) == ["// no JSON", "[1, 2]", "R1", "R2", '{"x": 1}', "Z", "B", "C1", "C2"]
    skipped = sources.Source(tmp_path).skipped
    assert skipped == {"hidden": 2, "binary": 1, "not UTF-8": 1, "empty": 1, "not a regular file": 1}


def test_a_folder_without_text_is_refused(tmp_path):
    with refused("folder holds no text", "no files"):
        sources.Source(tmp_path)
    write(tmp_path / ".hidden", "x")
    write(tmp_path / "x.bin", b"\0")
    with refused("folder holds no text", "1 hidden, 1 binary"):
        sources.Source(tmp_path)


def test_a_bad_record_in_a_folder_is_no_reason_to_skip_the_file(tmp_path):
    write(tmp_path / "x.json", '[{"text": "good"}, {"text": 1}]')
    with refused("no known form", "x.json, item 2"):
        list(load_documents(tmp_path))


def test_an_unknown_path_names_its_nearest_sibling(tmp_path):
    write(tmp_path / "texts" / "python.txt", "x")
    with refused("no such file or folder", "pyton.txt", "did you mean 'python.txt'?", "hf:NAME"):
        sources.Source(tmp_path / "texts" / "pyton.txt")
    with refused("'text' is not in", "did you mean 'texts'?"):
        sources.Source(tmp_path / "text" / "python.txt")
    (tmp_path / "void").mkdir()
    with refused("no such file or folder", "void is empty"):
        sources.Source(tmp_path / "void" / "x")
    os.mkfifo(tmp_path / "pipe")
    with refused("not a file or a folder", "pipe"):
        sources.Source(tmp_path / "pipe")


# --- Hugging Face datasets -------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the `datasets` library: `hub.rows` by name; the calls are noted."""
    state = SimpleNamespace(rows={}, calls=[], fails_after=None)

    class Rows(list):
        def shuffle(self, seed, buffer_size):
            state.calls.append({"seed": seed})
            return Rows(self[seed % len(self) :] + self[: seed % len(self)])

        def __iter__(self):
            for number, row in enumerate(super().__iter__()):
                if number == state.fails_after:
                    raise ConnectionError("cable cut")
                state.calls.append("row")
                yield row

    def load_dataset(name, config, *, split, streaming):
        state.calls.append({"name": name, "config": config, "split": split, "streaming": streaming})
        return Rows(state.rows[name])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return state


def test_hub_datasets_are_streamed_by_name(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub.rows["org/set"] = [{"text": "a", "id": 1}, {"messages": [{"role": "user", "content": "b"}]}]
    expected = ["a", [{"role": "user", "content": "b"}]]
    assert list(load_documents("hf:org/set")) == expected
    assert hub.calls[0] == {"name": "org/set", "config": None, "split": "train", "streaming": True}
    for spec, config, split in [("org/set:en", "en", "train"), ("hf:org/set::test", None, "test")]:
        hub.calls.clear()
        assert list(load_documents(spec)) == expected
        assert hub.calls[0] == {"name": "org/set", "config": config, "split": split, "streaming": True}
    assert next(iter(sources.Source("org/set", seed=1))).content == expected[1]


def test_a_path_is_never_taken_for_a_dataset(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "org" / "set", "a file")
    assert list(load_documents("org/set")) == ["a file"]
    for missing in ("org/sets", "other/x.txt", "/org/set"):
        with refused("no such file or folder"):
            list(load_documents(missing))
    assert not hub.calls


def test_hub_trouble_is_told(hub, monkeypatch):
    with refused("dataset cannot be read", "KeyError: 'no/such'", "network", "hf:NAME"):
        list(load_documents("hf:no/such"))
    hub.rows["org/set"] = [{"text": "a"}, {"content": "b"}]
    with refused("no known form", "hf:org/set, row 2", "'content': str"):
        list(load_documents("hf:org/set"))
    hub.fails_after = 1
    with refused("dataset cannot be read", "ConnectionError: cable cut"):
        list(load_documents("hf:org/set"))
    for name in ("hf:", "hf:a:b:c:d"):
        with refused("cannot be named so", "hf:NAME[:CONFIG][:SPLIT]"):
            sources.Source(name)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with refused("not installed", 'pip install "moekit[data]"'):
        sources.Source("hf:org/set")


def test_a_hub_dataset_is_not_read_to_its_end_for_a_budget(hub, tokenizer):
    hub.rows["org/set"] = [{"text": prose(30, seed)} for seed in range(1_000)]
    data = Dataset.build(["org/set"], tokenizer, tokens=100, sequence_length=16)
    assert data.tokens == {"set": 100}
    read = hub.calls.count("row")
    assert read == data.origins["set"]["documents"]
    assert 8 * 100 / 60 < read < 50


# --- rows ------------------------------------------------------------------------------------------------------------


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=300), data=st.data())
def test_the_rows_of_a_document_are_its_tokens(tokenizer, tmp_path, text, data):
    text += "."
    ids = tokenizer(text, verbose=False)["input_ids"]
    length = data.draw(st.integers(2, len(ids)))
    built = Dataset.build({"x": jsonl(tmp_path / "x.jsonl", {"text": text})}, tokenizer, sequence_length=length)
    dropped = len(ids) % length == 1  # a row of one token predicts nothing
    assert joined(built) == (ids[:-1] if dropped else ids)


def test_a_large_text_in_pieces_has_the_tokens_of_the_whole(tokenizer, tmp_path, monkeypatch):
    text = prose(3_000) + "  é\n\n\tx = {};\n\n" * 50 + prose(500, 1)
    monkeypatch.setattr(sources, "PIECE_CHARS", 997)
    data = Dataset.build({"x": write(tmp_path / "x.txt", text)}, tokenizer, sequence_length=64)
    assert joined(data) == tokenizer(text, verbose=False)["input_ids"]


def test_bos_stands_where_the_tokenizer_puts_it(tokenizer, bare, tmp_path):
    file = write(tmp_path / "x.txt", prose(200))
    data = Dataset.build({"x": file}, tokenizer, sequence_length=32)
    with_bos = rows_of(data)
    assert [row.count(tokenizer.bos_token_id) for row in with_bos] == [1] + [0] * (len(with_bos) - 1)
    assert with_bos[0][0] == tokenizer.bos_token_id
    without = Dataset.build({"x": file}, bare, sequence_length=32)
    assert joined(without) == joined(data)[1:]


def test_a_tokenizer_that_ends_texts_ends_documents_not_pieces(bare, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_CHARS", 100)
    raw = Tokenizer.from_str(bare.backend_tokenizer.to_str())
    raw.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A <|pad|>", special_tokens=[("<|bos|>", 0), ("<|pad|>", 1)]
    )
    both = PreTrainedTokenizerFast(tokenizer_object=raw)
    text = prose(300)
    ids = joined(Dataset.build({"x": write(tmp_path / "x.txt", text)}, both, sequence_length=50))
    assert ids == both(text)["input_ids"]
    assert (ids[0], ids[-1], ids.count(0), ids.count(1)) == (0, 1, 1, 1)


def test_long_texts_bring_no_warning_of_the_tokenizer(bare, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING, "transformers")  # the command line, in this process too, may have lowered it
    bare.model_max_length = 8
    Dataset.build({"x": write(tmp_path / "x.txt", prose(200))}, bare, sequence_length=8)
    assert not caplog.records
    bare(prose(200))
    assert "longer than the specified maximum" in caplog.text, "it would have"


def test_no_row_mixes_documents(tokenizer, tmp_path):
    documents = [letter * (7 * n + 3) for n, letter in enumerate("abcdefghij")]
    file = jsonl(tmp_path / "x.jsonl", *[{"text": text} for text in documents])
    rows = rows_of(Dataset.build({"x": file}, tokenizer, sequence_length=16))
    seen = [set(tokenizer.decode(row, skip_special_tokens=True)) for row in rows]
    assert all(len(letters) == 1 for letters in seen)
    assert set().union(*seen) == set("abcdefghij")
    starts = [row[0] == tokenizer.bos_token_id for row in rows]
    assert sum(starts) == len(documents)


def test_chats_go_through_the_template(tokenizer, tmp_path):
    chat = [{"role": "user", "content": "hi " * 20}, {"role": "assistant", "content": "ho"}]
    file = jsonl(tmp_path / "x.jsonl", {"messages": chat})
    (row,) = rows_of(Dataset.build({"x": file}, tokenizer, sequence_length=40, batch_size=1))[:1]
    expected = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert row == expected[:40]
    assert row[:2] != [0, 0], "the template writes bos; the tokenizer must not add another"


def test_chats_that_cannot_be_rendered_are_refused(tokenizer, bare, tmp_path):
    file = jsonl(tmp_path / "x.jsonl", {"text": "x"}, {"messages": [{"role": "user", "content": "x"}]})
    with refused("cannot be rendered", "x.jsonl, line 2", "has no chat template"):
        Dataset.build({"x": file}, bare, sequence_length=2)
    file = jsonl(tmp_path / "x.jsonl", {"messages": [{"role": "tool", "content": "x"}]})
    with refused("cannot be rendered", "x.jsonl, line 1", "no tools here", "mend the chat"):
        Dataset.build({"x": file}, tokenizer, sequence_length=2)


def test_characters_outside_unicode_are_refused(tokenizer, tmp_path):
    with refused("not Unicode", "x.jsonl, line 1"):
        Dataset.build({"x": write(tmp_path / "x.jsonl", r'{"text": "a\ud800"}')}, tokenizer, sequence_length=2)


# --- budget ----------------------------------------------------------------------------------------------------------


def positions(data: Dataset, whole: list[list[int]]) -> list[int]:
    """Which rows of `whole` were kept (a cut one counts)."""
    return [next(i for i, row in enumerate(whole) if row[: len(kept)] == kept) for kept in rows_of(data)]


def test_the_budget_is_kept_and_spread(tokenizer, tmp_path):
    file = write(tmp_path / "x.txt", prose(6_000))
    whole = rows_of(Dataset.build({"x": file}, tokenizer, sequence_length=16))
    before: set[int] = set()
    for budget in (64, 100, 160, 640, 1_601):
        data = Dataset.build({"x": file}, tokenizer, tokens=budget, sequence_length=16)
        assert budget - 1 <= data.tokens["x"] <= budget
        kept = positions(data, whole)
        assert len(set(kept)) == len(kept) == -(-data.tokens["x"] // 16)
        gaps = np.diff([-1, *sorted(kept), len(whole)])
        assert gaps.max() <= 3 * len(whole) / len(kept), "evenly spread from beginning to end"
        assert before <= set(kept), "a smaller sample is a part of the larger"
        before = set(kept)


def test_the_seed_moves_the_sample(tokenizer, tmp_path):
    file = write(tmp_path / "x.txt", prose(6_000))

    def build(seed):
        return Dataset.build({"x": file}, tokenizer, tokens=200, sequence_length=16, seed=seed)

    assert rows_of(build(3)) == rows_of(build(3))
    assert build(3).hash == build(3).hash
    assert rows_of(build(3)) != rows_of(build(4))
    assert build(3).hash != build(4).hash


def test_a_budget_beyond_the_text_takes_it_all(tokenizer, tmp_path):
    file = write(tmp_path / "x.txt", prose(300))
    everything = Dataset.build({"x": file}, tokenizer, sequence_length=16)
    generous = Dataset.build({"x": file}, tokenizer, tokens=10**6, sequence_length=16)
    assert rows_of(generous) == rows_of(everything)


def test_no_row_runs_across_a_gap():
    pieces = [np.arange(start, stop, dtype=np.int32) for start, stop in [(0, 3), (3, 6), (10, 13), (20, 25)]]
    rows = dataset_module._cut([None, *pieces[:2], None, pieces[2], None, None, pieces[3], None], 4)
    expected = [[0, 1, 2, 3], [4, 5], [10, 11, 12], [20, 21, 22, 23], [24]]
    assert [row.tolist() for row in rows] == expected


def test_of_a_huge_text_only_spread_pieces_are_tokenised(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_CHARS", 500)
    monkeypatch.setattr(dataset_module, "FREE_BYTES", 10_000)
    lines = [f"{n:06d} " * 7 + "\n" for n in range(8_000)]
    file = write(tmp_path / "x.txt", "".join(lines))
    data = Dataset.build({"x": file}, tokenizer, tokens=512, sequence_length=64)
    assert data.tokens == {"x": 512}
    share = 32 * 512 / file.stat().st_size
    assert share < 0.05
    tokenised = []
    original = type(tokenizer).__call__

    def noting(self, text, **options):
        tokenised.append(text)
        return original(self, text, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", noting)
    again = Dataset.build({"x": file}, tokenizer, tokens=512, sequence_length=64)
    assert again.hash == data.hash
    assert 0.7 * share < sum(map(len, tokenised)) / file.stat().st_size < 1.3 * share
    text = "".join(lines)
    decoded = [tokenizer.decode(row, skip_special_tokens=True) for row in rows_of(data)]
    assert all(row in text for row in decoded), "no row runs across a gap"
    places = sorted(text.index(row) / len(text) for row in decoded)
    assert len(set(places)) == len(places), "none is taken twice"
    assert places[0] < 0.25
    assert places[-1] > 0.75


def test_a_budget_is_reached_where_records_carry_much_else(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_module, "FREE_BYTES", 1_000)
    records = [{"text": prose(20, n), "vector": [0.5] * 2_000} for n in range(100)]
    data = Dataset.build({"x": jsonl(tmp_path / "x.jsonl", *records)}, tokenizer, tokens=1_000, sequence_length=16)
    assert 999 <= data.tokens["x"] <= 1_000


# --- batches ---------------------------------------------------------------------------------------------------------


def test_batches_are_padded_right_and_masked(tokenizer, tmp_path):
    file = jsonl(tmp_path / "x.jsonl", *[{"text": prose(n, n)} for n in (3, 40, 9, 1, 17, 25, 60)])
    data = Dataset.build({"x": file}, tokenizer, sequence_length=24, batch_size=4)
    lengths = [len(row) for row in rows_of(data)]
    assert lengths == sorted(lengths, reverse=True), "full rows first, similar lengths together"
    assert lengths[0] == 24
    for batch in data:
        assert batch.ids.dtype == torch.int64
        assert batch.mask.dtype == torch.bool
        assert batch.ids.shape == batch.mask.shape
        assert len(batch.ids) <= 4
        assert batch.mask[0].all(), "no wider than its longest row"
        assert (batch.mask[:, :-1] | ~batch.mask[:, 1:]).all(), "padding stands on the right"
        assert (batch.ids[~batch.mask] == tokenizer.pad_token_id).all()
        assert (batch.ids[batch.mask] != tokenizer.pad_token_id).all()
        assert batch.tokens == int(batch.mask.sum())
    assert sum(batch.tokens for batch in data) == sum(lengths) == data.tokens["x"]
    assert any(not batch.mask.all() for batch in data)


def test_padding_is_zero_where_the_tokenizer_has_none(bare, tmp_path):
    file = jsonl(tmp_path / "x.jsonl", {"text": prose(40)}, {"text": "fox over it"})
    data = Dataset.build({"x": file}, bare, sequence_length=16)
    assert any(not batch.mask.all() for batch in data)
    assert all((batch.ids[~batch.mask] == 0).all() for batch in data)


def test_tokens_per_batch_counts_positions(tokenizer, tmp_path):
    file = jsonl(tmp_path / "x.jsonl", *[{"text": prose(n, n)} for n in range(2, 40)])
    data = Dataset.build({"x": file}, tokenizer, sequence_length=32, tokens_per_batch=64)
    assert all(batch.ids.numel() <= 64 for batch in data)
    assert max(len(batch.ids) for batch in data) > min(len(batch.ids) for batch in data), "short rows: more of them"
    tight = Dataset.build({"x": file}, tokenizer, sequence_length=32, tokens_per_batch=8)
    assert all(len(batch.ids) == 1 or batch.ids.numel() <= 8 for batch in tight)
    assert rows_of(tight) == rows_of(data)


def test_domains_stay_apart(tokenizer, tmp_path):
    a, b = write(tmp_path / "a.txt", prose(200)), write(tmp_path / "b.txt", prose(300, 1))
    data = Dataset.build([f"one={a}", f"two={b}"], tokenizer, sequence_length=32)
    assert data.domains == ("one", "two")
    assert len(data) == len(data.batches) == len(list(data))
    for name, file in {"one": a, "two": b}.items():
        part = data.select(name)
        alone = Dataset.build({name: file}, tokenizer, sequence_length=32)
        assert part.domains == (name,)
        assert {batch.domain for batch in part} == {0}
        assert rows_of(part) == rows_of(alone)
        assert part.hash == alone.hash == data.describe()["domains"][name]["hash"]
        assert part.tokens == {name: data.tokens[name]}
    with refused("no such domain 'three'", "one, two"):
        data.select("three")


def test_the_hash_knows_every_id_and_setting(tokenizer, tmp_path):
    file = write(tmp_path / "x.txt", prose(200))

    def build(domain="x", file=file, **settings):
        return Dataset.build({domain: file}, tokenizer, **{"sequence_length": 32, **settings}).hash

    moved = write(tmp_path / "elsewhere" / "y.txt", file.read_bytes())
    assert build() == build(file=moved), "the same text at another place is the same data"
    changed = write(tmp_path / "z.txt", file.read_bytes()[:-2] + b"!\n")
    changes = [
        build(file=changed),
        build("other"),
        build(seed=1),
        build(tokens=10**6),
        build(sequence_length=31),
        build(batch_size=3),
    ]
    assert len({build(), *changes}) == 7
    assert len(build()) == 16
    assert int(build(), 16)
    batch = Batch(0, torch.tensor([[1, 2, 0]]), torch.tensor([[True, True, False]]))
    longer = Batch(0, batch.ids, torch.ones(1, 3, dtype=torch.bool))
    assert Dataset(("x",), [batch], 3).hash != Dataset(("x",), [longer], 3).hash, "padding is not a token of that id"


def test_describe_is_what_a_manifest_needs(tokenizer, tmp_path):
    write(tmp_path / "t" / "a.txt", prose(100))
    write(tmp_path / "t" / "b.txt", prose(100, 1))
    write(tmp_path / "t" / "c.bin", b"\0")
    data = Dataset.build({"x": tmp_path / "t"}, tokenizer, tokens=60, sequence_length=16, seed=5)
    told = json.loads(json.dumps(data.describe()))
    assert told == {
        "hash": data.hash,
        "sequence_length": 16,
        "budget": 60,
        "seed": 5,
        "domains": {
            "x": {
                "source": str(tmp_path / "t"),
                "documents": 2,
                "skipped": {"binary": 1},
                "sequences": 4,
                "tokens": 60,
                "hash": data.hash,
            }
        },
    }


# --- settings and tokenizers -----------------------------------------------------------------------------------------


def test_too_little_text_is_refused(tokenizer, tmp_path):
    file = write(tmp_path / "x.txt", "the quick brown fox")
    count = len(tokenizer("the quick brown fox")["input_ids"])
    with refused("'x' has fewer tokens than one sequence", f"got:      {count} tokens", f"at most {count}", "x.txt"):
        Dataset.build({"x": file}, tokenizer)
    assert Dataset.build({"x": file}, tokenizer, sequence_length=count).tokens == {"x": count}
    with refused("fewer tokens", "got:      0 tokens", "give more text"):
        Dataset.build({"x": jsonl(tmp_path / "x.jsonl", {"text": ""}, {"text": ""})}, tokenizer, sequence_length=2)


def test_settings_out_of_range_are_refused_before_reading(tokenizer):
    for name, value in [
        ("tokens", 0),
        ("tokens", -5),
        ("tokens", 1),
        ("sequence_length", 1),
        ("batch_size", 0),
        ("tokens_per_batch", 0),
    ]:
        with refused(f"{name} is too small", f"got:      {value}"):
            Dataset.build({"x": "no/such/path"}, tokenizer, **{name: value})


def test_every_source_is_checked_before_any_is_tokenised(tmp_path):
    file = write(tmp_path / "x.txt", prose(10))
    with refused("no such file or folder"):
        Dataset.build({"x": file, "y": tmp_path / "y.txt"}, tokenizer=None)


def test_load_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "good")
    loaded = load_tokenizer(tmp_path / "good")
    assert loaded("the fox")["input_ids"] == tokenizer("the fox")["input_ids"]
    assert loaded.chat_template == TEMPLATE
    with refused("no such model folder", kind=ModelError):
        load_tokenizer(tmp_path / "none")
    write(tmp_path / "model" / "config.json", '{"model_type": "qwen3_moe"}')
    with refused("holds no tokenizer", "tokenizer.json", kind=ModelError):
        load_tokenizer(tmp_path / "model")
    for content in ("{broken", "{}"):
        write(tmp_path / "model" / "tokenizer.json", content)
        with refused("tokenizer cannot be loaded", kind=ModelError):
            load_tokenizer(tmp_path / "model")


def test_a_tokenizer_with_code_of_its_own_is_not_run(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    write(tmp_path / "tokenizer_config.json", json.dumps(config))
    write(tmp_path / "mine.py", "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n")
    with refused("tokenizer cannot be loaded", "trust_remote_code", kind=ModelError):
        load_tokenizer(tmp_path)
    assert not list(tmp_path.rglob("ran"))
