"""What a fit leaves in its folder: the new tensors of every finished layer, and what is to be told of it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import torch

from moekit import __version__
from moekit.errors import OutputError
from moekit.fitting.decide import Fit
from moekit.plans import Plan, PlanTensors, Values

JOB = "fit.json"


class FitFolder:
    """The folder of one fit; what an interrupted run of the same fit left is found again.

    Args:
        fit: whose folder it is.
        teacher: fingerprint of the model that is learnt from.
        settings: all that decides the numbers: method, options, domain, seed.

    Raises:
        OutputError: the folder holds the numbers of another fit.
    """

    def __init__(self, fit: Fit, teacher: str, settings: Mapping[str, Any]):
        self.path = fit.folder
        self.tensors = PlanTensors(fit.folder)
        made_of = [__version__, fit.model.fingerprint, teacher, fit.data.hash, str(fit.dtype), dict(settings)]
        self.identity = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
        self.path.mkdir(parents=True, exist_ok=True)
        job = self.path / JOB
        if job.is_file() and json.loads(job.read_text()) != self.identity:
            raise OutputError(
                "that folder holds the numbers of another fit",
                where=self.path,
                fix="choose another folder, or remove this one",
            )
        self.write_json(JOB, self.identity)

    def write_json(self, name: str, value: object) -> None:
        """Keep plain data, whole from the moment that it has its name."""
        partial = self.path / (name + ".partial")
        partial.write_text(json.dumps(value))
        os.replace(partial, self.path / name)

    def read_json(self, name: str) -> Any:
        """Plain data that was kept; None if there is none."""
        file = self.path / name
        return json.loads(file.read_text()) if file.is_file() else None

    def found(self, layer: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """The new tensors of a finished layer, and its record; None while it is not finished."""
        record = self.read_json(_record(layer))
        if record is None:
            return None
        return {name: self.tensors.read(layer, name) for name in record["names"]}, record

    def finish(
        self, layer: int, tensors: dict[str, torch.Tensor], record: Mapping[str, Any]
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Keep the new tensors of a layer (none where it stays as it is) and what is to be told of it; as `found`."""
        if tensors:
            self.tensors.write(layer, tensors)
        full = {**record, "names": sorted(tensors)}
        self.write_json(_record(layer), full)
        return tensors, full

    def add_values(self, plan: Plan, layers: list[int]) -> None:
        """Let a plan carry the new tensors of these layers."""
        names = {layer: self.read_json(_record(layer))["names"] for layer in layers}
        plan.ops += [Values(layer=layer, names=tuple(found)) for layer, found in names.items() if found]
        if plan.values():
            plan.tensors = str(self.path.resolve())


def _record(layer: int) -> str:
    return f"layer-{layer:05d}.json"
