"""A zoo of tiny MoE models: one for each family of transformers that carries the experts contract, and Llama 4.

Every model has random weights, a few layers, 8 experts and top-2 routing that differs from token to token. `ZOO` has
one text model a family, `MULTIMODAL` the whole model where the hub's checkpoints hold more than the text model of
`ZOO`. Their tables say only where a family differs from `TINY`. `python tests/zoo.py [model_type ...]` prints what
running them shows.

The widths are unlike each other on purpose (hidden 64, dense 40, shared 32, expert 24), so that a mixed-up axis shows.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB, EXPERTS, TOP_K = 160, 8, 2

# A config takes from here the fields that it declares.
TINY: dict[str, Any] = {
    **{"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 3, "max_position_embeddings": 256},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1},
    # experts
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], EXPERTS),
    **dict.fromkeys(["num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"], TOP_K),
    **dict.fromkeys(["n_shared_experts", "num_shared_experts", "moe_num_shared_experts"], 1),
    **{"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_dense_layers": 1},
    **{"intermediate_size": 40, "dense_intermediate_size": 40, "moe_intermediate_size": 24},
    **{"shared_expert_intermediate_size": 32, "shared_intermediate_size": 32},
    # attention: plain, sliding, latent, indexed, linear
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    **{"sliding_window": 8, "sliding_window_size": 8},
    **{"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
    **{"index_topk": 4, "index_head_dim": 16, "index_n_heads": 2},
    **{"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"linear_head_dim": 16, "linear_num_heads": 4},
    # vision towers, where a family has no text-only class
    **{"depth": 1, "num_heads": 4, "out_hidden_size": 64},
}


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """The config of `model_type` from `TINY`, then `overrides`; a sub-config is a dict, None, or left to `TINY`."""
    cls = CONFIG_MAPPING[model_type]
    for name, spec in cls.sub_configs_defaults.items():
        if (sub := overrides.get(name, {})) is not None:
            overrides[name] = tiny_config(spec.model_type, **sub)
    fields = {field.name for field in dataclasses.fields(cls)}
    base = {name: value for name, value in TINY.items() if name in fields}
    if "kv_lora_rank" in fields:  # latent attention has as many key and value heads as query heads
        base["num_key_value_heads"] = base["num_attention_heads"]
    return cls(**base | overrides)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One family: the class that runs it, where its config differs from `TINY`, and what is odd about it."""

    model_type: str
    model_class: str
    notes: str
    overrides: dict[str, Any]

    def config(self, **changes: Any) -> PreTrainedConfig:
        """The family's tiny config; `changes` go to the text part of a multimodal one."""
        if "text_config" in CONFIG_MAPPING[self.model_type].sub_configs_defaults:
            changes = {"text_config": self.overrides.get("text_config", {}) | changes}
        return tiny_config(self.model_type, **self.overrides | changes)


def _entry(model_type: str, model_class: str, notes: str = "", **overrides: Any) -> Entry:
    return Entry(model_type, model_class, notes, overrides)


def _whole(model_type: str, model_class: str, text: str, **overrides: Any) -> Entry:
    return Entry(model_type, model_class, f"the whole of {text}", overrides | {"text_config": ZOO[text].overrides})


SLIDE, FULL, LINEAR, INDEXED = "sliding_attention", "full_attention", "linear_attention", "indexed_attention"
SLIDE_FULL = {"layer_types": [SLIDE, SLIDE, FULL]}
FULL_SLIDE = {"layer_types": [FULL, SLIDE, FULL]}
LINEAR_FULL = {"layer_types": [LINEAR, LINEAR, FULL]}
DENSE_FIRST = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
SHARED_INDEXER = {"indexer_types": ["full", "full", "shared"]}
HYPER_CONNECTIONS = {"hc_mult": 2, "hc_sinkhorn_iters": 3}
INKLING = {"layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid"], "d_rel": 4, "rel_extent": 16}
INKLING |= {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16}
SAM = {"hidden_size": 16, "output_channels": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}
SAM |= {"window_size": 2, "global_attn_indexes": [0]}
GEMMA_VISION = {"position_embedding_size": 16, "num_hidden_layers": 1}
QWEN_VISION = {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
OMNI_AUDIO = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "output_dim": 64}
OMNI_AUDIO |= {"num_mel_bins": 8, "downsample_hidden_size": 8, "max_source_positions": 16}


def _mrope(*sections: int, **more: Any) -> dict[str, Any]:
    """Multimodal rotary embedding: the sections sum to half of the rotated dimensions of a head."""
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections), **more}


# fmt: off
_ENTRIES = [
    # softmax, then top-k
    _entry("mixtral", "MixtralForCausalLM"),
    _entry("minimax", "MiniMaxForCausalLM", layer_types=[LINEAR, FULL, LINEAR], block_size=8),
    _entry("olmoe", "OlmoeForCausalLM"),
    _entry("flex_olmo", "FlexOlmoForCausalLM"),
    _entry("mellum", "MellumForCausalLM", **FULL_SLIDE),
    _entry("qwen2_moe", "Qwen2MoeForCausalLM"),
    _entry("qwen3_moe", "Qwen3MoeForCausalLM"),
    _entry("qwen3_next", "Qwen3NextForCausalLM", **LINEAR_FULL),
    _entry("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", **LINEAR_FULL),
    _entry("qwen4_exp_text", "Qwen4ExpForCausalLM", "n-gram embeddings on layer 0; hyper-connections",
           layer_types=[LINEAR, LINEAR, INDEXED], hc_count=2, hc_lowrank=8,
           ple_layer_ids=[1], ple_embed_dim=64, heads_per_ngram=2, ngram_vocab_size_base=50,
           make_ngram_vocab_size_divisible_by=8, split_ngram_parts=4,
           indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=4, indexer_compress_ratio=2),
    _entry("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", "no text-only class",
           text_config={"rope_parameters": _mrope(4, 2, 2)}, vision_config=QWEN_VISION),
    _entry("qwen3_omni_moe_thinker", "Qwen3OmniMoeThinkerForConditionalGeneration",
           "no text-only class; hub checkpoints hold it under `thinker.` beside a talker",
           text_config={"rope_parameters": _mrope(4, 2, 2)}, vision_config=QWEN_VISION, audio_config=OMNI_AUDIO),
    _entry("jamba", "JambaForCausalLM", "MoE in every second layer; weights never renormalised", num_hidden_layers=4,
           attn_layer_period=4, attn_layer_offset=1, mamba_d_state=8, use_mamba_kernels=False),
    _entry("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM", "router weight is gate.wg.weight"),
    _entry("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", "correction bias is [1, E]"),
    _entry("ernie4_5_vl_moe", "Ernie4_5_VLMoeForConditionalGeneration",
           "no text-only class; two expert sets a layer, of unlike width: text_moe and vision_moe",
           text_config={"moe_intermediate_size": [24, 16], "rope_parameters": _mrope(3, 3, 2)}),
    _entry("gemma4_text", "Gemma4ForCausalLM", "router beside a dense MLP in the decoder layer; per_expert_scale",
           **SLIDE_FULL, enable_moe_block=True, vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=0,
           global_head_dim=32),
    _entry("diffusion_gemma", "DiffusionGemmaForBlockDiffusion",
           "no text-only class; encoder and decoder are two sets of modules with tied weights", canvas_length=12,
           text_config={**SLIDE_FULL, "global_head_dim": 32},
           vision_config=GEMMA_VISION),
    # top-k, then softmax
    _entry("gpt_oss", "GptOssForCausalLM", "transposed, interleaved gate and up, biases in experts and router"),
    _entry("openai_privacy_filter", "OpenAIPrivacyFilterForTokenClassification", "a bidirectional token classifier"),
    _entry("aria_text", "AriaTextForCausalLM", "transposed"),
    _entry("granitemoe", "GraniteMoeForCausalLM"),
    _entry("granitemoe_swa", "GraniteMoeSWAForCausalLM", layer_types=[FULL, SLIDE, SLIDE]),
    _entry("granitemoeshared", "GraniteMoeSharedForCausalLM"),
    _entry("granitemoehybrid", "GraniteMoeHybridForCausalLM", layer_types=[LINEAR, FULL, LINEAR], mamba_n_heads=8,
           mamba_d_state=8, mamba_chunk_size=8),
    _entry("cohere2_moe", "Cohere2MoeForCausalLM", **SLIDE_FULL, logit_scale=1.0),
    # softmax in groups
    _entry("deepseek_v2", "DeepseekV2ForCausalLM", topk_method="group_limited_greedy"),
    _entry("deepseek_ocr2", "DeepseekOcr2ForConditionalGeneration", "no text-only class",
           text_config={**DENSE_FIRST, "topk_method": "greedy"},
           vision_config={"sam_config": {**SAM, "downsample_channels": [8, 64]}}),
    _entry("unlimited_ocr", "UnlimitedOcrForConditionalGeneration", "no text-only class", text_config=DENSE_FIRST,
           vision_config={"sam_config": {**SAM, "downsample_channels": [8, 8]},
                          "encoder_config": {"num_hidden_layers": 1}}),
    _entry("mistral4", "Mistral4ForCausalLM"),
    _entry("mistral_large4", "MistralLarge4ForConditionalGeneration", "no text-only class",
           text_config={**SHARED_INDEXER, "no_rope_layers": [1, 0, 1]}, vision_config={"num_hidden_layers": 1}),
    # sigmoid plus a correction bias, in groups
    _entry("deepseek_v3", "DeepseekV3ForCausalLM"),
    _entry("deepseek_v32", "DeepseekV32ForCausalLM"),
    _entry("axk1", "AXK1ForCausalLM"),
    _entry("axk2", "AXK2ForCausalLM", gated_norm_rank=4),
    _entry("bailing_hybrid", "BailingHybridForCausalLM", **LINEAR_FULL),
    _entry("beam", "BeamForCausalLM", "scaling factor on the sum of the experts", **SLIDE_FULL, **DENSE_FIRST),
    _entry("dots1", "Dots1ForCausalLM", **FULL_SLIDE),
    _entry("dots3_note_text", "Dots3NoteForCausalLM", layer_types=[INDEXED, SLIDE, INDEXED], head_dim=24,
           swa_num_attention_heads=4, swa_num_key_value_heads=4, swa_q_lora_rank=24, swa_kv_lora_rank=16,
           swa_head_dim=24, swa_qk_nope_head_dim=16, swa_v_head_dim=16, shared_experts_intermediate_size=32),
    _entry("exaone_moe", "ExaoneMoeForCausalLM", **SLIDE_FULL),
    _entry("glm4_moe", "Glm4MoeForCausalLM"),
    _entry("glm4_moe_lite", "Glm4MoeLiteForCausalLM"),
    _entry("glm4v_moe", "Glm4vMoeForConditionalGeneration", "no text-only class",
           text_config={"rope_parameters": _mrope(1, 1, 2, partial_rotary_factor=0.5)}),
    _entry("glm5_next", "Glm5NextForConditionalGeneration", "no text-only class; hyper-connections",
           text_config={**DENSE_FIRST, **SHARED_INDEXER, **HYPER_CONNECTIONS, "index_kpool": 2, "qk_rope_head_dim": 0,
                        "layer_types": [LINEAR, INDEXED, INDEXED]},
           vision_config={"projection_intermediate_size": 32}),
    _entry("glm_moe_dsa", "GlmMoeDsaForCausalLM", **SHARED_INDEXER),
    _entry("hy_v4", "HYV4ForCausalLM", "a pair goes from layer to layer", **SHARED_INDEXER, hc_mult=2),
    _entry("kimi_linear", "KimiLinearForCausalLM", **LINEAR_FULL),
    _entry("mimo_v2_flash", "MiMoV2FlashForCausalLM"),
    _entry("nemotron_h", "NemotronHForCausalLM", "experts have no gate: up_proj, down_proj",
           layers_block_type=[LINEAR, "moe", FULL, "moe", "mlp"], ssm_state_size=8, mamba_num_heads=4,
           mamba_head_dim=16, n_groups=2, chunk_size=8, use_mamba_kernels=False,
           moe_shared_expert_intermediate_size=32),
    _entry("solar_open", "SolarOpenForCausalLM"),
    # sigmoid, most with a correction bias
    _entry("afmoe", "AfmoeForCausalLM", "router weight is router.gate.weight", **SLIDE_FULL),
    _entry("deepseek_v4", "DeepseekV4ForCausalLM", "layer 0 routes by token id: gate.tid2eid [vocab, k]",
           num_hidden_layers=4, num_key_value_heads=1, mlp_layer_types=["hash_moe", "moe", "moe", "moe"],
           layer_types=[SLIDE, "heavily_compressed_attention"] + ["compressed_sparse_attention"] * 2,
           compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
           o_groups=2, o_lora_rank=8, **HYPER_CONNECTIONS),
    _entry("flint", "FlintForCausalLM", **FULL_SLIDE, mlp_only_layers=[0]),
    _entry("hy_v3", "HYV3ForCausalLM"),
    _entry("inkling2_text", "Inkling2ForCausalLM", **INKLING, unpadded_vocab_size=150, n_layers_per_attn_res_block=2),
    _entry("inkling_text", "InklingForCausalLM", "router rows E.. weigh the shared experts", **INKLING,
           n_shared_experts=2, dense_mlp_idx=1, logits_mup_width_multiplier=1.0),
    _entry("kolibri1", "Kolibri1ForCausalLM", "correction bias on logits", **SLIDE_FULL),
    _entry("laguna", "LagunaForCausalLM", **FULL_SLIDE),
    _entry("lfm2_moe", "Lfm2MoeForCausalLM", layer_types=["conv", FULL, "conv"]),
    _entry("minimax_m2", "MiniMaxM2ForCausalLM"),
    _entry("minimax_m3_vl_text", "MiniMaxM3VLForCausalLM", **DENSE_FIRST, rotary_dim=8, index_block_size=4,
           index_topk_blocks=2, layer_types=[FULL, "minimax_m3_sparse", "minimax_m3_sparse"]),
    _entry("muse_spark", "MuseSparkForConditionalGeneration", "no text-only class; experts work in moe_hidden_size",
           text_config={**SLIDE_FULL, "moe_hidden_size": 32, "output_multiplier": 1.0}, projector_hidden_size=32,
           vision_config={"num_hidden_layers": 1, "pos_emb_height": 4, "pos_emb_width": 4},
           audio_config={"patch_sizes": [4], "hidden_sizes": [8], "depths": [1], "num_hidden_layers": 1}),
    # kinds of their own
    _entry("phimoe", "PhimoeForCausalLM", "sparsemixer"),
    _entry("zaya", "ZayaForCausalLM", "router is an MLP of E + 1 outputs, the last skips",
           num_experts_per_tok=1, router_hidden_size=16, layer_types=["hybrid", "hybrid_sliding", "hybrid"]),
    _entry("llama4_text", "Llama4ForCausalLM", "no contract; the experts' input is multiplied by the score",
           moe_layers=[1, 2], no_rope_layers=[1, 1, 0], attention_chunk_size=8, intermediate_size=24,
           intermediate_size_mlp=40),
]
ZOO: dict[str, Entry] = {entry.model_type: entry for entry in _ENTRIES}

_WHOLE = [
    _whole("aria", "AriaForConditionalGeneration", "aria_text", projector_patch_to_query_dict={4: 2},
           vision_config={"num_hidden_layers": 1, "image_size": 28, "patch_size": 14}),
    _whole("dots3_note", "Dots3NoteForConditionalGeneration", "dots3_note_text",  # its vision tower has experts too
           vision_config={"num_hidden_layers": 2, "pyramid_num_routed": [-1, 4], "adapter_in_dim": 64,
                          "adapter_out_dim": 64},
           audio_config={"feature_size": 8, "downsample_hidden_size": 8, "adapter_input_size": 64,
                         "adapter_out_dim": 64}),
    _whole("gemma4", "Gemma4ForConditionalGeneration", "gemma4_text", vision_config=GEMMA_VISION, audio_config=None),
    _whole("inkling_mm_model", "InklingForConditionalGeneration", "inkling_text", vision_config={"patch_size": 8}),
    _whole("inkling2", "Inkling2ForConditionalGeneration", "inkling2_text",
           vision_config={"num_hidden_layers": 1, "text_hidden_size": 64, "projection_hidden_dim": 32,
                          "posemb_grid_size": 4, "patch_size": 4}),
    _whole("llama4", "Llama4ForConditionalGeneration", "llama4_text",
           vision_config={"num_hidden_layers": 1, "image_size": 28, "vision_output_dim": 32, "projector_input_dim": 32,
                          "projector_output_dim": 32}),
    _whole("minimax_m3_vl", "MiniMaxM3SparseForConditionalGeneration", "minimax_m3_vl_text", projector_hidden_size=32,
           vision_config={"num_hidden_layers": 1}),
    _whole("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe_text",
           vision_config={"num_position_embeddings": 16}),
    _whole("qwen4_exp", "Qwen4ExpForConditionalGeneration", "qwen4_exp_text",
           vision_config={"num_position_embeddings": 16}),
]
# fmt: on

MULTIMODAL: dict[str, Entry] = {entry.model_type: entry for entry in _WHOLE}

# Experts classes with the contract that no model here runs, and why.
EXCUSED: dict[str, str] = {
    "Qwen3OmniMoeTalkerTextExperts": "the talker makes speech codes from the thinker's hidden states: not a text model",
}


def build(model_type: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """The tiny model of a family in eval mode; the same seed gives the same weights.

    Nothing is left at a value that hides a mistake: norms are not ones, biases and correction biases are not zero,
    and router logits are spread so that tokens choose different experts. `changes` go to the config.
    """
    entry = (ZOO | MULTIMODAL)[model_type]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, entry.model_class)(entry.config(**changes)).eval()
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(5.0)  # tokens stay apart in the residual stream
            distinct = {tensor.data_ptr(): (name, tensor) for name, tensor in model.state_dict().items()}
            for name, tensor in distinct.values():
                _enliven(name, tensor, getattr(model.config, "n_routed_experts", EXPERTS))
    if dtype != torch.float32:  # loading, unlike `.to`, keeps in fp32 what the family keeps in fp32
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            model = type(model).from_pretrained(folder, dtype=dtype).eval()
    return model


def _enliven(name: str, tensor: Tensor, experts: int) -> None:
    if name.endswith("tid2eid"):  # token id -> its experts
        tensor.copy_(torch.rand(len(tensor), experts).argsort(dim=-1)[:, : tensor.shape[-1]])
    elif name.endswith("balancing_biases"):  # zaya: loading resets the null expert's to -1; the others' make it chosen
        tensor[:-1] = torch.randn_like(tensor[:-1]) * 0.1 - 0.8
    elif tensor.is_floating_point() and tensor.numel() and tensor.min() == tensor.max():
        tensor.add_(torch.randn_like(tensor) * 0.1)
    elif "router_mlp" in name:
        tensor.mul_(5.0)
    elif re.search(r"\.(gate|router)\.(\w+\.)*weight$", name) and tensor.dim() == 2:
        tensor.mul_(3.0)


def save(model_type: str, folder: str | Path, seed: int = 0, **kwargs: Any) -> Path:
    """Write the family's tiny model as `save_pretrained` does, under the family's own names on disk."""
    build(model_type, seed).save_pretrained(folder, **kwargs)
    return Path(folder)


def inputs(model_type: str, batch: int = 2, length: int = 12, seed: int = 1) -> dict[str, Tensor]:
    """What to call the model with: random token ids [batch, length], none of them special."""
    generator = torch.Generator().manual_seed(seed)
    names = ["input_ids", "decoder_input_ids"] if model_type == "diffusion_gemma" else ["input_ids"]
    return {name: torch.randint(3, 150, (batch, length), generator=generator) for name in names}


if __name__ == "__main__":
    import zoo_probe

    zoo_probe.main()
