"""Quantising with text in hand: bits by what they cost (mc-moe), weights by GPTQ.

Both look at one layer while all batches wait at it: what reaches each of its experts is kept, and the experts are taken
one at a time. By GPTQ the batches then go on through the rounded layer (`sequential`) or through the layer as it was.

Rounded layers lie in the plan's tensors, errors beside them, so that a pass that was interrupted goes on with the next
layer; what was rounded before is put in place without looking at text again.

Symbols: E experts, B widths, N tokens of an expert, O outputs and I inputs of a projection, D hidden.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from moekit import methods
from moekit.apply.quantize import Rounded, check_finite, roundings
from moekit.checkpoint.packing import dequantise_packed, pack
from moekit.checkpoint.weights import all_finite
from moekit.data import Batch
from moekit.errors import DataError, ModelError, PlanError
from moekit.fitting.decide import Fit
from moekit.fitting.routed import Moments, Routed, gather, second_moments
from moekit.layout import ExpertId, MoELayer
from moekit.measurement import manifest_of
from moekit.methods import quantize
from moekit.methods.quantize import mc_moe
from moekit.methods.quantize._gptq import gptq
from moekit.plans import OUTER, Plan, PlanTensors, Quantize, QuantizeDense
from moekit.stream import Stop, Stream
from moekit.view import MoEView

BATCH_BYTES = 256 << 20  # of weights, second moments and what is made of them
IDENTITY = "fit.json"  # what the numbers of a folder are of


def plan(fit: Fit, *, name: str, options: Mapping[str, Any], keep: float | int | None, domain: Any, **_: Any) -> Plan:
    """The plan of a quantising method that looks at text.

    Args:
        fit: what it may use; no statistics.
        name: of the method.
        options: of the method.
        keep: nothing, or 1.0.
        domain: whose text counts; None: all.

    Raises:
        RecipeError: options that are not possible.
        PlanError: bits that the format has not, or a model that cannot be quantised.
        DataError: no such domain.
        ModelError: activations that are no numbers.
        CheckpointError: weights that are no numbers.
    """
    method, _, settings = methods.check_options(name, options)
    methods.check_keep(method, keep)
    layout = fit.model.layout
    out = Plan(
        layout_hash=layout.hash,
        ops=[*quantize.ways(method, layout, settings)],
        method=name,
        settings=dict(settings),
        made_from=manifest_of(fit.model, fit.data.describe(), (), fit.dtype or fit.model.dtype),
        notes=quantize.notes(layout, settings),
    )
    out.check(layout)
    batches = _chosen(fit, domain)
    _claim(fit.folder, {"of": out.made_from, "domain": domain, "method": name, "settings": dict(settings)})
    tokens = sum(x.tokens for x in batches)
    out.notes.append(f"fitted to {tokens:,} tokens")
    if name == "mc-moe":
        _choose_bits(fit, batches, out, settings)
    if settings.get("rounding", "gptq") == "gptq":
        round_by_gptq(fit, batches, out, settings["damping"], settings["sequential"])
    return out


def round_by_gptq(
    fit: Fit, batches: Sequence[Batch], plan: Plan, damping: float = 0.01, sequential: bool = True
) -> None:
    """Fill the tensors of a plan with what GPTQ makes of its quantised layers, whatever their bits.

    Args:
        fit: what it may use; what an interrupted run left in its folder is used.
        batches: of the text.
        plan: its ops are made to name the numbers; what lies in no decoder layer stays rounded to nearest.
        damping: see `moekit.methods.quantize._gptq.gptq`.
        sequential: layers see what the rounded layers before them pass on.

    Raises:
        ModelError: activations that are no numbers.
        CheckpointError: weights that are no numbers.
    """
    _Rounding(fit, batches, plan, damping, sequential).run()


def _chosen(fit: Fit, domain: str | Sequence[str] | None) -> list[Batch]:
    wanted = fit.data.domains if domain is None else [domain] if isinstance(domain, str) else list(domain)
    if unknown := set(wanted) - set(fit.data.domains):
        raise DataError(f"the text has no domain {min(unknown)!r}", expected=", ".join(fit.data.domains))
    return [x for x in fit.data.batches if fit.data.domains[x.domain] in wanted]


def _claim(folder: Path, identity: Mapping[str, Any]) -> None:
    """Refuse a folder with the numbers of another fit; what this one left there is used."""
    said = json.dumps(identity, sort_keys=True, default=str)
    file = folder / IDENTITY
    if file.is_file() and file.read_text() != said:
        raise PlanError("the folder holds the numbers of another fit", where=folder, fix="choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(said)


class _Pass:
    """A walk of all batches through the model, one layer at a time."""

    def __init__(self, fit: Fit, batches: Sequence[Batch]):
        self.fit, self.batches, self.layout = fit, batches, fit.model.layout
        self.loader = fit.model.loader(fit.dtype, fit.device)
        self.view = MoEView(self.loader.model, self.layout)
        self.family = self.loader.understanding.family

    def stops(self, last_layer: int) -> Iterator[Stop]:
        """Pauses before each layer."""
        stream = Stream(self.loader, progress=self.fit.progress)
        yield from stream.stops([x.ids for x in self.batches], last_layer=last_layer)

    def by_expert(self, plan: Plan, index: int) -> dict[int, dict[str, list[Rounded]]]:
        """What the plan rounds of a layer's experts: by expert, then by parameter, what the experts are given first."""
        out: dict[int, dict[str, list[Rounded]]] = defaultdict(dict)
        for rounded in roundings(self.loader.checkpoint, self.loader.understanding, plan, index):
            if rounded.matrix.expert is not None:
                out[rounded.matrix.expert].setdefault(rounded.matrix.key, []).append(rounded)
        return {e: dict(sorted(x.items(), key=lambda y: _is_down(y[0]))) for e, x in out.items()}

    def parameter(self, key: str) -> torch.Tensor:
        """A parameter of the layer that is in."""
        path, _, name = key.rpartition(".")
        return self.loader.model.get_submodule(path)._parameters[name].data

    @contextmanager
    def restored(self, expert: int, keys: Sequence[str]) -> Iterator[None]:
        """Afterwards an expert's weights are what they were."""
        kept = {key: self.parameter(key)[expert].clone() for key in keys}
        try:
            yield
        finally:
            for key, x in kept.items():
                self.parameter(key)[expert] = x


def _is_down(key: str) -> bool:
    return key.rpartition(".")[2].startswith("down_proj")


class _Errors(_Pass):
    """What each expert costs at each width.

    Args:
        fit: what it may use.
        batches: the text.
        plan: with an op for each layer: group size and form.
        widths: to try.
    """

    def __init__(self, fit: Fit, batches: Sequence[Batch], plan: Plan, widths: Sequence[int]):
        super().__init__(fit, batches)
        self.widths, self.plan = widths, plan
        self.store = PlanTensors(fit.folder / "errors")

    def run(self) -> dict[int, dict[str, np.ndarray]]:
        """By layer: "error_sq" [E, B], "count" [E], "mass" [E]."""
        layers = {x.index: x for x in self.layout.routed}
        if not all(self.store.has(index) for index in layers):
            for stop in self.stops(max(layers)):
                if stop.layer in layers and not self.store.has(stop.layer):
                    routed = gather(self.view, stop, layers[stop.layer], self.batches)
                    assert routed is not None, "asked for"
                    self.store.write(stop.layer, self._of_layer(layers[stop.layer], routed))
        names = ("error_sq", "count", "mass")
        return {index: {name: self.store.read(index, name).numpy() for name in names} for index in layers}

    def _of_layer(self, layer: MoELayer, routed: Routed) -> dict[str, torch.Tensor]:
        ops = {b: self.plan.quantised()[layer.index].model_copy(update={"bits": b}) for b in self.widths if b < 16}
        trials = {b: self.by_expert(self.plan.model_copy(update={"ops": [op]}), layer.index) for b, op in ops.items()}
        error_sq = torch.zeros(layer.num_experts, len(self.widths), dtype=torch.float64)
        count, mass = torch.zeros(layer.num_experts), torch.zeros(layer.num_experts, dtype=torch.float64)
        experts = self.view.experts(layer.index)
        for expert in range(layer.num_experts):
            hidden_ND, weights_N = routed.of(expert, self.loader.device)
            count[expert], mass[expert] = len(hidden_ND), float(weights_N.sum())
            if not len(hidden_ND):
                continue
            with torch.inference_mode():
                right_ND = self.family.output(experts, expert, hidden_ND)
                for number, bits in enumerate(self.widths):
                    if bits in trials:
                        found_ND = self._tried(experts, expert, hidden_ND, trials[bits][expert])
                        gap_N = (found_ND - right_ND).double().square().sum(-1)
                        error_sq[expert, number] = float((weights_N.double().square() * gap_N).sum())
        return {"error_sq": error_sq, "count": count, "mass": mass}

    def _tried(
        self, experts: nn.Module, expert: int, hidden_ND: torch.Tensor, rounded: Mapping[str, list[Rounded]]
    ) -> torch.Tensor:
        with self.restored(expert, list(rounded)):
            for key, parts in rounded.items():
                for part in parts:
                    weight = part.matrix.view(self.parameter(key))
                    weight.copy_(part.read_back(weight))
            return self.family.output(experts, expert, hidden_ND)


def _choose_bits(fit: Fit, batches: Sequence[Batch], plan: Plan, settings: Mapping[str, Any]) -> None:
    """Give the plan's ops the bits that cost least; notes say how they are spread."""
    layout = fit.model.layout
    widths = mc_moe.parsed(settings["widths"], settings["bits"])
    errors = _Errors(fit, batches, plan, widths).run()
    powers = {name: settings[name] for name in ("alpha", "beta", "gamma")}
    costs = []
    for layer in layout.routed:
        found = errors[layer.index]
        costs.append(mc_moe.costs(found["error_sq"], found["count"], found["mass"], **powers))
    sizes = [3 * x.width * x.inner_size for x in layout.routed]  # with two projections as well: only ratios count
    chosen = mc_moe.choose(
        costs, sizes, widths, settings["bits"], scope=settings["scope"], published=settings["published"]
    )
    bits = dict(zip((x.index for x in layout.routed), chosen, strict=True))
    plan.ops = [op.model_copy(update={"bits": bits[op.layer]}) if isinstance(op, Quantize) else op for op in plan.ops]
    every = [b for x in chosen for b in x]
    spread = ", ".join(f"{every.count(b)} of {b} bits" for b in widths)
    plan.notes.append(f"experts: {spread}; {sum(every) / len(every):.2f} bits on average")
    plan.measured["expert_errors"] = {
        str(index): np.sqrt(found["error_sq"]).round(6).tolist() for index, found in errors.items()
    }


class _Rounding(_Pass):
    """GPTQ of every layer, in order; arguments as for `round_by_gptq`."""

    def __init__(self, fit: Fit, batches: Sequence[Batch], plan: Plan, damping: float, sequential: bool):
        super().__init__(fit, batches)
        self.plan, self.damping, self.sequential = plan, damping, sequential
        self.store = PlanTensors(fit.folder)

    def run(self) -> None:
        """Round; fill the plan's tensors."""
        plan = self.plan
        plan.ops = [
            op.model_copy(update={"scheme": "gptq"})
            if isinstance(op, Quantize | QuantizeDense) and op.layer != OUTER
            else op
            for op in plan.ops
        ]
        plan.tensors = str(self.fit.folder)
        indices = {op.layer for op in plan.ops if op.layer != OUTER}
        for stop in self.stops(max(indices)):
            if stop.layer not in indices:
                continue
            if not self.store.has(stop.layer):
                self.store.write(stop.layer, self._of_layer(stop))
            if self.sequential:
                self._put(stop.layer)
        cold = [ExpertId(index, e) for index in sorted(indices) for e in self.store.read(index, COLD).tolist()]
        unseen = [name for index in sorted(indices) for name in self._unseen(index)]
        if cold:
            plan.notes.append(f"too few tokens for GPTQ, rounded to nearest: {len(cold)} experts ({_listed(cold)})")
        if unseen:
            plan.notes.append(f"no inputs seen, rounded to nearest: {_listed(unseen)}")

    def _unseen(self, index: int) -> list[str]:
        parts = roundings(self.loader.checkpoint, self.loader.understanding, self.plan, index)
        dense = [x.matrix.name for x in parts if x.matrix.expert is None]
        return [dense[number] for number in self.store.read(index, UNSEEN).tolist()]

    def _put(self, index: int) -> None:
        """Let the layer that is in be the rounded one."""
        with torch.inference_mode():
            for x in roundings(self.loader.checkpoint, self.loader.understanding, self.plan, index):
                weight = x.matrix.view(self.parameter(x.matrix.key))
                weight.copy_(x.read_back(weight))

    def _of_layer(self, stop: Stop) -> dict[str, torch.Tensor]:
        """The packed numbers of all that the plan rounds in a layer, and where GPTQ could not be."""
        index = stop.layer
        layer = self.layout.by_index[index] if index in self.plan.quantised() else None
        parts = roundings(self.loader.checkpoint, self.loader.understanding, self.plan, index)
        dense = [x for x in parts if x.matrix.expert is None]
        modules = {x.matrix.key: self.loader.model.get_submodule(x.matrix.key.rpartition(".")[0]) for x in dense}
        moments = Moments(modules)
        routed = gather(self.view, stop, layer, self.batches, moments if dense else None)
        out: dict[str, torch.Tensor] = {}
        cold, unseen = [], []
        for number, x in enumerate(dense):
            hessian = moments.sums.get(x.matrix.key)
            found, sound = self._rounded([[x]], [[self.parameter(x.matrix.key)]], [hessian])
            out |= found
            unseen += [] if sound[0] else [number]
        if routed is not None:
            by_expert = self.by_expert(self.plan, index)
            for some in self._together(by_expert):
                found, nearest = self._experts(self.view.experts(index), some, by_expert, routed)
                out |= found
                cold += nearest
        said = {COLD: torch.tensor(sorted(cold), dtype=torch.int64), UNSEEN: torch.tensor(unseen, dtype=torch.int64)}
        return out | said

    def _together(self, by_expert: Mapping[int, Mapping[str, list[Rounded]]]) -> Iterator[list[int]]:
        """The experts of a layer in runs of one width that fit in `BATCH_BYTES` together."""
        by_bits: dict[int, list[int]] = defaultdict(list)
        for expert, by_key in by_expert.items():
            by_bits[next(iter(by_key.values()))[0].bits].append(expert)
        for experts in by_bits.values():
            parts = by_expert[experts[0]].values()
            each = max(4 * (4 * x[0].matrix.columns ** 2 + 4 * _rows(x) * x[0].matrix.columns) for x in parts)
            most = max(1, BATCH_BYTES // each)
            yield from (experts[i : i + most] for i in range(0, len(experts), most))

    def _experts(
        self,
        module: nn.Module,
        experts: Sequence[int],
        by_expert: Mapping[int, Mapping[str, list[Rounded]]],
        routed: Routed,
    ) -> tuple[dict[str, torch.Tensor], list[int]]:
        """Packed numbers of experts of one width, and which of them are not GPTQ's."""
        out: dict[str, torch.Tensor] = {}
        nearest: set[int] = set()
        keys = list(by_expert[experts[0]])
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            for e in experts:
                stack.enter_context(self.restored(e, keys))
            for key in keys:
                parts = [by_expert[e][key] for e in experts]
                first = parts[0][0]
                enough = first.group_size if first.group_size > 0 else first.matrix.columns
                moments = [self._moments(module, e, key, routed, enough) for e in experts]
                weights = [[x.matrix.view(self.parameter(key)) for x in some] for some in parts]
                found, sound = self._rounded(parts, weights, moments)
                out |= found
                nearest |= {e for e, is_sound in zip(experts, sound, strict=True) if not is_sound}
                for x in itertools.chain(*parts):
                    shape = (x.matrix.rows, x.matrix.columns)
                    packed, scale = (found[x.matrix.name + suffix] for suffix in ("_packed", "_scale"))
                    x.matrix.view(self.parameter(key)).copy_(dequantise_packed(packed, scale, shape, x.grid))
        return out, sorted(nearest)

    def _moments(self, module: nn.Module, expert: int, key: str, routed: Routed, enough: int) -> torch.Tensor | None:
        """Second moments of what reaches a parameter of an expert; None where too few tokens do."""
        hidden_ND, _ = routed.of(expert, self.loader.device)
        if len(hidden_ND) < enough:
            return None
        return second_moments(self.family.inner(module, expert, hidden_ND) if _is_down(key) else hidden_ND)

    def _rounded(
        self,
        parts: Sequence[Sequence[Rounded]],
        weights: Sequence[Sequence[torch.Tensor]],
        moments: Sequence[torch.Tensor | None],
    ) -> tuple[dict[str, torch.Tensor], list[bool]]:
        """Packed numbers of weights, and which are GPTQ's.

        Args:
            parts: for each set of inputs, what gets it: all of one grid, group size and dtype.
            weights: of those.
            moments: of the inputs; None: there were too few.

        Raises:
            CheckpointError: a weight that is no number.
            ModelError: inputs that are no numbers.
        """
        for some, their_weights, moment in zip(parts, weights, moments, strict=True):
            for x, weight in zip(some, their_weights, strict=True):
                check_finite(weight, x.matrix.source)
            if moment is not None and not all_finite(moment):
                raise ModelError(
                    "what reaches this weight are no numbers",
                    where=some[0].matrix.name,
                    fix="the model overflows on this text in this dtype: run it in bfloat16 or float32",
                )
        first = parts[0][0]
        nothing = torch.zeros(first.matrix.columns, first.matrix.columns, device=self.loader.device)
        codes_EOI, scale_EOG, sound_E = gptq(
            torch.stack([torch.cat(list(x)) for x in weights]),
            torch.stack([nothing if x is None else x for x in moments]),
            first.grid,
            first.group_size,
            first.dtype,
            self.damping,
        )
        out = {}
        for some, codes_OI, scale_OG in zip(parts, codes_EOI.cpu(), scale_EOG.cpu(), strict=True):
            rows = [x.matrix.rows for x in some]
            for x, its_codes, its_scales in zip(some, codes_OI.split(rows), scale_OG.split(rows), strict=True):
                out[x.matrix.name + "_packed"] = pack(its_codes, x.bits)
                out[x.matrix.name + "_scale"] = its_scales.clone()
        return out, sound_E.tolist()


def _rows(parts: Sequence[Rounded]) -> int:
    return sum(x.matrix.rows for x in parts)


COLD, UNSEEN = "experts_rounded_to_nearest", "dense_rounded_to_nearest"  # numbers of those where GPTQ could not be


def _listed(things: Sequence[object], most: int = 20) -> str:
    shown = ", ".join(map(str, things[:most]))
    return shown + (f" and {len(things) - most} more" if len(things) > most else "")
