"""The report's numbers: what the page and report.json hold equals the tables, whatever the trace has or has not."""

from __future__ import annotations

import base64
import hashlib
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from typer.testing import CliRunner

from moekit.cli import report as verb
from moekit.errors import DataError, OutputError, UserError
from moekit.plans import Drop, Plan
from moekit.report import collect, compare, render, words, write
from moekit.report.pack import Packed, from_blob, to_blob, to_plain
from moekit.report.structure import classical_scaling
from moekit.trace import Trace, tables
from synthetic import synthetic_trace

HOSTILE = "</script><script>window.pwned=1</script><img src=x onerror='window.pwned=1'>"


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return synthetic_trace(tmp_path_factory.mktemp("trace") / "t", tokens=400, decode=True)


@pytest.fixture(scope="module")
def payload(trace):
    return collect(trace)


def shown(payload):
    """What the page of a payload shows."""
    blob = re.search(r'id="data">([^<]*)</script>', render(payload))[1]
    return from_blob(base64.b64decode(blob))


# The largest model of the promise


def noisy(node, rng):
    """A payload whose numbers cannot be compressed."""
    if isinstance(node, Packed):
        noise = node.values.dtype.kind == "f"
        return Packed(rng.random(node.values.shape), node.bits) if noise else node
    if isinstance(node, dict):
        return {key: noisy(value, rng) for key, value in node.items()}
    return [noisy(x, rng) for x in node] if isinstance(node, list) else node


def test_a_page_of_the_largest_model_is_below_a_megabyte(tmp_path):
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    vocabulary = ["".join(letters[rng.integers(0, 26, 850)]) for _ in range(3)]  # 120 texts, together 102 kB
    trace = synthetic_trace(
        tmp_path / "t",
        layers=48,
        experts=128,
        top_k=8,
        domains=[f"domain {n}" for n in range(8)],
        tokens=160,
        vocabulary=vocabulary,
    )
    payload = collect(trace, against=trace)
    assert len(render(noisy(payload, rng)).encode()) < 1_000_000
    assert payload["usage"]["share"].values.shape == (8, 48, 128)
    assert payload["text"]["ids"].values.shape[2] == words.LEAST_EXPERTS
    assert payload["cards"]["input"]["token"].values.shape[2] >= 2
    filled = (payload["cards"]["input"]["token"].values[..., 0] != words.NONE).mean()
    assert filled > 0.9, "the cards are nearly empty: this is no test of the size"


# Packing


@given(arrays.arrays(np.float64, (3, 5), elements=st.floats(-1e6, 1e6) | st.just(np.nan)), st.sampled_from((8, 16, 32)))
def test_packed_numbers_are_at_most_half_a_level_off(values, bits):
    back = from_blob(to_blob({"x": Packed(values, bits)}))["x"]
    assert np.array_equal(np.isnan(back), np.isnan(values))
    finite = values[np.isfinite(values)]
    if len(finite):
        level = (finite.max() - finite.min()) / (2**bits - 2)
        assert np.nanmax(np.abs(back - values)) <= level / 2 * 1.001 + 1e-9


@given(arrays.arrays(np.int64, (4, 3), elements=st.integers(0, 255)))
def test_packed_whole_numbers_are_exact(values):
    assert np.array_equal(from_blob(to_blob([Packed(values, 8)]))[0], values)
    with pytest.raises(ValueError, match="256"):
        Packed(values + 256 - values.max(), 8).encode()


def test_packed_logarithms_keep_ratios():
    values = np.array([1e-3, 1.0, 40.0, 1e4, 0.0, np.nan])
    back = from_blob(to_blob([Packed(values, 16, log=True)]))[0]
    assert np.allclose(back[:4], values[:4], rtol=2e-4)
    assert np.isnan(back[4:]).all()


def test_several_arrays_stand_side_by_side():
    payload = {"a": Packed(np.arange(3), 8), "b": [Packed(np.arange(5), 32), "text"], "c": Packed(np.ones(2))}
    back = from_blob(to_blob(payload))
    assert back["a"].tolist() == [0, 1, 2]
    assert back["b"][0].tolist() == [0, 1, 2, 3, 4]
    assert back["b"][1] == "text"
    assert back["c"].tolist() == [1, 1]


# Numbers


def test_usage_equals_the_table(trace, payload):
    table, share = tables.usage(trace), shown(payload)["usage"]["share"]
    for row in table.rows():
        n, i = trace.domains.index(row["domain"]), trace.layers.index(row["layer"])
        assert share[n, i, row["expert"]] == pytest.approx(row["share"], abs=2e-5)
    assert share.sum(2) == pytest.approx(np.full(share.shape[:2], 2.0), abs=1e-3)  # top-2


def test_specialists_are_rows_of_the_table(trace, payload):
    table = tables.specialisation(trace)
    found = payload["specialisation"]["rows"]
    assert {row["domain"] for row in found} == set(trace.domains)
    for row in found:
        (same,) = table.where(domain=row["domain"], layer=row["layer"], expert=row["expert"]).rows()
        assert {name: row[name] for name in same} == same
        others = table.where(layer=row["layer"], expert=row["expert"])
        elsewhere = sum(x["count"] for x in others.rows() if x["domain"] != row["domain"]) / 800
        assert row["elsewhere"] == pytest.approx(elsewhere)
    first = [row for row in found if row["domain"] == "prose"]
    assert [row["share"] - row["elsewhere"] for row in first] == sorted(
        (row["share"] - row["elsewhere"] for row in first), reverse=True
    )
    information = tables.mutual_information(trace)
    assert payload["specialisation"]["information"]["observed"] == information["normalised"].tolist()


def test_balance_equals_the_tables(trace, payload):
    found = shown(payload)["balance"]
    for n, domain in enumerate([None, *trace.domains]):
        table = tables.balance(trace, domain)
        for name, values in found.items():
            assert values[n] == pytest.approx(table[name], abs=1e-3 * max(1, table[name].max()))


def test_confidence_equals_the_tables_by_phase(trace, payload):
    found = shown(payload)["confidence"]
    assert [x["name"] for x in found["phases"]] == ["prefill", "decode"]
    table = tables.confidence(trace, "math")
    for row in table.rows():
        at = found["positions"].index(
            str(row["first"]) if row["first"] == row["last"] else f"{row['first']}–{row['last']}"
        )
        phase = found["phases"][["prefill", "decode"].index(row["phase"])]
        i = trace.layers.index(row["layer"])
        assert phase["margin"][2, i, at] == pytest.approx(row["margin"], abs=1e-4)
        assert phase["entropy"][2, i, at] == pytest.approx(row["entropy"], abs=1e-3)
    missing = np.isnan(found["phases"][1]["margin"][0, 0])
    assert missing[0], "no token is generated at position 0"
    assert not missing[-1]


def test_text_shows_what_the_trace_holds(trace, payload):
    found = shown(payload)["text"]
    strings = payload["strings"]
    assert [x["count"] for x in found["samples"]] == [40] * 6
    columns = trace.tokens()
    rows = np.concatenate([np.arange(400 * n + 40 * i, 400 * n + 40 * (i + 1)) for n in range(3) for i in range(2)])
    assert [strings[x] for x in found["token"]] == trace.text(columns["id"][rows])
    for i, index in enumerate(trace.layers):
        layer = trace.layer(index)
        assert np.array_equal(found["ids"][:, i], layer.ids[rows])
        assert found["weights"][:, i] == pytest.approx(np.asarray(layer.weights[rows], np.float64), abs=2.1e-3)
        assert found["margin"][:, i] == pytest.approx(np.asarray(layer.margin[rows], np.float64), abs=2.1e-3)


def test_many_experts_of_a_token_are_cut_to_the_strongest():
    assert words.text_size(6, 4, 6) == (4, 240)
    experts, tokens = words.text_size(48, 8, 8)
    assert experts == words.LEAST_EXPERTS
    assert 48 * 8 * tokens * (2 * experts + 1) <= words.TEXT_BYTES


def test_cards_name_the_tables_tokens(trace, payload):
    found = shown(payload)["cards"]
    for kind, name in (("input", "input"), ("predicted", "output")):
        for i, index in enumerate(trace.layers):
            for expert in range(8):
                best = tables.top_tokens(trace, index, kind=kind, expert=expert)
                good = best["npmi"] > 0
                numbers = found[name]["token"][i, expert]
                texts = [payload["strings"][x] for x in numbers if x < len(payload["strings"])]
                assert texts == list(best["text"][good])
                assert found[name]["npmi"][i, expert][: len(texts)] == pytest.approx(best["npmi"][good], abs=5e-3)


def test_coactivation_equals_the_table(trace, payload):
    found = shown(payload)["coactivation"]
    for i, index in enumerate(trace.layers):
        table = tables.coactivation(trace, index)
        order = found["shown"][i]
        assert sorted(order) == list(range(8))
        for at, (a, b) in enumerate(zip(*np.triu_indices(8, 1), strict=True)):
            (row,) = table.where(expert=order[a], other=order[b]).rows()
            lift = found["lift"][i, at]
            assert (0 if np.isnan(lift) else lift) == pytest.approx(row["lift"], rel=1e-3)
        for a, b, count, lift in payload["coactivation"]["pairs"][i]:
            (row,) = table.where(expert=a, other=b).rows()
            assert (row["count"], row["lift"]) == (count, lift)
            assert count >= 10


def test_flow_equals_brute_force(trace, payload):
    found = shown(payload)["flow"]
    ids = [np.asarray(trace.layer(index).ids).astype(int) for index in trace.layers]
    domain = np.asarray(trace.tokens()["domain"])
    for n in range(4):
        mine = slice(None) if n == 0 else domain == n - 1
        for i in range(len(ids) - 1):
            pairs = np.zeros((8, 8))
            for a in range(2):
                for b in range(2):
                    np.add.at(pairs, (ids[i][mine][:, a], ids[i + 1][mine][:, b]), 1)
            nodes = [[int(x) for x in found["nodes"][n, i + j] if x < 8] for j in (0, 1)]
            for part in nodes:
                assert 4 <= len(part) <= 8
            size = found["share"].shape[-1] - 1
            for a, x in enumerate(nodes[0]):
                for b, y in enumerate(nodes[1]):
                    assert found["share"][n, i, a, b] == pytest.approx(pairs[x, y] / pairs.sum(), abs=1e-4)
                    lift = pairs[x, y] * pairs.sum() / pairs[x].sum() / pairs[:, y].sum()
                    assert (np.nan_to_num(found["lift"][n, i, a, b])) == pytest.approx(lift, rel=0.02)
            rest = [[e for e in range(8) if e not in part] for part in nodes]
            bundle = pairs[np.ix_(*rest)].sum() / pairs.sum()
            assert found["share"][n, i, size, size] == pytest.approx(bundle, abs=1e-4)


def test_similarity_map_keeps_distances_that_fit_into_a_plane():
    angle = np.array([0.0, 0.3, 1.0, 2.0, 4.0])
    points = np.stack([np.cos(angle), np.sin(angle)], 1)
    placed, kept = classical_scaling(points @ points.T)
    wanted = np.linalg.norm(points[:, None] - points[None], axis=2)
    assert np.linalg.norm(placed[:, None] - placed[None], axis=2) == pytest.approx(wanted)
    assert kept == pytest.approx(1)


def test_similarity_leaves_out_experts_that_are_never_used(trace, payload):
    found = {x["name"]: x for x in shown(payload)["similarity"]["kinds"]}
    assert set(found) == {"routing", "logits", "outputs"}
    used = np.stack([trace.stats.get("count", index) > 0 for index in trace.layers])
    for kind in found.values():
        assert np.array_equal(np.isfinite(kind["points"][..., 0]), used)


def test_report_json_holds_every_number_of_the_page(payload):
    numbers, page = to_plain(payload), shown(payload)
    json.dumps(numbers, allow_nan=False)
    assert numbers.keys() == page.keys()

    def check(a, b, where):
        if isinstance(b, np.ndarray):
            exact = np.array(a, np.float64)
            assert exact.shape == b.shape, where
            shown_as = np.where(np.isfinite(exact), exact, np.nan)
            spread = np.nanmax(np.abs(shown_as), initial=1e-9)
            wrong = ~np.isclose(shown_as, b, atol=spread / 200, rtol=0.02, equal_nan=True) & ~(
                (exact == 0) & np.isnan(b)
            )
            assert not wrong.any() or where == "lift", where
        elif isinstance(b, dict):
            assert a.keys() == b.keys(), where
            for key in b:
                check(a[key], b[key], key)
        elif isinstance(b, list):
            assert len(a) == len(b), where
            for x, y in zip(a, b, strict=True):
                check(x, y, where)
        else:
            assert a == b, where

    check(numbers, page, "")


# What is not there is not shown


def test_statistics_alone_give_no_text_and_next_tokens(tmp_path):
    payload = collect(synthetic_trace(tmp_path / "t", keep_tokens=False, tokens=400))
    assert "text" not in payload
    assert payload["cards"]["output_name"] == "tokens that come next"
    assert {"usage", "specialisation", "flow", "coactivation", "similarity", "balance", "confidence", "super"} <= set(
        payload
    )


def test_one_domain_has_no_specialists(tmp_path):
    assert "specialisation" not in collect(synthetic_trace(tmp_path / "t", domains=["only"]))


def test_one_layer_has_no_flow(tmp_path):
    assert "flow" not in collect(synthetic_trace(tmp_path / "t", layers=1))


def test_one_expert_a_token_has_no_company(tmp_path):
    assert "coactivation" not in collect(synthetic_trace(tmp_path / "t", top_k=1))


# Before and after


def test_a_trace_against_itself_has_not_changed(trace):
    found = collect(trace, against=trace)["against"]
    assert found["usage"] == pytest.approx([1.0] * 4)
    assert (found["overlap"].values == 1).all()
    assert (found["text_overlap"].values == 1).all()
    assert not found["change"].values.any()
    assert found["flips"] == []
    for row in found["domains"]:
        assert row["ratio"] == [1, 1, 1]
        assert row["flipped"] == [0, 0, 0]
        assert row["perplexity"][1] <= row["perplexity"][0] <= row["perplexity"][2]


def test_a_changed_trace_is_compared_token_by_token(tmp_path, trace):
    after = synthetic_trace(tmp_path / "t", tokens=400, decode=True, drift=0.7)
    found = collect(after, against=trace)["against"]
    for i, index in enumerate(trace.layers):
        old, new = (np.asarray(x.layer(index).ids).tolist() for x in (trace, after))
        same = np.array([len(set(a) & set(b)) / 2 for a, b in zip(old, new, strict=True)])
        assert found["overlap"].values[0, i] == pytest.approx(same.mean())
        assert found["overlap"].values[2, i] == pytest.approx(same[400:800].mean())
        assert found["text_overlap"].values[:40, i].tolist() == same[:40].tolist()
        shares = [np.bincount(np.ravel(x), minlength=8) / np.size(x) for x in (old, new)]
        assert found["usage"][i] == pytest.approx(np.minimum(*shares).sum())
        change = [np.bincount(np.ravel(x[:400]), minlength=8) / 400 for x in (old, new)]
        assert found["change"].values[0, i] == pytest.approx(change[1] - change[0])
    assert found["overlap"].values.min() < 1


def test_flips_name_what_each_model_predicted(tmp_path, trace):
    after = synthetic_trace(tmp_path / "t", tokens=400, decode=True)
    file = tmp_path / "t" / "tokens" / "tokens.safetensors"
    columns = {name: np.array(x) for name, x in after.tokens().items()}
    row = 405
    columns["predicted"][row] = 3
    columns["loss"][row] += 5
    from moekit.arrays import write_arrays

    write_arrays(file, columns)
    found = collect(Trace.open(tmp_path / "t"), against=trace)["against"]
    (flip,) = found["flips"]
    assert flip["domain"] == "prose"
    assert flip["loss"] == pytest.approx(5, abs=1e-5)
    assert flip["after"] == trace.text([3])[0]
    assert flip["before"] == trace.text(trace.tokens()["predicted"][[row]])[0]
    assert flip["next"] == trace.text(trace.tokens()["id"][[row + 1]])[0]
    assert flip["context"] == "".join(trace.text(trace.tokens()["id"][400 : row + 1]))
    rows = {x["domain"]: x for x in found["domains"]}
    assert rows["prose"]["flipped"][0] == pytest.approx(1 / 400)
    assert rows["prose"]["ratio"][0] == pytest.approx(np.exp(5 / 400), rel=1e-5)
    assert rows["math"]["flipped"] == [0, 0, 0]


def test_removed_experts_are_compared_under_their_old_numbers(tmp_path):
    before = synthetic_trace(tmp_path / "a", experts=6)
    after = synthetic_trace(tmp_path / "b", experts=4)
    with pytest.raises(DataError, match="--plan"):
        collect(after, against=before)
    ops = [Drop(layer=index, experts=(1, 4)) for index in before.layers]
    plan = Plan(layout_hash=before.layout_hash, ops=ops)
    found = collect(after, against=before, plan=plan)["against"]
    new = tables.usage(after).where(domain="math", layer=2)["share"]
    old = tables.usage(before).where(domain="math", layer=2)["share"]
    moved = np.array([new[0], 0, new[1], new[2], 0, new[3]])
    assert found["change"].values[2, 1] == pytest.approx(moved - old)
    kept = [0, 2, 3, 5]
    ids = [np.asarray(x.layer(2).ids).tolist() for x in (before, after)]
    same = [len(set(a) & {kept[e] for e in b}) / 2 for a, b in zip(*ids, strict=True)]
    assert found["overlap"].values[0, 1] == pytest.approx(np.mean(same))


def test_traces_of_other_texts_are_compared_by_use_alone(tmp_path, trace):
    other = synthetic_trace(tmp_path / "t", tokens=200)
    found = collect(trace, against=other)["against"]
    assert "overlap" not in found
    assert len(found["usage"]) == 4
    with pytest.raises(DataError, match="no domain in common"):
        collect(trace, against=synthetic_trace(tmp_path / "u", domains=["x", "y"]))
    with pytest.raises(DataError, match="other MoE layers"):
        collect(trace, against=synthetic_trace(tmp_path / "v", layers=3))


def test_an_evaluation_gives_the_divergence(trace):
    score = {
        "tokens": 99,
        "sequences": 3,
        "perplexity": [9, 8, 10],
        "kl": [0.2, 0.1, 0.3],
        "agreement": [0.9, 0.8, 0.95],
        "ratio": [1.1, 1.0, 1.2],
        "source_perplexity": [8, 7, 9],
    }
    found = collect(trace, evaluation={"domains": {"python": score}})["against"]
    (row,) = found["domains"]
    assert row["kl"] == [0.2, 0.1, 0.3]
    assert row["flipped"] == pytest.approx([0.1, 0.05, 0.2])
    with pytest.raises(DataError, match="no evaluation"):
        collect(trace, evaluation={"domains": {"python": {}}})


ROW = {
    "experts": "2.5",
    "domain": "math",
    "control": None,
    "of": "2.5",
    "share": 0.3,
    "touched": 9,
    "change": 0.05,
    "low": 0.04,
    "high": 0.06,
    "random": [0.01, 0.0, 0.02],
    "matched": [0.02, 0.01, 0.03],
    "excess": [0.03, 0.02, 0.04],
    "matched_share": 0.29,
}


def test_an_ablation_is_shown_beside_its_controls(trace):
    rows = [ROW, ROW | {"experts": "2.5+3.1"}, ROW | {"control": "random", "experts": "2.1"}]
    result = {"model": "synthetic", "fingerprint": "0" * 16, "how": "switched off", "rows": rows}
    found = collect(trace, ablation=result)["ablation"]
    assert [(row["experts"], row["at"]) for row in found["rows"]] == [("2.5", (1, 5)), ("2.5+3.1", None)]
    assert found["rows"][0]["excess"] == [0.03, 0.02, 0.04]
    with pytest.raises(DataError, match="another model"):
        collect(trace, ablation=result | {"fingerprint": "1" * 16})
    with pytest.raises(DataError, match="no ablation"):
        collect(trace, ablation={"fingerprint": "0" * 16})


def test_an_unlearning_run_is_shown_and_checked():
    run = {
        "rows": [
            {"step": 0, "forget": 0.7, "utility": 0.6, "overlap": 1},
            {"step": 9, "forget": 0.2, "utility": 0.6, "overlap": None},
        ]
    }
    assert compare.unlearning(run)["rows"][1] == {"step": "9", "forget": 0.2, "utility": 0.6, "overlap": None}
    with pytest.raises(DataError, match="no unlearning run"):
        compare.unlearning({"rows": [{"step": 1}]})


# The file


def test_the_page_allows_nothing_but_itself(payload):
    page = render(payload)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    for kind in ("script", "style"):
        (content,) = re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.S)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    assert "connect-src" not in policy
    assert "unsafe" not in policy
    assert not re.findall(r"""(?:src|href|action)\s*=\s*["'](?!#|data:,)""", page.split("<script")[0])
    assert "licenses/" not in page
    assert "Permission to use, copy, modify" in page, "d3's licence travels with it"


def test_hostile_names_and_tokens_stay_text(tmp_path):
    trace = synthetic_trace(tmp_path / "t", model=HOSTILE, domains=[HOSTILE, "b"], vocabulary=[HOSTILE, "x"])
    page = render(collect(trace))
    assert HOSTILE not in page
    assert page.count("<script") == 2
    assert "<img" not in page
    assert "&lt;/script&gt;&lt;script&gt;window.pwned" in page


def test_the_same_trace_gives_the_same_page(trace, payload):
    assert render(collect(trace)) == render(payload)


def test_the_vendored_bundle_is_what_the_lock_file_says():
    from pathlib import Path

    root = Path(__file__).resolve().parents[1]
    wanted = json.loads((root / "scripts/vendor_js/package.json").read_text())["dependencies"]
    bundle = (root / "src/moekit/report/assets/vendor.js").read_text()
    licences = (root / "src/moekit/report/assets/VENDOR_LICENSES.txt").read_text()
    for name, version in wanted.items():
        assert f"{name} {version} (" in bundle
        assert f"{name} {version} (" in licences
    assert len(bundle) < 100_000
    assert "registry" not in (root / "scripts/vendor_js/package-lock.json").read_text()


def test_write_leaves_whole_files_or_none(tmp_path, payload):
    page, numbers = write(payload, tmp_path / "new" / "report.html")
    assert page.read_text("utf-8") == render(payload)
    assert json.loads(numbers.read_text("utf-8"))["domains"] == ["python", "prose", "math"]
    with pytest.raises(OutputError, match=r"ends in \.html"):
        write(payload, tmp_path / "report.pdf")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        write(payload, tmp_path / "file" / "report.html")
    assert not list(tmp_path.glob("**/*.partial"))


def test_the_verb_writes_both_files(tmp_path, trace):
    import typer

    app = typer.Typer()
    app.command()(verb.report)
    out = tmp_path / "r.html"
    result = CliRunner().invoke(app, [str(trace.path), "--against", str(trace.path), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "r.json" in result.output
    assert "against" in json.loads(out.with_suffix(".json").read_text())
    for arguments in ([str(tmp_path)], [str(trace.path), "--evaluation", str(tmp_path / "none.json")]):
        result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "other.html")])
        assert isinstance(result.exception, UserError)
    assert not (tmp_path / "other.html").exists()
