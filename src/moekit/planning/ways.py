"""Ways to keep weights: in their own bits, or as each quantising method of the registry that needs no text would."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from moekit import methods
from moekit.errors import PlanError
from moekit.families.model import Model
from moekit.fitting import FITTED
from moekit.methods import Method
from moekit.methods.quantize import ways as ways_of
from moekit.planning.sizes import AnyQuantize, Sizes
from moekit.plans import Quantize
from moekit.recipe import Step

Formats = Literal["stock", "moekit"]
FORMS: dict[Formats, str] = {"stock": "compressed-tensors", "moekit": "moekit"}
REST = {"attention_bits": "attention", "shared_bits": "shared experts", "dense_bits": "dense MLP"}  # by option
REST_BITS = 8


@dataclass(frozen=True)
class Way:
    """One way.

    Attributes:
        step: of a recipe; None: weights stay as they are.
        ops: what it does to each layer.
        bits: of the experts' weights after it.
        rest: bits of attention, shared experts, dense MLPs, embeddings and head after it; 0: they stay.
    """

    step: Step | None
    ops: tuple[AnyQuantize, ...]
    bits: int
    rest: int = 0

    @property
    def bits_said(self) -> str:
        """`4 bits`, or `4 bits (all else 8)`."""
        return f"{self.bits} bits" + (f" (all else {self.rest})" if self.rest else "")


class Space:
    """Everything that a model can be made, as far as headers tell.

    Args:
        model: the source.
        formats: "stock": what stock transformers loads; "moekit": moekit's own packed form.

    Attributes:
        sizes: of the model and what it can become.
        ways: that its weights can be kept in, as they are first.
        notes: what cannot be done, and why.
    """

    def __init__(self, model: Model, formats: Formats = "stock"):
        self.sizes = Sizes(model)
        self.ways = [Way(None, (), _own_bits(model))]
        self.notes = [f"all experts stay: {self.sizes.cannot_drop}"] if self.sizes.cannot_drop else []
        for method in quantising():
            for rest in (0, REST_BITS):
                try:
                    way = _way(method, model, formats, rest)
                    before = self.ways[-1].ops if rest else ()
                    if self.sizes.of(self.sizes.experts, way.ops) < self.sizes.of(self.sizes.experts, before):
                        self.ways.append(way)
                except PlanError as error:
                    reason = f"not quantised: {error.problem}" + (f" ({error.got})" if str(error.got) else "")
                    self.notes += [] if reason in self.notes else [reason]

    @property
    def smallest(self) -> tuple[int, str]:
        """(bytes, what): the smallest that the model can become."""
        keep, experts = self.sizes.counts[0], self.sizes.experts
        way = min(self.ways, key=lambda x: self.sizes.of(keep, x.ops))
        count = f"{keep} of {experts} experts" if keep < experts else f"all {experts} experts"
        return self.sizes.of(keep, way.ops), f"{count} at {way.bits_said}"


def quantising() -> list[Method]:
    """Quantising methods that need nothing but weights."""
    return [methods.get(name) for name in methods.names("quantize") if name not in FITTED]


def options_of(method: Method, model: Model, formats: Formats, rest: int) -> dict[str, Any]:
    """Options that let a method write a form, with so many bits for what every token uses (0: it stays as it is)."""
    options: dict[str, Any] = {"fitted": True} if "fitted" in method.options else {}
    if method.options["format"] != FORMS[formats]:
        options["format"] = FORMS[formats]
    parts, rests = model.layout.parts, dict(REST)
    if formats == "moekit":  # stock transformers cannot read packed input embeddings
        rests["embedding_bits"] = "embeddings"
    if not model.layout.tied_embeddings:
        rests["head_bits"] = "embeddings"
    return options | {key: rest for key, part in rests.items() if rest and parts[part].bytes}


def _way(method: Method, model: Model, formats: Formats, rest: int) -> Way:
    options = options_of(method, model, formats, rest)
    ops = tuple(ways_of(method, model.layout, method.settings(options)))
    bits = next(op.width(0) for op in ops if isinstance(op, Quantize))
    return Way(Step(method=method.name, options=options), ops, bits, rest)


def _own_bits(model: Model) -> int:
    """Bits of a weight on disk; scales counted where the form does not say."""
    if said := re.search(r"\d+", model.layout.quantisation or ""):  # int8, fp8, mxfp4
        return int(said.group())
    experts = model.layout.parts["experts"]
    return round(8 * experts.bytes / max(1, experts.params))
