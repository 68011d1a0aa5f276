"""A trace holds what the model did, however it was run, and refuses to be anything else."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from moekit import refmoe
from moekit.arrays import ArrayFile, read_arrays, write_arrays
from moekit.cli import main
from moekit.data import Dataset
from moekit.errors import DataError, ModelError, OutputError
from moekit.families.family import Family
from moekit.families.model import Model
from moekit.measurement import measure
from moekit.plans import Drop, Plan
from moekit.recording import recorder, trace, trace_generation
from moekit.recording.prompts import load_prompts
from moekit.tally import Tally
from moekit.trace import Trace, tables
from moekit.trace.store import layer_spec
from synthetic import layout, synthetic_trace
from tiny import batch, dataset

DATA = dataset(batch(1, 10, 2), batch(0, 12, 9, 1), batch(0, 7, 7, seed=1))  # domains out of order on purpose
PROMPTS = {"code": [[5, 9, 14, 30], [7, 8]], "prose": [[11, 12, 13]]}
FP32 = {"dtype": torch.float32}


@pytest.fixture(scope="module")
def qwen(opened) -> Model:
    return opened("qwen3_moe")


@pytest.fixture(scope="module")
def traced(qwen, tmp_path_factory) -> Trace:
    return trace(qwen, DATA, out=tmp_path_factory.mktemp("traced") / "t", tokens=True, in_memory=False, **FP32)


def assert_same_trace(a: Trace, b: Trace, sums: float = 0.0) -> None:
    """Choices, counts and tokens to the unit, sums to a relative tolerance."""
    assert a.head["tokens"] == b.head["tokens"]
    for index in a.layers:
        one, other = a.layer(index), b.layer(index)
        if a.has_tokens and b.has_tokens:
            np.testing.assert_array_equal(one.ids, other.ids)
            np.testing.assert_allclose(one.weights, other.weights, atol=1e-3 * (sums > 0))
        for name in ("count", "coactivation", "position_tokens", *(["transition"] if index > a.layers[0] else [])):
            np.testing.assert_array_equal(one.stats.arrays[name], other.stats.arrays[name], err_msg=name)
        for name in ("gate_mass", "entropy", "margin", "logit", "logit_gram"):
            scale = np.abs(one.stats.arrays[name]).max()
            np.testing.assert_allclose(
                one.stats.arrays[name], other.stats.arrays[name], atol=sums * scale, err_msg=name
            )
        np.testing.assert_array_equal(one.stats.vocabulary, other.stats.vocabulary)
        np.testing.assert_array_equal(one.stats.following, other.stats.following)


# ---- files


def test_arrays_are_filled_in_any_order_and_mapped_back(tmp_path):
    file = tmp_path / "a.safetensors"
    values = np.arange(60, dtype=np.float16).reshape(10, 6)
    for attempt in range(2):  # the second goes on with the first's file
        out = ArrayFile(file, {"x": (np.float16, (10, 6)), "n": (np.int64, (10,)), "b": (np.uint8, (10,))})
        for start in (7, 0, 3)[attempt:]:
            stop = min(start + 4, 10)
            out.write("x", start, values[start:stop])
            out.write("n", start, np.arange(start, stop))
        out.close()
    arrays = read_arrays(file)
    assert arrays["x"].base is not None
    for found in (arrays, load_file(file)):  # any safetensors library reads it
        np.testing.assert_array_equal(found["x"], values)
        np.testing.assert_array_equal(found["n"], np.arange(10))
        np.testing.assert_array_equal(found["b"], 0)
    with pytest.raises(ValueError, match="do not fit"):
        out.write("x", 8, values[:4])


def test_damaged_array_files_are_refused(tmp_path):
    file = tmp_path / "a.safetensors"
    write_arrays(file, {"x": np.arange(100)})
    whole = file.read_bytes()
    for damaged, complaint in (
        (whole[:-1], "truncated"),
        (whole + b"!", "longer than its header"),
        (whole[:40], "damaged"),
        (b"", "damaged"),
        (whole.replace(b"I64", b"I99"), "damaged"),
        (whole.replace(b"[0,800]", b"[800,0]"), "truncated|damaged|longer"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=complaint):
            read_arrays(file)
    with pytest.raises(DataError, match="missing"):
        read_arrays(tmp_path / "b")


@pytest.mark.parametrize("memory", [10, 10_000])
def test_tallies_count_alike_in_memory_and_on_disk(memory):
    rng, tally, expected = np.random.default_rng(0), Tally(memory), Counter()
    for _ in range(60):
        keys = rng.zipf(1.3, 3000) % 5000
        tally.add(keys)
        expected.update(keys.tolist())
    keys, counts = tally.result()
    assert (np.diff(keys) > 0).all()
    assert dict(zip(keys.tolist(), counts.tolist(), strict=True)) == expected
    assert len(Tally(5).result()[0]) == 0


# ---- what is recorded


def test_a_trace_is_what_hooks_on_the_stock_model_see(qwen, traced):
    """Against the stock model in transformers' own eager implementation, sequence by sequence, without padding."""
    stock = qwen.load(torch.float32)
    stock.set_experts_implementation("eager")
    seen: dict[int, list] = {}
    for layer in qwen.layout.routed:
        found = seen.setdefault(layer.index, [])
        stock.get_submodule(layer.experts_path).register_forward_pre_hook(lambda _m, args, f=found: f.append(args[1:3]))
    columns = traced.tokens()
    order = [x for name in range(2) for x in DATA.batches if x.domain == name]
    sequences = [row[mask] for x in order for row, mask in zip(x.ids, x.mask, strict=True)]
    assert columns["id"].tolist() == [int(x) for row in sequences for x in row]
    assert columns["sequence"].tolist() == [n for n, row in enumerate(sequences) for _ in row]
    assert columns["position"].tolist() == [n for row in sequences for n in range(len(row))]
    assert columns["domain"].tolist() == [0] * 36 + [1] * 12
    predicted, loss = [], []
    with torch.inference_mode():
        for row in sequences:
            logits = stock(input_ids=row[None], use_cache=False).logits[0].log_softmax(-1)
            predicted += logits.argmax(-1).tolist()
            loss += [-float(logits[i, x]) for i, x in enumerate(row[1:])] + [np.nan]
    assert columns["predicted"].tolist() == predicted
    np.testing.assert_allclose(columns["loss"], loss, rtol=1e-5)
    for index, calls in seen.items():
        layer = traced.layer(index)
        np.testing.assert_array_equal(layer.ids, torch.cat([ids for ids, _ in calls]))
        np.testing.assert_allclose(layer.weights, torch.cat([weights for _, weights in calls]), atol=1e-3)
        for domain, rows in enumerate((slice(0, 36), slice(36, 48))):
            counts = np.bincount(np.asarray(layer.ids[rows]).reshape(-1), minlength=8)
            np.testing.assert_array_equal(layer.stats.arrays["count"][domain], counts)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "zaya", "llama4_text"])
def test_in_memory_and_streamed_give_the_same_numbers(opened, tmp_path, family):
    model = opened(family)
    streamed = trace(model, DATA, out=tmp_path / "a", tokens=True, in_memory=False, **FP32)
    loaded = trace(model, DATA, out=tmp_path / "b", tokens=True, in_memory=True, **FP32)
    assert_same_trace(streamed, loaded, sums=1e-6)
    for name, column in streamed.tokens().items():
        np.testing.assert_allclose(column, loaded.tokens()[name], rtol=1e-4 * (name == "loss"), equal_nan=True)
    filled = sum(int((streamed.layer(i).ids < 8).sum()) for i in streamed.layers)
    assert filled == sum(x.arrays["count"].sum() for x in streamed.stats.layers.values())
    assert (filled < 48 * len(streamed.layers)) == (family == "zaya")  # whose tokens may skip a layer: id E
    # without tokens, the same sums; and those of `measure`
    assert_same_trace(trace(model, DATA, out=tmp_path / "c", in_memory=False, **FP32), streamed)
    measured = measure(model, DATA, groups=("routing",), **FP32)
    for index in streamed.layers:
        for name, array in measured.layers[index].arrays.items():
            np.testing.assert_allclose(streamed.stats.layers[index].arrays[name], array, err_msg=name)


def test_margins_and_logits_are_the_router_s(qwen, tmp_path):
    with_logits = trace(qwen, DATA, out=tmp_path / "t", logits=True, in_memory=False, **FP32)
    for index in with_logits.layers:
        layer = with_logits.layer(index)
        scores = torch.tensor(layer.logits).float().softmax(-1)
        best, ids = scores.topk(3)
        np.testing.assert_array_equal(ids[:, :2].sort().values, np.sort(layer.ids, 1))
        np.testing.assert_allclose(layer.margin, best[:, 1] - best[:, 2], atol=2e-3)


def test_outputs_and_plans_can_be_traced(qwen, tmp_path):
    plan = Plan(layout_hash=qwen.layout.hash, ops=[Drop(layer=1, experts=(2, 5))])
    planned = trace(qwen, DATA, out=tmp_path / "t", tokens=True, plan=plan, outputs=True, **FP32)
    assert {2, 5}.isdisjoint(np.unique(planned.layer(1).ids).tolist())
    assert {2, 5} <= set(np.unique(planned.layer(0).ids).tolist())
    assert np.isfinite(planned.layer(1).stats.arrays["logit_gram"]).all()
    assert planned.layer(1).stats.arrays["peak"].shape == (2, 8)
    assert planned.head["plan"]["ops"][0]["experts"] == [2, 5]


def test_a_wrong_seam_is_noticed_and_leaves_nothing(qwen, tmp_path, monkeypatch):
    honest = Family.routing
    monkeypatch.setattr(Family, "routing", lambda *args: [(x + 1) % 8 for x in honest(*args)])
    for whole in (False, True):
        with pytest.raises(ModelError, match="do not agree"):
            trace(qwen, DATA, out=tmp_path / "t", in_memory=whole, **FP32)
        assert list(tmp_path.iterdir()) == []


def test_miscounted_choices_are_noticed(qwen, tmp_path, monkeypatch):
    honest = recorder.Recorder.finished

    def forgetful(self, call, output):
        honest(self, call, output)
        self.sums[call.layer.index]["count"][0, 0] += 1

    monkeypatch.setattr(recorder.Recorder, "finished", forgetful)
    with pytest.raises(ModelError, match="choices for 48 tokens, expected 96"):
        trace(qwen, DATA, out=tmp_path / "t", **FP32)


def test_an_interrupted_recording_goes_on(opened, tmp_path, traced):
    model = opened("qwen3_moe")
    layers = []

    def interrupt(stage: str, done: int, total: int) -> None:
        layers.append((stage, done))
        if done == 2 * len(DATA) + 1:
            raise KeyboardInterrupt

    settings = {"out": tmp_path / "t", "tokens": True, "in_memory": False, "checkpoint_s": 0.0, **FP32}
    with pytest.raises(KeyboardInterrupt):
        trace(model, DATA, **settings, progress=interrupt)
    assert (tmp_path / "t.partial").is_dir()
    with pytest.raises(DataError, match="no trace") as caught:
        Trace.open(tmp_path / "t")
    assert "not finished" in caught.value.fix
    with pytest.raises(OutputError, match="another job left unfinished work"):
        trace(model, DATA, **settings | {"tokens": False})
    shutil.copytree(tmp_path / "t.partial", tmp_path / "u.partial")
    loaded = trace(model, DATA, **settings | {"in_memory": True, "out": tmp_path / "u"})  # begins anew
    assert_same_trace(loaded, traced, sums=1e-6)
    layers.clear()
    found = trace(model, DATA, **settings, progress=lambda stage, done, _: layers.append((stage, done)))
    assert min(done for stage, done in layers if stage == "layers") > len(DATA)  # the first layers were not run again
    assert_same_trace(found, traced)
    assert not (tmp_path / "t.partial").exists()
    assert not (found.path / "work").exists()


def test_what_is_in_the_way_is_refused(qwen, tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "file").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputError):
            trace(qwen, DATA, out=tmp_path / "t", overwrite=overwrite, **FP32)
    assert (tmp_path / "t" / "file").read_text() == "mine"
    trace(qwen, DATA, out=tmp_path / "u", **FP32)
    again = trace(qwen, DATA, out=tmp_path / "u", tokens=True, overwrite=True, **FP32)
    assert again.has_tokens
    with pytest.raises(DataError, match="'poems' has no tokens"):
        trace(qwen, Dataset(("code", "prose", "poems"), DATA.batches, 12), out=tmp_path / "v", **FP32)
    assert not (tmp_path / "v").exists()


# ---- generation


@pytest.fixture(scope="module")
def written(qwen, tmp_path_factory) -> Trace:
    out = tmp_path_factory.mktemp("written") / "t"
    return trace_generation(qwen, PROMPTS, out=out, max_new_tokens=6, tokens=True, **FP32)


def test_generation_is_greedy_and_its_experts_are_those_of_reading_it(qwen, written):
    stock = qwen.load(torch.float32)
    rows, phases = [], []
    for prompt in (x for texts in PROMPTS.values() for x in texts):
        row = list(prompt)
        for _ in range(6):
            with torch.inference_mode():
                row.append(int(stock(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
            if row[-1] == stock.generation_config.eos_token_id:
                break
        rows.append(row)
        phases += [0] * len(prompt) + [1] * (len(row) - len(prompt) - 1)
    columns = written.tokens()
    assert columns["id"].tolist() == [x for row in rows for x in row[:-1]]
    assert columns["phase"].tolist() == phases
    assert columns["position"].tolist() == [i for row in rows for i in range(len(row) - 1)]
    chosen = np.roll(columns["phase"], -1).astype(bool) | columns["phase"].astype(bool)
    follows = np.array([x for row in rows for x in row[1:]])
    np.testing.assert_array_equal(columns["predicted"][chosen], follows[chosen])
    assert np.isnan(columns["loss"]).all()
    seen = {}
    for layer in qwen.layout.routed:
        found = seen.setdefault(layer.index, [])
        stock.get_submodule(layer.experts_path).register_forward_pre_hook(lambda _m, args, f=found: f.append(args[1]))
    with torch.inference_mode():
        for row in rows:
            stock(input_ids=torch.tensor([row[:-1]]), use_cache=False)
    for index, ids in seen.items():
        np.testing.assert_array_equal(written.layer(index).ids, torch.cat(ids))


def test_phases_add_up(written):
    parts = [written.phase_stats(phase) for phase in ("prefill", "decode")]
    columns = written.tokens()
    assert parts[0].tokens.tolist() == [6, 3]
    assert (parts[0].tokens + parts[1].tokens).tolist() == [written.head["tokens"][name] for name in PROMPTS]
    assert written.stats.sequences.tolist() == [2, 1]
    for index in written.layers:
        ids = np.asarray(written.layer(index).ids)
        for phase, part in enumerate(parts):
            counts = np.bincount(ids[columns["phase"] == phase].reshape(-1), minlength=8)
            np.testing.assert_array_equal(part.get("count", index), counts)
        # all that follows is counted, the last token written included, which itself was never fed
        assert sum(part.layers[index].following[:, 3].sum() for part in parts) == 2 * len(ids)
    assert set(tables.confidence(written)["phase"].tolist()) == {"prefill", "decode"}
    reading = written.phase_stats("prefill").get("position_tokens", written.layers[0])
    assert reading[:4].tolist() == [3, 3, 3, 0]  # positions 0, 1, 2-3


def test_padded_prompts_are_continued_as_alone(qwen, written, tmp_path):
    together = trace_generation(qwen, PROMPTS, out=tmp_path / "t", max_new_tokens=6, batch_size=2, tokens=True, **FP32)
    for name, column in written.tokens().items():
        np.testing.assert_array_equal(together.tokens()[name], column, err_msg=name)
    assert_same_trace(together, written, sums=1e-5)


def test_a_row_that_has_ended_is_not_traced(qwen, tmp_path, monkeypatch):
    """With an end token that comes early in one row of two, what `generate()` feeds it afterwards is masked out."""
    free = trace_generation(qwen, PROMPTS, out=tmp_path / "a", max_new_tokens=6, tokens=True, **FP32)
    columns = free.tokens()
    end = int(columns["id"][(columns["sequence"] == 0) & (columns["phase"] == 1)][1])
    load = Model.load

    def ending(self, *args):
        loaded = load(self, *args)
        loaded.generation_config.eos_token_id = end
        return loaded

    monkeypatch.setattr(Model, "load", ending)
    alone = trace_generation(qwen, PROMPTS, out=tmp_path / "b", max_new_tokens=6, tokens=True, **FP32)
    together = trace_generation(qwen, PROMPTS, out=tmp_path / "c", max_new_tokens=6, batch_size=2, tokens=True, **FP32)
    assert alone.token_count < free.token_count
    for name, column in alone.tokens().items():
        np.testing.assert_array_equal(together.tokens()[name], column, err_msg=name)


def test_generation_keeps_sums_only_unless_asked(qwen, written, tmp_path):
    sums = trace_generation(qwen, PROMPTS, out=tmp_path / "t", max_new_tokens=6, **FP32)
    assert {x.name for x in sums.path.iterdir()} == {"stats", "trace.json"}
    assert_same_trace(sums, written)
    for bad in ({"prompts": {"code": []}}, {"prompts": {"code": [[]]}}, {"prompts": PROMPTS, "max_new_tokens": 1}):
        with pytest.raises(DataError):
            trace_generation(qwen, bad.pop("prompts"), out=tmp_path / "u", **bad)
    assert not (tmp_path / "u").exists()


def test_prompts_come_from_lines_and_records(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n  \ntwo\n")
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    records = [{"text": "a\nb"}, {"messages": turns}, {"prompt": "p", "completion": "c"}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, records)))
    found = load_prompts({"a": str(tmp_path / "a.txt"), "b": str(tmp_path / "b.jsonl")})
    assert found["a"] == ["one", "two"]
    assert found["b"] == ["a\nb", turns[:1], [{"role": "user", "content": "p"}]]


# ---- the trace on disk


def test_a_domain_is_a_part_of_the_whole(traced):
    prose = traced.domain("prose")
    assert (prose.domains, prose.token_count, traced.token_count) == (("prose",), 12, 48)
    for index in traced.layers:
        np.testing.assert_array_equal(prose.layer(index).ids, traced.layer(index).ids[36:])
        for name, array in prose.layer(index).stats.arrays.items():
            np.testing.assert_array_equal(array[0], traced.layer(index).stats.arrays[name][1])
    assert (prose.tokens()["domain"] == 1).all()
    assert prose.stats.token_count() == 12
    assert isinstance(prose.layer(0).ids.base, np.memmap | np.ndarray)
    with pytest.raises(DataError, match="no domain 'code'"):
        prose.domain("code")


def test_a_trace_describes_itself(traced):
    assert "48 tokens of code, prose" in repr(traced)
    assert "<td>prose</td><td>12</td>" in traced._repr_html_()
    assert traced.layout.hash == traced.layout_hash
    assert traced.text([3, 4]) == ["<3>", "<4>"]  # this model has no tokenizer


def test_bad_traces_are_refused(tmp_path):
    good = tmp_path / "good"
    synthetic_trace(good, layers=2)

    def broken(change) -> DataError:
        folder = tmp_path / "bad"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        change(folder)
        with pytest.raises(DataError) as caught:
            Trace.open(folder)
        return caught.value

    def head(folder: Path, file: str = "trace.json", **values: object) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    assert broken(lambda x: (x / "trace.json").unlink()).problem == "this is no trace"
    assert broken(lambda x: (x / "trace.json").write_text("{")).problem == "the trace is damaged"
    assert "no domains" in broken(lambda x: (x / "trace.json").write_text('{"schema": 1, "model": ""}')).got
    assert broken(lambda x: head(x, schema=99)).problem == "trace of another version"
    assert broken(lambda x: head(x, "stats/prefill/stats.json", schema=99)).problem == "statistics of another version"
    assert "of another model" in broken(lambda x: head(x, "stats/prefill/stats.json", layout_hash="0")).problem
    shard = "layers/layer-0001.safetensors"
    assert "truncated" in broken(lambda x: os.truncate(x / shard, 500)).problem
    assert "missing" in broken(lambda x: (x / shard).unlink()).problem
    short = {"ids": np.zeros((3, 2), np.uint8), "weights": np.zeros((3, 2), np.float16)}
    assert "does not hold its tokens" in broken(lambda x: write_arrays(x / shard, short)).problem
    assert "truncated" in broken(lambda x: os.truncate(x / "stats/prefill" / Path(shard).name, 5000)).problem
    empty = broken_domain = Trace.open(good)
    empty.head["tokens"]["math"] = 0
    with pytest.raises(DataError, match="'math' has no tokens"):
        broken_domain.domain("math")
    with pytest.raises(DataError, match="layer 0 has no experts"):
        broken_domain.layer(0)
    with pytest.raises(DataError, match="no layer 77"):
        broken_domain.layer(77)
    with pytest.raises(DataError, match="no phase 'decode'"):
        broken_domain.phase_stats("decode")


def test_a_trace_knows_its_model(traced, qwen, opened):
    traced.check(qwen)
    with pytest.raises(DataError, match="recorded from another model"):
        traced.check(opened("olmoe"))
    other = Model.open(qwen.path)
    other.fingerprint = "0" * 16
    with pytest.raises(DataError, match="same structure, other weights"):
        traced.check(other)


def test_ids_take_a_byte_where_they_fit():
    spec = {E: layer_spec(layout(1, E, 2).layers[0], 5)["ids"][0] for E in (8, 256, 257)}
    assert spec == {8: np.uint8, 256: np.uint8, 257: np.uint16}


def test_parquet_is_read_by_others(traced, written, tmp_path):
    pytest.importorskip("pyarrow", reason="pip install 'moekit[parquet]'")
    file = traced.to_parquet(tmp_path / "t.parquet")
    assert list(tmp_path.iterdir()) == [file]
    layer = traced.layer(2)
    polars = pytest.importorskip("polars", reason="another reader of parquet: pip install polars")
    frame = polars.read_parquet(file)
    assert frame["token"].to_list() == traced.tokens()["id"].tolist()
    assert frame["domain"].to_list() == ["code"] * 36 + ["prose"] * 12
    assert np.array_equal(np.stack(frame["ids_2"].to_list()), layer.ids)
    assert np.array_equal(np.stack(frame["weights_2"].to_list()), layer.weights.astype(np.float32))
    assert frame["loss"].null_count() == 7
    duckdb = pytest.importorskip("duckdb")
    query = f"select e, count(*) from (select unnest(ids_2) e from '{file}') group by e"
    counts = layer.stats.arrays["count"].sum(0)
    assert dict(duckdb.sql(query).fetchall()) == {e: n for e, n in enumerate(counts) if n}
    small = polars.read_parquet(written.to_parquet(tmp_path / "s.parquet", weights="uint8"))
    scale = float(written.layer(2).weights.max()) / 255
    np.testing.assert_allclose(np.stack(small["weights_2"].to_list()) * scale, written.layer(2).weights, atol=scale)
    assert small["phase"].to_list().count("decode") == int((written.tokens()["phase"] == 1).sum())
    with pytest.raises(DataError, match="float32 or uint8"):
        traced.to_parquet(tmp_path / "x", weights="float8")
    with pytest.raises(OutputError, match="cannot be written"):
        traced.to_parquet(tmp_path / "no" / "x")


# ---- the command


def test_the_verb_traces_refmoe(tmp_path, capsys, monkeypatch):
    texts = {name: refmoe.texts()[name] for name in ("python", "kjv")}
    monkeypatch.setattr(refmoe, "texts", lambda: texts)
    small = ["--tokens-per-domain", "256", "--sequence-length", "128", "--dtype", "float32"]
    assert main(["trace", "refmoe", "--out", str(tmp_path / "t"), "--tokens", *small]) == 0
    said = capsys.readouterr().out
    assert "prefill tokens: python 256, kjv 256" in said
    assert "domain MI" in said
    assert f"moekit report {tmp_path / 't'}" in said.replace("\n", "")
    found = Trace.open(tmp_path / "t")
    assert "".join(found.text(found.domain("kjv").tokens()["id"][:40])) in texts["kjv"].read_text("utf-8")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("def main():\nimport os\n")
    command = [
        "trace",
        "refmoe",
        "--out",
        str(tmp_path / "g"),
        "--generate",
        f"python={prompts}",
        "--max-new-tokens",
        "4",
    ]
    assert main(command) == 0
    assert "decode tokens: python 6" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nowhere", "--data", "a=b"], "model error"),
        (["refmoe", "--data", "a=nowhere.txt"], "no such file or folder"),
        (["refmoe", "--generate", "a=b", "--data", "a=b"], "--generate goes without --data"),
        (["refmoe", "--dtype", "float8"], "no such dtype"),
        (["refmoe", "--parquet", "/nowhere/x.parquet"], "the folder for the output does not exist"),
        (["refmoe", "--tokens-per-domain", "1"], "tokens is too small"),
    ],
)
def test_the_verb_says_what_is_wrong(tmp_path, capsys, arguments, complaint):
    assert main(["trace", *arguments, "--out", str(tmp_path / "t")]) == 2
    assert complaint in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
