"""Whether a model's decoder is plain, and where its parts are: so that a kernel can run a token through it at once.

    h += attention(norm(h));  h += experts(norm(h)) or mlp(norm(h))

with root-mean-square norms, grouped-query attention over all tokens, rotary positions, and routers that take the
largest of softmax or sigmoid scores. Parts are found by their names and shapes, which is a guess: `plain_parts` only
says what to try. Whoever uses it compares with the stock code (`moekit.serve.token`), and leaves a model alone whose
numbers differ: multipliers and whatever else a family does beside that are found out so. What acts only on large
numbers or long texts is looked for in the config (`SOMETIMES`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from moekit.families.caches import RoomyLayer
from moekit.families.family import Family
from moekit.families.resident import empty_cache
from moekit.layout import Layout, MoELayer

SOMETIMES = ("softcap", "clip", "clamp", "limit", "sliding_window", "chunk_size")  # settings that a trial cannot see
EVEN_ROTATIONS = ("default", "linear", "llama3", "yarn")  # whose angles depend on a token's own place alone


@dataclass(frozen=True)
class Mlp:
    """A gated MLP: down(act(gate(x)) * up(x))."""

    gate: nn.Module
    up: nn.Module
    down: nn.Module
    act: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class PlainLayer:
    """The parts of one decoder layer.

    Attributes:
        module: the layer.
        norms: before attention, and before experts or MLP.
        qkvo: its projections.
        head_norms: of queries and keys; None where there are none.
        router: weight [E, D], and bias; None in a dense layer.
        correction: added to scores for the choice; None.
        mlp: of a dense layer, or the shared expert; None.
        mlp_gate: a row whose sigmoid opens the shared expert; None.
    """

    module: nn.Module
    norms: tuple[nn.Module, nn.Module]
    qkvo: tuple[nn.Module, nn.Module, nn.Module, nn.Module]
    head_norms: tuple[nn.Module, nn.Module] | None
    router: tuple[torch.Tensor, torch.Tensor | None] | None
    correction: torch.Tensor | None
    mlp: Mlp | None
    mlp_gate: nn.Module | None


@dataclass(frozen=True)
class Plain:
    """A plain decoder.

    Attributes:
        layers: in order.
        norm: the last one.
        output: the vocabulary's matrix.
        embed: what makes hidden states of token ids.
        rotate: (hidden states, position ids [1, T]) -> cosines and sines [1, T, R].
        heads: of queries.
        kv_heads: of keys and values.
        head: size of one.
        scaling: of scores.
        round_weights: the router gives its weights in bfloat16.
    """

    layers: tuple[PlainLayer, ...]
    norm: nn.Module
    output: nn.Module
    embed: nn.Module
    rotate: Callable[..., Any]
    heads: int
    kv_heads: int
    head: int
    scaling: float
    round_weights: bool


def plain_parts(model: PreTrainedModel, layout: Layout, family: Family) -> Plain | None:
    """The parts of a decoder that may be plain; None where it cannot be."""
    try:
        return _parts(model, layout, family)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, StopIteration):
        return None  # something is not there, or not what it would have to be


def _parts(model: PreTrainedModel, layout: Layout, family: Family) -> Plain | None:
    config = model.config.get_text_config()
    path = layout.routed[0].path.rpartition(".")[0]
    decoder = model.get_submodule(path.rpartition(".")[0])
    stack = model.get_submodule(path)
    rotary = decoder.rotary_emb
    sometimes = any(value and any(x in name for x in SOMETIMES) for name, value in config.to_dict().items())
    if rotary.rope_type not in EVEN_ROTATIONS or sometimes or not family.by_contract:
        return None
    layers = tuple([_layer(model, x, layout.by_index.get(i)) for i, x in enumerate(stack)])
    attention = _attention(stack[0])
    head = attention.head_dim
    q, k = layers[0].qkvo[:2]
    weights: list[torch.Tensor] = []
    router = model.get_submodule(layout.routed[0].router_path)
    hook = router.register_forward_hook(lambda _, args, out: weights.append(family.routing(out)[0]))
    try:
        with torch.inference_mode():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long), past_key_values=empty_cache(model), use_cache=True)
    finally:
        hook.remove()
    return Plain(
        layers,
        decoder.norm,
        model.get_output_embeddings(),
        model.get_input_embeddings(),
        rotary,
        q.out_features // head,
        k.out_features // head,
        head,
        float(attention.scaling),
        weights[0].dtype == torch.bfloat16,
    )


def _attention(layer: nn.Module) -> nn.Module:
    return next(x for x in layer.children() if hasattr(x, "q_proj") and hasattr(x, "o_proj"))


def _layer(model: nn.Module, layer: nn.Module, moe: MoELayer | None) -> PlainLayer:
    attention = _attention(layer)
    first, second = (x for x in layer.children() if isinstance(getattr(x, "weight", None), torch.Tensor))
    norms = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None
    router = correction = gate = None
    if moe is None:
        mlp: Mlp | None = next(y for y in map(_mlp, layer.children()) if y is not None)
    else:
        module = model.get_submodule(moe.router_path)
        bias = getattr(module, "bias", None)
        router = (module.weight, bias)
        values = dict(model.named_parameters()) | dict(model.named_buffers()) if moe.correction_biases else {}
        correction = next((values[name] for name in moe.correction_biases), None)
        block = model.get_submodule(moe.experts_path.rpartition(".")[0])
        mlps = [y for y in map(_mlp, block.children()) if y is not None]
        mlp = mlps[0] if mlps else None
        gates = [x for x in block.children() if isinstance(x, nn.Linear) and x.out_features == 1]
        gate = gates[0] if gates else None
        if len(mlps) > 1 or len(mlps) != bool(moe.shared_experts):
            raise TypeError("another block of experts")
    qkvo = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    return PlainLayer(layer, (first, second), qkvo, norms, router, correction, mlp, gate)


def _mlp(module: nn.Module) -> Mlp | None:
    names = ("gate_proj", "up_proj", "down_proj")
    if not all(isinstance(getattr(module, x, None), nn.Module) for x in names):
        return None
    gate, up, down = (getattr(module, x) for x in names)
    return Mlp(gate, up, down, module.act_fn)


def norm_of(module: nn.Module) -> tuple[int, float, torch.Tensor]:
    """(Kind as kernels know it, epsilon, factors) of a root-mean-square norm, by what it does.

    Raises:
        ValueError: it does something else.
    """
    weight = module.weight.detach()
    x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).bfloat16()
    x[1:] *= torch.tensor([1e-3, 1.0, 10.0]).bfloat16()[:, None]
    found = module(x)
    for eps in (getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)):
        plain = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        for factors in (weight.float(), 1 + weight.float()):
            for kind, right in enumerate(
                ((factors * plain.bfloat16().float()).bfloat16(), (factors * plain).bfloat16())
            ):
                if torch.equal(right, found):
                    return kind, float(eps), factors
    raise ValueError("another norm")


def roomy(cache: Any, columns: int) -> list[RoomyLayer] | None:
    """The layers of a cache of one text, each with room for the next column; None where they are of another kind.

    Args:
        cache: of keys and values, filled.
        columns: that are added when there is no room.
    """
    out = []
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, RoomyLayer) or not layer.is_initialized or len(layer.keys) != 1:
            return None
        layer.__class__ = RoomyLayer
        layer.reserve(columns)
        out.append(layer)
    return out
