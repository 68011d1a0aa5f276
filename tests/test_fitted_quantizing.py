"""GPTQ and MC-MoE: the mathematics against slow versions, the passes over text, what is written and what is refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import moekit
import tiny
import zoo
from moekit import methods
from moekit.apply.bake import bake
from moekit.checkpoint.grid import Grid, fitted_scale, nearest, quantised, read_back, split
from moekit.data import Batch
from moekit.errors import DataError, ModelError, PlanError, RecipeError
from moekit.evaluation.compare import Subject, evaluate, logits_of
from moekit.families.model import Model
from moekit.fitting import Fit, decide
from moekit.fitting.quantize import COLD
from moekit.fitting.routed import gather
from moekit.methods.quantize import mc_moe
from moekit.methods.quantize._allocation import allocate
from moekit.methods.quantize._gptq import gptq
from moekit.plans import Drop, Plan, PlanTensors, Quantize
from moekit.stream import Stream
from moekit.view import Call, MoEView, Observer


def correlated(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -1.5, columns)
    return torch.randn(rows, columns, generator=generator) @ mix.T


def one_column_at_a_time(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, size: int, damping: float):
    """GPTQ without Cholesky or blocks: after each column its row and column leave the inverse by elimination."""
    left = weight.double().clone()
    inverse = torch.linalg.inv(
        hessian.double() + damping * hessian.diagonal().double().mean() * torch.eye(len(hessian))
    )
    out = torch.zeros_like(left)
    for i in range(weight.shape[1]):
        if i % size == 0:
            scale = fitted_scale(left[:, i : i + size], grid, torch.float32)
        out[:, i] = read_back(nearest(left[:, i : i + 1], scale, grid), scale[:, None], grid)[:, 0]
        error = (left[:, i] - out[:, i]) / inverse[i, i]
        left -= error[:, None] * inverse[i]
        inverse = inverse - inverse[:, i : i + 1] @ inverse[i : i + 1] / inverse[i, i]
        inverse[i, i] = 1.0
    return out.float()


def alone(found: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scale, sound = found
    assert sound.all()
    return codes[0], scale[0]


@pytest.mark.parametrize(("columns", "size"), [(48, 8), (48, 48), (256, 64), (160, 160)])
def test_gptq_is_elimination_column_by_column(columns, size):
    given, weight = correlated(600, columns), torch.randn(6, columns, generator=torch.Generator().manual_seed(1))
    hessian, grid = given.T @ given, Grid(3, half=True)
    codes, scale = alone(gptq(weight[None], hessian[None], grid, size, torch.float32, damping=0.05))
    slow = one_column_at_a_time(weight, hessian, grid, size, 0.05)
    found = read_back(codes, scale, grid)
    differ = (found - slow).abs() > 1e-3  # a near-tie may fall either way, and then all columns after it may
    assert differ[:, : columns // 2].float().mean() < 0.05

    def lost(q):
        return (given @ (weight - q).T).square().sum()

    assert lost(found) == pytest.approx(float(lost(slow)), rel=0.1)
    assert lost(found) < 0.6 * lost(read_back(*quantised(weight, grid, size, torch.float32, fitted=True), grid))


def test_with_uncorrelated_inputs_gptq_rounds_to_nearest():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    for grid, size in ((Grid(4, half=False), 16), (Grid(2, half=True), -1)):
        codes, scale = alone(gptq(weight[None], 3 * torch.eye(64)[None], grid, size, torch.bfloat16))
        expected = quantised(weight, grid, size, torch.bfloat16, fitted=True)
        assert torch.equal(codes, expected[0])
        assert torch.equal(scale, expected[1])


def test_gptq_takes_dead_columns_and_refuses_what_has_no_inverse():
    given, weight = correlated(300, 32), torch.randn(4, 32, generator=torch.Generator().manual_seed(3))
    given[:, 5] = 0
    grid = Grid(3, half=True)
    few = given[:3]  # fewer inputs than columns: damping makes it invertible

    def tried(hessian, damping=0.01):
        return gptq(weight[None], hessian[None], grid, 8, torch.bfloat16, damping)

    codes, scale = alone(tried(given.T @ given))
    assert torch.equal(codes[:, 5:6], nearest(split(weight, 8)[:, 0, 5:6], scale[:, 0], grid).to(torch.uint8))
    assert alone(tried(few.T @ few))[1].isfinite().all()
    to_nearest = quantised(weight, grid, 8, torch.bfloat16, fitted=True)
    for hessian, damping in ((few.T @ few, 0.0), (torch.zeros(32, 32), 0.01), (torch.full((32, 32), torch.nan), 0.01)):
        codes, scale, sound = tried(hessian, damping)
        assert not sound.any()
        assert torch.equal(codes[0], to_nearest[0])
        assert torch.equal(scale[0], to_nearest[1])
    both = gptq(weight.repeat(2, 1, 1), torch.stack([given.T @ given, few.T @ few]), grid, 8, torch.bfloat16, 0.0)
    assert both[2].tolist() == [True, False]


def test_weights_at_once_are_weights_one_by_one():
    inputs = [correlated(200, 48, seed) for seed in range(3)]
    weight = torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(4))
    hessians = torch.stack([x.T @ x for x in inputs])
    hessians[1] = torch.nan
    grid = Grid(2, half=True)
    codes, scale, sound = gptq(weight, hessians, grid, 16, torch.float32)
    assert sound.tolist() == [True, False, True]
    for i in range(3):
        single = gptq(weight[i : i + 1], hessians[i : i + 1], grid, 16, torch.float32)
        assert torch.equal(single[0][0], codes[i])
        assert torch.allclose(single[1][0], scale[i])


@pytest.mark.parametrize("seed", range(12))
def test_bits_are_the_best_of_all_choices(seed):
    random = np.random.default_rng(seed)
    experts, widths = 5, (1, 2, 3)
    costs = random.random((experts, 3)) ** 6
    sizes = random.choice([1.0, 1.0, 2.0], experts)
    average = random.choice([1.5, 2.0, 2.5])
    wanted = (3, 2) if seed % 2 else ()
    groups = [range(3), range(3, 5)]

    def fits(choice):
        enough = all(any(widths[choice[e]] == w for e in group) for w in wanted for group in groups)
        return enough and sum(widths[b] * n for b, n in zip(choice, sizes, strict=True)) <= average * sizes.sum() + 1e-9

    possible = [x for x in itertools.product(range(3), repeat=experts) if fits(x)]
    if not possible:
        with pytest.raises(PlanError, match="no choice of bits"):
            allocate(costs, widths, sizes, average, groups, wanted)
        return
    best = min(sum(costs[e, b] for e, b in enumerate(x)) for x in possible)
    found = allocate(costs, widths, sizes, average, groups, wanted)
    assert fits([widths.index(b) for b in found])
    assert sum(costs[e, widths.index(b)] for e, b in enumerate(found)) == pytest.approx(best, abs=1e-9)


def test_costs_follow_the_formula_and_scopes_are_kept():
    error_sq = np.array([[4.0, 1.0, 0.0], [9.0, 4.0, 1.0]])
    found = mc_moe.costs(error_sq, np.array([3, 1]), np.array([1.0, 1.0]), 1.0, 1.5, 2.0)
    assert np.allclose(found, np.array([[0.75], [0.25]]) * 0.5**1.5 * error_sq)
    assert np.allclose(mc_moe.costs(error_sq, np.array([3, 1]), np.array([1, 1]), 0, 0, 1), np.sqrt(error_sq))
    costly, cheap = np.array([[9.0, 8, 0]] * 4), np.array([[0.3, 0.2, 0.1]] * 4)
    by_layer = mc_moe.choose([costly, cheap], [5, 5], (1, 2, 3), 2.0, scope="layer", published=False)
    assert [sum(x) for x in by_layer] == [8, 8]
    whole = mc_moe.choose([costly, cheap], [5, 5], (1, 2, 3), 2.0, scope="model", published=False)
    assert whole == [(3, 3, 3, 3), (1, 1, 1, 1)]
    both = mc_moe.choose([costly, cheap], [5, 5], (1, 2, 3), 2.5, scope="model", published=True)
    assert all({2, 3} <= set(x) for x in both)


def text(model: Model, *lengths: int) -> moekit.data.Dataset:
    generator = torch.Generator().manual_seed(5)
    batches = []
    for length in lengths:
        ids = torch.randint(3, model.layout.vocab_size, (2, length), generator=generator)
        mask = torch.ones(2, length, dtype=torch.bool)
        mask[1, length - length // 4 :] = False
        batches.append(Batch(0, ids, mask))
    return tiny.dataset(*batches, domains=("code",))


def fit_of(model: Model, folder, *lengths: int) -> Fit:
    return Fit(model, model, None, text(model, *(lengths or (40, 40, 24))), folder, torch.float32)


def logits(model: Model, plan: Plan | None = None) -> torch.Tensor:
    ids = zoo.inputs(model.layout.family)["input_ids"]
    return next(logits_of(Subject(model, plan), [Batch(0, ids, torch.ones_like(ids, dtype=torch.bool))], torch.float32))


class Outputs(Observer):
    def __init__(self):
        self.found: list[torch.Tensor] = []

    def finished(self, call: Call, output: torch.Tensor) -> None:
        self.found.append(output.reshape(-1, output.shape[-1]).clone())


def routed_sums(model: Model, data, layer, plan: Plan) -> torch.Tensor:
    """The routed output of a layer under a live plan, real tokens only."""
    from moekit.apply.live import live

    loader = model.loader(torch.float32)
    view, seen = MoEView(loader.model, model.layout), Outputs()
    with live(view, plan, loader), view.watch(seen, layers=[layer.index]):
        for _ in Stream(loader).run([x.ids for x in data.batches], last_layer=layer.index):
            pass
    return torch.cat([x[batch.mask.reshape(-1)] for x, batch in zip(seen.found, data.batches, strict=True)])


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4_text", "zaya"])
def test_errors_are_those_of_the_block_with_one_expert_changed(family, tmp_path):
    model = moekit.open(zoo.save(family, tmp_path / "model"))
    fit = fit_of(model, tmp_path / "fit")
    plan = decide("mc-moe", fit, options={"group_size": 8, "rounding": "nearest", "widths": "1,3"})
    layer = model.layout.routed[0]
    before = routed_sums(model, fit.data, layer, Plan(layout_hash=model.layout.hash))
    for expert, bits in ((0, 1), (3, 1), (5, 3)):
        op = Quantize(
            layer=layer.index,
            bits=tuple(bits if e == expert else 16 for e in range(8)),
            group_size=8,
            scheme="fitted",
            format="moekit",
        )
        after = routed_sums(model, fit.data, layer, Plan(layout_hash=model.layout.hash, ops=[op]))
        said = plan.measured["expert_errors"][str(layer.index)][expert][(1, 3).index(bits)]
        assert said == pytest.approx(float((after - before).norm()), rel=1e-3, abs=1e-4)


def test_bits_are_those_of_the_least_error_unless_the_published_exponents_are_asked_for(tmp_path):
    model = moekit.open(zoo.save("qwen3_moe", tmp_path / "model"))
    lost = []
    for number, exponents in enumerate(({}, {"alpha": 1.0, "beta": 1.5})):
        options = {"group_size": 8, "rounding": "nearest", **exponents}
        plan = decide("mc-moe", fit_of(model, tmp_path / str(number)), options=options)
        errors = plan.measured["expert_errors"]
        lost.append(
            sum(
                errors[str(i)][e][(1, 2, 3).index(b)] ** 2
                for i, op in plan.quantised().items()
                for e, b in enumerate(op.bits)
            )
        )
    assert lost[0] < lost[1]


@pytest.mark.parametrize("family", ["qwen3_moe", "granitemoe", "gpt_oss", "llama4_text", "nemotron_h", "deepseek_v3"])
def test_what_is_fitted_is_written_as_it_is_live(family, tmp_path):
    model = moekit.open(zoo.save(family, tmp_path / "model"))
    options = {"group_size": 8, "bits": 2.5, "widths": "1,2,3,16", "attention_bits": 4, "shared_bits": 3}
    plan = decide("mc-moe", fit_of(model, tmp_path / "fit"), options=options)
    given = [b for op in plan.quantised().values() for b in op.bits]
    assert sum(given) <= 2.5 * len(given)
    assert len(set(given)) > 1
    result = moekit.open(bake(model.checkpoint, model.understanding, plan, tmp_path / "out").path)
    live = logits(model, plan)
    assert torch.equal(logits(result), live)
    assert (live - logits(model)).abs().max() > 1e-2
    saved = Plan.load(plan.save(tmp_path / "plan.json"))
    assert torch.equal(logits(model, saved), live)


def test_gptq_loads_in_stock_transformers_and_combines_with_dropping(tmp_path):
    model = moekit.open(zoo.save("qwen3_moe", tmp_path / "model"))
    plan = decide("gptq-int4", fit_of(model, tmp_path / "fit"), options={"group_size": 8, "attention_bits": 8})
    plan.ops += [Drop(layer=x.index, experts=(2, 7)) for x in model.layout.routed]
    result = moekit.open(bake(model.checkpoint, model.understanding, plan, tmp_path / "out").path)
    ids = zoo.inputs("qwen3_moe")["input_ids"]
    with torch.no_grad():
        stock = result.load(torch.float32)(input_ids=ids, use_cache=False).logits
    assert torch.allclose(stock, logits(model, plan), atol=1e-5)


def test_a_layer_sees_what_the_rounded_layers_before_it_pass_on(tmp_path):
    model = moekit.open(zoo.save("qwen3_moe", tmp_path / "model"))
    plans = {}
    for sequential in (True, False):
        options = {"group_size": 8, "sequential": sequential, "format": "moekit"}
        plans[sequential] = decide("gptq-int2", fit_of(model, tmp_path / str(sequential)), options=options)
    name = "model.layers.{}.mlp.experts.1.up_proj.weight_packed"
    one, other = (PlanTensors(plans[x].tensors) for x in (True, False))
    assert torch.equal(one.read(0, name.format(0)), other.read(0, name.format(0)))
    assert not torch.equal(one.read(1, name.format(1)), other.read(1, name.format(1)))
    # By hand: layer 1 fitted to what comes out of layer 0 as the plan has it.
    done = plans[True].model_copy(update={"ops": [op for op in plans[True].ops if op.layer == 0]})
    half = moekit.open(bake(model.checkpoint, model.understanding, done, tmp_path / "half").path)
    loader = half.loader(torch.float32)
    fit = fit_of(model, tmp_path / "again")
    for stop in Stream(loader).stops([x.ids for x in fit.data.batches], last_layer=1):
        if stop.layer == 1:
            layer = half.layout.by_index[1]
            hidden, _ = gather(MoEView(loader.model, half.layout), stop, layer, fit.data.batches).of(1, loader.device)
    weight = model.checkpoint.read(name.format(1).removesuffix("_packed"))
    _, scale = alone(gptq(weight[None], (hidden.T @ hidden)[None], Grid(2, half=True), 8, torch.float32))
    assert torch.allclose(scale, one.read(1, name.format(1).replace("_packed", "_scale")), rtol=1e-4)


class KilledError(Exception):
    pass


def test_an_interrupted_fit_goes_on_with_the_next_layer(tmp_path):
    model = moekit.open(zoo.save("qwen3_moe", tmp_path / "model"))
    options = {"group_size": 8, "bits": 2.5}
    whole = decide("mc-moe", fit_of(model, tmp_path / "whole"), options=options)
    fit = fit_of(model, tmp_path / "killed")

    def kill(stage: str, done: int, total: int) -> None:
        if PlanTensors(fit.folder).has(0):
            raise KilledError

    fit.progress = kill
    with pytest.raises(KilledError):
        decide("mc-moe", fit, options=options)
    times = {path: path.stat().st_mtime_ns for path in (fit.folder / "errors").glob("layer*")}
    fit.progress = moekit.progress.silent
    again = decide("mc-moe", fit, options=options)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert again.ops == whole.ops
    assert again.notes == whole.notes
    assert PlanTensors(again.tensors).digest == PlanTensors(whole.tensors).digest
    with pytest.raises(PlanError, match="numbers of another fit"):
        decide("mc-moe", fit, options=options | {"bits": 2.0})


def test_experts_with_too_few_tokens_are_rounded_to_nearest_and_named(tmp_path):
    model = moekit.open(zoo.save("qwen3_moe", tmp_path / "model"))
    data = tiny.dataset(Batch(0, torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.bool)), domains=("code",))
    fit = Fit(model, model, None, data, tmp_path / "fit", torch.float32)
    plan = decide("gptq-int3", fit, options={"group_size": 8})
    experts = len(model.layout.routed) * 8
    assert any(f"rounded to nearest: {experts} experts (0.0, 0.1" in note for note in plan.notes)
    store = PlanTensors(plan.tensors)
    assert store.read(0, COLD).tolist() == list(range(8))
    for index in (x.index for x in model.layout.routed):
        assert all(store.read(index, x).isfinite().all() for x in store.names(index) if x.endswith("_scale"))
    nearest_plan = methods.make_plan("rtn-int3", None, model.layout, group_size=8, fitted=True)
    assert torch.equal(logits(model, plan), logits(model, nearest_plan))


def test_on_a_trained_model_gptq_and_chosen_bits_lose_less(tmp_path):
    model = moekit.open("refmoe")
    data = moekit.load_data(model, {"python": moekit.refmoe.calibration()["python"]}, tokens=2048, sequence_length=128)
    held = moekit.load_data(model, {"python": moekit.refmoe.texts()["python"]}, tokens=1024, sequence_length=128)

    def kl(name: str, **options) -> float:
        fit = Fit(model, model, None, data, tmp_path / f"{name}{len(options)}", torch.float32)
        plan = decide(name, fit, options={"format": "moekit", **options})
        return evaluate(Subject(model, plan), held, against=model).domains["python"].kl.value

    nearest_kl, fitted_kl = kl("rtn-int2", fitted=True), kl("gptq-int2")
    assert fitted_kl < 0.8 * nearest_kl
    assert kl("mc-moe", bits=2.0, rounding="nearest") < 0.95 * nearest_kl


def test_options_and_text_that_cannot_be_are_refused(tmp_path):
    model = moekit.open(zoo.save("qwen3_moe", tmp_path / "model"))

    def refused(name: str = "mc-moe", kind: type = RecipeError, **options) -> str:
        with pytest.raises(kind) as caught:
            decide(name, fit_of(model, tmp_path / "fit"), options={"group_size": 8} | options)
        return str(caught.value)

    assert "impossible widths" in refused(widths="2,9")
    assert "fewer bits than the smallest" in refused(bits=1.5, widths="2,3")
    assert "has no scope" in refused(scope="expert")
    assert "has no rounding" in refused(rounding="up")
    assert "has no format" in refused(format="gguf")
    assert "impossible bits" in refused(attention_bits=9)
    assert "experts of 2 and of 3 bits" in refused(published=True, widths="1,2")
    assert "one of 2, 3, 4" in refused(kind=PlanError, format="compressed-tensors")
    assert "group size" in refused("gptq-int4", PlanError, group_size=0)
    with pytest.raises(DataError, match="no domain"):
        decide("gptq-int4", fit_of(model, tmp_path / "fit"), domain="prose", options={"group_size": 8})
    with pytest.raises(RecipeError, match="drops none"):
        decide("mc-moe", fit_of(model, tmp_path / "fit"), keep=0.5)


def test_activations_that_are_no_numbers_are_refused(tmp_path):
    folder = zoo.save("qwen3_moe", tmp_path / "model")
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.post_attention_layernorm.weight"][0] = torch.inf
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = moekit.open(folder)
    with pytest.raises(ModelError, match="are no numbers"):
        decide("gptq-int4", fit_of(model, tmp_path / "fit"), options={"group_size": 8})
