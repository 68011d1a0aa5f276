"""New values that a plan carries: applied live they are what the baked files hold, whatever form the disk has."""

from __future__ import annotations

import pytest
import torch

import moekit
import zoo
from moekit.apply.bake import bake
from moekit.checkpoint.reader import Checkpoint
from moekit.data import Batch
from moekit.errors import PlanError
from moekit.evaluation.compare import Subject, logits_of
from moekit.families.model import Model
from moekit.fitting import Fit, decide
from moekit.plans import OUTER, Drop, Group, Merge, Plan, PlanTensors, Values


def batch_of(model):
    ids = torch.randint(model.layout.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    return Batch(0, ids, torch.ones_like(ids, dtype=torch.bool))


def shaken(model, index, keys, folder):
    """A Values op with noise on parameters of a layer."""
    tensors = model.loader(torch.float32).read(index)
    generator = torch.Generator().manual_seed(1)
    new = {key: tensors[key] + 0.3 * torch.randn(tensors[key].shape, generator=generator) for key in keys}
    PlanTensors(folder).write(index, new)
    return Values(layer=index, names=tuple(keys))


def keys_of(model, index):
    """Experts, router and a norm of a layer."""
    loader, layer = model.loader(), model.layout.by_index[index]
    keys = [key for key, group in loader.placements(index).items() if key in group[0].keys]
    stems = (layer.experts_path, layer.router_path)
    return [key for key in keys if key.startswith(stems) and "bias" not in key] + [x for x in keys if "norm" in x][:1]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "jamba", "granitemoe"])
@pytest.mark.parametrize("cut", [False, True])
def test_live_is_baked(name, cut, tmp_path):
    zoo.build(name).save_pretrained(tmp_path / "model")
    model = Model.open(tmp_path / "model")
    layer = model.layout.routed[-1]
    ops = [shaken(model, layer.index, keys_of(model, layer.index), tmp_path / "new")]
    outer = [key for key in model.loader().placements(OUTER) if "embed" in key]
    ops.append(shaken(model, OUTER, outer, tmp_path / "new"))
    if cut:
        half = tuple(range(layer.num_experts))[1 :: layer.num_experts // 2]
        size = layer.num_experts // layer.router.groups
        gone = half[:1] if layer.router.groups == 1 else tuple(g * size for g in range(layer.router.groups))
        ops += [Drop(layer=x.index, experts=gone) for x in model.layout.routed]
    plan = Plan(layout_hash=model.layout.hash, ops=ops, tensors=str(tmp_path / "new"))
    out = bake(model.checkpoint, model.understanding, plan, tmp_path / "out").path
    batch = batch_of(model)
    (live,) = logits_of(Subject(model, plan), [batch], torch.float32)
    (before,) = logits_of(Subject(model), [batch], torch.float32)
    with torch.no_grad():
        written = Model.open(out).load(torch.float32)(input_ids=batch.ids, use_cache=False).logits
    assert torch.allclose(written, live, atol=1e-4)
    assert (written - before).abs().max() > 1e-2


def test_values_win_over_a_merge(tmp_path):
    model = moekit.open("refmoe")
    layer = model.layout.routed[0]
    op = shaken(model, layer.index, [layer.router_path + ".weight"], tmp_path / "new")
    merge = [
        Merge(layer=x.index, groups=(Group(members=(3, 4), weights=(0.5, 0.5)),), router="weighted")
        for x in model.layout.routed
    ]
    plan = Plan(layout_hash=model.layout.hash, ops=[*merge, op], tensors=str(tmp_path / "new"))
    out = bake(model.checkpoint, model.understanding, plan, tmp_path / "out").path
    written = Checkpoint.open(out).read(layer.router_path + ".weight")
    given = PlanTensors(tmp_path / "new").read(layer.index, layer.router_path + ".weight").bfloat16()
    assert torch.equal(written, given[[e for e in range(layer.num_experts) if e != 4]])


def test_a_plan_finds_its_tensors_beside_it_wherever_both_move(tmp_path):
    model = moekit.open("refmoe")
    layer = model.layout.routed[0]
    op = shaken(model, layer.index, [layer.router_path + ".weight"], tmp_path / "a" / "new")
    Plan(layout_hash=model.layout.hash, ops=[op], tensors=str(tmp_path / "a" / "new")).save(
        tmp_path / "a" / "plan.json"
    )
    (tmp_path / "a").rename(tmp_path / "b")
    plan = Plan.load(tmp_path / "b" / "plan.json")
    plan.check(model.layout)
    assert plan.tensors == str(tmp_path / "b" / "new")
    assert plan.kind == "heal"


def test_what_does_not_fit_is_refused(tmp_path):
    model = moekit.open("refmoe")
    layer = model.layout.routed[0]
    name = layer.router_path + ".weight"
    op = Values(layer=layer.index, names=(name,))
    plan = Plan(layout_hash=model.layout.hash, ops=[op], tensors=str(tmp_path / "new"))
    with pytest.raises(PlanError, match="are not there"):
        plan.check(model.layout)
    PlanTensors(tmp_path / "new").write(layer.index, {name: torch.zeros(3)})
    with pytest.raises(PlanError, match="do not fit"):
        list(logits_of(Subject(model, plan), [batch_of(model)]))
    with pytest.raises(PlanError, match="given new values twice"):
        plan.model_copy(update={"ops": [op, op]}).check(model.layout)


def test_tensors_are_whole_or_not_there(tmp_path):
    store = PlanTensors(tmp_path / "new")
    assert not store.has(3)
    store.write(3, {"a": torch.arange(3)})
    first = store.digest
    store.write(OUTER, {"b": torch.ones(2, dtype=torch.bfloat16)})
    assert (store.has(3), store.has(OUTER)) == (True, True)
    assert store.digest != first
    assert store.names(3) == ("a",)
    with pytest.raises(PlanError, match="lack one"):
        store.read(3, "b")
    with pytest.raises(PlanError, match="missing or damaged"):
        store.read(4, "a")


def test_a_method_that_needs_statistics_says_so(tmp_path):
    model = moekit.open("refmoe")
    data = moekit.load_data(model, {"python": moekit.refmoe.texts()["python"]}, tokens=256)
    with pytest.raises(PlanError, match="needs statistics"):
        decide("reap", Fit(model, model, None, data, tmp_path / "new"), keep=0.5)
    stats = moekit.measure(model, data)
    plan = decide("reap", Fit(model, model, stats, data, tmp_path / "new"), keep=0.5)
    assert plan.ops == moekit.plan("reap", stats, keep=0.5).ops
