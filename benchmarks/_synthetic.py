"""Qwen3-MoE checkpoints of any size with a structured routing, for benchmarks that need one larger than refmoe.

Each token id belongs to a few clusters, and the router's rows are those clusters' directions, so tokens use different
experts, about equally often; what the layers add to the residual stream moves the choice from layer to layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zlib import crc32


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen3-MoE model; `experts` experts a layer, `chosen` of them for each token."""

    hidden: int = 1024
    inner: int = 768
    experts: int = 32
    chosen: int = 4
    heads: int = 16
    kv_heads: int = 4
    head: int = 64
    vocabulary: int = 4096

    def config(self, layers: int) -> dict[str, Any]:
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "dtype": "bfloat16",
            "hidden_size": self.hidden,
            "moe_intermediate_size": self.inner,
            "intermediate_size": self.inner,
            "num_experts": self.experts,
            "num_experts_per_tok": self.chosen,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "num_hidden_layers": layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": False,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "bos_token_id": 0,
            "eos_token_id": 0,
        }

    def products(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of a layer's dense weights."""
        q, kv = self.heads * self.head, self.kv_heads * self.head
        return {"q": (q, self.hidden), "k": (kv, self.hidden), "v": (kv, self.hidden), "o": (self.hidden, q)}

    def layer_bytes(self) -> int:
        dense = sum(rows * columns for rows, columns in self.products().values()) + self.experts * self.hidden
        return 2 * (dense + 3 * self.experts * self.hidden * self.inner)


def make(folder: Path, layers: int, shape: Shape) -> None:
    """Write a checkpoint, tensor by tensor; layer i is the same in every depth."""
    from moekit import refmoe
    from moekit.checkpoint.writer import Make, OutTensor, write_checkpoint

    def tensors() -> Iterator[OutTensor]:
        for name, (size, fn) in _weights(layers, shape).items():
            yield OutTensor(name, "BF16", size, Make(fn))

    source = refmoe.model_path()
    sides = [(source / x, Path(x)) for x in ("tokenizer.json", "tokenizer_config.json", "generation_config.json")]
    folder.parent.mkdir(parents=True, exist_ok=True)
    job = {"benchmark": "stream", "shape": asdict(shape), "layers": layers}
    write_checkpoint(folder, list(tensors()), shape.config(layers), sides, job=job, shard_bytes=1 << 30, overwrite=True)


def _weights(layers: int, shape: Shape) -> dict[str, tuple[tuple[int, ...], Callable]]:
    """Name -> (shape, function that makes it). Experts add a tenth of the residual stream's size in each layer."""
    import torch

    D, F, E = shape.hidden, shape.inner, shape.experts

    def normal(seed: str, rows: int, columns: int, scale: float) -> torch.Tensor:
        generator = torch.Generator().manual_seed(crc32(seed.encode()))
        return torch.randn(rows, columns, generator=generator).mul_(scale).bfloat16()

    centres_ED = torch.linalg.qr(torch.randn(D, E, generator=torch.Generator().manual_seed(1)))[0].T * D**0.5

    def embeddings() -> torch.Tensor:
        generator = torch.Generator().manual_seed(2)
        rank_VE = torch.rand(shape.vocabulary, E, generator=generator).argsort(1).argsort(1)
        noise_VD = torch.randn(shape.vocabulary, D, generator=generator)
        return (0.6 ** rank_VE.float() @ centres_ED + 0.3 * noise_VD).bfloat16()

    def router(layer: int) -> torch.Tensor:
        order = torch.randperm(E, generator=torch.Generator().manual_seed(100 + layer))
        return (centres_ED[order] * 6 / D).bfloat16()

    def ones(size: int) -> tuple[tuple[int, ...], Callable]:
        return (size,), lambda: torch.ones(size, dtype=torch.bfloat16)

    def random(name: str, rows: int, columns: int, scale: float) -> tuple[tuple[int, ...], Callable]:
        return (rows, columns), lambda: normal(name, rows, columns, scale)

    out = {"model.embed_tokens.weight": ((shape.vocabulary, D), embeddings)}
    for i in range(layers):
        at = f"model.layers.{i}"
        for norm, size in (
            ("input_layernorm", D),
            ("post_attention_layernorm", D),
            ("self_attn.q_norm", shape.head),
            ("self_attn.k_norm", shape.head),
        ):
            out[f"{at}.{norm}.weight"] = ones(size)
        for name, (rows, columns) in shape.products().items():
            out[f"{at}.self_attn.{name}_proj.weight"] = random(f"{i} {name}", rows, columns, 0.5 * columns**-0.5)
        out[f"{at}.mlp.gate.weight"] = (E, D), lambda i=i: router(i)
        for e in range(E):
            for name, rows, columns in (("gate", F, D), ("up", F, D), ("down", D, F)):
                key = f"{at}.mlp.experts.{e}.{name}_proj.weight"
                out[key] = random(f"{i} {e} {name}", rows, columns, (0.3 if name == "down" else 1) * columns**-0.5)
    out["model.norm.weight"] = ones(D)
    out["lm_head.weight"] = random("head", shape.vocabulary, D, D**-0.5)
    return out
