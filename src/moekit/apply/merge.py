"""Experts made one: the weighted mean of their weights, each first brought into the dominant expert's order of units.

An expert computes the same function when its I hidden units are permuted: rows of the gate and up projections and
columns of the down projection move together. Two experts that were trained apart keep similar units at different
places, so that a plain mean mixes unlike units. The permutation used is the one that maximises

    sum over i of < unit i of the dominant, unit p(i) of the member >,

a unit being its rows and its column end to end: a linear assignment problem, solved exactly.

Everything here works on the stock model's own parameters of one layer, whatever names and orientation the disk has.

Symbols: E experts, I hidden units of an expert, F numbers of a unit.

Paper: P. Li et al., "Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy", arXiv
2310.01334.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from moekit.families.family import ExpertForm
from moekit.families.loader import Loader
from moekit.layout import Layout
from moekit.plans import Merge, Plan


class ExpertUnits:
    """The hidden units of a layer's experts, whatever the orientation of their parameters.

    Args:
        form: of the experts' parameters.
        tensors: their parameters by local name, expert axis in front.
    """

    def __init__(self, form: ExpertForm, tensors: dict[str, torch.Tensor]):
        self.form, self.tensors = form, {name: x for name, x in tensors.items() if name in form.names}

    def unit_axis_first(self, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """One expert's parameter as [I, ...]; None where it has no hidden units (the bias of the down projection).

        A view, so that writing to it writes to the parameter.
        """
        if name.startswith("down_proj"):
            if tensor.dim() == 1:
                return None
            return tensor if self.form.transposed else tensor.movedim(1, 0)
        rows = tensor.movedim(-1, 0) if self.form.transposed and tensor.dim() == 2 else tensor
        if not self.form.gated:
            return rows
        half = len(rows) // 2
        if self.form.interleaved:
            return rows.unflatten(0, (half, 2))
        return rows.unflatten(0, (2, half)).movedim(1, 0)

    def units(self, expert: int) -> torch.Tensor:
        """All units of an expert, float32 [I, F]."""
        return torch.cat(self.unit_parts(expert), 1)

    def unit_parts(self, expert: int) -> list[torch.Tensor]:
        """The same in parts that lie side by side, one for each parameter."""
        parts = [self.unit_axis_first(name, x[expert]) for name, x in self.tensors.items()]
        return [x.reshape(len(x), -1).float() for x in parts if x is not None]

    def alignment(self, reference: int, expert: int) -> torch.Tensor:
        """For each unit of `reference`, the unit of `expert` that takes its place, int64 [I]."""
        pairs = zip(self.unit_parts(reference), self.unit_parts(expert), strict=True)
        similarity = torch.stack([ours @ theirs.T for ours, theirs in pairs]).sum(0)
        _, columns = linear_sum_assignment(similarity.double().numpy(), maximize=True)
        return torch.from_numpy(np.asarray(columns, np.int64))

    def permuted(self, name: str, expert: int, order: torch.Tensor | None) -> torch.Tensor:
        """A parameter of an expert, float32, with its units in another order: the same function."""
        out = self.tensors[name][expert].to(torch.float32, copy=True)
        units = self.unit_axis_first(name, out)
        if units is not None and order is not None:
            units.copy_(units[order])
        return out


def merge_experts(form: ExpertForm, tensors: dict[str, torch.Tensor], merge: Merge) -> dict[str, torch.Tensor]:
    """Merge a layer's experts.

    Args:
        form: of the experts' parameters.
        tensors: the parameters by local name, [E, ...].
        merge: the groups.

    Returns:
        New parameters: at a dominant expert's place the mean of its group; all else unchanged.
    """
    units = ExpertUnits(form, tensors)
    out = {name: x.clone() for name, x in units.tensors.items()}
    for group in merge.groups:
        first = group.members[0]
        orders = [units.alignment(first, e) if merge.align and e != first else None for e in group.members]
        for name, x in out.items():
            mean = torch.zeros_like(x[first], dtype=torch.float32)
            for e, order, weight in zip(group.members, orders, group.weights, strict=True):
                mean.add_(units.permuted(name, e, order), alpha=weight)
            x[first] = mean.to(x.dtype)
    return out


def merge_rows(tensor: torch.Tensor, axis: int, merge: Merge) -> torch.Tensor:
    """A router's parameter with the rows of dominant experts replaced by the weighted means of their groups' rows."""
    out = tensor.clone()
    rows = out.movedim(axis, 0)
    for group in merge.groups:
        members = tensor.movedim(axis, 0)[list(group.members)].float()
        weights = torch.tensor(group.weights, dtype=torch.float32).reshape(-1, *[1] * (members.dim() - 1))
        rows[group.members[0]] = (weights * members).sum(0).to(tensor.dtype)
    return out


def merged_parameters(
    loader: Loader, layout: Layout, plan: Plan, index: int, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What changes among a decoder layer's parameters when its experts are merged.

    Args:
        loader: of the model.
        layout: of the model.
        plan: with or without merges.
        index: decoder layer index; -1 for what is in no decoder layer.
        tensors: the decoder layer's parameters by key, as `Loader.read` gives them.

    Returns:
        New parameters by key: of the experts and, for weighted rows, of the router.
    """
    merge = plan.merges().get(index)
    if merge is None or layout.by_index[index].mtp:
        return {}
    layer = layout.by_index[index]
    prefix = layer.experts_path + "."
    local = {key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)}
    form = loader.expert_form(layer.experts_path)
    out = {prefix + name: x for name, x in merge_experts(form, local, merge).items()}
    if merge.router == "weighted":
        axes = {x.name: x.axis for x in layer.tensors if x.role == "router"}
        for key, placements in loader.placements(layer.index).items():
            if placements[0].name in axes and tensors[key].is_floating_point():
                out[key] = merge_rows(tensors[key], axes[placements[0].name] or 0, merge)
    return out


def merged_names(loader: Loader, layout: Layout, plan: Plan, index: int) -> set[str]:
    """Disk names of what `merged_parameters` changes."""
    merge = plan.merges().get(index)
    if merge is None or layout.by_index[index].mtp:
        return set()
    firsts = {group.members[0] for group in merge.groups}
    roles = {"expert"} | ({"router"} if merge.router == "weighted" else set())
    tensors = layout.by_index[index].tensors
    return {x.name for x in tensors if x.role in roles and (x.expert is None or x.expert in firsts)}
