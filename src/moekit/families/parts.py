"""Multi-token-prediction layers, and what a model's bytes and parameters are spent on."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from math import prod

from moekit.checkpoint.reader import Checkpoint, TensorInfo
from moekit.families.names import COMPANIONS, FACTORED_SUFFIX, PACKED_SUFFIX, Placement, natural_key, quantised_suffix
from moekit.layout import ExpertTensor, MoELayer, Part


def mtp_layers(checkpoint: Checkpoint, layers: list[MoELayer], unused: list[str], num_layers: int) -> list[MoELayer]:
    """Multi-token-prediction layers: on disk, shaped like the MoE layers, unknown to the stock model.

    They are numbered on from the `num_layers` decoder layers.
    """
    template = layers[-1]
    anchor = template.tensors[0].name
    for at in re.finditer(rf"\.{template.index}\.", anchor):
        tails = {x.name[at.end() :]: x for x in template.tensors if x.name.startswith(anchor[: at.end()])}
        if len(tails) == len(template.tensors):
            break
    else:
        return []
    found: dict[str, list[ExpertTensor]] = defaultdict(list)
    for name in unused:
        for match in re.finditer(r"\.\d+\.", name):
            if name[match.end() :] in tails:
                found[name[: match.end()]].append(replace(tails[name[match.end() :]], name=name))
                break
    out = []
    for offset, prefix in enumerate(sorted(found, key=natural_key)):
        tensors = tuple(found[prefix])
        if any(x.role == "expert" for x in tensors):
            size = sum(checkpoint.tensors[x.name].bytes for x in tensors if x.role == "expert") // template.num_experts
            out.append(
                replace(
                    template,
                    index=num_layers + offset,
                    path=prefix.rstrip("."),
                    tensors=tensors,
                    expert_bytes=size,
                    mtp=True,
                )
            )
    return out


def _params(info: TensorInfo, placement: Placement | None, bits: int) -> int:
    """Parameters that a tensor holds; scales and shapes of quantised weights are none."""
    suffix = placement.suffix if placement else quantised_suffix(info.name)
    if suffix == "_blocks":
        return 2 * info.bytes  # two 4-bit values a byte
    if suffix == PACKED_SUFFIX and bits:
        return 8 * info.bytes // bits
    return 0 if suffix in COMPANIONS else prod(info.shape)


def _packed_params(placed: dict[str, Placement], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Parameters of packed weights by name: all of a model's parameter with the first of its tensors, none with others.

    How many there are is not to be seen from words of unknown bits; of factors, it is what they are multiplied out.
    """
    packed = {x.key for x in placed.values() if x.suffix in (PACKED_SUFFIX, FACTORED_SUFFIX)}
    out, seen = {}, set()
    for placement in placed.values():
        if placement.key in packed:
            out[placement.name] = 0 if placement.key in seen else prod(shapes[placement.key])
            seen.add(placement.key)
    return out


def count_parts(
    checkpoint: Checkpoint,
    placed: dict[str, Placement],
    unused: list[str],
    layers: list[MoELayer],
    layers_path: str,
    num_layers: int,
    shapes: Mapping[str, tuple[int, ...]],
    bits: int = 0,
) -> dict[str, Part]:
    """Bytes and parameters by part.

    Args:
        checkpoint: headers are enough.
        placed: tensors that the stock model uses, with their place.
        unused: those that it does not use.
        layers: the MoE layers, multi-token-prediction ones included.
        layers_path: module path of the list of decoder layers.
        num_layers: its length.
        shapes: of the model's parameters, by key.
        bits: of packed weights that the stock model does not use; 0 where that is not known.
    """
    roles = {
        x.name: "experts" if x.role == "expert" else "routers"
        for layer in layers
        if not layer.mtp
        for x in layer.tensors
    }
    extra = {layer.path + "." for layer in layers if layer.mtp}
    parts = dict.fromkeys(
        ("experts", "shared experts", "routers", "attention", "dense MLP", "embeddings", "other", "mtp"), Part()
    )
    unused_names = set(unused)
    packed = _packed_params(placed, shapes)
    for name, info in checkpoint.tensors.items():
        if name in unused_names:
            part = "mtp" if _is_mtp(name, extra, num_layers) else "other"
        elif name in roles:
            part = roles[name]
        else:
            part = part_of(placed[name].key, layers_path)
        parts[part] += Part(info.bytes, packed[name] if name in packed else _params(info, placed.get(name), bits))
    return parts


def _is_mtp(name: str, prefixes: set[str], num_layers: int) -> bool:
    """Whether a tensor that the stock model does not use belongs to a multi-token-prediction layer."""
    number = re.search(r"layers\.(\d+)\.", name)
    beyond = number is not None and int(number.group(1)) >= num_layers
    return beyond or "mtp" in name or name.startswith(tuple(prefixes))


def part_of(key: str, layers_path: str) -> str:
    """The part that a parameter which is no expert's and no router's counts to."""
    if not key.startswith(layers_path + "."):
        return "embeddings" if re.search(r"embed|lm_head|wte", key) else "other"
    local = key.removeprefix(layers_path + ".")
    if "norm" in local.rsplit(".", 2)[-2]:
        return "other"
    if "shared" in local:
        return "shared experts"
    if re.search(r"attn|attention|mamba|mixer|conv|kda|gdn|delta", local):
        return "attention"
    return "dense MLP" if re.search(r"mlp|feed_forward|ffn", local) else "other"


def active_params(parts: dict[str, Part], layers: list[MoELayer]) -> int:
    """Parameters that take part in one token: k of E experts, and everything else but multi-token prediction."""
    routed = [layer for layer in layers if not layer.mtp]
    share = sum(layer.top_k for layer in routed) / sum(layer.num_experts for layer in routed)
    rest = sum(part.params for name, part in parts.items() if name not in ("experts", "mtp"))
    return rest + round(parts["experts"].params * share)
