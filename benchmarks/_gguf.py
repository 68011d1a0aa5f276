"""A stock MoE checkpoint as GGUF, for llama.cpp: the same weights in bfloat16, or rounded to q4_0.

    write_gguf(model_folder, "model.gguf", quant="q4_0")

Needs the extra `bench`. Qwen2-MoE, Qwen3-MoE and Mixtral; no tokenizer: benchmarks give token ids. As llama.cpp's own
quantiser does, routers and norms stay in float32, and in "q4_0" the output matrix has 8 bits (q8_0).

llama.cpp's graph of Qwen2-MoE never makes the weights of the chosen experts sum to 1, whatever `norm_topk_prob` says:
for such a checkpoint bytes and arithmetic are the same, what the model says is not. `faithful` tells.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Type

ARCHITECTURES = {"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "mixtral": "llama"}
QUANTS = {"bf16": (Type.BF16, Type.BF16), "q4_0": (Type.Q4_0, Type.Q8_0)}  # weights, output
FILE_TYPES = {"bf16": gguf.LlamaFileType.MOSTLY_BF16, "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0}
OF_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}


def faithful(config: transformers.PretrainedConfig) -> bool:
    """Whether llama.cpp computes what stock transformers does."""
    return not (config.model_type == "qwen2_moe" and config.norm_topk_prob)


def write_gguf(model_folder: str | Path, out: str | Path, quant: str = "q4_0") -> Path:
    """Write a checkpoint as GGUF; nothing stands at `out` before all is written.

    Args:
        model_folder: a stock checkpoint of Qwen2-MoE, Qwen3-MoE or Mixtral.
        out: the file to make.
        quant: "bf16" (every number kept) or "q4_0".

    Returns:
        `out`.

    Raises:
        SystemExit: a family, or a feature of it, that this file does not know.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    config = model.config
    if config.model_type not in ARCHITECTURES or config.rope_parameters["rope_type"] != "default":
        raise SystemExit(f"{config.model_type} with {config.rope_parameters}: not written as GGUF here")
    partial = Path(out).with_name(f"{Path(out).name}.partial")
    writer = gguf.GGUFWriter(partial, ARCHITECTURES[config.model_type])
    _write_settings(writer, config)
    writer.add_file_type(FILE_TYPES[quant])
    for name, kind, x in _tensors(model, quant):
        data = gguf.quants.quantize(np.ascontiguousarray(x.float().numpy()), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(partial, out)
    return Path(out)


def _write_settings(writer: gguf.GGUFWriter, config: transformers.PretrainedConfig) -> None:
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    mixtral = config.model_type == "mixtral"
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_expert_count(config.num_local_experts if mixtral else config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.intermediate_size if mixtral else config.moe_intermediate_size)
    if config.model_type == "qwen2_moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    writer.add_tokenizer_model("no_vocab")


def _tensors(model: transformers.PreTrainedModel, quant: str) -> Iterator[tuple[str, Type, torch.Tensor]]:
    """(name, type, numbers) of every tensor that llama.cpp wants."""
    weights, output = QUANTS[quant]
    state, config = model.state_dict(), model.config
    yield "token_embd.weight", weights, state["model.embed_tokens.weight"]
    yield "output_norm.weight", Type.F32, state["model.norm.weight"]
    yield "output.weight", output, state["lm_head.weight"]
    for layer in range(config.num_hidden_layers):
        prefix, block = f"model.layers.{layer}.", f"blk.{layer}."
        mine = {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)}
        gate, up = mine.pop("mlp.experts.gate_up_proj").chunk(2, 1)
        yield block + "ffn_gate_exps.weight", weights, gate
        yield block + "ffn_up_exps.weight", weights, up
        if "mlp.shared_expert_gate.weight" in mine:
            yield block + "ffn_gate_inp_shexp.weight", Type.F32, mine.pop("mlp.shared_expert_gate.weight")[0]
        for key, x in mine.items():
            path, _, kind = key.rpartition(".") if key.endswith((".weight", ".bias")) else (key, "", "weight")
            name, plain = OF_LAYER[path], x.dim() == 1 or path == "mlp.gate"
            if config.model_type == "mixtral" and name in ("attn_q", "attn_k"):
                x = _neighbours(x, config.num_attention_heads if name == "attn_q" else config.num_key_value_heads)
            yield f"{block}{name}.{kind}", Type.F32 if plain else weights, x


def _neighbours(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows in the order of llama.cpp's rotary embedding of Llama's kind: the two numbers of a pair side by side."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
