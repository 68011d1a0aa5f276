"""How many bytes a model will have, to the byte, before anything is written: from what `bake` would write.

Bytes are linear in the number of experts that a layer keeps (every layer keeps as many: stock models load nothing
else), so the lists of tensors of a few plans say all: of two numbers of experts, and of each way of quantising.
"""

from __future__ import annotations

from collections.abc import Sequence

from moekit.apply.bake import bake_tensors
from moekit.errors import PlanError
from moekit.families.model import Model
from moekit.methods.budget import fewest
from moekit.plans import Drop, Plan, Quantize, QuantizeDense, check_droppable, keep_count

AnyQuantize = Quantize | QuantizeDense


class Sizes:
    """Bytes of what can become of a model.

    Args:
        model: the source.

    Attributes:
        source: bytes of the source's tensors.
        experts: experts of a layer; the smallest number where layers differ.
        counts: numbers of experts that every layer can keep, ascending; only `experts` where none can go.
        cannot_drop: why no expert can go; "" where they can.
    """

    def __init__(self, model: Model):
        self._model = model
        layout = model.layout
        self.source = model.checkpoint.bytes
        self.experts = min(layer.num_experts for layer in layout.routed)
        self.cannot_drop = ""
        least = max(fewest(layer) for layer in layout.routed)
        self.counts = [n for n in range(least, self.experts) if self._possible(n)]
        try:
            check_droppable(layout)
            if any(layer.num_experts != self.experts for layer in layout.routed):
                raise PlanError("layers have different numbers of experts", got="no number that all of them could keep")
            if not self.counts:
                raise PlanError("no expert can go", got=f"every token needs {least} of {self.experts}")
        except PlanError as error:
            self.counts, self.cannot_drop = [], str(error.got)
        mtp = any(layer.mtp for layer in layout.layers)  # they go with the first expert: the source is not on the line
        self._ends = (self.counts[0], self.counts[-1] if mtp else self.experts) if self.counts else ()
        self._known: dict[tuple[int, str], int] = {}
        self.counts.append(self.experts)

    def drop(self, keep: int) -> Plan:
        """A plan that leaves every layer so many experts, whichever."""
        layout = self._model.layout
        ops = []
        for layer in layout.routed:
            each = layer.num_experts // layer.router.groups
            gone = [e for e in range(layer.num_experts) if e % each >= keep // layer.router.groups]
            ops += [Drop(layer=layer.index, experts=tuple(gone))] if gone else []
        return Plan(layout_hash=layout.hash, ops=[*ops])

    def of(self, keep: int, ways: Sequence[AnyQuantize] = ()) -> int:
        """Bytes of the tensors when every layer keeps `keep` experts, which are then quantised.

        Args:
            keep: one of `counts`.
            ways: how each layer is; empty: not at all.

        Raises:
            PlanError: the experts cannot be quantised.
        """
        if self._ends and keep not in self._ends and keep < self.experts:
            low, high = self._ends
            least, most = self.of(low, ways), self.of(high, ways)
            return least + (most - least) * (keep - low) // (high - low)
        key = keep, repr(ways)
        if key not in self._known:
            plan = self.drop(keep)
            plan.ops += ways
            tensors = bake_tensors(self._model.checkpoint, self._model.understanding, plan)
            self._known[key] = sum(x.bytes for x in tensors)
        return self._known[key]

    def _possible(self, keep: int) -> bool:
        try:
            return all(keep_count(layer, keep) == keep for layer in self._model.layout.routed)
        except PlanError:
            return False
