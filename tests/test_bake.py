"""A baked plan makes the same model with fewer experts: every number is the source's, and stock code loads it."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import zoo
from moekit.apply.bake import Baked, bake, bake_tensors
from moekit.checkpoint.place import JOB
from moekit.checkpoint.reader import INDEX, Checkpoint
from moekit.checkpoint.weights import dequantise_fp8, dequantise_mxfp4
from moekit.errors import CheckpointError, ModelError, OutputError, PlanError
from moekit.families.detect import Understanding, understand
from moekit.layout import ExpertTensor
from moekit.plans import Drop, Plan, drop_lowest

KEEP = 4
FAMILIES = [
    "mixtral",  # w1, w2, w3: numbers beside the expert's
    "qwen3_moe",
    "deepseek_v3",  # groups, correction bias, shared expert
    "gpt_oss",  # fused, biases of experts and router
    "granitemoe",  # fused under names that stock code renames
    "ernie4_5_moe",  # correction bias [1, E]
    "minimax_m2",
    "jamba",  # MoE in every second layer
    "inkling_text",  # router rows behind those of the experts
    "zaya",  # the same of a router that is an MLP
]


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def open_model(folder: Path) -> tuple[Checkpoint, Understanding]:
    checkpoint = Checkpoint.open(folder)
    return checkpoint, understand(checkpoint)


def random_plan(understanding: Understanding, keep: int = KEEP, seed: int = 0) -> Plan:
    """Other experts in every layer, equally many in each group."""
    rng, layout = random.Random(seed), understanding.layout
    ops = [drop_lowest(x, [rng.random() for _ in range(x.num_experts)], keep) for x in layout.routed]
    return Plan(layout_hash=layout.hash, ops=[op for op in ops if op], method="random", settings={"seed": seed})


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def rewrite(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> None:
    """Put other tensors into a model folder, and change its config."""
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        file.unlink()
    save_file(
        {k: v.clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}, folder / "model.safetensors"
    )
    settings = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(settings))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


def assert_experts_renumbered(before: dict, after: dict, understanding: Understanding, plan: Plan) -> None:
    """Every parameter equals the source's; where an axis shrank, it holds the kept experts and what lay behind them."""
    assert before.keys() == after.keys()
    shrunk = 0
    for name, old in before.items():
        new = after[name]
        axis = next((i for i, (a, b) in enumerate(zip(old.shape, new.shape, strict=True)) if a != b), None)
        if axis is not None:
            layer = next(x for x in understanding.layout.layers if name.startswith(x.path + "."))
            index = [*plan.kept(layer), *range(layer.num_experts, old.shape[axis])]
            assert len(index) < old.shape[axis]
            old = old.index_select(axis, torch.tensor(index))
            shrunk += 1
        assert same(old, new), name
    layers = understanding.layout.routed
    assert shrunk >= sum(3 if x.correction_biases else 2 for x in layers)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_stock_transformers_loads_what_was_baked_and_every_weight_is_the_sources(tmp_path, model_type):
    model = zoo.build(model_type)
    model.save_pretrained(tmp_path / "in", max_shard_size="300KB")
    checkpoint, understanding = open_model(tmp_path / "in")
    plan = random_plan(understanding)
    made = bake(checkpoint, understanding, plan, tmp_path / "out", shard_bytes=250_000)
    assert (made.shards, made.notes) == (len(list(made.path.glob("*.safetensors"))), ())
    assert made.shards > 1
    assert made.bytes_after == sum(x.nbytes for x in tensors_of(made.path).values()) == Checkpoint.open(made.path).bytes
    saved = made.bytes_before - made.bytes_after
    assert plan.saved_bytes(understanding.layout) <= saved < 1.1 * plan.saved_bytes(understanding.layout)

    loaded, told = type(model).from_pretrained(made.path, output_loading_info=True)
    assert not any(told.values()), told
    assert_experts_renumbered(model.state_dict(), loaded.state_dict(), understanding, plan)
    assert loaded.eval()(**zoo.inputs(model_type)).logits.isfinite().all()

    layout = understand(Checkpoint.open(made.path)).layout
    assert {x.num_experts for x in layout.layers} == {KEEP}
    assert layout.routed[0].router == understanding.layout.routed[0].router
    config = json.loads((made.path / "config.json").read_text())
    assert {config[key] for key in layout.expert_count_keys} == {KEEP}
    old = json.loads((tmp_path / "in" / "config.json").read_text())
    assert {k for k in config if config[k] != old.get(k)} <= set(layout.expert_count_keys)


def test_a_nested_config_is_rewritten_where_it_says_the_number(tmp_path):
    zoo.save("qwen3_vl_moe", tmp_path / "in")
    checkpoint, understanding = open_model(tmp_path / "in")
    out = bake(checkpoint, understanding, random_plan(understanding), tmp_path / "out").path
    old, new = (json.loads((x / "config.json").read_text()) for x in (tmp_path / "in", out))
    assert new["text_config"].pop("num_experts") == KEEP
    assert new["text_config"].pop("num_local_experts", KEEP) == KEEP
    old["text_config"].pop("num_experts", None), old["text_config"].pop("num_local_experts", None)
    assert new == old


@pytest.fixture
def mixtral(tmp_path) -> Path:
    return zoo.save("mixtral", tmp_path / "in", max_shard_size="300KB")


def test_an_empty_plan_copies_every_bit(tmp_path, mixtral):
    checkpoint, understanding = open_model(mixtral)
    made = bake(checkpoint, understanding, Plan(layout_hash=understanding.layout.hash), tmp_path / "out")
    before, after = tensors_of(mixtral), tensors_of(made.path)
    assert before.keys() == after.keys()
    assert all(same(before[name], after[name]) for name in before)
    assert json.loads((made.path / "config.json").read_text()) == checkpoint.config
    assert made == Baked(tmp_path / "out", checkpoint.bytes, checkpoint.bytes, 1, ())


def test_experts_that_stay_in_place_are_copied_in_one_piece(mixtral):
    checkpoint, understanding = open_model(mixtral)
    ops = [Drop(layer=x.index, experts=(6, 7)) for x in understanding.layout.routed]
    tensors = bake_tensors(checkpoint, understanding, Plan(layout_hash=understanding.layout.hash, ops=ops))
    assert {len(x.source.spans) for x in tensors} == {1}
    assert len(tensors) == len(checkpoint.tensors) - 3 * 3 * 2


def test_the_rest_of_the_folder_comes_along_and_says_how_it_was_made(tmp_path, mixtral):
    side = {"tokenizer.json": "{}", "README.md": "# card", "LICENSE": "free", "sub/chat_template.jinja": "{{ x }}"}
    foreign = {"consolidated.safetensors": "w", "original/model.pth": "w", "pytorch_model.bin.index.json": "w"}
    for name, text in (side | foreign).items():
        (mixtral / name).parent.mkdir(exist_ok=True)
        (mixtral / name).write_text(text)
    checkpoint, understanding = open_model(mixtral)
    plan = random_plan(understanding)
    made = bake(checkpoint, understanding, plan, tmp_path / "out", provenance={"recipe": {"keep": 0.5}})
    assert {name: (made.path / name).read_text() for name in side} == side
    assert not any((made.path / name).exists() for name in foreign)
    assert all(name in made.notes[0] for name in foreign)
    assert Plan.load(made.path / "plan.json") == plan
    record = json.loads((made.path / "moekit.json").read_text())
    assert record["source"]["fingerprint"] == checkpoint.fingerprint
    assert record["source"]["layout"] == understanding.layout.hash
    assert record["recipe"] == {"keep": 0.5}
    assert record["versions"]["transformers"] == transformers.__version__
    assert record["notes"] == list(made.notes)
    assert "moekit" not in (made.path / "config.json").read_text()

    again, understood = open_model(made.path)
    second = bake(again, understood, random_plan(understood, keep=2), tmp_path / "second").path
    assert Plan.load(second / "plan.json").dropped() == random_plan(understood, keep=2).dropped()
    assert json.loads((second / "moekit.json").read_text())["source"]["fingerprint"] == again.fingerprint


def test_an_interrupted_bake_goes_on_with_the_same_plan_only(tmp_path, mixtral):
    checkpoint, understanding = open_model(mixtral)
    out = tmp_path / "out"

    def stop(_, done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    plan = random_plan(understanding)
    with pytest.raises(KeyboardInterrupt):
        bake(checkpoint, understanding, plan, out, shard_bytes=100_000, progress=stop)
    assert not out.exists()
    with pytest.raises(OutputError, match="another job"):
        bake(checkpoint, understanding, random_plan(understanding, seed=1), out, shard_bytes=100_000)
    job = json.loads((tmp_path / "out.partial" / JOB).read_text())["job"]
    assert job.keys() == {"source", "plan", "moekit"}
    told = []
    bake(checkpoint, understanding, plan, out, shard_bytes=100_000, progress=lambda _, done, total: told.append(done))
    straight = bake(checkpoint, understanding, plan, tmp_path / "straight", shard_bytes=100_000).path
    assert told[0] > 100_000
    contents = [{x.name: x.read_bytes() for x in folder.iterdir()} for folder in (out, straight)]
    assert contents[0] == contents[1]


def test_what_cannot_be_baked_is_refused_before_anything_is_written(tmp_path, mixtral):
    checkpoint, understanding = open_model(mixtral)
    plan, out = random_plan(understanding), tmp_path / "out"
    with pytest.raises(PlanError, match="another model"):
        bake(checkpoint, understanding, plan.model_copy(update={"layout_hash": "0" * 16}), out)
    with pytest.raises(PlanError, match="different numbers"):
        bake(checkpoint, understanding, plan.model_copy(update={"ops": plan.ops[:1]}), out)
    with pytest.raises(OutputError, match="own folder"):
        bake(checkpoint, understanding, plan, mixtral / "pruned")
    remote = Checkpoint(mixtral, checkpoint.config, checkpoint.tensors, local=False)
    with pytest.raises(ModelError, match="headers"):
        bake(remote, understanding, plan, out)
    index = json.loads((mixtral / INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../other.safetensors")
    (mixtral / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside"):
        open_model(mixtral)
    assert [x.name for x in tmp_path.iterdir()] == ["in"]


def test_tensors_of_any_shape_and_name_are_cut_alike(tmp_path):
    """Four experts in one layer, in every way in which a checkpoint may hold them."""
    zoo.save("mixtral", tmp_path / "in")
    _, understanding = open_model(tmp_path / "in")
    experts = {f"h.2.w2.{e}.k{e}.weight": torch.full((2, 2), float(e)) for e in range(4)}
    extra = {f"h.2.w2.{e}.k{e}.input_scale": torch.tensor(e + 0.5) for e in range(4)}
    fused = {
        "h.2.stacked": torch.randn(4, 2, 3),
        "h.2.across": torch.randn(2, 4, 3).to(torch.float8_e4m3fn),
        "h.2.flat": torch.arange(12.0).reshape(12, 1),  # three rows an expert
        "h.2.scale": torch.tensor([2.0]),  # one for all
        "h.2.behind": torch.arange(6.0).reshape(6, 1),  # two shared experts behind the routed ones
        "h.2.router": torch.arange(8.0).reshape(8, 1),  # four rows behind the experts'
    }
    axes = dict.fromkeys(fused, 0) | {"h.2.across": 1}
    parts = [ExpertTensor(name, "router" if "router" in name else "expert", None, axes[name]) for name in fused]
    parts += [ExpertTensor(name, "expert", int(name.split(".")[3]), None) for name in experts]
    layer = dataclasses.replace(understanding.layout.routed[0], index=2, num_experts=4, tensors=tuple(parts))
    layout = dataclasses.replace(understanding.layout, layers=(layer,))
    understanding = dataclasses.replace(understanding, layout=layout, unused=list(extra))
    rewrite(tmp_path / "in", experts | extra | fused | {"other.2.w2.1": torch.ones(1)})
    plan = Plan(layout_hash=layout.hash, ops=[Drop(layer=2, experts=(0, 2))])

    made = bake(Checkpoint.open(tmp_path / "in"), understanding, plan, tmp_path / "out")
    after = tensors_of(made.path)
    assert after.keys() == fused.keys() | {"other.2.w2.1"} | {
        f"h.2.w2.{e}.k{e}.{kind}" for e in (0, 1) for kind in ("weight", "input_scale")
    }
    assert [after[f"h.2.w2.{e}.k{e}.weight"][0, 0].item() for e in (0, 1)] == [1, 3]
    assert [after[f"h.2.w2.{e}.k{e}.input_scale"].item() for e in (0, 1)] == [1.5, 3.5]
    assert same(after["h.2.stacked"], fused["h.2.stacked"][[1, 3]])
    assert same(after["h.2.across"], fused["h.2.across"][:, [1, 3]])
    assert after["h.2.flat"].flatten().tolist() == [3, 4, 5, 9, 10, 11]
    assert after["h.2.behind"].flatten().tolist() == [1, 3, 4, 5]
    assert after["h.2.router"].flatten().tolist() == [1, 3, 4, 5, 6, 7]
    assert after["h.2.scale"].tolist() == [2.0]

    rewrite(tmp_path / "in", experts | extra | fused | {"h.2.stacked": torch.randn(3, 2)})
    with pytest.raises(ModelError, match="fewer rows"):
        bake_tensors(Checkpoint.open(tmp_path / "in"), understanding, plan)


def with_mtp(folder: Path, model_type: str, prefix: str, extra: list[str], **config: object) -> None:
    """A checkpoint with a multi-token-prediction layer, made of the last layer's tensors."""
    zoo.save(model_type, folder)
    tensors = tensors_of(folder)
    mtp = {name.replace("model.layers.2.", prefix): x for name, x in tensors.items() if "model.layers.2." in name}
    rewrite(folder, tensors | mtp | {name: torch.ones(3) for name in extra}, **config)


@pytest.mark.parametrize(
    ("model_type", "prefix", "extra", "key"),
    [
        ("deepseek_v3", "model.layers.3.", ["model.layers.3.eh_proj.weight"], "num_nextn_predict_layers"),
        ("qwen3_next", "mtp.layers.0.", ["mtp.fc.weight", "mtp.norm.weight"], "mtp_num_hidden_layers"),
    ],
)
def test_prediction_layers_leave_a_model_that_loses_experts(tmp_path, model_type, prefix, extra, key):
    kept = ["rotary.inv_freq"]  # unknown to the stock model too, but no part of the prediction layer
    with_mtp(tmp_path / "in", model_type, prefix, extra + kept, **{key: 1})
    checkpoint, understanding = open_model(tmp_path / "in")
    assert [x.mtp for x in understanding.layout.layers].count(True) == 1
    plan = random_plan(understanding)
    made = bake(checkpoint, understanding, plan, tmp_path / "out")
    left = tensors_of(made.path).keys()
    assert not [name for name in left if name.startswith((prefix, *extra))]
    assert set(kept) <= left
    assert json.loads((made.path / "config.json").read_text())[key] == 0
    assert "prediction" in made.notes[0]
    assert key in made.notes[0]
    model = zoo.build(model_type)
    loaded, told = type(model).from_pretrained(made.path, output_loading_info=True)
    assert not told["missing_keys"]
    assert_experts_renumbered(model.state_dict(), loaded.state_dict(), understanding, plan)

    whole = bake(checkpoint, understanding, Plan(layout_hash=understanding.layout.hash), tmp_path / "whole")
    assert tensors_of(whole.path).keys() == checkpoint.tensors.keys()
    assert whole.notes == ()


def to_fp8(weight: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(fp8 values [O, I], inverse scales [ceil(O / block), ceil(I / block)])."""
    rows, columns = (-(-n // block) for n in weight.shape)
    scale = torch.rand(rows, columns) + 0.5
    full = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)[: weight.shape[0], : weight.shape[1]]
    return (weight / full).to(torch.float8_e4m3fn), scale


def test_fp8_weights_and_their_scales_are_cut_as_they_are(tmp_path):
    zoo.save("deepseek_v3", tmp_path / "in")
    tensors = {}
    for name, x in tensors_of(tmp_path / "in").items():
        if ".experts." in name:
            tensors[name], tensors[name + "_scale_inv"] = to_fp8(x, 16)
        else:
            tensors[name] = x.to(torch.bfloat16)
    settings = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    rewrite(tmp_path / "in", tensors, quantization_config=settings)
    checkpoint, understanding = open_model(tmp_path / "in")
    assert understanding.layout.quantisation == "fp8"
    plan = random_plan(understanding)
    made = bake(checkpoint, understanding, plan, tmp_path / "out")
    after = tensors_of(made.path)
    assert json.loads((made.path / "config.json").read_text())["quantization_config"] == settings
    for layer in understanding.layout.routed:
        stem = f"model.layers.{layer.index}.mlp.experts."
        numbers = {name.removeprefix(stem).split(".")[0] for name in after if name.startswith(stem)}
        assert numbers == {str(i) for i in range(KEEP)}
        for new, old in enumerate(plan.kept(layer)):
            for part in ("gate", "up", "down"):
                pairs = []
                for source, expert in ((tensors, old), (after, new)):
                    name = f"{stem}{expert}.{part}_proj.weight"
                    pairs.append((source[name], source[name + "_scale_inv"]))
                assert all(same(a, b) for a, b in zip(*pairs, strict=True))
                values = [dequantise_fp8(*pair, (16, 16), torch.float32) for pair in pairs]
                assert torch.equal(*values)
    assert len(after) == len(tensors) - 2 * 3 * 2 * (8 - KEEP)
    assert understand(Checkpoint.open(made.path)).layout.quantisation == "fp8"


def test_mxfp4_blocks_and_scales_are_cut_as_they_are_and_stock_transformers_loads_them(tmp_path):
    torch.manual_seed(0)
    zoo.build("gpt_oss", intermediate_size=32).save_pretrained(tmp_path / "in")
    tensors = {}
    for name, x in tensors_of(tmp_path / "in").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inner, outer = x.shape
            tensors[name + "_blocks"] = torch.randint(256, (experts, outer, inner // 32, 16), dtype=torch.uint8)
            tensors[name + "_scales"] = torch.randint(120, 124, (experts, outer, inner // 32), dtype=torch.uint8)
        else:
            tensors[name] = x.to(torch.bfloat16)
    unquantised = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": unquantised}
    rewrite(tmp_path / "in", tensors, quantization_config=settings, dtype="bfloat16")
    checkpoint, understanding = open_model(tmp_path / "in")
    assert understanding.layout.quantisation == "mxfp4"
    plan = random_plan(understanding)
    made = bake(checkpoint, understanding, plan, tmp_path / "out")
    after = tensors_of(made.path)
    assert after.keys() == tensors.keys()
    for layer in understanding.layout.routed:
        kept = list(plan.kept(layer))
        for x in layer.tensors:
            assert same(after[x.name], tensors[x.name][kept]), x.name
    loaded, told = transformers.AutoModelForCausalLM.from_pretrained(made.path, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    for layer in understanding.layout.routed:
        for part in ("gate_up_proj", "down_proj"):
            name = f"{layer.experts_path}.{part}"
            expected = dequantise_mxfp4(tensors[name + "_blocks"], tensors[name + "_scales"], torch.bfloat16)
            assert torch.equal(loaded.get_parameter(name), expected[list(plan.kept(layer))])
