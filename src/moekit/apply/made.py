"""Ops that make new numbers, carried out on the stock model's parameters of one layer: live and baked by the same code.

A change is a function of the plan and a layer's parameters that returns those it makes anew; changes follow each other
in the order of `CHANGES`, each seeing what the one before has made. What comes out is rounded to the dtype on disk, so
that a live model has the numbers that its baked files will have. Quantising, and factors in moekit's own form, come
after all of them (`moekit.apply.quantize`, `moekit.apply.factor`): their numbers are not parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from moekit.apply.factor import dense_names, dense_parameters, own_parameters
from moekit.apply.hold import held_names, held_parameters
from moekit.apply.merge import merged_names, merged_parameters
from moekit.apply.quantize import quantised_parameters
from moekit.checkpoint.weights import all_finite
from moekit.errors import CheckpointError, PlanError
from moekit.families.loader import Loader
from moekit.families.unload import to_disk
from moekit.layout import Layout
from moekit.plans import Plan, PlanTensors

Parameters = dict[str, torch.Tensor]
Change = Callable[[Loader, Layout, Plan, int, Parameters], Parameters]
Names = Callable[[Loader, Layout, Plan, int], set[str]]


def given_values(loader: Loader, layout: Layout, plan: Plan, index: int, tensors: Parameters) -> Parameters:
    """The parameters of a layer that the plan carries new values of.

    Raises:
        PlanError: a parameter that the layer does not have, or values of another shape.
    """
    op = plan.values().get(index)
    store, out = PlanTensors(plan.tensors), {}
    for name in op.names if op else ():
        value = store.read(index, name)
        if name not in tensors or value.shape != tensors[name].shape:
            raise PlanError(
                "the plan's new values do not fit the model",
                where=name,
                expected=list(tensors[name].shape) if name in tensors else "a parameter of this layer",
                got=list(value.shape),
                fix="make the plan again for this model",
            )
        out[name] = value.to(tensors[name].dtype)
    return out


def given_names(loader: Loader, layout: Layout, plan: Plan, index: int) -> set[str]:
    """Disk names of what `given_values` changes."""
    op = plan.values().get(index)
    return {
        x.name
        for group in loader.placements(index).values()
        for x in group
        if op is not None and not set(op.names).isdisjoint(x.keys)
    }


CHANGES: tuple[tuple[Change, Names], ...] = (
    (merged_parameters, merged_names),
    (given_values, given_names),
    (held_parameters, held_names),
    (dense_parameters, dense_names),
)


def changes_weights(plan: Plan) -> bool:
    """Whether the plan makes new numbers: such a plan is applied as layers are read."""
    return bool(plan.merges() or plan.values() or plan.holds() or plan.factored() or plan.packed_form)


def new_parameters(loader: Loader, layout: Layout, plan: Plan, index: int, tensors: Parameters) -> Parameters:
    """What the plan makes of a decoder layer's parameters, all experts still in their places, before quantising.

    Args:
        loader: of the source.
        layout: of the source.
        plan: what to do.
        index: decoder layer index; -1 for what is in no decoder layer.
        tensors: the layer's parameters by key, as `Loader.read` gives them.

    Returns:
        Those that change, by key, rounded to what the disk holds, in the dtype that the model runs in.

    Raises:
        CheckpointError: a weight that new numbers are made of has entries that are no numbers.
    """
    _check_numbers(loader, layout, plan, index, tensors)
    out: Parameters = {}
    on_disk = {key: x.name for group in loader.placements(index).values() for x in group for key in x.keys}
    for change, _ in CHANGES:
        for key, x in change(loader, layout, plan, index, tensors | out).items():
            if not all_finite(x):
                raise CheckpointError(
                    "this weight has entries that are no numbers",
                    where=f"{loader.checkpoint.path}: {on_disk[key]}",
                    got="NaN or infinity in it, or in what it is made of",
                    fix="repair the source",
                )
            out[key] = x.to(loader.on_disk(on_disk[key])).to(tensors[key].dtype)
    return out


def _check_numbers(loader: Loader, layout: Layout, plan: Plan, index: int, tensors: Parameters) -> None:
    """Refuse a parameter that is to change and is not all numbers, by the name of its tensor on disk."""
    names = set().union(*(find(loader, layout, plan, index) for _, find in CHANGES))
    for key, group in loader.placements(index).items() if names else ():
        on_disk = [x.name for x in group]
        if key not in tensors or names.isdisjoint(on_disk) or all_finite(tensors[key]):
            continue
        bad = next((x for x in on_disk if not all_finite(loader.checkpoint.read(x).float())), on_disk[0])
        raise CheckpointError(
            "this weight has entries that are no numbers",
            where=f"{loader.checkpoint.path}: {bad}",
            got="NaN or infinity",
            fix="repair the source",
        )


def editing(loader: Loader, layout: Layout, plan: Plan) -> None:
    """Let a loader make, of every layer that it reads, what the plan says."""

    def edit(index: int, tensors: Parameters) -> Parameters:
        changed = tensors | new_parameters(loader, layout, plan, index, tensors)
        changed |= own_parameters(loader, layout, plan, index, changed)
        return changed | quantised_parameters(loader, layout, plan, index, changed)

    loader.edit = edit if changes_weights(plan) else None


class MadeTensors:
    """Disk tensors that a plan makes anew, a layer at a time, all experts still in their places.

    Args:
        loader: of the source, in its own dtype.
        layout: of the source.
        plan: what to do.
    """

    def __init__(self, loader: Loader, layout: Layout, plan: Plan):
        self._loader, self._layout, self._plan = loader, layout, plan
        self._index: int | None = None
        self._tensors: Parameters = {}

    def readers(self, index: int) -> dict[str, Callable[[], torch.Tensor]]:
        """For each disk tensor of a layer (-1: of no decoder layer) that changes, what reads it; reads nothing now."""
        names = set().union(*(find(self._loader, self._layout, self._plan, index) for _, find in CHANGES))
        return {name: partial(self.read, index, name) for name in names}

    def read(self, index: int, name: str) -> torch.Tensor:
        """A disk tensor as the plan leaves it."""
        if self._index != index:
            self._tensors = {}
            tensors = self._loader.read(index)
            made = new_parameters(self._loader, self._layout, self._plan, index, tensors)
            del tensors
            self._tensors, self._index = to_disk(self._loader, index, made), index
        return self._tensors[name]
