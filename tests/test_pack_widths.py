"""Bits of each expert: from plans, from sensitivity, from sources that are quantised already; what the verb says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import moekit
import zoo
from moekit.apply.bake import bake
from moekit.cli import main
from moekit.errors import ModelError, PlanError, RecipeError
from moekit.families.model import Model
from moekit.methods import make_plan
from moekit.plans import Drop, Plan, Quantize
from moekit.serve.engine import Engine
from moekit.serve.packing import pack
from moekit.serve.store import ExpertStore
from moekit.serve.widths import relative_error, widths_by_sensitivity, widths_of
from moekit.stats import Stats
from moekit.stream import Stream
from test_disk_forms import fp8_deepseek, saved, to_mxfp4, write

REFMOE = moekit.open("refmoe")


def quantising(*bits, scheme="rtn"):
    """A plan that gives the first layers of refmoe these bits."""
    ops = [Quantize(layer=i, bits=b, group_size=64, scheme=scheme, format="moekit") for i, b in enumerate(bits)]
    return Plan(layout_hash=REFMOE.layout.hash, ops=ops)


def test_a_plans_bits_are_raised_to_what_stores_have():
    mixed = tuple([2] * 10 + [5] * 10 + [16] * 12)
    widths, notes = widths_of(quantising(3, 8, mixed), REFMOE)
    assert widths == {
        0: (4,) * 32,
        1: (8,) * 32,
        2: (4,) * 10 + (8,) * 10 + (16,) * 12,
        **{i: (16,) * 32 for i in (3, 4, 5)},
    }
    assert [x.partition(":")[0] for x in notes] == [
        "10 experts of 2 bits are kept in 4",
        "32 experts of 3 bits are kept in 4",
        "10 experts of 5 bits are kept in 8",
    ]
    assert "rounded to nearest" in widths_of(quantising(4, scheme="fitted"), REFMOE)[1][0]
    assert widths_of(quantising(4), REFMOE)[1] == []


def test_plans_that_do_more_are_refused():
    drops = Plan(layout_hash=REFMOE.layout.hash, ops=[Drop(layer=0, experts=(1,))])
    with pytest.raises(PlanError, match=r"only bits[\s\S]*got:\s+drop[\s\S]*moekit compress --plan"):
        widths_of(drops, REFMOE)
    with pytest.raises(PlanError, match="another model"):
        widths_of(Plan(layout_hash="x", ops=[]), REFMOE)


def test_sensitivity_spends_the_bits_where_rounding_costs_most():
    widths = widths_by_sensitivity(REFMOE, 5.0)
    all_bits = np.concatenate([widths[i] for i in sorted(widths)])
    assert 4.9 < all_bits.mean() <= 5.0
    errors = []
    for layer in REFMOE.layout.routed:
        read = REFMOE.loader().read(layer.index)
        names = ("gate_up_proj", "down_proj")
        for e in range(layer.num_experts):
            one = {x: read[f"{layer.experts_path}.{x}"][e] for x in names}
            errors.append(relative_error(one, 4, False) - relative_error(one, 8, False))
    gained = np.asarray(errors)
    assert gained[all_bits == 8].min() >= gained[all_bits == 4].max() - 1e-9
    assert set(np.concatenate(list(widths_by_sensitivity(REFMOE, 4.0).values()))) == {4}
    assert set(np.concatenate(list(widths_by_sensitivity(REFMOE, 16.0).values()))) == {16}
    with pytest.raises(RecipeError, match="impossible average"):
        widths_by_sensitivity(REFMOE, 3.0)


def test_statistics_say_which_experts_matter():
    stats = moekit.measure(REFMOE, moekit.load_data(REFMOE, moekit.refmoe.calibration(), tokens=256), groups=["scores"])
    widths = widths_by_sensitivity(REFMOE, 6.0, stats)
    lost = {i: stats.get("gated_norm_sq", i) for i in widths}
    by_bits = {
        b: np.mean([lost[i][e] for i, row in widths.items() for e, x in enumerate(row) if x == b]) for b in (4, 8)
    }
    assert by_bits[8] > 2 * by_bits[4]
    other = Stats("other", stats.domains, stats.tokens, stats.sequences, stats.layers, stats.manifest)
    with pytest.raises(PlanError, match="another model"):
        widths_by_sensitivity(REFMOE, 6.0, other)


def test_the_verb_packs_mixed_bits(tmp_path, capsys):
    assert main(["pack", "refmoe", "--out", str(tmp_path / "mixed"), "--bits", "mixed", "--average-bits", "6"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "of 8 bits" in shown
    assert "6.00 on average" in shown
    store = ExpertStore(tmp_path / "mixed")
    assert not store.lossless
    plan = quantising(*[3] * 6).save(tmp_path / "plan.json")
    assert main(["pack", "refmoe", "--out", str(tmp_path / "four"), "--bits", "mixed", "--plan", str(plan)]) == 0
    assert "192 experts of 3 bits are kept in 4" in " ".join(capsys.readouterr().out.split())
    exact = ExpertStore(pack(REFMOE, tmp_path / "4", bits=4))
    assert ExpertStore(tmp_path / "four").layers == exact.layers
    ids = torch.arange(10, 40)
    logits = [Engine(x, context=64).logits(ids).float() for x in (pack(REFMOE, tmp_path / "16"), exact, store)]
    rough, mixed = ((x - logits[0]).norm() for x in logits[1:])
    assert 0 < mixed < rough


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "4", "--average-bits", "5"], "leave nothing to choose"),
        (["--bits", "mixed", "--plan", "plan.json", "--average-bits", "5"], "a plan says all bits"),
        (["--bits", "four"], "impossible bits"),
        (["--bits", "5"], "cannot be packed so"),
        (["--bits", "mixed", "--average-bits", "17"], "impossible average"),
    ],
)
def test_mistakes_are_told(tmp_path, capsys, arguments, message):
    assert main(["pack", "refmoe", "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def logits_match(folder, tmp_path, ids):
    """Whether a store of a folder gives the logits that a streamed forward of it with eager experts gives."""
    model = Model.open(folder)
    engine = Engine(pack(model, tmp_path / "store"), context=64)
    found = engine.logits(ids)
    engine.close()
    loader = model.loader()
    loader.differentiable()  # transformers' own loop over experts
    return torch.equal(found, next(Stream(loader).run([ids[None]]))[0])


@pytest.mark.parametrize(("method", "form"), [("rtn-int4", "moekit"), ("rtn-int8", "compressed-tensors")])
def test_what_compress_quantised_is_packed_in_16_bits(tmp_path, method, form):
    """Unpacked to the numbers that its codes stand for, none lost."""
    plan = make_plan(method, None, REFMOE.layout, format=form)
    bake(REFMOE.checkpoint, REFMOE.understanding, plan, tmp_path / "small")
    assert logits_match(tmp_path / "small", tmp_path, torch.arange(10, 40))


def test_pruned_models_are_packed(tmp_path):
    ops = [Drop(layer=x.index, experts=tuple(range(16))) for x in REFMOE.layout.routed]
    bake(REFMOE.checkpoint, REFMOE.understanding, Plan(layout_hash=REFMOE.layout.hash, ops=ops), tmp_path / "half")
    assert logits_match(tmp_path / "half", tmp_path, torch.arange(10, 40))


def test_experts_that_are_constants_are_refused(tmp_path):
    constant = replace(REFMOE.layout.routed[1], constants=(3,))
    layers = tuple(constant if x.index == constant.index else x for x in REFMOE.layout.layers)
    model = moekit.open("refmoe")
    model.understanding.layout = replace(model.layout, layers=layers)
    with pytest.raises(ModelError, match=r"constant vectors[\s\S]*layers 1"):
        pack(model, tmp_path / "store")


def test_fp8_is_unpacked(tmp_path):
    folder, _ = fp8_deepseek(tmp_path, lambda name: name + "_scale_inv", powers=False)
    assert logits_match(folder, tmp_path, zoo.inputs("deepseek_v3")["input_ids"][0])


def test_mxfp4_is_unpacked(tmp_path):
    """gpt-oss as it is published: blocks of four-bit numbers."""
    tensors, config = saved(tmp_path / "plain", "gpt_oss", intermediate_size=32)
    packed = {}
    for name, x in tensors.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            packed[name + "_blocks"], packed[name + "_scales"] = to_mxfp4(x)
        else:
            packed[name] = x
    config |= {"quantization_config": {"quant_method": "mxfp4"}}
    folder = write(tmp_path / "mxfp4", packed, config)
    assert logits_match(folder, tmp_path, zoo.inputs("gpt_oss")["input_ids"][0])
