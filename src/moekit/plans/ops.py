"""What a plan can say: one op is one change to one layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from moekit.layout import MoELayer
from moekit.plans.base import Op
from moekit.plans.dynamic import Odp
from moekit.plans.factoring import Factor
from moekit.plans.holding import Hold
from moekit.plans.standins import Replace
from moekit.plans.steering import Steer

OUTER = -1  # the layer of an op on what is in no decoder layer
UNQUANTISED = 16  # the bits of what stays as it is
DENSE_PARTS = ("attention", "shared experts", "dense MLP", "embeddings", "head")
Width = Literal[1, 2, 3, 4, 5, 6, 7, 8, 16]


class Drop(Op):
    """Remove experts of a layer, with their router rows and biases.

    Attributes:
        layer: decoder layer index.
        experts: the experts to remove, ascending.
    """

    op: Literal["drop"] = "drop"
    layer: int
    experts: tuple[int, ...]


class Group(BaseModel):
    """Experts that become one.

    Attributes:
        members: the experts, the dominant one first: it gives place, router row and the order of hidden units.
        weights: share of each member in the mean of their weights; they sum to 1.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    members: tuple[int, ...]
    weights: tuple[float, ...]


class Merge(Op):
    """Replace groups of a layer's experts by their weighted means. Experts in no group stay as they are.

    Attributes:
        layer: decoder layer index.
        groups: disjoint groups of at least two experts.
        align: first bring every member's hidden units into the order of the dominant one's that they resemble most.
        router: "dominant" keeps the dominant expert's router row, "weighted" takes the weighted mean of the rows.
    """

    op: Literal["merge"] = "merge"
    layer: int
    groups: tuple[Group, ...]
    align: bool = True
    router: Literal["dominant", "weighted"] = "dominant"

    @property
    def gone(self) -> tuple[int, ...]:
        """Experts that vanish into another."""
        return tuple(sorted(e for group in self.groups for e in group.members[1:]))


class Rounding(Op):
    """What the two ops that quantise share.

    Attributes:
        group_size: input columns that share a scale; -1: all of a row.
        scheme: how numbers are chosen. "rtn": the nearest, with scales that clip nothing; "fitted": the nearest, with
            the scales of least squared error; "gptq": by passes over text, they lie in the plan's tensors.
        format: how they are written. "compressed-tensors": as stock transformers reads them; "moekit": in moekit's own
            packed form, which has a width for each matrix (docs/packed-format.md).
    """

    group_size: int = Field(ge=-1)
    scheme: Literal["rtn", "fitted", "gptq"] = "rtn"
    format: Literal["compressed-tensors", "moekit"] = "compressed-tensors"


class Quantize(Rounding):
    """Keep the weights of a layer's experts as whole numbers times scales.

    Attributes:
        layer: decoder layer index.
        bits: of a number, 1 to 8, for all experts or for each; 16: the expert stays as it is.
    """

    op: Literal["quantize"] = "quantize"
    layer: int
    bits: Width | tuple[Width, ...]

    def width(self, expert: int) -> int:
        """Bits of an expert."""
        return self.bits if isinstance(self.bits, int) else self.bits[expert]

    def widths(self, experts: Iterable[int]) -> list[int]:
        """Bits of some experts."""
        return [self.width(e) for e in experts]

    def share(self, layer: MoELayer, itemsize: int, expert: int) -> float:
        """Bytes of an expert after over before; `itemsize` is that of a weight and of a scale."""
        return share_of(self.width(expert), self.group_size if self.group_size > 0 else layer.inner_size, itemsize)


class QuantizeDense(Rounding):
    """Keep weights that every token uses as whole numbers times scales: linear maps and embeddings.

    Attributes:
        layer: decoder layer index; -1: what is in no decoder layer.
        bits: of a number, by part: "attention", "shared experts", "dense MLP", "embeddings" (of the input; where
            they are also the output head, both), "head".
        group_size: at most so many columns share a scale: the largest number that divides a weight's columns.
    """

    op: Literal["quantize-dense"] = "quantize-dense"
    layer: int
    bits: dict[str, Width]

    @field_validator("bits")
    @classmethod
    def _parts(cls, bits: dict[str, int]) -> dict[str, int]:
        if unknown := bits.keys() - set(DENSE_PARTS):
            raise ValueError(f"no such part: {sorted(unknown)[0]}; there are {', '.join(DENSE_PARTS)}")
        return bits

    def size(self, columns: int) -> int:
        """The group size of a weight with so many columns."""
        if self.group_size < 0:
            return -1
        return max(size for size in range(1, min(self.group_size, columns) + 1) if columns % size == 0)


def share_of(bits: int, group_size: int, itemsize: int) -> float:
    """Bytes of a weight after over before, scales included."""
    return 1.0 if bits == UNQUANTISED else bits / (8 * itemsize) + 1 / group_size


class Values(Op):
    """New numbers for some of a layer's parameters, as healing and least squares compute them.

    They lie in the plan's tensors, under the same names and in the same shapes.

    Attributes:
        layer: decoder layer index; -1: what is in no decoder layer.
        names: parameters by their key in the stock model, as "model.layers.2.mlp.gate.weight".
    """

    op: Literal["values"] = "values"
    layer: int
    names: tuple[str, ...]


AnyOp = Annotated[
    Drop | Merge | Factor | Quantize | QuantizeDense | Values | Replace | Odp | Steer | Hold, Field(discriminator="op")
]
