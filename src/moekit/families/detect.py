"""detect(checkpoint) -> Layout: what an MoE checkpoint is, from its config and safetensors headers alone."""

from __future__ import annotations

import copy
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from moekit.checkpoint.reader import DTYPES, Checkpoint
from moekit.errors import ModelError
from moekit.families.checks import check_complete, check_experts, check_numbers
from moekit.families.constants import split_constants
from moekit.families.family import Family, family_of
from moekit.families.names import NameMap, Placement, disk_axis, grown_axes
from moekit.families.packings import OWN, PACKED, Packing, packing_of
from moekit.families.parts import active_params, count_parts, mtp_layers
from moekit.families.probe import Probed, probe_router
from moekit.families.stock import ExpertsAt, build, find_experts, load_config, quantisation
from moekit.layout import ExpertTensor, Layout, MoELayer

EXPERT_COUNT = re.compile(
    r"expert(?!.*(per_tok|top_?k|shared|size|dim|layer|freq|interval|step|group|capacity|null|hash|scale|width))"
)
TOWERS = re.compile(r"vision|visual|audio|talker")
SHARED_COUNT = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert")
GROUP_KEYS = (
    ("n_group", "topk_group"),
    ("num_expert_group", "topk_group"),
    ("num_groups", "topk_groups"),
    ("moe_n_group", "moe_topk_group"),
)


@dataclass
class Understanding:
    """A layout and what it was read from: the stock config, the weightless model, and where each tensor goes."""

    config: PretrainedConfig
    model: PreTrainedModel
    family: Family
    experts: list[ExpertsAt]
    placed: dict[str, Placement]
    unused: list[str]
    layout: Layout


def understand(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Understanding:
    """Read a checkpoint's structure.

    Raises:
        ModelError: dense, unknown family or type, remote code, or a refused quantisation.
        CheckpointError: parameters that the stock model needs are not on disk.
    """
    config = load_config(checkpoint.path, checkpoint.config, trust_remote_code)
    method = quantisation(config)
    family = family_of(config.get_text_config().model_type)
    model = build(config, trust_remote_code=trust_remote_code)
    tied = getattr(model, "all_tied_weights_keys", {})
    experts = [x for x in find_experts(model, family.is_experts) if f"{x.path}.down_proj" not in tied]
    if not experts:
        raise _no_experts(checkpoint, config)
    if len({x.layers_path for x in experts}) > 1:
        raise ModelError(
            "experts lie in several stacks of layers, which is not supported",
            where=checkpoint.path,
            got=sorted({x.layers_path for x in experts}),
        )
    names = NameMap(model)
    placed, unused = names.place_all(checkpoint.tensors)
    constants, unused = split_constants(unused, experts)
    check_complete(checkpoint, model, placed)
    check_numbers(checkpoint, model, placed)
    keys = expert_count_keys(config, {_num_experts(model, at) for at in experts})
    axes = grown_axes(names.shapes, _grown_shapes(config, keys, trust_remote_code))
    layers = _layers(checkpoint, config, model, family, experts, placed, axes, constants)
    stack = model.get_submodule(experts[0].layers_path)
    layers += mtp_layers(checkpoint, layers, unused, len(stack))
    packing = packing_of(config)
    bits = packing.bits if packing else 0
    parts = count_parts(checkpoint, placed, unused, layers, experts[0].layers_path, len(stack), names.shapes, bits)
    text = config.get_text_config()
    sizes: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        if not packing or DTYPES[info.dtype].is_floating_point:
            sizes[info.dtype] += info.bytes
    layout = Layout(
        family=config.model_type,
        text_family=text.model_type,
        architecture=type(model).__name__,
        hidden_size=text.hidden_size,
        num_layers=len(stack),
        vocab_size=text.vocab_size,
        dtype=str(DTYPES[sizes.most_common(1)[0][0]]).removeprefix("torch."),
        quantisation=method,
        layers=tuple(layers),
        parts=parts,
        active_params=active_params(parts, layers),
        expert_count_keys=keys,
        tied_embeddings=bool(getattr(text, "tie_word_embeddings", False)),
        cannot_run=family.cannot_run,
        cannot_drop=family.cannot_drop or family.cannot_run,
    )
    return Understanding(config, model, family, experts, placed, unused, layout)


def _no_experts(checkpoint: Checkpoint, config: PretrainedConfig) -> ModelError:
    claims = [
        key
        for key, value in _walk(config.to_dict())
        if EXPERT_COUNT.search(key.rpartition(".")[2]) and type(value) is int and value > 1
    ]
    if claims:
        return ModelError(
            f"the experts of the family {config.model_type!r} are not supported",
            where=checkpoint.path,
            expected="experts that follow the contract of transformers 5",
            got=f"{claims[0]} in the config, but no such module",
            fix="docs/families.md lists the families that work",
        )
    return ModelError(
        "this is a dense model: it has no experts",
        where=checkpoint.path,
        got=f"model_type {config.model_type!r}",
        fix="moekit works on Mixture-of-Experts models",
    )


def _num_experts(model: nn.Module, at: ExpertsAt) -> int:
    return model.get_submodule(at.path).down_proj.shape[0]


def _walk(settings: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _walk(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def expert_count_keys(config: PretrainedConfig, counts: set[int]) -> tuple[str, ...]:
    """Dotted config keys that state the number of routed experts, with the aliases that older readers know."""
    keys = []
    for dotted, value in _walk(config.to_dict()):
        name = dotted.rsplit(".", 1)[-1]
        numbers = value if isinstance(value, list) else [value]
        stated = EXPERT_COUNT.search(name) and not TOWERS.search(dotted)
        if stated and all(type(x) is int for x in numbers) and counts <= set(numbers):
            keys.append(dotted)
    if not keys:
        raise ModelError(
            "the config does not say how many experts there are", got=f"experts modules with {sorted(counts)} experts"
        )
    for dotted in list(keys):
        prefix, _, name = dotted.rpartition(".")
        owner = config
        for part in filter(None, prefix.split(".")):
            owner = getattr(owner, part)
        aliases = [
            alias
            for alias, real in (type(owner).attribute_map or {}).items()
            if real == name and EXPERT_COUNT.search(alias)
        ]
        keys += [f"{prefix}.{alias}" if prefix else alias for alias in aliases]
    return tuple(dict.fromkeys(keys))


def set_expert_count(settings: dict, keys: tuple[str, ...], count: int | list[int]) -> dict:
    """A copy of a config dict with the number of experts replaced under every key of `keys` (added where absent)."""
    out = copy.deepcopy(settings)
    for dotted in keys:
        *path, name = dotted.split(".")
        owner = out
        for part in path:
            owner = owner.setdefault(part, {})
        old = owner.get(name)
        owner[name] = [count] * len(old) if isinstance(old, list) and isinstance(count, int) else count
    return out


def _grown_shapes(
    config: PretrainedConfig, keys: tuple[str, ...], trust_remote_code: bool
) -> dict[str, tuple[int, ...]]:
    larger = copy.deepcopy(config)
    for dotted in keys:
        *path, name = dotted.split(".")
        owner = larger
        for part in path:
            owner = getattr(owner, part)
        value = getattr(config if not path else owner, name)
        if dotted in keys and name not in (type(owner).attribute_map or {}):
            setattr(owner, name, [2 * x for x in value] if isinstance(value, list) else 2 * value)
    grown = build(larger, trust_remote_code=trust_remote_code)
    return {key: tuple(tensor.shape) for key, tensor in grown.state_dict().items()}


def router_path(experts_path: str, keys: list[str]) -> str:
    """The module that routes for `experts_path`: the branch beside it that holds parameters with an expert axis."""
    experts = experts_path.split(".")
    best: tuple[int, str] = (0, "")
    for key in keys:
        parts = key.split(".")
        common = next((i for i, (a, b) in enumerate(zip(experts, parts, strict=False)) if a != b), len(experts))
        if common < len(experts) and common >= best[0] and len(parts) > common + 1:
            best = (common, ".".join(parts[: common + 1]))
    return best[1]


def _groups(config: PretrainedConfig) -> tuple[int, int]:
    text = config.get_text_config()
    for keys in GROUP_KEYS:
        total, kept = (getattr(text, key, None) or 0 for key in keys)
        if total > kept > 0:
            return total, kept
    return 1, 1


def _shared(config: PretrainedConfig, layer: nn.Module) -> int:
    if not any("shared" in name for name, _ in layer.named_parameters()):
        return 0
    text = config.get_text_config()
    counts = [getattr(text, key, None) for key in SHARED_COUNT]
    return next((x for x in counts if isinstance(x, int) and x > 0), 1)


def _layers(
    checkpoint: Checkpoint,
    config: PretrainedConfig,
    model: PreTrainedModel,
    family: Family,
    experts: list[ExpertsAt],
    placed: dict[str, Placement],
    axes: dict[str, int],
    constants: dict[int, dict[int, str]],
) -> list[MoELayer]:
    in_layer = defaultdict(list)
    depth = len(experts[0].layers_path.split("."))
    for placement in placed.values():
        parts = placement.key.split(".")
        if placement.key in axes and placement.key.startswith(experts[0].layers_path + ".") and parts[depth].isdigit():
            in_layer[int(parts[depth])].append(placement)
    probed: dict[tuple, Probed] = {}
    sizes = {key: tensor.shape[axes[key]] for key, tensor in model.state_dict().items() if key in axes}
    layers = []
    for at in experts:
        module = model.get_submodule(at.path)
        count, inner_size = module.down_proj.shape[0], _inner_size(module)
        block = at.path.rpartition(".")[0] + "."
        keys = [key for key in axes if key.startswith(block) and not key.startswith(at.path + ".")]
        where = router_path(at.path, keys)
        described = _probe(probed, family, model, config, where, count, axes)
        tables = tuple(f"{where}.{x}" for x in described.tables)
        mine = [x for x in in_layer[at.layer] if x.key.startswith(block)]
        mine = [x for x in mine if len(x.keys) == 1 or x.expert is None or x.expert < count]  # the rest are another set
        vectors = constants.get(at.layer, {})
        own = packing_of(config) == Packing(OWN)
        check_experts(checkpoint, mine, count, of_own_width=own, constants=vectors if own else {})
        tensors = [ExpertTensor(x.name, "table") for x in (placed.values() if tables else ()) if x.key in tables]
        expert_bytes = 0
        for placement in sorted(mine, key=lambda x: (x.key, x.expert or 0, x.name)):
            info = checkpoint.tensors[placement.name]
            is_expert = placement.key.startswith(at.path + ".")
            axis = disk_axis(placement, info.shape, axes[placement.key], sizes[placement.key])
            if axis is None and placement.expert is None:
                raise ModelError(
                    "cannot tell which axis of this tensor counts the experts",
                    where=f"{checkpoint.path}: {placement.name}",
                    got=list(info.shape),
                )
            tensors.append(ExpertTensor(placement.name, "expert" if is_expert else "router", placement.expert, axis))
            expert_bytes += info.bytes if is_expert else 0
        path = f"{at.layers_path}.{at.layer}"
        tensors += [ExpertTensor(name, "expert", expert) for expert, name in sorted(vectors.items())]
        layers.append(
            MoELayer(
                index=at.layer,
                path=path,
                experts_path=at.path,
                router_path=where,
                router_width=described.width,
                correction_biases=described.bias_keys(where),
                num_experts=count,
                top_k=described.top_k,
                router=described.router,
                inner_size=inner_size,
                width=module.down_proj[0].numel() // inner_size,
                shared_experts=_shared(config, model.get_submodule(path)),
                tensors=tuple(tensors),
                expert_bytes=expert_bytes // (count - len(vectors)),
                tables=tables,
                output_bias=family.biased(module),
                constants=tuple(sorted(vectors)),
            )
        )
    return layers


def _inner_size(experts: nn.Module) -> int:
    sizes = experts.down_proj.shape[1:]
    declared = [
        getattr(experts, name, None)
        for name in ("intermediate_dim", "intermediate_size", "expert_dim", "moe_intermediate_size")
    ]
    return next((x for x in declared if x is not None and x in sizes), min(sizes))


def _probe(
    probed: dict[tuple, Probed],
    family: Family,
    model: nn.Module,
    config: PretrainedConfig,
    where: str,
    count: int,
    axes: dict[str, int],
) -> Probed:
    module, block = model.get_submodule(where), model.get_submodule(where.rpartition(".")[0])
    scalars = tuple(
        sorted(
            (k, v)
            for k, v in vars(module).items()
            if isinstance(v, int | float | str | bool | None) and k != "layer_idx"
        )
    )
    signature = (type(module), scalars, count)
    if signature not in probed:
        local = {key.removeprefix(where + "."): axis for key, axis in axes.items() if key.startswith(where + ".")}
        try:
            hidden_size = config.get_text_config().hidden_size
            found = probe_router(family, module, block, count, hidden_size, _groups(config), local)
            probed[signature] = family.refine(found)
        except (TypeError, RuntimeError, ValueError, IndexError, KeyError) as error:
            raise ModelError(
                "this family's router is not understood",
                where=f"{type(model).__name__}: {where}",
                got=str(error)[:300],
                fix="see docs/families.md; please report it",
            ) from error
    return probed[signature]


def dtype_of(layout: Layout) -> torch.dtype:
    """The dtype in which the model runs: its own (of what is not packed), or bfloat16 for fp8 and mxfp4."""
    packed = layout.quantisation in (OWN, *PACKED)
    return torch.bfloat16 if layout.quantisation and not packed else getattr(torch, layout.dtype)
