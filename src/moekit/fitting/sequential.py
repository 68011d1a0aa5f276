"""Merging layer by layer, each decided on statistics that were taken with the merged layers before it.

All batches wait before a layer; it is run on each of them and its statistics are taken; its experts are merged; then
all batches go through it as it now is. One pass over the text, with every MoE layer run twice.

What was decided for a layer lies in the fit's folder, so that a pass that was interrupted takes no statistics twice.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moekit import methods
from moekit.apply.made import new_parameters
from moekit.errors import PlanError
from moekit.fitting.decide import Fit
from moekit.layout import Layout, MoELayer
from moekit.measurement import Gatherer
from moekit.methods.merge import layer_merge
from moekit.plans import Merge, Plan
from moekit.stats import Stats
from moekit.stream import Stop, Stream
from moekit.view import MoEView


def plan(fit: Fit, *, name: str, options: Mapping[str, Any], domain: str | list[str] | None, **settings: Any) -> Plan:
    """The plan of a merging method that may be asked for `sequential`; without, that of `moekit.methods.make_plan`.

    Args:
        fit: what it may use; the statistics, of all layers as they are, name the super experts.
        name: of the method.
        options: of the method.
        domain: whose statistics count; the text of all runs.
        settings: as for `moekit.fitting.decide`.

    Raises:
        UserError: see `moekit.methods.make_plan`.
    """
    if fit.stats is None:
        raise PlanError(f"the method {name!r} needs statistics", fix="measure the model first")
    once = methods.make_plan(
        name, fit.stats, fit.model.layout, domain=domain, **settings, **{**options, "sequential": False}
    )
    if not options.get("sequential"):
        return once
    once.ops = [*_Pass(fit, once, domain).run()]
    once.settings["sequential"] = True
    once.notes = [x for x in once.notes if not x.startswith("largest group")]
    largest = max((len(group.members) for op in once.merges().values() for group in op.groups), default=1)
    once.notes += [f"largest group: {largest} experts", "each layer was decided with the merged layers before it"]
    return once


class _Pass:
    """The pass over the text.

    Args:
        fit: what it may use.
        once: the plan of one pass: how many experts each layer keeps, and the settings.
        domain: whose statistics count.
    """

    def __init__(self, fit: Fit, once: Plan, domain: str | Sequence[str] | None):
        assert fit.stats is not None, "looked at before"
        self.fit, self.stats, self.domain = fit, fit.stats, domain
        self.method, router, self.settings = methods.check_options(
            once.method, {key: once.settings[key] for key in ("router", *methods.get(once.method).options)}
        )
        self.router: Any = router["router"]
        layout: Layout = fit.model.layout
        self.keep = {layer.index: len(once.kept(layer)) for layer in layout.routed}
        safe = methods.super_experts(self.stats, layout) if once.settings["protect"] == "super" else frozenset()
        self.protected = {index: frozenset(x.expert for x in safe if x.layer == index) for index in self.keep}
        self.folder = Path(fit.folder) / "merges"
        self.ops: dict[int, Merge | None] = {}

    def run(self) -> list[Merge]:
        """The merge of each layer that has one."""
        model, data = self.fit.model, self.fit.data
        loader = model.loader(self.fit.dtype, self.fit.device)
        view = MoEView(loader.model, model.layout)

        def around(index: int, number: int) -> contextlib.AbstractContextManager:
            op = self.ops.get(index)
            return view.ban({index: op.gone}) if op else contextlib.nullcontext()

        stream = Stream(loader, progress=self.fit.progress)
        last = model.layout.routed[-1].index
        for stop in stream.stops([x.ids for x in data.batches], around=around, last_layer=last):
            layer = model.layout.by_index.get(stop.layer)
            if layer is None:
                continue
            self.ops[layer.index] = op = self._kept(layer) or self._decided(view, stop, layer)
            if op is not None:
                stored = (*loader.model.named_parameters(), *loader.model.named_buffers())
                tensors = {key: x.data.cpu() for key, x in stored if key.startswith(layer.path + ".")}
                one = Plan(layout_hash=model.layout.hash, ops=[op])
                loader.attach(layer.index, new_parameters(loader, model.layout, one, layer.index, tensors))
        return [op for op in self.ops.values() if op is not None]

    def _decided(self, view: MoEView, stop: Stop, layer: MoELayer) -> Merge | None:
        """What is done to a layer, from statistics of it as all batches reach it now."""
        data = self.fit.data
        gatherer = Gatherer([layer], len(data.domains), self.method.groups)
        with view.watch(gatherer, layers=[layer.index]), torch.inference_mode():
            for number, batch in enumerate(data.batches):
                gatherer.batch = (number, batch)
                stop.run(number)
        found = gatherer.take(layer.index, sum(data.tokens.values()))
        tokens = np.array([data.tokens[name] for name in data.domains], np.int64)
        stats = Stats(self.stats.layout_hash, tuple(data.domains), tokens, tokens * 0, {layer.index: found})
        keep, protected = self.keep[layer.index], self.protected[layer.index]
        op = layer_merge(
            self.method, stats, layer, keep, self.domain, protected, router=self.router, settings=self.settings
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self._file(layer).with_suffix(".partial")
        partial.write_text(json.dumps(None if op is None else op.model_dump()))
        os.replace(partial, self._file(layer))
        return op

    def _kept(self, layer: MoELayer) -> Merge | None:
        """What an interrupted pass has decided for a layer."""
        try:
            return Merge.model_validate_json(self._file(layer).read_text())
        except (OSError, ValueError):
            return None

    def _file(self, layer: MoELayer) -> Path:
        return self.folder / f"layer-{layer.index:05d}.json"
