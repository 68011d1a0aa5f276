"""Models that stock transformers cannot load with packed experts are refused before work starts, and only they."""

import pytest
import torch

from moekit.apply import quantize
from moekit.apply.bake import bake
from moekit.data import Dataset
from moekit.errors import ModelError, PlanError
from moekit.evaluation.verify import verify
from moekit.families.model import Model
from moekit.families.packable import unloadable
from moekit.pipeline import prepare
from moekit.plans import Plan, Quantize
from moekit.recipe import Recipe
from tiny import batch

CANNOT = {
    "qwen4_exp_text": "ngram_embedding",  # shards of an embedding, joined
    "unlimited_ocr": "split qkv_proj",
    "bailing_hybrid": "conv1d",  # three convolutions, joined
    "minimax_m3_vl": "gate_up_proj",  # of a dense MLP
    "dots3_note": "vision_tower",  # experts that stay as they are
}


def plan_of(model: Model, form: str = "compressed-tensors") -> Plan:
    ops = [Quantize(layer=x.index, bits=8, group_size=-1, format=form) for x in model.layout.routed]
    return Plan(layout_hash=model.layout.hash, ops=ops)


@pytest.mark.parametrize("family", CANNOT)
def test_what_stock_transformers_cannot_load_is_refused(family, opened, tmp_path, monkeypatch):
    model, out = opened(family), tmp_path / "out"
    with pytest.raises(PlanError, match=rf"(?s)cannot load this model.*{CANNOT[family]}.*format: moekit"):
        bake(model.checkpoint, model.understanding, plan_of(model), out)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(quantize, "unloadable", lambda _: "")
    baked = bake(model.checkpoint, model.understanding, plan_of(model), out)
    with pytest.raises(ModelError):  # if this fails, transformers has learned it, and nothing need be refused
        Model.open(baked.path).load(torch.float32)


@pytest.mark.parametrize("family", CANNOT)
def test_moekits_own_form_has_them(family, opened, tmp_path):
    model = opened(family)
    plan = plan_of(model, "moekit")
    baked = bake(model.checkpoint, model.understanding, plan, tmp_path / "out")
    assert verify(model, plan, Model.open(baked.path), Dataset(("x",), [batch(0, 9, 7)], 12)).ok


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "qwen3_next"])
def test_others_are_not_refused(family, opened, tmp_path):
    model = opened(family)
    assert not unloadable(model.understanding)
    baked = bake(model.checkpoint, model.understanding, plan_of(model), tmp_path / "out")
    Model.open(baked.path).load(torch.float32)


@pytest.mark.parametrize(
    ("family", "message"), [("bailing_hybrid", "cannot load this model"), ("gpt_oss", "one tensor")]
)
def test_refused_before_the_text_is_read(family, message, opened, tmp_path):
    recipe = Recipe(
        model=str(opened(family).path), data={"x": "nowhere.txt"}, method="rtn-int8", out=str(tmp_path / "out")
    )
    with pytest.raises(PlanError, match=message):
        prepare(recipe)
    with pytest.raises(ModelError, match="tokenizer"):  # what comes next: the form is right, these models have none
        prepare(recipe.model_copy(update={"options": {"format": "moekit"}}))
