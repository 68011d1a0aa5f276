"""A Plan: what to do to a model, as data that a person can read, compare and keep.

Methods make plans; `moekit.apply` carries them out, on disk (bake) or on a live model (live). A plan names the layout
that it was made for and is checked against it before anything is loaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moekit.errors import PlanError
from moekit.layout import Layout, MoELayer
from moekit.markup import html_table

VERSION = 1
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


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


class Plan(BaseModel):
    """Changes to a model.

    Attributes:
        layout_hash: the layout that the plan was made for.
        ops: the changes.
        method: the method that made it, and its settings.
        settings: of the method.
        made_from: fingerprints of model and data, versions.
        notes: what the method wants a reader to know (protected experts, warnings).
        measured: numbers behind the notes, such as "removed_gate_mass": share by decoder layer index.
    """

    model_config = ConfigDict(extra="forbid")

    version: int = VERSION
    layout_hash: str
    ops: list[Annotated[Drop | Merge | Quantize, Field(discriminator="op")]] = []
    method: str = ""
    settings: dict = {}
    made_from: dict = {}
    notes: list[str] = []
    measured: dict = {}

    def dropped(self) -> dict[int, tuple[int, ...]]:
        """Experts whose place goes, dropped or merged into another: ascending, by decoder layer index."""
        out: dict[int, set[int]] = {}
        for op in self.ops:
            if not isinstance(op, Quantize):
                out.setdefault(op.layer, set()).update(op.experts if isinstance(op, Drop) else op.gone)
        return {layer: tuple(sorted(experts)) for layer, experts in sorted(out.items()) if experts}

    def dropped_live(self, layout: Layout) -> dict[int, tuple[int, ...]]:
        """`dropped` for the layers that the stock model runs."""
        return {layer.index: gone for layer in layout.routed if (gone := self.dropped().get(layer.index))}

    def merges(self) -> dict[int, Merge]:
        """The merge of each layer that has one."""
        return {op.layer: op for op in self.ops if isinstance(op, Merge)}

    @property
    def kind(self) -> Literal["prune", "merge", "quantize"]:
        """What the changes are."""
        return "quantize" if self.quantised() else "merge" if self.merges() else "prune"

    def quantised(self) -> dict[int, Quantize]:
        """How each layer that is quantised is."""
        return {op.layer: op for op in self.ops if isinstance(op, Quantize)}

    def kept(self, layer: MoELayer) -> tuple[int, ...]:
        """Experts of a layer that stay, ascending."""
        gone = set(self.dropped().get(layer.index, ()))
        return tuple(e for e in range(layer.num_experts) if e not in gone)

    def check(self, layout: Layout) -> None:
        """Refuse a plan that does not fit the model, before anything is loaded.

        Raises:
            PlanError: other layout, unknown layer or expert, too few experts left for top_k or for the groups.
        """
        if self.layout_hash != layout.hash:
            raise PlanError(
                "the plan was made for another model",
                expected=self.layout_hash,
                got=f"{layout.hash} ({layout.family})",
                fix="make the plan again for this model",
            )
        if self.dropped():
            check_droppable(layout)
        for index, experts in self.dropped().items():
            layer = layout.by_index.get(index)
            if layer is None:
                raise PlanError(f"layer {index} is no MoE layer", expected=f"one of {sorted(layout.by_index)}")
            if experts[0] < 0 or experts[-1] >= layer.num_experts:
                raise PlanError(f"layer {index} has no expert {experts[-1]}", expected=f"0 to {layer.num_experts - 1}")
            check_feasible(layer, self.kept(layer))
        for index, op in self.merges().items():
            check_merge(op, self.ops)
            if max(e for group in op.groups for e in group.members) >= layout.by_index[index].num_experts:
                raise PlanError(f"layer {index} has not that many experts", expected=layout.by_index[index].num_experts)
        if quantised := self.quantised():
            check_quantised(quantised, self.ops, layout)

    def check_bakeable(self, layout: Layout) -> None:
        """Refuse a plan whose result no stock model loads: layers with different numbers of experts or bits."""
        self.check(layout)
        ways = [self.quantised().get(layer.index) for layer in layout.routed]
        if len({x and (x.bits, x.group_size, x.scheme) for x in ways}) > 1:
            raise PlanError(
                "layers would be quantised in different ways, which stock transformers cannot load",
                expected="the same bits and group size in every MoE layer",
                fix="quantise all layers alike, or apply the plan live",
            )
        left = {len(self.kept(layer)) for layer in layout.routed}
        if len(left) > 1:
            raise PlanError(
                "layers would keep different numbers of experts, which stock transformers cannot load",
                expected="the same number in every MoE layer",
                got=f"{min(left)} to {max(left)}",
                fix="use a uniform budget (the default)",
            )

    def saved_bytes(self, layout: Layout) -> int:
        """Bytes on disk that the plan saves, experts only (router rows are a rounding error)."""
        saved = sum(len(experts) * layout.by_index[index].expert_bytes for index, experts in self.dropped().items())
        itemsize = ITEMSIZE.get(layout.dtype, 2)
        for index, op in self.quantised().items():
            layer = layout.by_index[index]
            saved += round(layer.num_experts * layer.expert_bytes * (1 - op.share(layer, itemsize)))
        return saved

    def diff(self, other: Plan) -> str:
        """What `other` does otherwise, a line per layer; empty when they do the same."""
        ours, theirs = self.dropped(), other.dropped()
        lines = []
        for layer in sorted(ours.keys() | theirs.keys()):
            a, b = set(ours.get(layer, ())), set(theirs.get(layer, ()))
            if a != b:
                lines.append(f"layer {layer}: only here {sorted(a - b)}, only there {sorted(b - a)}")
        mine, its = self.quantised(), other.quantised()
        for layer in sorted(mine.keys() | its.keys()):
            if mine.get(layer) != its.get(layer):
                here, there = (f"{x.bits} bits" if x else "unquantised" for x in (mine.get(layer), its.get(layer)))
                lines.append(f"layer {layer}: here {here}, there {there}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        changes = [(op.layer, op.op, op.model_dump(exclude={"layer", "op"})) for op in self.ops]
        rows = [(layer, op, ", ".join(f"{name} {value}" for name, value in x.items())) for layer, op, x in changes]
        caption = f"Plan of {len(self.ops)} changes by {self.method or 'hand'} for layout {self.layout_hash}"
        return html_table(caption, ("layer", "change", "what"), rows)

    def save(self, file: str | Path) -> Path:
        """Write as JSON, one op a line."""
        path = Path(file)
        head = self.model_dump(exclude={"ops"})
        body = ",\n".join("  " + json.dumps(op.model_dump()) for op in self.ops)
        text = json.dumps(head, indent=1)[:-2] + f',\n "ops": [\n{body}\n ]\n}}\n'
        temporary = path.with_name(path.name + ".partial")
        temporary.write_text(text)
        temporary.rename(path)
        return path

    @classmethod
    def load(cls, file: str | Path) -> Plan:
        """Read a plan.

        Raises:
            PlanError: no such file, or not a plan of this version.
        """
        path = Path(file)
        try:
            raw = json.loads(path.read_text())
            if isinstance(raw, dict) and raw.get("version", VERSION) != VERSION:
                raise PlanError("plan of another version", where=path, expected=VERSION, got=raw["version"])
            return cls.model_validate(raw)
        except FileNotFoundError:
            raise PlanError("no such plan", where=path) from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(x) for x in first["loc"])
            raise PlanError("this is not a valid plan", where=f"{path}: {where}", got=first["msg"]) from None
        except ValueError as error:
            raise PlanError("this is not a plan", where=path, got=str(error)[:200]) from None


def check_merge(merge: Merge, ops: Sequence[Op]) -> None:
    """Refuse a merge whose groups contradict themselves or another op.

    Raises:
        PlanError: groups that overlap or have one member, weights that do not sum to 1, an expert that is also dropped.
    """
    where = f"layer {merge.layer}"
    members = [e for group in merge.groups for e in group.members]
    if len(members) != len(set(members)) or any(len(group.members) < 2 for group in merge.groups):
        raise PlanError("groups to merge must be disjoint and have at least two experts", where=where)
    for group in merge.groups:
        if len(group.weights) != len(group.members) or abs(sum(group.weights) - 1) > 1e-6 or min(group.weights) < 0:
            raise PlanError("weights of a merged group must sum to 1", where=where, got=list(group.weights))
    others = [op for op in ops if op is not merge and op.layer == merge.layer]
    if any(isinstance(op, Merge) for op in others):
        raise PlanError("a layer can be merged once", where=where)
    dropped = {e for op in others if isinstance(op, Drop) for e in op.experts}
    if dropped & set(members):
        raise PlanError("an expert cannot be dropped and merged", where=where, got=sorted(dropped & set(members)))


def check_quantised(quantised: Mapping[int, Quantize], ops: Sequence[Op], layout: Layout) -> None:
    """Refuse what cannot be quantised.

    Raises:
        PlanError: other changes in the same plan, a layer twice or unknown, a model that is quantised already, a group
            size that does not divide the experts' widths.
    """
    if len(ops) != len(quantised):
        raise PlanError("quantising is a plan of its own, a layer once", fix="first prune or merge, then quantise that")
    if layout.quantisation:
        raise PlanError(
            "this model is quantised already", got=layout.quantisation, fix="start from the unquantised checkpoint"
        )
    for index, op in quantised.items():
        layer = layout.by_index.get(index)
        if layer is None or layer.mtp:
            raise PlanError(f"layer {index} cannot be quantised", expected=f"one of {[x.index for x in layout.routed]}")
        size = op.group_size
        if size == 0 or (size > 0 and (layer.width % size or layer.inner_size % size)):
            raise PlanError(
                f"layer {index}: the group size does not divide the widths of its experts",
                expected=f"a divisor of {layer.width} and {layer.inner_size}, or -1",
                got=size,
            )


def check_droppable(layout: Layout) -> None:
    """Refuse a model that no expert can be removed from.

    Raises:
        PlanError: with the reason.
    """
    if layout.cannot_drop:
        raise PlanError(
            f"experts cannot be removed from models of the family {layout.family!r}",
            got=layout.cannot_drop,
            fix="see docs/families.md for what moekit can do with it",
        )


def check_feasible(layer: MoELayer, kept: tuple[int, ...]) -> None:
    """Refuse a choice of experts that the layer's router cannot work with.

    Raises:
        PlanError: fewer than top_k left; with groups: unequal groups, or too few experts in the kept groups.
    """
    router, k = layer.router, layer.top_k
    if len(kept) < k:
        raise PlanError(
            f"layer {layer.index} chooses {k} experts for every token, but only {len(kept)} would be left",
            expected=f"at least {k} of {layer.num_experts}",
            got=len(kept),
            fix=_keep_more(k, layer.num_experts),
        )
    if router.groups > 1:
        size = layer.num_experts // router.groups
        per_group = [sum(e // size == g for e in kept) for g in range(router.groups)]
        if len(set(per_group)) > 1:
            raise PlanError(
                f"layer {layer.index} routes in {router.groups} groups: each must keep equally many experts",
                got=per_group,
                fix="drop the same number in every group",
            )
        if per_group[0] < 2 or per_group[0] * router.groups_kept < k:
            need = max(2, -(-k // router.groups_kept))
            raise PlanError(
                f"layer {layer.index} would have {per_group[0]} experts in a group",
                expected=f"at least {need} (2 for the group score, {k} in {router.groups_kept} groups for top-k)",
                got=per_group[0],
                fix=_keep_more(need * router.groups, layer.num_experts),
            )


def _keep_more(least: int, num_experts: int) -> str:
    return f"keep at least {least} experts a layer, or {math.ceil(100 * least / num_experts)}%"


def keep_count(layer: MoELayer, keep: float | int) -> int:
    """How many experts of a layer a budget keeps, rounded to what groups allow.

    Args:
        layer: the layer.
        keep: a share (float in (0, 1]) or a number (int).

    Raises:
        PlanError: not a share or a number, or too few for top_k or the groups.
    """
    possible = 1 <= keep <= layer.num_experts if isinstance(keep, int) else 0 < keep <= 1
    if not possible:
        raise PlanError(
            "impossible number of experts to keep",
            where=f"keep, layer {layer.index}",
            expected=f"a share in (0, 1] or 1 to {layer.num_experts}",
            got=keep,
            fix="keep fewer: 0.5 is half of them",
        )
    wanted = keep if isinstance(keep, int) else round(keep * layer.num_experts)
    groups = layer.router.groups
    wanted = max(1, round(wanted / groups)) * groups
    kept = [
        e
        for g in range(groups)
        for e in range(layer.num_experts)[g * layer.num_experts // groups :][: wanted // groups]
    ]
    check_feasible(layer, tuple(kept))
    return wanted


def drop_lowest(
    layer: MoELayer, scores: Mapping[int, float] | list[float], keep: int, protected: frozenset[int] = frozenset()
) -> Drop | None:
    """Keep the `keep` highest-scored experts of a layer (equally many in each group); ties go to the lower number.

    Args:
        scores: one per expert.
        keep: from `keep_count`.
        protected: experts that stay whatever their score.

    Returns:
        The Drop, or None when nothing goes.
    """
    groups = layer.router.groups
    size = layer.num_experts // groups
    gone: list[int] = []
    for group in range(groups):
        members = range(group * size, (group + 1) * size)
        ranked = sorted(members, key=lambda e: (e not in protected, -scores[e], e))
        gone += ranked[keep // groups :]
    return Drop(layer=layer.index, experts=tuple(sorted(gone))) if gone else None
