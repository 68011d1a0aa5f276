"""Every table of a trace is what a plain loop gives, and says what is true of routings that were built to be known."""

import json
import math
from collections import Counter
from itertools import combinations, permutations

import numpy as np
import pytest

from moekit.arrays import write_arrays
from moekit.errors import DataError
from moekit.stats import LayerStats, Stats
from moekit.trace import Table, Trace, resample, tables
from moekit.trace.domains import information
from moekit.trace.overlap import common
from moekit.trace.store import layer_path
from moekit.trace.usage import evenness, fewest, gini
from moekit.trace.words import npmi, thin
from synthetic import layout, synthetic_trace

DOMAINS = ("python", "prose", "math")


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    folder = tmp_path_factory.mktemp("tables") / "trace"
    return synthetic_trace(folder, layers=3, experts=8, top_k=3, domains=DOMAINS, tokens=120, sequence_length=20)


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return synthetic_trace(tmp_path_factory.mktemp("tables") / "generated", layers=2, tokens=80, decode=True)


def counted(choices: dict[int, np.ndarray], tokens: list[int], **arrays: np.ndarray) -> Stats:
    """Statistics with these counts [N, E] by layer."""
    first = next(iter(choices.values()))
    shape = layout(len(choices), first.shape[1], 2)
    layers = {
        i: LayerStats({"count": x.astype(float), "gate_mass": x.astype(float), **arrays}) for i, x in choices.items()
    }
    names = DOMAINS[: len(tokens)]
    return Stats(shape.hash, names, np.array(tokens), np.ones(len(tokens), int), layers, {"layout": shape.to_dict()})


def rows_of(trace: Trace, layer: int):
    """(domain name, token id, predicted, chosen experts) of every token."""
    columns, ids = trace.tokens(), trace.layer(layer).ids
    for row in range(trace.token_count):
        name = DOMAINS[columns["domain"][row]]
        yield name, int(columns["id"][row]), int(columns["predicted"][row]), [int(x) for x in ids[row]]


# ---- tables themselves


def test_a_table_selects_sorts_and_becomes_plain_data():
    table = Table(
        "t", {"layer": np.array([0, 0, 1]), "x": np.array([1.0, math.nan, 3.0]), "name": np.array(["a", "b", "c"])}
    )
    assert [row["name"] for row in table.where(layer=0).rows()] == ["a", "b"]
    assert table.top(1, "layer")["name"].tolist() == ["c"]
    assert Table.stacked([table, table])["x"].shape == (6,)
    assert json.loads(json.dumps(table.to_dict(), allow_nan=False))["columns"]["x"] == [1.0, None, 3.0]
    with pytest.raises(ValueError, match="different lengths"):
        Table("t", {"a": np.zeros(2), "b": np.zeros(3)})


def test_a_table_on_a_page_escapes_what_it_holds():
    page = Table("<b>", {"<i>": np.array(["<script>alert(1)</script>"], object)}, "a & b")._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "a &amp; b" in page


# ---- usage and balance


def test_usage_is_what_a_loop_counts(trace):
    table = tables.usage(trace)
    for layer in trace.layers:
        count, mass = Counter(), Counter()
        weights = trace.layer(layer).weights
        for row, (name, _, _, chosen) in enumerate(rows_of(trace, layer)):
            for slot, expert in enumerate(chosen):
                count[name, expert] += 1
                mass[name, expert] += float(weights[row, slot])
        for found in table.where(layer=layer).rows():
            key = found["domain"], found["expert"]
            assert found["count"] == count[key]
            assert found["share"] == count[key] / 120
            assert found["gate_mass"] == pytest.approx(mass[key], rel=2e-3)  # weights on disk are float16
            assert found["gate_share"] == pytest.approx(found["gate_mass"] / 120, rel=1e-6)


def test_balance_of_known_loads():
    even, one = np.full(8, 5.0), np.eye(8)[3]
    assert (evenness(even), gini(even), fewest(even, 0.7)) == (pytest.approx(1), pytest.approx(0), 6)
    assert (evenness(one), gini(one), fewest(one, 0.7)) == (0, pytest.approx(7 / 8), 1)
    loads = np.random.default_rng(0).gamma(1.0, 1.0, 20)
    differences = sum(abs(a - b) for a in loads for b in loads)
    assert gini(loads) == pytest.approx(differences / (2 * 20 * loads.sum()))
    held = next(n for n in range(1, 21) if np.sort(loads)[::-1][:n].sum() >= 0.7 * loads.sum())
    assert fewest(loads, 0.7) == held
    table = tables.balance(counted({1: np.array([[0, 10, 30, 0]])}, [20]))
    row = next(table.rows())
    assert (row["never_used"], row["max_over_mean"], row["experts_for_70"]) == (2, 3.0, 1)
    assert row["entropy"] == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(4))
    unused = tables.never_used(counted({1: np.array([[0, 10, 30, 0]])}, [20]))
    assert list(unused.rows()) == [{"layer": 1, "expert": 0}, {"layer": 1, "expert": 3}]


def test_confidence_by_place_and_phase(generated):
    table = tables.confidence(generated)
    columns = generated.tokens()
    for phase, number in (("prefill", 0), ("decode", 1)):
        for layer in generated.layers:
            margins = generated.layer(layer).margin.astype(float)
            for row in table.where(layer=layer, phase=phase).rows():
                places = (columns["position"] >= row["first"]) & (columns["position"] <= row["last"])
                mine = places & (columns["phase"] == number)
                assert row["tokens"] == mine.sum() > 0
                assert row["margin"] == pytest.approx(margins[mine].mean(), rel=2e-3)
    assert table["tokens"].sum() == generated.token_count * len(generated.layers)


# ---- domains


def test_specialisation_is_what_a_loop_counts(trace):
    table = tables.specialisation(trace, resamples=50, permutations=50)
    for layer in trace.layers:
        counts = Counter((name, e) for name, _, _, chosen in rows_of(trace, layer) for e in chosen)
        for row in table.where(layer=layer).rows():
            assert row["count"] == counts[row["domain"], row["expert"]]
            assert row["share"] == pytest.approx(row["count"] / 120)
            assert row["overall"] == pytest.approx(sum(counts[name, row["expert"]] for name in DOMAINS) / 360)
            assert row["uniform"] == 3 / 8
            assert row["low"] <= row["share"] <= row["high"]
            assert row["null_low"] <= row["null_high"]
            assert 0 < row["p"] <= 1


def test_intervals_by_sequence_are_the_bootstrap(trace):
    """Against resampling written out, with the same draws."""
    sequences = resample.Sequences.of(trace)
    assert sequences.tokens.tolist() == [20] * 18
    assert sequences.domain.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    counts = sequences.counts(trace.layer(1).ids, 8)
    columns = trace.tokens()
    for s, number in enumerate(dict.fromkeys(columns["sequence"].tolist())):
        mine = trace.layer(1).ids[columns["sequence"] == number]
        assert counts[s].tolist() == [float((mine == e).sum()) for e in range(8)]
    drawn = resample.draws(6, 40, np.random.default_rng(5))
    assert (drawn.sum(1) == 6).all()
    low, high = resample.bootstrap(counts[:6], sequences.tokens[:6], drawn)
    shares = [sum(w * counts[s, 0] for s, w in enumerate(row)) / sum(20 * w for w in row) for row in drawn]
    assert [low[0], high[0]] == pytest.approx(np.quantile(shares, (0.025, 0.975)))


def test_wilson_interval_of_the_textbook():
    low, high = resample.wilson(np.array([10.0, 0.0]), 100)
    assert (low[0], high[0]) == (pytest.approx(0.0552, abs=1e-4), pytest.approx(0.1744, abs=1e-4))
    assert low[1] == pytest.approx(0)
    assert high[1] == pytest.approx(0.0370, abs=1e-4)


def test_permuting_tokens_is_hypergeometric():
    counts, tokens = np.array([[30.0, 0], [10, 20]]), np.array([100, 50])
    null, sizes = resample.permuted_tokens(counts, tokens, 4000, np.random.default_rng(0))
    assert null.shape == (4000, 2, 2)
    assert (sizes == tokens).all()
    assert null[:, 0, 0].mean() == pytest.approx(40 * 100 / 150, rel=0.01)
    variance = 100 * (40 / 150) * (110 / 150) * (50 / 149)
    assert null[:, 0, 0].var() == pytest.approx(variance, rel=0.1)


def test_permuting_sequences_keeps_their_tokens_together():
    counts, tokens = np.array([[4.0], [0], [2]]), np.array([4, 4, 2])
    labels = np.array([p for p in permutations([0, 0, 1])])
    null, sizes = resample.permuted_sequences(counts, tokens, labels, 2)
    for found, size, label in zip(null, sizes, labels, strict=True):
        assert found[1, 0] == counts[label == 1].sum()
        assert size.tolist() == [tokens[label == 0].sum(), tokens[label == 1].sum()]


def test_an_expert_of_one_domain_is_found_and_blind_routing_is_not(tmp_path):
    rng = np.random.default_rng(0)
    known = np.zeros((2, 8), int)
    for domain in (0, 1):
        chosen = np.stack([rng.permutation(np.arange(1, 8))[:1] for _ in range(500)])[:, 0]
        known[domain] = np.bincount(chosen, minlength=8)
    known[0, 0] = 500  # expert 0: every token of the first domain, none of the second
    known[1] += np.bincount(rng.integers(1, 8, 500), minlength=8)
    blind = np.stack([np.bincount(rng.integers(0, 8, 1000), minlength=8) for _ in range(2)])
    stats = counted({1: known, 2: blind}, [500, 500])
    table = tables.specialisation(stats, permutations=400)
    best = next(table.where(layer=1, expert=0, domain="python").rows())
    assert (best["share"], best["high"]) == (1.0, 1.0)
    assert best["null_high"] < 0.6 < best["low"]
    assert best["p"] == 1 / 401
    assert tables.preferred(stats).where(domain="python")["expert"].tolist() == [0]
    guesses = table.where(layer=2)
    assert (guesses["p"] < 0.05).mean() < 0.3
    shared = tables.mutual_information(stats, permutations=400)
    first, second = shared.rows()
    assert first["bits"] > 10 * first["null_high"]
    assert first["p"] == 1 / 401
    assert second["bits"] < 0.02
    assert second["p"] > 0.05


def test_mutual_information_of_known_tables():
    assert information(np.eye(4) * 7, balanced=True) == pytest.approx(2.0)
    assert information(np.ones((3, 5)), balanced=False) == pytest.approx(0.0)
    counts = np.random.default_rng(1).integers(0, 9, (3, 5)).astype(float)
    for balanced in (False, True):
        joint = counts / counts.sum(1, keepdims=True) / 3 if balanced else counts / counts.sum()
        expected = sum(
            joint[d, e] * math.log2(joint[d, e] / (joint[d].sum() * joint[:, e].sum()))
            for d in range(3)
            for e in range(5)
            if joint[d, e]
        )
        assert information(counts, balanced) == pytest.approx(expected)
    sure = tables.mutual_information(counted({1: np.eye(3) * 20}, [20, 20, 20]))
    assert sure["normalised"].tolist() == [pytest.approx(1.0)]
    assert sure["bits"].tolist() == [pytest.approx(math.log2(3))]


def test_sequences_widen_what_tokens_narrow(tmp_path):
    """All tokens of a sequence alike: as tokens that is overwhelming evidence, as sequences it is none."""
    trace = synthetic_trace(
        tmp_path / "t", layers=1, experts=4, top_k=1, domains=("a", "b"), tokens=200, sequence_length=50
    )
    ids = np.repeat(np.array([0, 1, 0, 0, 1, 1, 0, 1], np.uint8), 50)[:, None]
    layer = trace.layer(1)
    write_arrays(
        layer_path(tmp_path / "t", 1), {"ids": ids, "weights": layer.weights.copy(), "margin": layer.margin.copy()}
    )
    counts = {1: np.array([[150.0, 50, 0, 0], [50, 150, 0, 0]])}
    by_token = tables.mutual_information(counted(counts, [200, 200]))
    by_sequence = tables.mutual_information(Trace.open(tmp_path / "t"))
    assert by_sequence["bits"].tolist() == pytest.approx(by_token["bits"].tolist())
    assert by_token["p"][0] < 0.01
    assert by_sequence["p"][0] > 0.2


def test_nothing_is_divided_by_no_tokens():
    stats = counted({1: np.array([[3.0, 1], [0, 0]])}, [4, 0])
    for function in (tables.specialisation, tables.mutual_information, tables.preferred):
        with pytest.raises(DataError, match="'prose' has no tokens"):
            function(stats)
    assert tables.usage(stats).where(domain="prose")["share"].tolist() == [0, 0]
    with pytest.raises(DataError, match="no tokens"):
        tables.balance(counted({1: np.zeros((1, 2))}, [0]))


# ---- words


@pytest.mark.parametrize("kind", ["input", "predicted"])
def test_vocabulary_is_what_a_loop_counts(trace, kind):
    place = 1 if kind == "input" else 2
    for domain in (None, "prose"):
        pairs, words, experts = Counter(), Counter(), Counter()
        for row in rows_of(trace, 2):
            if domain in (None, row[0]):
                words[row[place]] += 1
                for expert in row[3]:
                    pairs[row[place], expert] += 1
                    experts[expert] += 1
        table = tables.vocabulary(trace, 2, kind=kind, domain=domain, min_count=3)
        assert {(r["token"], r["expert"]): r["count"] for r in table.rows()} == {
            (x, e): n for (x, e), n in pairs.items() if words[x] >= 3
        }
        for row in table.rows():
            assert row["total"] == words[row["token"]]
            assert row["share"] == row["count"] / row["total"]
            assert row["overall"] == pytest.approx(experts[row["expert"]] / words.total())
            given = (row["count"] + row["overall"]) / (row["total"] + 1)
            together = given * row["total"] / words.total()
            assert row["npmi"] == pytest.approx(math.log(given / row["overall"]) / -math.log(together))


def test_the_next_token_is_the_one_of_the_same_sequence(trace, generated):
    table = tables.vocabulary(trace, 1, kind="next", min_count=1)
    assert table["count"].sum() == 3 * (360 - 18)  # the last token of each of the 18 sequences has none
    columns = trace.tokens()
    follows = Counter()
    for row in range(359):
        if columns["sequence"][row] == columns["sequence"][row + 1]:
            follows.update((int(columns["id"][row + 1]), int(e)) for e in trace.layer(1).ids[row])
    assert {(r["token"], r["expert"]): r["count"] for r in table.rows()} == follows
    assert tables.vocabulary(generated, 1, kind="next", min_count=1)["count"].sum() == 2 * generated.token_count


def test_statistics_and_tokens_count_the_same_words(trace):
    from_stats = tables.vocabulary(trace.stats, 1, min_count=2)
    from_tokens = tables.vocabulary(trace, 1, min_count=2)
    for name in from_stats.columns:
        np.testing.assert_array_equal(from_stats[name], from_tokens[name])


def test_an_expert_of_one_token_is_found():
    """Expert 2 fires for token 7 and only for it; tokens 8 and 9 go to experts 0 and 1 alike."""
    rows = [[0, 7, 2, 50], [0, 8, 0, 25], [0, 8, 1, 25], [0, 9, 0, 20], [0, 9, 1, 30], [0, 5, 3, 2]]
    stats = counted({1: np.array([[45.0, 55, 50, 2]])}, [152])
    stats.manifest["layout"]["layers"][0]["top_k"] = 1
    stats.layers[1].vocabulary = np.array(rows)
    table = tables.vocabulary(stats, 1, smoothing=0)
    sure = next(table.where(token=7).rows())
    assert (sure["share"], sure["npmi"]) == (1.0, pytest.approx(1.0))
    assert table.where(token=8, expert=0)["npmi"][0] == pytest.approx(math.log(0.5 / (45 / 152)) / -math.log(25 / 152))
    assert 5 not in table["token"]  # seen twice
    best = tables.top_tokens(stats, 1, per_expert=1, smoothing=0)
    assert dict(zip(best["expert"].tolist(), best["token"].tolist(), strict=True)) == {0: 8, 1: 9, 2: 7}
    assert tables.top_tokens(stats, 1, expert=1, by="count")["token"].tolist() == [9, 8]
    summary = next(tables.vocabulary_specialisation(stats).rows())
    assert (summary["token_ids"], summary["always"]) == (3, 1)
    assert summary["strongest"] == pytest.approx((1.0 + 0.5 + 0.6) / 3)
    assert summary["strongest_weighted"] == pytest.approx((50 + 25 + 30) / 150)


def test_npmi_has_its_known_values():
    ones = np.array([10.0])
    assert npmi(ones, ones, ones, 100, 0.0) == pytest.approx(1)
    assert npmi(np.array([2.0]), np.array([10.0]), np.array([20.0]), 100, 0.0) == pytest.approx(0)
    assert npmi(np.array([0.0]), ones, ones, 100, 0.0) == -1
    assert npmi(np.array([100.0]), np.array([100.0]), np.array([100.0]), 100, 0.0) == 0
    few, many = npmi(np.array([2.0, 200]), np.array([2.0, 200]), np.array([500.0, 500]), 1000)
    assert few < many  # rare tokens do not win by luck


def test_domains_are_labels_too(trace):
    for row in tables.domain_npmi(trace, smoothing=0).rows():
        layer = trace.layer(row["layer"])
        total = layer.stats.arrays["count"][:, row["expert"]].sum()
        expected = math.log(row["count"] / 120 / (total / 360)) / -math.log(row["count"] / 360)
        assert row["npmi"] == pytest.approx(expected)


def test_thinned_words_keep_what_stands_out_and_every_sum():
    rng = np.random.default_rng(3)
    experts, k = 6, 2
    words = rng.zipf(1.3, 4000) % 300
    chosen = np.argsort(rng.random((4000, experts)) - 0.8 * np.eye(experts)[words % experts], 1)[:, :k]
    chosen[rng.random(chosen.shape) < 0.05] = experts  # empty slots
    counts = Counter((int(w % 3), int(w), int(e)) for w, row in zip(words, chosen, strict=True) for e in row)
    rows = np.array(sorted((*key, n) for key, n in counts.items()))
    thinned = thin(rows, experts, k, per_expert=5)
    assert len(thinned) < len(rows) / 2
    apart = thinned[thinned[:, 2] <= experts]
    for e in range(experts + 1):
        assert apart[apart[:, 2] == e, 3].sum() == rows[rows[:, 2] == e, 3].sum()
    for x in set(thinned[:, 1].tolist()) - {-1}:
        assert thinned[thinned[:, 1] == x, 3].sum() == rows[rows[:, 1] == x, 3].sum()
    full, small = counted({1: np.ones((3, experts))}, [1, 1, 1]), counted({1: np.ones((3, experts))}, [1, 1, 1])
    full.layers[1].vocabulary, small.layers[1].vocabulary = rows, thinned
    for by in ("npmi", "count"):
        a, b = (tables.top_tokens(x, 1, by=by, per_expert=5) for x in (full, small))
        for name in ("token", "expert", "count", "total", "share", "overall", "npmi"):
            np.testing.assert_allclose(a[name], b[name])
    a, b = (next(tables.vocabulary_specialisation(x).rows()) for x in (full, small))
    assert (a["strongest"], a["token_ids"]) == (pytest.approx(b["strongest"]), b["token_ids"])


# ---- pairs


def test_coactivation_counts_all_pairs_of_a_token(trace):
    pairs, experts = Counter(), Counter()
    for _, _, _, chosen in rows_of(trace, 2):
        pairs.update((i, j) for i in chosen for j in chosen if i != j)
        experts.update(chosen)
    table = tables.coactivation(trace, 2)
    assert len(table) == 8 * 7
    for row in table.rows():
        i, j = row["expert"], row["other"]
        assert row["count"] == pairs[i, j]
        assert row["given"] == pytest.approx(pairs[i, j] / experts[i])
        assert row["lift"] == pytest.approx(360 * pairs[i, j] / (experts[i] * experts[j]))
        assert row["chance"] == pytest.approx(8 * 2 / (3 * 7))


def test_blind_choices_have_the_lift_of_chance():
    rng = np.random.default_rng(0)
    chosen = np.argsort(rng.random((20_000, 6)), 1)[:, :2]
    one = np.zeros((20_000, 6))
    np.put_along_axis(one, chosen, 1.0, 1)
    stats = counted({1: one.sum(0, keepdims=True)}, [20_000], coactivation=(one.T @ one)[None])
    table = tables.coactivation(stats, 1)
    np.testing.assert_allclose(table["lift"], table["chance"], rtol=0.08)


def test_affinity_joins_all_pairs_of_two_layers(trace):
    pairs, came, chosen = Counter(), Counter(), Counter()
    for (_, _, _, before), (_, _, _, after) in zip(rows_of(trace, 1), rows_of(trace, 2), strict=True):
        pairs.update((i, j) for i in before for j in after)
        came.update(before)
        chosen.update(after)
    table = tables.affinity(trace, 2)
    for row in table.rows():
        i, j = row["expert"], row["other"]
        assert (row["from_layer"], row["layer"], row["count"]) == (1, 2, pairs[i, j])
        assert row["probability"] == pytest.approx(pairs[i, j] / came[i])
        assert row["lift"] == pytest.approx(360 * pairs[i, j] / (came[i] * chosen[j]))
    matrices = tables.affinity_matrices(trace)
    assert matrices.keys() == {2, 3}
    np.testing.assert_allclose(matrices[2].sum(1), 3)
    with pytest.raises(DataError, match="first MoE layer"):
        tables.affinity(trace, 1)


def test_similarity_against_its_definition(trace):
    arrays = {name: x.sum(0) for name, x in trace.layer(1).stats.arrays.items()}
    matrices = {kind: tables.similarity_matrix(trace, 1, kind) for kind in ("routing", "logits", "outputs")}
    for i, j in combinations(range(8), 2):
        rest = [m for m in range(8) if m not in (i, j)]
        a, b = arrays["coactivation"][i, rest], arrays["coactivation"][j, rest]
        assert matrices["routing"][i, j] == pytest.approx(a @ b / np.sqrt((a @ a) * (b @ b)))
        gram, mean = arrays["logit_gram"] / 360, arrays["logit"] / 360
        covariance = gram - np.outer(mean, mean)
        expected = covariance[i, j] / np.sqrt(covariance[i, i] * covariance[j, j])
        assert matrices["logits"][i, j] == pytest.approx(expected)
        a, b = arrays["output"][i].astype(float), arrays["output"][j].astype(float)
        assert matrices["outputs"][i, j] == pytest.approx(a @ b / np.sqrt((a @ a) * (b @ b)))
    for matrix in matrices.values():
        np.testing.assert_allclose(matrix, matrix.T)
        np.testing.assert_array_equal(matrix.diagonal(), 1)
    table = tables.similarity(trace, 1, "logits")
    assert len(table) == 28
    assert table["cosine"][0] == matrices["logits"][0, 1]
    with pytest.raises(DataError, match="no similarity of kind 'shape'"):
        tables.similarity(trace, 1, "shape")


# ---- two traces


def test_saturation_is_the_mean_overlap(trace, tmp_path):
    settings = {"layers": 3, "experts": 8, "top_k": 3, "domains": DOMAINS, "tokens": 120, "sequence_length": 20}
    moved = synthetic_trace(tmp_path / "moved", drift=1.0, **settings)
    same = tables.saturation(trace, trace)
    assert same["overlap"].tolist() == [1.0] * 9
    table = tables.saturation(trace, moved)
    for row in table.rows():
        rows = slice(120 * DOMAINS.index(row["domain"]), 120 * (DOMAINS.index(row["domain"]) + 1))
        one, other = trace.layer(row["layer"]).ids[rows], moved.layer(row["layer"]).ids[rows]
        shares = [len(set(a) & set(b)) / 3 for a, b in zip(one.tolist(), other.tolist(), strict=True)]
        assert row["overlap"] == pytest.approx(np.mean(shares))
        assert 0.2 < row["low"] <= row["overlap"] <= row["high"] < 1
    other = synthetic_trace(tmp_path / "other", seed=1, **settings)
    with pytest.raises(DataError, match="not of the same tokens"):
        tables.saturation(trace, other)
    fewer = synthetic_trace(tmp_path / "fewer", **settings | {"top_k": 2})
    with pytest.raises(DataError, match="another number of experts"):
        tables.saturation(trace, fewer)


def test_overlap_of_a_pruned_model_is_by_the_old_numbers():
    one = np.array([[0, 5], [7, 2], [8, 8]], np.uint8)  # 8: an empty slot
    pruned = np.array([[0, 2], [1, 0], [4, 0]], np.uint8)  # experts 0, 2, 5, 6 are left; 4: an empty slot
    assert common(one, pruned, 8, np.array([0, 2, 5, 6])).tolist() == [2, 1, 0]
    assert common(one, one, 8).tolist() == [2, 2, 0]


def test_what_was_not_recorded_is_said(trace, tmp_path):
    sums = synthetic_trace(tmp_path / "sums", layers=2, keep_tokens=False)
    for ask in (sums.tokens, lambda: tables.saturation(sums, sums), lambda: sums.to_parquet(tmp_path / "x")):
        with pytest.raises(DataError, match="statistics only"):
            ask()
    assert sums.layer(1).ids.shape == (0, 2)
    with pytest.raises(DataError, match="not recorded"):
        tables.vocabulary(sums, 1, kind="predicted")
    for function in (tables.vocabulary, tables.coactivation, tables.affinity, tables.similarity):
        with pytest.raises(DataError, match="layer 0 has no experts"):
            function(sums, 0)
    with pytest.raises(DataError, match="did you mean 'prose'"):
        tables.balance(trace, "pros")
