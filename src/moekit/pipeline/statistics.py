"""The statistics that a step decides from: measured, those that lie there already, or carried over a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from moekit.checkpoint.reader import DTYPES, Checkpoint
from moekit.errors import CheckpointError, OutputError
from moekit.families.model import Model
from moekit.layout import Layout
from moekit.measurement import measure
from moekit.pipeline.job import Job
from moekit.plans import Plan
from moekit.progress import Progress
from moekit.stats import ALL_GROUPS, Stats


def statistics_of(
    job: Job, model: Model, groups: Iterable[str], folder: Path, work: Path, device: str, progress: Progress
) -> Stats:
    """Those that lie in `folder`, if they are of this model and text and hold what is needed; else they are measured.

    Args:
        job: whose text is run.
        model: what it runs through.
        groups: of statistics that are needed.
        folder: where they are kept.
        work: where an interrupted pass leaves what it needs to go on.
        device: to measure on.
        progress: told as layers pass.

    Raises:
        OutputError: a folder of the user's choice holds statistics of something else.
        CheckpointError: a weight has entries that are no numbers.
    """
    Stats.check_place(folder)
    needed = set(groups)
    if (folder / "stats.json").is_file():
        known = Stats.load(folder)
        wanted = (model.fingerprint, job.calibration.hash, str(job.dtype or model.dtype).removeprefix("torch."))
        found = (known.manifest.get("fingerprint"), known.manifest.get("data", {}).get("hash"))
        if (*found, known.manifest.get("dtype")) == wanted:
            if needed <= set(known.manifest["groups"]):
                return known
            needed |= set(known.manifest["groups"])
        elif folder.parent != job.workplace.folder:
            raise OutputError(
                "that folder holds statistics of another model, of other data, or in another dtype",
                where=folder,
                fix="choose another folder, or remove this one",
            )
    stats = measure(
        model,
        job.calibration,
        groups=[x for x in ALL_GROUPS if x in needed],
        dtype=job.dtype,
        device=device,
        workdir=work,
        progress=progress,
    )
    if not all(np.isfinite(x).all() for layer in stats.layers.values() for x in layer.arrays.values()):
        check_finite(model.checkpoint)
    stats.save(folder)
    job.workplace.vanish()
    return stats


def check_finite(checkpoint: Checkpoint) -> None:
    """Read all weights and refuse one that is not all numbers; for when what came out of a model is not.

    Raises:
        CheckpointError: the tensor, and where in it.
    """
    for info in checkpoint.tensors.values():
        if not DTYPES[info.dtype].is_floating_point:
            continue
        bad = ~checkpoint.read(info.name).float().isfinite()
        if bad.any():
            raise CheckpointError(
                "this weight has entries that are no numbers",
                where=f"{info.file}: {info.name}",
                got=f"{int(bad.sum()):,} entries of NaN or infinity, the first at {bad.nonzero()[0].tolist()}",
                fix="repair the source",
            )


def carried(stats: Stats, layout: Layout, plan: Plan, after: Layout, fingerprint: str) -> Stats:
    """What statistics of a model say of the one that a plan has made of it.

    Args:
        stats: of the model.
        layout: of the model.
        plan: what was done to it.
        after: layout of what it made.
        fingerprint: of what it made.
    """
    origins: dict[int, list[Mapping[int, float]]] = {}
    merges = plan.merges()
    for layer in layout.routed:
        merge = merges.get(layer.index)
        groups = {group.members[0]: group for group in merge.groups} if merge else {}
        origins[layer.index] = []
        for expert in plan.kept(layer):
            group = groups.get(expert)
            if group is None or merge is None:
                origins[layer.index].append({expert: 1.0})
            elif merge.router == "weighted":
                origins[layer.index].append(dict(zip(group.members, group.weights, strict=True)))
            else:
                origins[layer.index].append({e: float(e == expert) for e in group.members})
    return stats.regrouped(origins, after, fingerprint)
