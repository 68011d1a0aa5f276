"""What every healing pass begins with: teacher and student, the text in batches, the parameters that may change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moekit.data import Batch
from moekit.errors import DataError, PlanError, did_you_mean
from moekit.families.loader import Loader
from moekit.families.model import Model
from moekit.fitting.decide import Fit
from moekit.layout import MoELayer


def teacher_of(fit: Fit, options: Mapping[str, Any]) -> Model:
    """The model that is learnt from: the one that the option names, or the source.

    Raises:
        PlanError: its vocabulary or its layers are not the student's.
        UserError: it cannot be opened.
    """
    named = options.get("teacher")
    teacher = Model.open(named, trust_remote_code=fit.model.trust_remote_code) if named else fit.source
    ours, theirs = fit.model.layout, teacher.layout
    for what, a, b in (
        ("vocabulary", theirs.vocab_size, ours.vocab_size),
        ("hidden size", theirs.hidden_size, ours.hidden_size),
        ("MoE layers", [x.index for x in theirs.routed], [x.index for x in ours.routed]),
    ):
        if a != b:
            raise PlanError(f"teacher and student have not the same {what}", where=teacher.name, expected=b, got=a)
    return teacher


def text_of(fit: Fit, domain: str | list[str] | None, sequences: int | None = None) -> list[Batch]:
    """The batches of the domains that count, cut to at most `sequences` rows.

    Raises:
        DataError: no such domain.
    """
    names = fit.data.domains if domain is None else [domain] if isinstance(domain, str) else domain
    for name in names:
        if name not in fit.data.domains:
            raise DataError(f"the data have no domain {name!r}", fix=did_you_mean(name, fit.data.domains))
    out = []
    for batch in fit.data.batches:
        if fit.data.domains[batch.domain] in names:
            rows = sequences or len(batch.ids)
            out += [
                Batch(batch.domain, batch.ids[i : i + rows], batch.mask[i : i + rows])
                for i in range(0, len(batch.ids), rows)
            ]
    return out


def to_tune(loader: Loader, layer: MoELayer, part: str) -> tuple[str, ...]:
    """Keys of a layer's parameters that learn, of the part "routers" or "experts".

    Raises:
        PlanError: they are kept on disk as no plain numbers.
    """
    placed = loader.placements(layer.index)
    if part == "experts":
        prefix, names = layer.experts_path + ".", loader.expert_form(layer.experts_path).names
        keys = [key for key in placed if key.startswith(prefix) and key.removeprefix(prefix) in names]
    else:
        on_disk = {x.name for x in layer.tensors if x.role == "router"}
        fixed = {*layer.correction_biases, *layer.tables}
        keys = [key for key, group in placed.items() if key not in fixed and group[0].name in on_disk]
    for key in keys:
        if any(x.suffix for x in placed[key]) or not loader.on_disk(placed[key][0].name).is_floating_point:
            raise PlanError(
                f"the {part} are quantised on disk and cannot be tuned",
                where=placed[key][0].name,
                fix="heal before quantising",
            )
    return tuple(key for key in keys if _is_parameter(loader.model, key))


def _is_parameter(model: nn.Module, key: str) -> bool:
    path, _, name = key.rpartition(".")
    return name in model.get_submodule(path)._parameters


@contextmanager
def standing_in(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Let tensors, which may carry a gradient to something else, take the places of parameters."""
    old = {}
    for key, x in tensors.items():
        path, _, name = key.rpartition(".")
        places = model.get_submodule(path)._parameters
        old[key] = places[name]
        places[name] = x
    try:
        yield
    finally:
        for key, x in old.items():
            path, _, name = key.rpartition(".")
            model.get_submodule(path)._parameters[name] = x


@dataclass
class Learner:
    """Parameters that learn: in float32, whatever the model runs in.

    Attributes:
        model: that they belong to.
        masters: by key, float32 leaves.
        dtypes: that the model has them in, by key.
        disk: that they will be written in, by key.
    """

    model: nn.Module
    masters: dict[str, torch.Tensor]
    dtypes: dict[str, torch.dtype]
    disk: dict[str, torch.dtype]

    @classmethod
    def of(cls, loader: Loader, keys: Mapping[int, Sequence[str]]) -> Learner:
        """Of parameters that are in the model now, by decoder layer."""
        now = {key: loader.model.get_parameter(key).detach() for names in keys.values() for key in names}
        return cls(
            loader.model,
            {key: x.float().clone().requires_grad_() for key, x in now.items()},
            {key: x.dtype for key, x in now.items()},
            {
                key: loader.on_disk(loader.placements(layer)[key][0].name)
                for layer, names in keys.items()
                for key in names
            },
        )

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The model runs with what has been learnt; gradients reach the masters."""
        with standing_in(self.model, {key: x.to(self.dtypes[key]) for key, x in self.masters.items()}):
            yield

    def state(self) -> dict[str, torch.Tensor]:
        """A copy of the masters."""
        return {key: x.detach().clone() for key, x in self.masters.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put a copy back."""
        for key, x in state.items():
            self.masters[key].copy_(x)

    @torch.no_grad()
    def round(self) -> None:
        """Round to what the disk will hold."""
        for key, x in self.masters.items():
            x.copy_(x.to(self.disk[key]))

    def written(self) -> dict[str, torch.Tensor]:
        """As the disk will hold them, on the CPU."""
        return {key: x.detach().to(self.disk[key]).cpu() for key, x in self.masters.items()}


@torch.no_grad()
def put(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write values into the parameters of a model."""
    for key, x in tensors.items():
        model.get_parameter(key).data.copy_(x)
