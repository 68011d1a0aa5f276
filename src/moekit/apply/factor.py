"""Experts' matrices as L R + S: what a checkpoint in moekit's own form holds, and the numbers that are read back.

For each `gate_proj.weight` the own form has a `weight_left`, a `weight_right`, a `weight_values` and what says where
these lie (`moekit.families.factors`). Live, and written dense, the product takes the place of the weight. Numbers of
L, R and S have the dtype that the weight has on disk, products and sums are taken in float32.

Symbols: O output rows, I input columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from moekit.apply.quantize import check_finite
from moekit.checkpoint.reader import DTYPES, Checkpoint
from moekit.checkpoint.writer import Make, OutTensor
from moekit.errors import PlanError
from moekit.families.detect import Understanding
from moekit.families.factors import largest, low_rank, pack_sparse, read_back
from moekit.families.loader import Loader
from moekit.families.matrices import WEIGHT, Matrix, expert_matrices
from moekit.layout import Layout
from moekit.plans import Factor, Plan, PlanTensors
from moekit.plans.factoring import LEFT, RIGHT, VALUES, entries, index_shapes

NOTE = "in moekit's own form, experts as low rank and sparse rest: moekit reads it, stock transformers finds no weights"
DENSE_NOTE = "factors were multiplied out: stock transformers loads the model, and it is as large as before"


class Factored:
    """A plan's factors of one matrix.

    Args:
        matrix: which.
        op: how.
        tensors: folder of the plan's numbers.
    """

    def __init__(self, matrix: Matrix, op: Factor, tensors: str):
        self.matrix, self.op, self._tensors = matrix, op, tensors
        self.dtype = DTYPES[matrix.dtype]
        self.rank = min(op.rank, matrix.rows, matrix.columns)
        self.count = entries(matrix.rows, matrix.columns, op.density)

    @property
    def shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """What the own form holds: dtype and shape by suffix."""
        x = self.matrix
        out = {LEFT: (x.dtype, (x.rows, self.rank)), RIGHT: (x.dtype, (self.rank, x.columns))}
        return (
            out
            | ({VALUES: (x.dtype, (self.count,))} if self.count else {})
            | index_shapes(x.rows, x.columns, self.count)
        )

    def parts(self, weight: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
        """L, R and S of a weight [O, I], by suffix; of a healed one from the plan.

        Raises:
            CheckpointError: the weight has entries that are no numbers.
            PlanError: the plan's numbers are missing, or of other shapes.
        """
        if self.op.scheme == "healed":
            return {suffix: self._stored(suffix, shape) for suffix, (_, shape) in self.shapes.items()}
        whole = weight().float().contiguous()  # one order of sums, wherever the matrix lies
        check_finite(whole, self.matrix.source)
        left, right = (x.to(self.dtype) for x in low_rank(whole, self.rank))
        rest = whole - left.float() @ right.float()
        return {LEFT: left, RIGHT: right, **pack_sparse(rest.to(self.dtype), largest(rest, self.count))}

    def _stored(self, suffix: str, shape: tuple[int, ...]) -> torch.Tensor:
        name = self.matrix.name + suffix
        found = PlanTensors(self._tensors).read(self.op.layer, name)
        if found.shape != shape:
            raise PlanError(
                "the plan's factors do not fit the model",
                where=name,
                expected=list(shape),
                got=list(found.shape),
                fix="make the plan again for this model",
            )
        return found


class _Latest:
    """The parts of the matrix that was asked for last: what is written together is computed once."""

    def __init__(self) -> None:
        self._name, self._parts = "", dict[str, torch.Tensor]()

    def part(self, factored: Factored, read: Callable[[], torch.Tensor], suffix: str) -> torch.Tensor:
        """One part of a matrix."""
        if self._name != factored.matrix.name:
            self._name, self._parts = factored.matrix.name, factored.parts(read)
        return self._parts[suffix]


def factorings(checkpoint: Checkpoint, understanding: Understanding, plan: Plan, index: int) -> list[Factored]:
    """What a plan factors in a decoder layer: the matrices of the experts that stay.

    Raises:
        PlanError: weights in a form that has no such matrices.
    """
    op = plan.factored().get(index)
    if op is None:
        return []
    layer = understanding.layout.by_index[index]
    kept = set(plan.kept(layer))
    matrices = expert_matrices(checkpoint, understanding, layer)
    return [Factored(x, op, plan.tensors) for x in matrices if x.expert in kept]


def factored_parameters(
    loader: Loader, layout: Layout, plan: Plan, index: int, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What changes among a layer's parameters when its experts are factored: they, as they are read back.

    Args:
        loader: of the model.
        layout: of the model.
        plan: with factors or without.
        index: decoder layer index; -1 for what is in no decoder layer.
        tensors: the layer's parameters by key.

    Raises:
        CheckpointError: a weight has entries that are no numbers.
        PlanError: see `Factored.parts`.
    """
    out: dict[str, torch.Tensor] = {}
    for factored in factorings(loader.checkpoint, loader.understanding, plan, index):
        key = factored.matrix.key
        if key not in out:
            out[key] = tensors[key].clone()
        part = factored.matrix.view(out[key])
        part.copy_(read_back(factored.parts(lambda part=part: part), factored.matrix.name))  # type: ignore[misc]
    return out


def own_parameters(
    loader: Loader, layout: Layout, plan: Plan, index: int, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """`factored_parameters` where factors are written in moekit's own form."""
    return {} if _dense(plan, index) else factored_parameters(loader, layout, plan, index, tensors)


def dense_parameters(
    loader: Loader, layout: Layout, plan: Plan, index: int, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """`factored_parameters` where they are written multiplied out."""
    return factored_parameters(loader, layout, plan, index, tensors) if _dense(plan, index) else {}


def dense_names(loader: Loader, layout: Layout, plan: Plan, index: int) -> set[str]:
    """Disk names of what `dense_parameters` changes."""
    if not _dense(plan, index):
        return set()
    return {x.matrix.source for x in factorings(loader.checkpoint, loader.understanding, plan, index)}


def _dense(plan: Plan, index: int) -> bool:
    op = plan.factored().get(index)
    return op is not None and op.format == "dense"


def factored_tensors(
    checkpoint: Checkpoint,
    understanding: Understanding,
    plan: Plan,
    readers: Callable[[int], Mapping[str, Callable[[], torch.Tensor]]],
    names: Mapping[str, str],
) -> dict[str, list[OutTensor]]:
    """What takes the place of each weight on disk in the own form, by its name; reads nothing.

    Args:
        checkpoint: the source.
        understanding: of it.
        plan: what to do.
        readers: by layer, what reads the disk tensors that the plan makes anew before it factors them.
        names: new names of the tensors of single experts.

    Raises:
        PlanError: see `factorings`.
    """
    out: dict[str, list[OutTensor]] = {}
    latest = _Latest()
    for index, op in plan.factored().items():
        if op.format == "dense":
            continue
        made = readers(index)
        places = {e: i for i, e in enumerate(plan.kept(understanding.layout.by_index[index]))}
        for factored in factorings(checkpoint, understanding, plan, index):
            x = factored.matrix
            name = names.get(x.source, x.source)
            if x.fused and x.expert is not None:
                name = f"{x.source}.{places[x.expert]}{WEIGHT}"
            read = partial(_read, checkpoint, x, made.get(x.source))
            out.setdefault(x.source, []).extend(
                OutTensor(name + suffix, dtype, shape, Make(partial(latest.part, factored, read, suffix)))
                for suffix, (dtype, shape) in factored.shapes.items()
            )
    return out


def _read(checkpoint: Checkpoint, matrix: Matrix, made: Callable[[], torch.Tensor] | None) -> torch.Tensor:
    return matrix.read(checkpoint) if made is None else matrix.part(made())
