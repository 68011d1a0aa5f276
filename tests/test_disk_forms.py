"""One model, many forms on disk: quantised, fused, without prefix, sharded, with prediction layers; all read as one."""

import json
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import zoo
from moekit.apply.bake import bake
from moekit.checkpoint.reader import Checkpoint
from moekit.checkpoint.weights import FP4_VALUES, dequantise_fp8, dequantise_mxfp4
from moekit.errors import CheckpointError, ModelError
from moekit.families.detect import Understanding, understand
from moekit.families.loader import Loader
from moekit.plans import Plan, drop_lowest, keep_count
from moekit.stream import Stream
from moekit.view import MoEView

FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def write(folder: Path, tensors: dict[str, Tensor], config: dict) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: x.clone(memory_format=torch.contiguous_format) for name, x in tensors.items()},
        folder / "model.safetensors",
    )
    return folder


def saved(folder: Path, name: str, **changes: object) -> tuple[dict[str, Tensor], dict]:
    """(tensors, config) of a tiny model as stock transformers saves it."""
    zoo.build(name, **changes).save_pretrained(folder)
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


def read(folder: Path) -> tuple[Checkpoint, Understanding]:
    checkpoint = Checkpoint.open(folder)
    return checkpoint, understand(checkpoint)


def streamed(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    ids = zoo.inputs(name)["input_ids"]
    return next(Stream(Loader(*read(folder), dtype=dtype)).run([ids]))


@torch.no_grad()
def stock_logits(folder: Path, name: str) -> Tensor:
    cls = getattr(transformers, zoo.ZOO[name].model_class)
    model = cls.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    return model(**zoo.inputs(name), use_cache=False).logits


def half(understanding: Understanding) -> Plan:
    generator, layout = torch.Generator().manual_seed(0), understanding.layout
    ops = [
        drop_lowest(x, torch.rand(x.num_experts, generator=generator).tolist(), keep_count(x, 0.5))
        for x in layout.routed
    ]
    return Plan(layout_hash=layout.hash, ops=ops)


# ---- numbers


def test_fp8_is_each_value_times_the_scale_of_its_block() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 5, 7, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 2, 3, generator=generator)
    got = dequantise_fp8(weight, scale, (3, 3), torch.float32)
    for e, o, i in product(range(2), range(5), range(7)):
        assert got[e, o, i] == weight[e, o, i].float() * scale[e, o // 3, i // 3]
    powers = torch.tensor([[[1.0, 2.0, 0.5], [4.0, 1.0, 0.25]]] * 2).to(torch.float8_e8m0fnu)
    wanted = dequantise_fp8(weight, powers.float(), (3, 3), torch.bfloat16)
    assert torch.equal(dequantise_fp8(weight, powers, (3, 3), torch.bfloat16), wanted)
    assert torch.equal(dequantise_fp8(weight, powers.view(torch.uint8), (3, 3), torch.bfloat16), wanted)
    one = dequantise_fp8(weight, torch.tensor([2.0]), (3, 3), torch.float32)
    assert torch.equal(one, 2 * weight.float())
    with pytest.raises(CheckpointError, match="do not fit"):
        dequantise_fp8(weight, scale, (2, 2), torch.float32, "w")


def test_mxfp4_is_what_transformers_makes_of_every_byte_and_scale() -> None:
    blocks = torch.arange(256, dtype=torch.uint8).reshape(2, 2, 4, 16)
    scales = torch.tensor([0, 1, 100, 120, 126, 127, 128, 130, 140, 200, 254, 255, 3, 90, 127, 127], dtype=torch.uint8)
    scales = scales.reshape(2, 2, 4)
    for dtype in (torch.bfloat16, torch.float32):
        got = dequantise_mxfp4(blocks, scales, dtype)
        stock = convert_moe_packed_tensors(blocks.clone(), scales.clone(), dtype=dtype)
        assert got.dtype == dtype
        assert got.shape == stock.shape == (2, 128, 2)
        assert torch.equal(got, stock)


# ---- quantised checkpoints


def to_fp8(weight: Tensor, block: int = 16, powers: bool = False) -> tuple[Tensor, Tensor]:
    """(fp8 values, inverse scales) of a matrix whose blocks each use the whole range of fp8."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % block, 0, -rows % block))
    blocks = padded.unflatten(0, (-1, block)).unflatten(2, (-1, block))
    scale = blocks.abs().amax((1, 3)).clamp_min(1e-12) / 448
    scale = torch.exp2(scale.log2().ceil()) if powers else scale
    full = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)[:rows, :columns]
    return (weight / full).to(torch.float8_e4m3fn), scale


def fp8_deepseek(folder: Path, rename: Callable[[str], str], powers: bool) -> tuple[Path, Path]:
    """(fp8 checkpoint, checkpoint of the same numbers in fp32)."""
    tensors, config = saved(folder / "full", "deepseek_v3")
    small, plain = {}, {}
    for name, x in tensors.items():
        if x.dim() == 2 and re.search(r"(mlp|self_attn)\..*proj", name):
            values, scale = to_fp8(x, powers=powers)
            small[name], small[rename(name)] = values, scale.to(torch.float8_e8m0fnu) if powers else scale
            plain[name] = dequantise_fp8(values, scale, (16, 16), torch.float32)
        else:
            small[name] = plain[name] = x
    return write(folder / "fp8", small, config | {"quantization_config": FP8}), write(folder / "fp32", plain, config)


@pytest.mark.parametrize(
    ("suffix", "powers"), [(".weight_scale_inv", False), (".scale", True)], ids=["DeepSeek-V3", "DeepSeek-V4"]
)
def test_fp8_checkpoints_are_read_run_and_cut(tmp_path: Path, suffix: str, powers: bool) -> None:
    fp8, fp32 = fp8_deepseek(tmp_path, lambda name: name.removesuffix(".weight") + suffix, powers)
    checkpoint, understanding = read(fp8)
    layout = understanding.layout
    assert (layout.quantisation, layout.dtype) == ("fp8", "float8_e4m3fn")
    assert not understanding.unused
    scales = [x for layer in layout.layers for x in layer.tensors if x.name.endswith(suffix)]
    assert len(scales) == 2 * 3 * zoo.EXPERTS
    assert layout.parts["experts"].params == read(fp32)[1].layout.parts["experts"].params
    logits = streamed(fp8, "deepseek_v3")
    assert torch.equal(logits, stock_logits(fp32, "deepseek_v3"))
    full = stock_logits(tmp_path / "full", "deepseek_v3")
    assert 0 < (logits - full).abs().mean() < 0.2 * full.abs().mean()

    plan = half(understanding)
    small = bake(checkpoint, understanding, plan, tmp_path / "half").path
    loader = Loader(*read(fp32), dtype=torch.float32)
    with MoEView(loader.model, layout).ban(plan.dropped()):
        banned = next(Stream(loader).run([zoo.inputs("deepseek_v3")["input_ids"]]))
    assert (streamed(small, "deepseek_v3") - banned).abs().max() < 1e-4


def to_mxfp4(weight_EIO: Tensor) -> tuple[Tensor, Tensor]:
    """(blocks, scales) of the nearest values with each group's scale a power of two."""
    groups = weight_EIO.transpose(1, 2).unflatten(2, (-1, 32)).float()  # [E, O, G, 32]
    exponent = groups.abs().amax(-1, keepdim=True).clamp_min(1e-12).log2().floor() - 2  # 4 <= largest < 8, capped at 6
    table = torch.tensor(FP4_VALUES)
    codes = (groups * torch.exp2(-exponent)).unsqueeze(-1).sub(table).abs().argmin(-1).to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, (exponent.squeeze(-1) + 127).to(torch.uint8)


def test_mxfp4_checkpoints_are_read_run_and_cut(tmp_path: Path) -> None:
    tensors, config = saved(tmp_path / "full", "gpt_oss", intermediate_size=32)
    small, plain = {}, {}
    for name, x in tensors.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            blocks, scales = to_mxfp4(x)
            small[name + "_blocks"], small[name + "_scales"] = blocks, scales
            plain[name] = dequantise_mxfp4(blocks, scales, torch.float32)
            assert (plain[name] - x).abs().mean() < 0.15 * x.abs().mean()
        else:
            small[name] = plain[name] = x
    folder = write(tmp_path / "mxfp4", small, config | {"quantization_config": {"quant_method": "mxfp4"}})
    same = write(tmp_path / "fp32", plain, config)
    checkpoint, understanding = read(folder)
    layout = understanding.layout
    assert layout.quantisation == "mxfp4"
    assert {x.name: x.axis for x in layout.layers[0].tensors}.keys() == {x for x in small if ".0.mlp." in x}
    assert {x.axis for x in layout.layers[0].tensors} == {0}
    assert layout.parts["experts"].params == read(same)[1].layout.parts["experts"].params
    assert torch.equal(streamed(folder, "gpt_oss"), stock_logits(same, "gpt_oss"))

    plan = half(understanding)
    cut = bake(checkpoint, understanding, plan, tmp_path / "half").path
    loader = Loader(*read(same), dtype=torch.float32)
    with MoEView(loader.model, layout).ban(plan.dropped()):
        banned = next(Stream(loader).run([zoo.inputs("gpt_oss")["input_ids"]]))
    assert (streamed(cut, "gpt_oss") - banned).abs().max() < 1e-4


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "torchao"])
def test_other_quantisations_are_refused_by_name(tmp_path: Path, method: str) -> None:
    tensors, config = saved(tmp_path / "full", "mixtral")
    folder = write(tmp_path / method, tensors, config | {"quantization_config": {"quant_method": method, "bits": 4}})
    with pytest.raises(ModelError, match=method):
        read(folder)


def test_quantised_weights_that_the_config_does_not_explain_are_refused(tmp_path: Path) -> None:
    tensors, config = saved(tmp_path / "full", "mixtral")
    name = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
    bare = tensors | {name: tensors[name].to(torch.float8_e4m3fn)}
    with pytest.raises(ModelError, match=r"experts\.3\.w1.*\n.*\n.*without scales"):
        read(write(tmp_path / "bare", bare, config | {"quantization_config": FP8}))
    packed = tensors | {name: torch.zeros(40, 32, dtype=torch.int8)}
    with pytest.raises(ModelError, match="I8"):
        read(write(tmp_path / "packed", packed, config | {"quantization_config": FP8}))


# ---- other forms of the same weights

FUSED = (
    "mixtral",
    "qwen3_moe",
    "jamba",
    "phimoe",
    "deepseek_v3",
    "ernie4_5_moe",
    "minimax_m2",
    "hunyuan_v1_moe",
    "granitemoe",
)


@pytest.mark.parametrize("name", FUSED)
def test_the_models_own_fused_names_are_read_and_cut_too(tmp_path: Path, name: str) -> None:
    model = zoo.build(name)
    zoo.save(name, tmp_path / "usual")
    config = json.loads((tmp_path / "usual" / "config.json").read_text())
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    folder = write(tmp_path / "fused", {k: x for k, x in model.state_dict().items() if k not in tied}, config)
    _, understanding = read(folder)
    _, usual = read(tmp_path / "usual")
    assert understanding.layout.hash == usual.layout.hash
    assert not understanding.unused
    assert {x.axis for layer in understanding.layout.layers for x in layer.tensors} <= {0, 1}
    logits = stock_logits(tmp_path / "usual", name)
    assert torch.equal(streamed(folder, name), logits)
    plan = half(understanding)
    fused, single = (bake(*read(x), plan, tmp_path / f"half-{x.name}").path for x in (folder, tmp_path / "usual"))
    assert torch.equal(stock_logits(fused, name), stock_logits(single, name))
    assert not torch.equal(stock_logits(fused, name), logits)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_names_may_lack_the_models_prefix(tmp_path: Path, name: str) -> None:
    tensors, config = saved(tmp_path / "usual", name)
    bare = write(tmp_path / "bare", {k.removeprefix("model."): x for k, x in tensors.items()}, config)
    checkpoint, understanding = read(bare)
    assert not understanding.unused
    assert torch.equal(streamed(bare, name), stock_logits(tmp_path / "usual", name))
    small = bake(checkpoint, understanding, half(understanding), tmp_path / "half").path
    assert all(not k.startswith("model.") for k in load_file(small / "model.safetensors"))
    assert torch.equal(streamed(small, name), stock_logits(small, name))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_shards_are_one_checkpoint(tmp_path: Path, name: str) -> None:
    zoo.save(name, tmp_path / "one")
    zoo.save(name, tmp_path / "many", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one, many = (read(tmp_path / x)[1].layout for x in ("one", "many"))
    assert one == many
    assert torch.equal(streamed(tmp_path / "many", name), streamed(tmp_path / "one", name))


def test_fused_experts_are_read_in_either_orientation(tmp_path: Path) -> None:
    name = "qwen3_vl_moe"
    tensors, config = saved(tmp_path / "new", name)
    turned = {k: x.transpose(1, 2) if x.dim() == 3 and ".experts." in k else x for k, x in tensors.items()}
    old = write(tmp_path / "old", turned, config)
    assert torch.equal(streamed(old, name), stock_logits(tmp_path / "new", name))
    checkpoint, understanding = read(old)
    small = bake(checkpoint, understanding, half(understanding), tmp_path / "half").path
    assert torch.equal(streamed(small, name), stock_logits(small, name))


def test_what_stock_loading_resets_is_reset(tmp_path: Path) -> None:
    tensors, config = saved(tmp_path / "usual", "zaya")
    moved = {k: x + 0.3 if k.endswith("balancing_biases") else x for k, x in tensors.items()}
    folder = write(tmp_path / "moved", moved, config)
    assert torch.equal(streamed(folder, "zaya"), stock_logits(folder, "zaya"))


# ---- multi-token prediction


@pytest.mark.parametrize(
    ("name", "prefixes", "whole"),
    [
        ("deepseek_v3", ["model.layers.3."], []),
        ("glm4_moe", ["model.layers.3.", "model.layers.4."], ["model.layers.3.eh_proj.weight"]),
        ("qwen3_next", ["mtp.layers.0."], ["mtp.fc.weight", "mtp.norm.weight"]),
    ],
)
def test_prediction_layers_are_seen_and_counted(
    tmp_path: Path, name: str, prefixes: list[str], whole: list[str]
) -> None:
    tensors, config = saved(tmp_path / "plain", name)
    extra = {p + k.removeprefix("model.layers.2."): x for p in prefixes for k, x in tensors.items() if "rs.2." in k}
    extra |= {k: torch.ones(4, 4) for k in whole}
    folder = write(tmp_path / "mtp", tensors | extra | {"rotary.inv_freq": torch.ones(2)}, config)
    _, understanding = read(folder)
    layout, plain = understanding.layout, read(tmp_path / "plain")[1].layout
    assert [x.path + "." for x in layout.layers if x.mtp] == prefixes
    assert layout.routed == plain.routed
    for number, layer in enumerate(x for x in layout.layers if x.mtp):
        assert layer.index == layout.num_layers + number
        assert len(layer.tensors) == len(plain.layers[-1].tensors)
        assert layer.expert_bytes == plain.layers[-1].expert_bytes
    assert layout.parts["mtp"].bytes == sum(x.nbytes for x in extra.values())
    assert layout.parts["other"].bytes == plain.parts["other"].bytes + 8
    assert layout.active_params == plain.active_params + 2
    assert torch.equal(streamed(folder, name), stock_logits(tmp_path / "plain", name))


# ---- what is missing


def test_what_is_not_on_disk_is_named(tmp_path: Path) -> None:
    tensors, config = saved(tmp_path / "full", "qwen3_moe")
    expert = "model.layers.1.mlp.experts.5.up_proj.weight"
    without = {k: x for k, x in tensors.items() if k != expert}
    with pytest.raises(CheckpointError, match=r"not the 8 experts[\s\S]*none for expert 5"):
        read(write(tmp_path / "expert", without, config))
    without = {k: x for k, x in tensors.items() if "layers.2.mlp.gate" not in k}
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.gate\.weight"):
        read(write(tmp_path / "router", without, config))
    without = {k: x for k, x in tensors.items() if "layers.2.mlp.experts" not in k}
    with pytest.raises(CheckpointError, match=r"2 parameters[\s\S]*layers\.2\.mlp\.experts"):
        read(write(tmp_path / "experts", without, config))
    wrong = tensors | {"model.norm.weight": torch.ones(72)}
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        read(write(tmp_path / "shape", wrong, config))
    fewer = dict.fromkeys(("num_experts", "num_local_experts"), 6)
    with pytest.raises(CheckpointError, match=r"not the 6 experts[\s\S]*one for expert 6 too"):
        read(
            write(
                tmp_path / "config", {k: x[:6] if "gate.weight" in k else x for k, x in tensors.items()}, config | fewer
            )
        )
