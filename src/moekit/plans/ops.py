"""What a plan can say: one op is one change to one layer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from moekit.layout import MoELayer

OUTER = -1  # the layer of an op on what is in no decoder layer


class Op(BaseModel):
    """One change to one layer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: int


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


class Quantize(Op):
    """Keep the weights of all of a layer's experts as whole numbers times scales.

    Attributes:
        layer: decoder layer index.
        bits: of a number.
        group_size: input columns that share a scale; -1: all of a row.
        scheme: how numbers are chosen; "rtn": the nearest, with scales that clip nothing.
    """

    op: Literal["quantize"] = "quantize"
    layer: int
    bits: Literal[4, 8]
    group_size: int = Field(ge=-1)
    scheme: Literal["rtn"] = "rtn"

    def share(self, layer: MoELayer, itemsize: int) -> float:
        """Bytes of the layer's experts after over before; `itemsize` is that of a weight and of a scale."""
        return self.bits / (8 * itemsize) + 1 / (self.group_size if self.group_size > 0 else layer.inner_size)


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


AnyOp = Annotated[Drop | Merge | Quantize | Values, Field(discriminator="op")]
