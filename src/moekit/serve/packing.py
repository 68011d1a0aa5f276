"""pack(model, out): a checkpoint made an expert store, a layer in memory at a time; goes on where it was stopped."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moekit import __version__
from moekit.checkpoint.place import check_place, check_space, claimed, failed, move, sign, sync, take_over, write_text
from moekit.errors import ModelError, OutputError
from moekit.families.loader import OUTER
from moekit.families.model import Model
from moekit.families.resident import run_config
from moekit.layout import MoELayer
from moekit.progress import Progress, silent
from moekit.serve.forms import BITS, packed_expert
from moekit.serve.rest import packed_rest, rest_widths
from moekit.serve.store import MANIFEST, VERSION, Form, StoredLayer, checksum, experts_name, form_of, rest_name, to_row

DONE = "packed.json"  # in OUT.partial: the layers that are complete
KEPT_FILES = (".json", ".txt", ".model", ".jinja", ".md", ".tiktoken")
LARGEST_SIDE_BYTES = 64 << 20


def check_packable(model: Model, bits: int, rest_bits: int = 16) -> None:
    """Refuse what the run time could not run, before anything is read.

    Raises:
        ModelError: a family that moekit does not run, a model that writes no text, or experts that are constants.
        OutputError: bits that records cannot have.
    """
    model.understanding.family.check_runs()
    if not model.loader().model.can_generate():
        raise ModelError(
            "this model writes no text, so there is nothing to run", where=model.name, got=model.layout.architecture
        )
    constant = [x.index for x in model.layout.routed if x.constants]
    if constant:
        raise ModelError(
            "experts that constant vectors stand for (mone) cannot be packed",
            where=model.name,
            got=f"layers {', '.join(map(str, constant))}",
            fix="pack the source, or what another method made of it",
        )
    for where, what, given in (("bits", "experts", bits), ("rest_bits", "matrices", rest_bits)):
        if given not in BITS:
            raise OutputError(f"{what} cannot be packed so", where=where, expected=", ".join(map(str, BITS)), got=given)


def pack(
    model: Model,
    out: str | Path,
    *,
    bits: int = 16,
    by_expert: Mapping[int, tuple[int, ...]] | None = None,
    rest_bits: int = 16,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Path:
    """Write the expert store of a model; 16 bits keep every number.

    Args:
        model: from `moekit.open`.
        out: a new folder.
        bits: of experts' weights: 16 (the model's own dtype), 8 or 4.
        by_expert: bits of each expert [E] by decoder layer index, where they differ; other layers take `bits`.
        rest_bits: of the other large matrices' weights (`moekit.serve.rest`): 16, 8 or 4.
        overwrite: replace a store that lies there.
        progress: told as layers pass.

    Raises:
        ModelError: what cannot be run.
        OutputError: a place that cannot be written to, or a disk that is full.
        CheckpointError: weights that cannot be read.
    """
    check_packable(model, bits, rest_bits)
    target = Path(out).resolve()
    check_place(target, overwrite)
    partial = target.with_name(target.name + ".partial")
    job: dict[str, Any] = {"store of": model.fingerprint, "bits": bits, "moekit": __version__}
    if rest_bits < 16:
        job["rest_bits"] = rest_bits
    if by_expert:
        job["by_expert"] = {str(index): list(widths) for index, widths in by_expert.items()}
    try:
        with claimed(partial):
            take_over(partial, job, overwrite)
            known = partial / DONE
            done = json.loads(known.read_text()) if known.is_file() else {"layers": {}, "sizes": {}}
            if not done["sizes"]:
                check_space(target.parent, model.layout.total.bytes * max(1, 2 // _itemsize(model)))
            sign(partial, job)
            _write(model, partial, job, done, bits, by_expert or {}, rest_bits, progress)
            move(partial, target)
    except OSError as error:
        raise failed(error, partial) from error
    return target


def _itemsize(model: Model) -> int:
    """Bytes of a weight on disk, where they are fewer than at run time."""
    return 1 if model.layout.quantisation else 2


def _write(
    model: Model,
    partial: Path,
    job: dict[str, Any],
    done: dict[str, Any],
    bits: int,
    by_expert: Mapping[int, tuple[int, ...]],
    rest_bits: int,
    progress: Progress,
) -> None:
    layout, loader = model.layout, model.loader()
    rest = rest_widths(loader.model, layout, rest_bits)
    steps = [OUTER, *range(layout.num_layers)]
    for number, index in enumerate(steps):
        progress("pack", number, len(steps))
        if rest_name(index) in done["sizes"]:
            continue
        tensors = loader.read(index)
        layer = layout.by_index.get(index)
        if layer is not None and not layer.mtp:
            prefix = layer.experts_path + "."
            names = loader.expert_form(layer.experts_path).names
            experts = {name: tensors.pop(prefix + name) for name in sorted(names)}
            widths = by_expert.get(index, (bits,) * layer.num_experts)
            swap = loader.expert_form(layer.experts_path).transposed
            stored = _write_experts(partial / experts_name(index), layer, experts, widths, swap)
            done["layers"][str(index)] = to_row(stored)
            done["sizes"][experts_name(index)] = (partial / experts_name(index)).stat().st_size
            del experts
        _save(packed_rest(tensors, rest), partial / rest_name(index))
        done["sizes"][rest_name(index)] = (partial / rest_name(index)).stat().st_size
        del tensors
        sync(partial / rest_name(index))
        write_text(partial / (DONE + ".tmp"), json.dumps(done))
        os.replace(partial / (DONE + ".tmp"), partial / DONE)
    for side in model.checkpoint.side_files():
        file = model.path / side
        if side.suffix in KEPT_FILES and file.stat().st_size < LARGEST_SIDE_BYTES:
            (partial / side).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, partial / side)
    write_text(partial / "config.json", json.dumps(run_config(model.checkpoint.config), indent=1))
    manifest = {
        "version": VERSION,
        "source": {"name": model.name, "fingerprint": model.fingerprint},
        "job": job,
        "rest_bits": rest_bits,
        "layout": layout.to_dict(),
        "layers": done["layers"],
        "sizes": done["sizes"],
    }
    write_text(partial / MANIFEST, json.dumps(manifest))
    (partial / DONE).unlink()
    progress("pack", len(steps), len(steps))


def _save(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    import safetensors.torch

    try:
        safetensors.torch.save_file({name: x.contiguous().clone() for name, x in tensors.items()}, file)
    except safetensors.SafetensorError as error:  # of whatever the system says
        full = "code: 28" in str(error) or "StorageFull" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(file)) from None


def _write_experts(
    file: Path, layer: MoELayer, experts: dict[str, torch.Tensor], widths: tuple[int, ...], transposed: bool
) -> StoredLayer:
    forms: list[Form] = []
    which: list[int] = []
    offsets: list[int] = []
    checksums: list[int] = []
    with file.open("wb", buffering=0) as stream:
        for expert in range(layer.num_experts):
            one = {name: x[expert] for name, x in experts.items()}
            group, tensors = packed_expert(one, widths[expert], transposed)
            form = form_of(widths[expert], group, tensors)
            if form not in forms:
                forms.append(form)
            record = torch.zeros(form.record_bytes, dtype=torch.uint8)
            for piece in form.pieces:
                piece.view(record).copy_(tensors[piece.name])
            offsets.append(stream.tell())
            checksums.append(checksum(record))
            which.append(forms.index(form))
            data = memoryview(record.numpy().data)
            while data:
                data = data[stream.write(data) :]
        os.fsync(stream.fileno())
    return StoredLayer(file.name, tuple(forms), tuple(which), tuple(offsets), tuple(checksums))
