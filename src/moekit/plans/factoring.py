"""Experts' matrices as the product of two thin ones and a sparse rest: what a plan says of them, how large they are.

Symbols: O output rows, I input columns, r rank, n entries of the sparse rest S.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from moekit.errors import PlanError
from moekit.layout import Layout, MoELayer
from moekit.plans.base import Op

OWN = "moekit"
LEFT, RIGHT, VALUES, MASK, COLUMNS, COUNTS = "_left", "_right", "_values", "_mask", "_columns", "_counts"
WORD = 16  # bits of a word of the mask


class Factor(Op):
    """Keep every matrix of a layer's experts as L R + S: two factors of low rank and a sparse rest.

    Attributes:
        layer: decoder layer index.
        rank: columns of L and rows of R, at most (a matrix may be smaller).
        density: share of a matrix's entries that S has.
        scheme: how they are chosen. "svd": L R by singular values, S the largest entries of what is left, when the plan
            is applied; "healed": by passes over text, they lie in the plan's tensors.
        format: how they are written. "moekit": as L, R and S, in moekit's own form (docs/packed-format.md), smaller,
            and moekit loads it; "dense": multiplied out, of the same size as before, and stock transformers loads it.
    """

    op: Literal["factor"] = "factor"
    layer: int
    rank: int = Field(ge=1)
    density: float = Field(ge=0, le=1)
    scheme: Literal["svd", "healed"] = "svd"
    format: Literal["moekit", "dense"] = "moekit"

    def share(self, layer: MoELayer, itemsize: int) -> float:
        """Bytes of the layer's matrices after over before; `itemsize` is that of a number."""
        if self.format == "dense":
            return 1.0
        rows, columns = layer.inner_size, layer.width
        return factored_bytes(rows, columns, self.rank, self.density, itemsize) / (rows * columns * itemsize)


def largest_rank(layer: MoELayer, density: float, itemsize: int) -> int:
    """The largest rank that makes a layer's matrices smaller; 0 where none does."""
    rows, columns = layer.inner_size, layer.width
    left = rows * columns * itemsize - factored_bytes(rows, columns, 0, density, itemsize)
    return max(0, (left - 1) // ((rows + columns) * itemsize))


def entries(rows: int, columns: int, density: float) -> int:
    """n: entries of S for a share of a matrix."""
    return round(density * rows * columns)


def index_shapes(rows: int, columns: int, count: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What says where the entries of S lie, in the smallest form: safetensors' dtype and shape by suffix."""
    if not count:
        return {}
    dtype = "I16" if columns < 2**15 else "I32"
    listed: dict[str, tuple[str, tuple[int, ...]]] = {COLUMNS: (dtype, (count,)), COUNTS: (dtype, (rows,))}
    mask: dict[str, tuple[str, tuple[int, ...]]] = {MASK: ("I16", (rows, -(-columns // WORD)))}
    return mask if _bytes(mask) <= _bytes(listed) else listed


def _bytes(shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    return sum((2 if dtype == "I16" else 4) * math.prod(shape) for dtype, shape in shapes.values())


def factored_bytes(rows: int, columns: int, rank: int, density: float, itemsize: int) -> int:
    """Bytes of a matrix in this form; `itemsize` is that of a number of L, R and S."""
    count = entries(rows, columns, density)
    numbers = min(rank, rows, columns) * (rows + columns) + count
    return numbers * itemsize + _bytes(index_shapes(rows, columns, count))


def check_factored(ops: Sequence[Op], layout: Layout, itemsize: int) -> None:
    """Refuse factors that cannot be, or that save nothing though they should.

    Args:
        ops: of the plan.
        layout: of the model.
        itemsize: bytes of a number of the model.

    Raises:
        PlanError: a layer twice or unknown, a model that is quantised or factored already, two forms, ops that would
            change the same weights, a rank that makes nothing smaller.
    """
    factors = [op for op in ops if isinstance(op, Factor)]
    if not factors:
        return
    if layout.quantisation:
        raise PlanError(
            "this model is quantised or factored already",
            got=layout.quantisation,
            fix="start from the checkpoint with plain weights",
        )
    if len({op.layer for op in factors}) < len(factors):
        raise PlanError("a layer can be factored once", got=sorted(op.layer for op in factors))
    if len({op.format for op in factors}) > 1:
        raise PlanError("factors are written in one form", got="moekit and dense")
    for op in factors:
        layer = layout.by_index.get(op.layer)
        if layer is None or layer.mtp:
            raise PlanError(
                f"layer {op.layer} is no MoE layer of this model", expected=f"one of {[x.index for x in layout.routed]}"
            )
        if op.share(layer, itemsize) >= 1 and op.format == OWN:
            most = largest_rank(layer, op.density, itemsize)
            raise PlanError(
                f"layer {op.layer}: factors of rank {op.rank} with a rest of {op.density:.0%} are no smaller than the "
                f"matrices of {layer.inner_size} x {layer.width} themselves",
                expected=f"a rank of at most {most}" if most else "a smaller density",
                got=op.rank,
                fix=f"use rank={max(1, most // 2)}, or write them multiplied out (format=dense)",
            )


def check_factored_alone(ops: Sequence[Op]) -> None:
    """Refuse to write factors along with what has a form of its own.

    Raises:
        PlanError: there is such an op.
    """
    if not any(isinstance(op, Factor) for op in ops):
        return
    others = sorted({str(getattr(op, "op", "")) for op in ops} - {"factor", "drop", "merge"})
    if others:
        raise PlanError(
            "factors are written with nothing else but experts dropped or merged",
            got=", ".join(others),
            fix="make it two steps",
        )
