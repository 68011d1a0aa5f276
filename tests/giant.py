"""A checkpoint of any size whose weights are holes in sparse files: headers, index and config are real."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path

Row = tuple[str, str, tuple[int, ...]]  # name, safetensors dtype, shape
SIZES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}


def write_sparse(file: Path, rows: Iterable[Row]) -> tuple[list[str], int]:
    """A safetensors file with zeros for data; returns the names in it and the bytes of their data."""
    header: dict[str, object] = {}
    end = 0
    for name, dtype, shape in rows:
        start, end = end, end + prod(shape) * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)
    return list(header), end


def write_sparse_checkpoint(folder: Path, config: dict, shards: list[Iterable[Row]]) -> int:
    """A sharded checkpoint; returns the bytes of its tensors."""
    folder.mkdir()
    weight_map, total = {}, 0
    for number, rows in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        names, size = write_sparse(folder / name, rows)
        weight_map |= dict.fromkeys(names, name)
        total += size
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return total


DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    "routed_scaling_factor": 2.5,
    "topk_group": 4,
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def deepseek_v3(folder: Path) -> int:
    """DeepSeek-V3 as it lies on the hub: 61 layers, 58 of 256 experts, and one for multi-token prediction; fp8."""
    vocabulary, D, I, experts, layers = 129280, 7168, 2048, 256, 61  # noqa: E741

    def linear(name: str, rows: int, columns: int) -> Iterator[Row]:
        yield f"{name}.weight", "F8_E4M3", (rows, columns)
        yield f"{name}.weight_scale_inv", "F32", (-(-rows // 128), -(-columns // 128))

    def mlp(name: str, inner: int) -> Iterator[Row]:
        yield from linear(f"{name}.gate_proj", inner, D)
        yield from linear(f"{name}.up_proj", inner, D)
        yield from linear(f"{name}.down_proj", D, inner)

    def layer(number: int) -> Iterator[Row]:
        path = f"model.layers.{number}"
        yield f"{path}.input_layernorm.weight", "BF16", (D,)
        yield f"{path}.post_attention_layernorm.weight", "BF16", (D,)
        yield from linear(f"{path}.self_attn.q_a_proj", 1536, D)
        yield f"{path}.self_attn.q_a_layernorm.weight", "BF16", (1536,)
        yield from linear(f"{path}.self_attn.q_b_proj", 128 * 192, 1536)
        yield from linear(f"{path}.self_attn.kv_a_proj_with_mqa", 512 + 64, D)
        yield f"{path}.self_attn.kv_a_layernorm.weight", "BF16", (512,)
        yield from linear(f"{path}.self_attn.kv_b_proj", 128 * 256, 512)
        yield from linear(f"{path}.self_attn.o_proj", D, 128 * 128)
        if number < 3:
            yield from mlp(f"{path}.mlp", 18432)
            return
        yield f"{path}.mlp.gate.weight", "BF16", (experts, D)
        yield f"{path}.mlp.gate.e_score_correction_bias", "F32", (experts,)
        yield from mlp(f"{path}.mlp.shared_experts", I)
        for expert in range(experts):
            yield from mlp(f"{path}.mlp.experts.{expert}", I)

    def prediction() -> Iterator[Row]:
        path = f"model.layers.{layers}"
        yield from layer(layers)
        yield f"{path}.eh_proj.weight", "BF16", (D, 2 * D)
        yield f"{path}.embed_tokens.weight", "BF16", (vocabulary, D)
        yield f"{path}.shared_head.head.weight", "BF16", (vocabulary, D)
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            yield f"{path}.{norm}.weight", "BF16", (D,)

    outer: list[Row] = [(f"{name}.weight", "BF16", (vocabulary, D)) for name in ("model.embed_tokens", "lm_head")]
    outer.append(("model.norm.weight", "BF16", (D,)))
    return write_sparse_checkpoint(folder, DEEPSEEK_V3, [outer, *map(layer, range(layers)), prediction()])
