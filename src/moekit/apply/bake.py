"""bake(checkpoint, plan) -> new checkpoint: a plan carried out on disk, from file to file, without loading a model.

Dropping experts never changes a number: tensors of one expert are left out or renumbered, fused tensors, router rows,
biases and quantisation scales are sliced along their expert axis, all else is copied byte for byte: fp8 and mxfp4
weights are never dequantised. Merging makes new numbers for the experts that stay, a layer at a time; quantising rounds
what is left after that, a tensor at a time. Multi-token-prediction layers share the number of experts with the rest of
the model, but no statistics tell which of theirs matter: they leave a model that loses experts.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path

import torch

from moekit import __version__
from moekit.apply.factor import DENSE_NOTE, factored_tensors
from moekit.apply.factor import NOTE as FACTORED_NOTE
from moekit.apply.made import MadeTensors
from moekit.apply.padding import bias_names, empty_places, fused, of_zeros
from moekit.apply.quantize import NOTE, OWN_NOTE, quantisation_config, quantised_tensors
from moekit.apply.standins import NOTE as STAND_INS_NOTE
from moekit.apply.standins import Readers, own_tensors, with_stand_ins
from moekit.checkpoint.place import write_text
from moekit.checkpoint.reader import Checkpoint, TensorInfo
from moekit.checkpoint.writer import STEM, Copy, Make, OutTensor, write_checkpoint
from moekit.errors import ModelError, OutputError
from moekit.families.detect import Understanding, set_expert_count
from moekit.families.loader import Loader
from moekit.families.packings import OWN, OWN_VERSION
from moekit.families.seam import reroute
from moekit.layout import ExpertTensor, MoELayer
from moekit.plans import Plan, PlanTensors
from moekit.plans.padding import Slots
from moekit.progress import Progress, silent

MTP_COUNT = re.compile(r"(nextn_predict|mtp).*layers")
NUMBER = re.compile(r"(\d+)")
PROVENANCE, PLAN = "moekit.json", "plan.json"
# The model's weights in another format: they would still be those of the model before.
OTHER_WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|gguf|onnx|onnx_data|h5|msgpack)(\.index\.json)?$")


@dataclass(frozen=True)
class Baked:
    """What `bake` made.

    Attributes:
        path: the new model's folder.
        bytes_before: of the source's tensors.
        bytes_after: of the new model's tensors.
        shards: safetensors files written.
        notes: what a reader should know.
    """

    path: Path
    bytes_before: int
    bytes_after: int
    shards: int
    notes: tuple[str, ...]


def bake(
    checkpoint: Checkpoint,
    understanding: Understanding,
    plan: Plan,
    out: str | Path,
    *,
    provenance: Mapping[str, object] | None = None,
    shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Baked:
    """Write the model that `plan` makes of a checkpoint; running it again after a kill goes on where it stopped.

    Beside weights and config the folder gets every side file of the source (tokenizer, templates, model card, licence),
    `plan.json`, and `moekit.json`, which says how it was made.

    Args:
        checkpoint: the source, with its files here.
        understanding: of that checkpoint.
        plan: what to do.
        out: a new or empty folder outside the source.
        provenance: JSON data for moekit.json: recipe, settings ...
        shard_bytes: largest size of a file.
        overwrite: replace a model that lies in `out`.
        progress: told of "bytes".

    Raises:
        PlanError: the plan does not fit, or its result would not load in stock transformers.
        ModelError: only headers of the source are here, or a tensor cannot be cut.
        OutputError: see `write_checkpoint`.
        CheckpointError: a file ends early.
    """
    if not checkpoint.local:
        raise ModelError("only this model's headers were fetched", where=checkpoint.path, fix="download it first")
    if Path(out).resolve().is_relative_to(checkpoint.path.resolve()):
        raise OutputError("the output lies in the model's own folder", where=out, fix="choose another folder")
    tensors = bake_tensors(checkpoint, understanding, plan)
    config, notes = baked_config(checkpoint, understanding, plan)
    sides = list(checkpoint.side_files())
    foreign = [x.as_posix() for x in sides if OTHER_WEIGHTS.search(x.name)]
    if foreign:
        notes.append(f"left out, weights of the source in another form: {', '.join(foreign)}")
    numbers = [PlanTensors(plan.tensors).digest] if plan.tensors else []
    numbers += [plan.padding] if plan.padding != "none" else []
    plan_hash = hashlib.sha256(json.dumps([op.model_dump() for op in plan.ops] + numbers).encode()).hexdigest()[:16]
    versions = {"moekit": __version__} | {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    source = {"name": checkpoint.path.name, "fingerprint": checkpoint.fingerprint, "layout": understanding.layout.hash}
    record = {"source": source, "plan": plan_hash, "versions": versions, "notes": notes} | dict(provenance or {})

    def finish(folder: Path) -> None:
        plan.model_copy(update={"tensors": ""}).save(folder / PLAN)  # what they held is in the weights now
        write_text(folder / PROVENANCE, json.dumps(record, indent=1))

    written = write_checkpoint(
        out,
        tensors,
        config,
        [(checkpoint.path / x, x) for x in sides if x.as_posix() not in foreign],
        job={"source": checkpoint.fingerprint, "plan": plan_hash, "moekit": __version__},
        stem=OWN if plan.own_form or understanding.layout.quantisation == OWN else STEM,
        shard_bytes=shard_bytes,
        overwrite=overwrite,
        progress=progress,
        finish=finish,
    )
    return Baked(written.path, checkpoint.bytes, written.bytes, written.shards, tuple(notes))


def bake_tensors(checkpoint: Checkpoint, understanding: Understanding, plan: Plan) -> list[OutTensor]:
    """The tensors that `plan` makes of a checkpoint, in the order in which the source is best read; reads nothing.

    Raises:
        PlanError: the plan does not fit, or its result would not load in stock transformers.
        ModelError: a tensor cannot be cut.
    """
    layout = understanding.layout
    plan.check_bakeable(layout)
    dropped = plan.dropped()
    dense = bool(plan.merges() or plan.values() or plan.holds() or plan.factored())
    readers: Readers = (
        MadeTensors(Loader(checkpoint, understanding), layout, plan).readers if dense else lambda index: {}
    )
    readers = with_stand_ins(readers, checkpoint, understanding, plan)
    gone = set(_mtp_tensors(understanding)) if _leaves_out_experts(plan) else set()
    new: dict[str, OutTensor] = {}
    extra: dict[str, list[OutTensor]] = defaultdict(list)  # experts of zeros, behind a tensor of another expert
    places = plan.places(layout)
    for layer in layout.routed:
        if layer.index in dropped:
            kept, made = places[layer.index], readers(layer.index)
            biases = bias_names(understanding, layer) if None in kept else set()
            for tensor in layer.tensors:
                if tensor.expert is None:
                    bias, read = tensor.name in biases, made.get(tensor.name)
                    new[tensor.name] = _of_all_experts(checkpoint, layer, tensor, kept, bias, read)
            for name, expert, numbers in _of_one_expert(layer, understanding.unused):
                if expert in kept:
                    info = checkpoint.info(name)
                    copied = _copy(info, _renumbered(name, numbers, kept.index(expert)))
                    new[name] = replace(copied, source=Make(made[name])) if name in made else copied
                    if expert == next(e for e in kept if e is not None):
                        extra[name] += [of_zeros(info, _renumbered(name, numbers, x)) for x in empty_places(kept)]
                else:
                    gone.add(name)
    for index in {op.layer for op in plan.ops}:
        for name, read in readers(index).items():
            if name not in new and name not in gone:
                new[name] = replace(_copy(checkpoint.info(name), name), source=Make(read))
    names = {source: tensor.name for source, tensor in new.items()}
    instead = quantised_tensors(checkpoint, understanding, plan, readers, names)
    instead |= factored_tensors(checkpoint, understanding, plan, readers, names)
    replaced = [layout.by_index[index] for index in plan.replaced()]
    single = {x.index: [(name, e) for name, e, _ in _of_one_expert(x, understanding.unused)] for x in replaced}
    instead |= own_tensors(checkpoint, understanding, plan, single)
    infos = sorted(checkpoint.tensors.values(), key=lambda x: (x.file, x.start))
    out = (
        [*instead.get(x.name, [new.get(x.name) or _copy(x, x.name)]), *extra[x.name]]
        for x in infos
        if x.name not in gone
    )
    return [tensor for tensors in out for tensor in tensors]


def _leaves_out_experts(plan: Plan) -> bool:
    return bool(plan.dropped()) or any(op.format == OWN for op in plan.replaced().values())


def baked_config(checkpoint: Checkpoint, understanding: Understanding, plan: Plan) -> tuple[dict, list[str]]:
    """config.json of the model that `plan` makes, and notes on what a reader may not expect."""
    layout = understanding.layout
    config, notes = checkpoint.config, []
    if plan.packed_form:
        config = config | {"quantization_config": quantisation_config(checkpoint, understanding, plan)}
        notes.append(OWN_NOTE if plan.packed_form == OWN else NOTE)
    elif plan.own_form and not layout.quantisation:
        config = config | {"quantization_config": {"quant_method": OWN, "version": OWN_VERSION}}
        notes.append(FACTORED_NOTE if plan.factored() else STAND_INS_NOTE)
    elif plan.factored():
        notes.append(DENSE_NOTE)
    if not _leaves_out_experts(plan):
        return config, notes
    places = plan.places(layout)
    config = set_expert_count(config, layout.expert_count_keys, len(places[layout.routed[0].index]))
    if zeros := sum(x.count(None) for x in places.values()):
        notes.append(f"layers filled up with {zeros} experts of zeros that are never chosen: they save no memory")
    if removed := _mtp_tensors(understanding):
        keys = _clear_mtp(config)
        notes.append(
            f"multi-token-prediction layers removed ({len(removed)} tensors), since their experts would not match"
            + (f"; set to 0: {', '.join(keys)}" if keys else "")
        )
    return config, notes


def _copy(info: TensorInfo, name: str) -> OutTensor:
    return OutTensor(name, info.dtype, info.shape, Copy(info.file, ((info.start, info.end),)))


def _of_all_experts(
    checkpoint: Checkpoint,
    layer: MoELayer,
    tensor: ExpertTensor,
    places: Slots,
    bias: bool,
    made: Callable[[], torch.Tensor] | None,
) -> OutTensor:
    """A tensor with an expert axis for the experts of `places`; `bias` keeps those of zeros from being chosen."""
    if None in places and tensor.role != "table" and prod(checkpoint.info(tensor.name).shape) > 1:
        return fused(checkpoint, layer, tensor, places, bias, made)
    return _slice(checkpoint, layer, tensor, places, made)


def _slice(
    checkpoint: Checkpoint,
    layer: MoELayer,
    tensor: ExpertTensor,
    places: Slots,
    made: Callable[[], torch.Tensor] | None = None,
) -> OutTensor:
    """A tensor with an expert axis, cut to the kept experts; what lies behind the experts (shared, null) stays.

    `made` gives the tensor where it is not the one on disk.
    """
    info, axis, count = checkpoint.info(tensor.name), tensor.axis or 0, layer.num_experts
    if tensor.role == "table":
        return OutTensor(
            info.name, info.dtype, info.shape, Make(partial(_cut_table, checkpoint, info.name, places, count))
        )
    kept = [e for e in places if e is not None]
    if prod(info.shape) == 1:
        return _copy(info, info.name)  # one scale for all
    length = info.shape[axis]
    if length < count:
        raise ModelError(
            "this tensor has fewer rows than there are experts",
            where=f"{info.file}: {info.name}",
            expected=f"at least {count} on axis {axis}",
            got=list(info.shape),
        )
    each = length // count if tensor.role == "expert" and length % count == 0 else 1
    runs = _joined([*((e * each, (e + 1) * each) for e in kept), (count * each, length)])
    shape = (*info.shape[:axis], sum(end - start for start, end in runs), *info.shape[axis + 1 :])
    if axis == 0 and made is None:
        spans = tuple((info.start + start * info.row_bytes, info.start + end * info.row_bytes) for start, end in runs)
        return OutTensor(info.name, info.dtype, shape, Copy(info.file, spans))
    return OutTensor(
        info.name, info.dtype, shape, Make(partial(_cut, made or partial(checkpoint.read, info.name), axis, runs))
    )


def _cut_table(checkpoint: Checkpoint, name: str, places: Slots, count: int) -> torch.Tensor:
    """A table of expert numbers: dropped experts give way as under a live ban, then all get their new numbers."""
    rank = torch.full((count,), -1)
    for place, expert in enumerate(places):
        if expert is not None:
            rank[expert] = place
    table = checkpoint.read(name)
    return rank[reroute(table, rank < 0).long()].to(table.dtype)


def _joined(runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ascending (start, end) runs with neighbours made one and empty ones left out."""
    out: list[tuple[int, int]] = []
    for start, end in runs:
        if out and out[-1][1] == start:
            out[-1] = (out[-1][0], end)
        elif start < end:
            out.append((start, end))
    return out


def _cut(read: Callable[[], torch.Tensor], axis: int, runs: list[tuple[int, int]]) -> torch.Tensor:
    index = torch.tensor([i for start, end in runs for i in range(start, end)])
    return read().index_select(axis, index)


def _of_one_expert(layer: MoELayer, unused: list[str]) -> Iterator[tuple[str, int, list[int]]]:
    """Every tensor of a single expert: (name, expert, places of the expert's number in the name split at its numbers).

    The places are those where the names of one kind of tensor all say their expert. What else lies under an expert's
    name on disk (scales that the stock model has no use for) goes with it.
    """
    kinds = defaultdict(list)
    for tensor in layer.tensors:
        if tensor.expert is not None:
            parts = NUMBER.split(tensor.name)
            kinds[tuple(parts[::2])].append((tensor.name, tensor.expert, parts))
    owners: dict[str, tuple[int, list[int]]] = {}
    for members in kinds.values():
        numbers = range(1, len(members[0][2]), 2)
        places = [i for i in numbers if all(int(parts[i]) == expert for _, expert, parts in members)]
        if len({expert for _, expert, _ in members}) == 1:
            places = places[-1:]  # the layer may have the same number
        if not places:
            raise ModelError("cannot tell where this name says which expert it is", where=members[0][0])
        for name, expert, parts in members:
            owners["".join(parts[: places[-1] + 1])] = expert, places
            yield name, expert, places
    for name in unused:
        for match in NUMBER.finditer(name):
            if name[: match.end()] in owners:
                yield name, *owners[name[: match.end()]]
                break


def _renumbered(name: str, places: list[int], expert: int) -> str:
    parts = NUMBER.split(name)
    for place in places:
        parts[place] = str(expert)
    return "".join(parts)


def _mtp_tensors(understanding: Understanding) -> list[str]:
    """All tensors of the multi-token-prediction layers.

    A layer counted on after the decoder's (model.layers.61) goes alone, a stack of its own (mtp.layers.0) with all that
    belongs to it (mtp.fc): the widest path around the layer under which the stock model uses nothing.
    """
    stems = set()
    for layer in understanding.layout.layers:
        if layer.mtp:
            stem = layer.path
            while (above := stem.rpartition(".")[0]) and not any(
                x.startswith(above + ".") for x in understanding.placed
            ):
                stem = above
            stems.add(stem + ".")
    return [name for name in understanding.unused if name.startswith(tuple(stems))] if stems else []


def _clear_mtp(settings: dict, prefix: str = "") -> list[str]:
    """Set every count of multi-token-prediction layers to 0, in place; returns the dotted keys."""
    keys = []
    for key, value in settings.items():
        if isinstance(value, dict):
            keys += _clear_mtp(value, f"{prefix}{key}.")
        elif type(value) is int and MTP_COUNT.search(key):
            settings[key] = 0
            keys.append(prefix + key)
    return keys
