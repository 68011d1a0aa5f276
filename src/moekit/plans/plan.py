"""The plan itself: ops, where they come from, and what they add up to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from moekit.errors import PlanError
from moekit.layout import Layout, MoELayer
from moekit.markup import html_table
from moekit.plans.checks import (
    check_carried,
    check_droppable,
    check_feasible,
    check_merge,
    check_no_constants,
    check_quantised,
    check_values,
)
from moekit.plans.dynamic import Odp, check_dynamic, check_no_dynamics
from moekit.plans.factoring import Factor, check_factored, check_factored_alone
from moekit.plans.holding import Hold, check_held
from moekit.plans.ops import OUTER, AnyOp, Drop, Merge, Quantize, QuantizeDense, Values, share_of
from moekit.plans.padding import Slots, check_paddable, check_padded_alone, slots
from moekit.plans.standins import OWN, Replace, check_alone, check_replaced
from moekit.plans.steering import Steer, check_no_steering, check_steering

VERSION = 1
Kind = Literal["prune", "merge", "factor", "replace", "quantize", "heal", "live", "steer"]
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


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
        tensors: folder of the numbers that ops carry (`PlanTensors`); empty when there are none. In a file, a path that
            counts from the file's own folder.
        padding: what is written where layers keep different numbers of experts. "exact": they are filled up with
            experts of zeros that are never chosen (`moekit.plans.padding`).
        meant: the kind of the method that made it, which says what a plan without changes was for.
    """

    model_config = ConfigDict(extra="forbid")

    version: int = VERSION
    layout_hash: str
    ops: list[AnyOp] = []
    method: str = ""
    settings: dict = {}
    made_from: dict = {}
    notes: list[str] = []
    measured: dict = {}
    tensors: str = ""
    padding: Literal["none", "exact"] = "none"
    meant: Kind | None = None

    def dropped(self) -> dict[int, tuple[int, ...]]:
        """Experts whose place goes, dropped or merged into another: ascending, by decoder layer index."""
        out: dict[int, set[int]] = {}
        for op in self.ops:
            if isinstance(op, Drop | Merge):
                out.setdefault(op.layer, set()).update(op.experts if isinstance(op, Drop) else op.gone)
        return {layer: tuple(sorted(experts)) for layer, experts in sorted(out.items()) if experts}

    def dropped_live(self, layout: Layout) -> dict[int, tuple[int, ...]]:
        """`dropped` for the layers that the stock model runs."""
        return {layer.index: gone for layer in layout.routed if (gone := self.dropped().get(layer.index))}

    def merges(self) -> dict[int, Merge]:
        """The merge of each layer that has one."""
        return {op.layer: op for op in self.ops if isinstance(op, Merge)}

    @property
    def kind(self) -> Kind:
        """What the changes are."""
        if self.quantised() or self.quantised_dense():
            return "quantize"
        if self.factored():
            return "factor"
        if self.merges() or self.dropped():
            return "merge" if self.merges() else "prune"
        if self.replaced() or self.values():
            return "replace" if self.replaced() else "heal"
        return "live" if self.dynamic() else "steer" if self.steers() or self.holds() else self.meant or "prune"

    def factored(self) -> dict[int, Factor]:
        """How each layer's experts are factored, where they are."""
        return {op.layer: op for op in self.ops if isinstance(op, Factor)}

    def values(self) -> dict[int, Values]:
        """The new parameters of each layer that has some."""
        return {op.layer: op for op in self.ops if isinstance(op, Values)}

    def quantised(self) -> dict[int, Quantize]:
        """How each layer that is quantised is."""
        return {op.layer: op for op in self.ops if isinstance(op, Quantize)}

    def quantised_dense(self) -> dict[int, QuantizeDense]:
        """How each layer's weights that every token uses are quantised, where they are."""
        return {op.layer: op for op in self.ops if isinstance(op, QuantizeDense)}

    @property
    def packed_form(self) -> str | None:
        """The form that quantised weights are written in; None where the plan quantises nothing."""
        return next((op.format for op in self.ops if isinstance(op, Quantize | QuantizeDense)), None)

    def replaced(self) -> dict[int, Replace]:
        """The experts of each layer that vectors stand for, where there are any."""
        return {op.layer: op for op in self.ops if isinstance(op, Replace)}

    def dynamic(self) -> dict[int, Odp]:
        """How each layer is pruned dynamically, where it is."""
        return {op.layer: op for op in self.ops if isinstance(op, Odp)}

    @property
    def own_form(self) -> bool:
        """Whether what the plan makes is written in moekit's own form, which stock transformers does not load."""
        others: list[Replace | Factor] = [*self.replaced().values(), *self.factored().values()]
        return self.packed_form == OWN or any(op.format == OWN for op in others)

    def steers(self) -> list[Steer]:
        """What is done to routers' choices and weights, live."""
        return [op for op in self.ops if isinstance(op, Steer)]

    def holds(self) -> dict[int, Hold]:
        """How each layer is steered by its weights, where it is."""
        return {op.layer: op for op in self.ops if isinstance(op, Hold)}

    def kept(self, layer: MoELayer) -> tuple[int, ...]:
        """Experts of a layer that stay, ascending."""
        gone = set(self.dropped().get(layer.index, ()))
        return tuple(e for e in range(layer.num_experts) if e not in gone)

    def places(self, layout: Layout) -> dict[int, Slots]:
        """The experts of each written layer by their old numbers; None: one of zeros, that fills a layer up."""
        kept = {layer.index: self.kept(layer) for layer in layout.routed}
        most = max(len(x) for x in kept.values())
        full = {
            x.index: slots(x, kept[x.index], most if self.padding == "exact" else len(kept[x.index]))
            for x in layout.routed
        }
        return full

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
            check_no_constants(op, layout.by_index[index])
        if self.packed_form:
            check_quantised(self.ops, layout, self.tensors)
        if self.values():
            check_values(self.ops, self.tensors)
        check_factored(self.ops, layout, ITEMSIZE.get(layout.dtype, 2))
        if any(op.scheme == "healed" for op in self.factored().values()):
            check_carried(self.tensors)
        check_steering(self.ops, layout)
        check_held(self.ops, layout)
        check_replaced(self.ops, layout, self.tensors)
        check_dynamic(self.ops, layout)

    def check_bakeable(self, layout: Layout) -> None:
        """Refuse a plan whose result no stock model loads: layers with different numbers of experts or bits."""
        self.check(layout)
        check_no_steering(self.ops)
        check_no_dynamics(self.ops)
        check_alone(self.ops)
        check_factored_alone(self.ops)
        ways = [self.quantised().get(layer.index) for layer in layout.routed]
        stock = self.packed_form == "compressed-tensors"
        if stock and len({x and (x.bits, x.group_size) for x in ways}) > 1:
            raise PlanError(
                "layers would be quantised in different ways, which stock transformers cannot load",
                expected="the same bits and group size in every MoE layer",
                fix="quantise all layers alike, use format: moekit, or apply the plan live",
            )
        left = {len(self.kept(layer)) for layer in layout.routed}
        if len(left) > 1 and self.padding == "exact":
            check_paddable(layout)
            check_padded_alone(self.ops)
        elif len(left) > 1:
            raise PlanError(
                "layers would keep different numbers of experts, which stock transformers cannot load",
                expected="the same number in every MoE layer",
                got=f"{min(left)} to {max(left)}",
                fix="use a uniform spread (the default), or padding: exact where the router has a bias",
            )

    def saved_bytes(self, layout: Layout) -> int:
        """Bytes on disk that the plan saves, about (router rows and norms are left out)."""
        saved = sum(len(experts) * layout.by_index[index].expert_bytes for index, experts in self.dropped().items())
        if self.padding == "exact":
            saved -= sum(x.count(None) * layout.by_index[i].expert_bytes for i, x in self.places(layout).items())
        itemsize = ITEMSIZE.get(layout.dtype, 2)
        for index, replace in self.replaced().items():
            if replace.format == OWN:
                layer = layout.by_index[index]
                saved += len(replace.experts) * (layer.expert_bytes - layer.width * itemsize)
        for index, factor in self.factored().items():
            layer = layout.by_index[index]
            saved += round(len(self.kept(layer)) * layer.expert_bytes * (1 - factor.share(layer, itemsize)))
        for index, op in self.quantised().items():
            layer = layout.by_index[index]
            shares = [op.share(layer, itemsize, e) for e in self.kept(layer)]
            saved += round(layer.expert_bytes * (len(shares) - sum(shares)))
        for dense in self.quantised_dense().values():
            for part, bits in dense.bits.items():
                size = dense.group_size if dense.group_size > 0 else layout.hidden_size
                outer = layout.vocab_size * layout.hidden_size * itemsize
                inner = layout.parts[part].bytes / layout.num_layers if part in layout.parts else 0
                saved += round((outer if dense.layer == OUTER else inner) * (1 - share_of(bits, size, itemsize)))
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
                here, there = (f"{_bits(x)} bits" if x else "unquantised" for x in (mine.get(layer), its.get(layer)))
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
        if self.tensors:
            head["tensors"] = os.path.relpath(self.tensors, path.absolute().parent)
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
            plan = cls.model_validate(raw)
            if plan.tensors:
                plan.tensors = os.path.normpath(path.absolute().parent / plan.tensors)
            return plan
        except FileNotFoundError:
            raise PlanError("no such plan", where=path) from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(x) for x in first["loc"])
            raise PlanError("this is not a valid plan", where=f"{path}: {where}", got=first["msg"]) from None
        except ValueError as error:
            raise PlanError("this is not a plan", where=path, got=str(error)[:200]) from None


def _bits(op: Quantize) -> str:
    return str(op.bits) if isinstance(op.bits, int) else " ".join(map(str, op.bits))
