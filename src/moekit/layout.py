"""What an MoE checkpoint is, as frozen plain data: layers, experts, routers, tensors. Knows nothing of torch.

A `Layout` is made once by `moekit.families` from config and safetensors headers; everything else (statistics, plans,
baking, reports) reads it and never looks at a config or a model class again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import NamedTuple


class ExpertId(NamedTuple):
    """One routed expert: decoder layer index and its number in that layer; written `L.E`, as in `12.87`."""

    layer: int
    expert: int

    def __str__(self) -> str:
        return f"{self.layer}.{self.expert}"


@dataclass(frozen=True)
class Router:
    """How a layer chooses and weighs experts.

    Attributes:
        score: function from logits to scores: "softmax", "sigmoid", "sparsemixer", "softplus-sqrt", ...
        order: "score, top-k" or "top-k, score" (what the family's code does first), or "table, score" (a fixed table
            says which experts a token id gets; scores only weigh them).
        renormalised: the weights of the chosen experts sum to `scaling` (for softmax this makes both orders equal).
        scaling: constant factor on the weights.
        groups: number of expert groups that selection is limited by (1: no groups).
        groups_kept: groups that remain per token.
        correction_bias: a per-expert bias that changes the selection but not the weights.
        logit_bias: the router's linear map has a bias.
        expert_scale: a learned factor of each expert multiplies its weights.
        weighs_input: the weight multiplies the expert's input (Llama 4) rather than its output.
    """

    score: str
    order: str = "score, top-k"
    renormalised: bool = False
    scaling: float = 1.0
    groups: int = 1
    groups_kept: int = 1
    correction_bias: bool = False
    logit_bias: bool = False
    expert_scale: bool = False
    weighs_input: bool = False

    @property
    def follows_logits(self) -> bool:
        """Whether the chosen experts are always those of the k largest logits (nothing else decides)."""
        return not (self.correction_bias or self.groups > 1 or self.order.startswith("table"))

    def describe(self) -> str:
        """One line for people, as `sigmoid + correction bias, 4 of 8 groups, top-k, renormalised, x 2.5`."""
        words = [self.score + (" + correction bias" if self.correction_bias else "")]
        if self.groups > 1:
            words.append(f"{self.groups_kept} of {self.groups} groups")
        first = self.order.partition(",")[0]
        words = [*words, "top-k"] if first == "score" else ["by token id" if first == "table" else first, *words]
        if self.renormalised:
            words.append("renormalised")
        if self.scaling != 1.0:
            words.append(f"x {self.scaling:g}")
        if self.expert_scale:
            words.append("x a learned scale per expert")
        if self.weighs_input:
            words.append("weights the expert's input")
        return ", ".join(words)


@dataclass(frozen=True)
class ExpertTensor:
    """A tensor on disk that holds something of a layer's experts.

    Attributes:
        name: its name in the safetensors files.
        role: "expert" (weights, biases, scales of experts), "router" (rows, biases, correction biases) or "table" (its
            values are expert numbers; it has no expert axis).
        expert: the expert that it belongs to, for checkpoints with one tensor per expert; None when fused.
        axis: the axis that counts experts, for fused and router tensors; None for per-expert tensors.
    """

    name: str
    role: str
    expert: int | None = None
    axis: int | None = None


@dataclass(frozen=True)
class MoELayer:
    """One MoE layer.

    Attributes:
        index: position among the decoder layers.
        path: module path of the decoder layer in the stock transformers model.
        experts_path: module path of its experts.
        router_path: module path of its router.
        router_width: rows of the router: E, or more where it also scores shared or null experts.
        correction_biases: model keys of biases that change the selection but not the weights.
        tables: model keys of tables from token ids to experts.
        width: D, size of what the experts take and give; the hidden size but in families that project before and after.
        num_experts: E, routed experts.
        top_k: k, experts chosen per token.
        router: how they are chosen.
        inner_size: I, the experts' intermediate size.
        shared_experts: number of always-active shared experts (0: none).
        tensors: the tensors on disk that have an expert dimension.
        expert_bytes: bytes on disk of one routed expert.
        mtp: a multi-token-prediction layer: on disk, not run by the stock model.
        output_bias: the experts' last step adds a bias of its own to each.
        constants: experts whose output is a constant vector, ascending (MoNE).
    """

    index: int
    path: str
    experts_path: str
    router_path: str
    router_width: int
    correction_biases: tuple[str, ...]
    num_experts: int
    top_k: int
    router: Router
    inner_size: int
    shared_experts: int
    tensors: tuple[ExpertTensor, ...] = field(repr=False)
    expert_bytes: int = 0
    mtp: bool = False
    tables: tuple[str, ...] = ()
    width: int = 0
    output_bias: bool = False
    constants: tuple[int, ...] = ()


@dataclass(frozen=True)
class Part:
    """Bytes on disk and number of parameters of one part of a model."""

    bytes: int = 0
    params: int = 0

    def __add__(self, other: Part) -> Part:
        return Part(self.bytes + other.bytes, self.params + other.params)


@dataclass(frozen=True)
class Layout:
    """A whole MoE model, understood.

    Attributes:
        family: the transformers `model_type` whose code runs it.
        text_family: the same of its language model (unlike `family` in multimodal models).
        architecture: the transformers class.
        hidden_size: d.
        num_layers: decoder layers, dense ones included, multi-token-prediction layers not.
        vocab_size: number of token ids.
        dtype: the dtype that most bytes have on disk ("bfloat16", "float8_e4m3fn", ...).
        quantisation: None, "fp8", "mxfp4", "int4" and the like, "int-mixed", or "moekit" (packed by moekit).
        layers: the MoE layers in order (multi-token-prediction ones last).
        parts: "experts", "shared experts", "routers", "attention", "dense MLP", "embeddings", "other", "mtp".
        active_params: parameters that take part in one token.
        expert_count_keys: dotted config keys that state the number of experts (all are rewritten together).
        tied_embeddings: input embedding and output head are one tensor.
        cannot_run: why moekit cannot run this model; "" when it can.
        cannot_drop: why experts cannot be removed from this model; "" when they can.
    """

    family: str
    text_family: str
    architecture: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    dtype: str
    quantisation: str | None
    layers: tuple[MoELayer, ...]
    parts: Mapping[str, Part]
    active_params: int
    expert_count_keys: tuple[str, ...]
    tied_embeddings: bool = False
    cannot_run: str = ""
    cannot_drop: str = ""

    @cached_property
    def by_index(self) -> dict[int, MoELayer]:
        """MoE layers by decoder layer index."""
        return {layer.index: layer for layer in self.layers}

    @property
    def routed(self) -> tuple[MoELayer, ...]:
        """The MoE layers that the stock model runs (multi-token-prediction layers left out)."""
        return tuple(layer for layer in self.layers if not layer.mtp)

    @property
    def total(self) -> Part:
        """Bytes and parameters of everything."""
        return sum(self.parts.values(), Part())

    @cached_property
    def hash(self) -> str:
        """16 hex digits that name this structure (not its weights): plans and statistics carry it."""
        rows = [
            [x.index, x.num_experts, x.top_k, x.inner_size, x.shared_experts, asdict(x.router)]
            + ([list(x.constants)] if x.constants else [])
            for x in self.layers
        ]
        text = json.dumps([self.family, self.hidden_size, self.num_layers, self.vocab_size, rows], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_dict(self) -> dict:
        """Plain data for JSON: everything but the tensor lists."""
        bare = replace(self, layers=tuple(replace(layer, tensors=()) for layer in self.layers))
        out = asdict(bare)
        out["layers"] = [{key: value for key, value in row.items() if key != "tensors"} for row in out["layers"]]
        total = self.total
        return out | {"hash": self.hash, "total_bytes": total.bytes, "total_params": total.params}

    @classmethod
    def from_dict(cls, data: Mapping) -> Layout:
        """A layout from what `to_dict` gave: equal in hash, without the tensor lists (enough to plan, not to bake)."""
        names = {x.name for x in fields(cls)}
        rows = [
            MoELayer(
                **{
                    **row,
                    "router": Router(**row["router"]),
                    "correction_biases": tuple(row["correction_biases"]),
                    "tables": tuple(row["tables"]),
                    "constants": tuple(row.get("constants", ())),
                    "tensors": (),
                }
            )
            for row in data["layers"]
        ]
        known = {key: value for key, value in data.items() if key in names}
        known |= {
            "layers": tuple(rows),
            "parts": {key: Part(**value) for key, value in data["parts"].items()},
            "expert_count_keys": tuple(data["expert_count_keys"]),
        }
        return cls(**known)
