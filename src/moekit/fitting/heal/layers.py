"""Layers tuned one by one, by gradient: routers, experts or both, towards what the teacher's layer gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moekit import methods
from moekit.data import Batch
from moekit.errors import DataError
from moekit.families.seam import Call, Observer
from moekit.fitting.decide import Fit
from moekit.fitting.heal import whole
from moekit.fitting.heal.folder import FitFolder
from moekit.fitting.heal.learner import Learner, put, teacher_of, text_of, to_tune
from moekit.fitting.heal.lockstep import Pair, hidden_of, side_by_side
from moekit.methods.heal import _tuning as tuning
from moekit.methods.heal._tuning import Tuning
from moekit.plans import Plan


def plan(
    fit: Fit, *, name: str, options: Mapping[str, Any], domain: str | list[str] | None, seed: int, **_: Any
) -> Plan:
    """New weights of routers or experts, each layer tuned for itself.

    Args:
        fit: what it may use.
        name: of the method.
        options: of the method.
        domain: whose text counts.
        seed: of the order of the text.

    Raises:
        DataError: too little text to hold some out.
        PlanError: weights that are quantised on disk.
        UserError: see `moekit.fitting.heal.learner`.
    """
    settings = methods.check_options(name, options)[2]
    wanted: Tuning = methods.get(name)(**settings)
    if wanted.match == "logits":
        return whole.plan(fit, name=name, options=options, domain=domain, seed=seed)
    teacher = teacher_of(fit, settings)
    loader = fit.model.loader(fit.dtype)
    for layer in fit.model.layout.routed:
        for part in wanted.parts:
            to_tune(loader, layer, part)
    folder = FitFolder(fit, teacher.fingerprint, {"method": name, "domain": domain, "seed": seed, **settings})
    batches = text_of(fit, domain, wanted.sequences)
    check_enough(batches)
    shown = frozenset({wanted.match} | ({"arguments"} if wanted.inputs == "teacher" else set()))
    records: dict[int, dict[str, Any]] = {}
    pairs = side_by_side(teacher, fit.model, batches, shown, dtype=fit.dtype, device=fit.device, progress=fit.progress)
    for pair in pairs:
        index = pair.layer.index
        if (found := folder.found(index)) is None:
            tensors, record = _LayerTuning(pair, batches, wanted, seed).run()
            found = folder.finish(index, tensors, record)
        put(pair.loader.model, found[0])
        records[index] = found[1]
    made = Plan(layout_hash=fit.model.layout.hash, method=name, settings={"domain": domain, "seed": seed, **settings})
    made.made_from = {"model": fit.model.name, "teacher": teacher.name, "data": fit.data.describe()}
    folder.add_values(made, sorted(records))
    made.measured["held_out_error"] = {str(index): [x["before"], x["after"]] for index, x in records.items()}
    made.notes.append(
        f"error of each layer's {wanted.match} on held-out text, before and after: "
        + ", ".join(f"{index}: {x['before']:.3g} -> {x['after']:.3g}" for index, x in records.items())
    )
    if same := [str(index) for index, x in records.items() if not x["names"]]:
        made.notes.append(f"layers that tuning did not make better stay as they are: {', '.join(same)}")
    return made


def check_enough(batches: Sequence[Batch]) -> None:
    """Refuse text of which nothing can be held out.

    Raises:
        DataError: a single batch.
    """
    if len(batches) < 2:
        raise DataError(
            "too little text to heal on: none of it could be held out",
            expected="two batches at least",
            got=f"{sum(len(x.ids) for x in batches)} sequences",
            fix="give more text, shorter sequences, or fewer of them in a step (option sequences)",
        )


@dataclass
class _Output(Observer):
    """Keeps the routed experts' sum, with its gradient."""

    block: torch.Tensor | None = None

    def finished(self, call: Call, output: torch.Tensor) -> None:
        self.block = output


class _LayerTuning:
    """One layer's tuning.

    Args:
        pair: where teacher and student stand.
        batches: of the text.
        wanted: what is to be done.
        seed: of the order of the text.
    """

    def __init__(self, pair: Pair, batches: Sequence[Batch], wanted: Tuning, seed: int):
        self.pair, self.tuning, self.seed = pair, wanted, seed
        keys = tuple(key for part in wanted.parts for key in to_tune(pair.loader, pair.layer, part))
        self.learner = Learner.of(pair.loader, {pair.layer.index: keys})
        self.device = pair.loader.device
        self.masks = [x.mask.reshape(-1).to(self.device) for x in batches]
        shown = pair.seen.block if wanted.match == "block" else pair.seen.hidden
        self.targets = [x[mask].clone() for x, mask in zip(shown, self.masks, strict=True)]
        sizes = torch.cat([x.float().square().sum(-1) for x in self.targets])
        self.scale = max(float(sizes.median()), torch.finfo(torch.float32).tiny)
        self.held = tuning.held_out(len(batches), wanted.held_out)
        self.others = [number for number in range(len(batches)) if number not in self.held]

    def run(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """(new tensors as the disk will hold them, what is to be told); none where held-out text got no better."""
        before = self._held_out()
        best, history, state = 0, [before], self.learner.state()
        adam = torch.optim.Adam(list(self.learner.masters.values()), betas=tuning.BETAS)
        order: list[int] = []
        draw = torch.Generator().manual_seed(1_000_003 * self.seed + self.pair.layer.index)
        every = tuning.check_every(self.tuning)
        for step in range(self.tuning.steps):
            order = order or [self.others[i] for i in torch.randperm(len(self.others), generator=draw).tolist()]
            for group in adam.param_groups:
                group["lr"] = tuning.rate_at(step, self.tuning)
            adam.zero_grad()
            self._error(order.pop()).backward()
            adam.step()
            if (step + 1) % every == 0 or step + 1 == self.tuning.steps:
                history.append(self._held_out())
                if history[-1] == min(history) and history[-1] < before:
                    best, state = step + 1, self.learner.state()
                if tuning.no_longer_better(history):
                    break
        self.learner.load(state)
        self.learner.round()
        after = self._held_out() if best else before
        if after < before:
            return self.learner.written(), {"before": before, "after": after, "step": best}
        return {}, {"before": before, "after": before, "step": 0}

    def _error(self, number: int) -> torch.Tensor:
        """The student's error on a batch."""
        pair, output = self.pair, _Output()
        arguments = pair.seen.arguments
        args, kwargs = arguments[number] if arguments else pair.stop.arguments(number)
        with self.learner.in_use(), pair.view.watch(output, layers=[pair.layer.index]):
            hidden = hidden_of(pair.stop.forward(*args, **kwargs))
        found = hidden if self.tuning.match == "hidden" else output.block
        assert found is not None, "every MoE layer runs its experts"
        return tuning.squared_error(found[self.masks[number]], self.targets[number], self.scale)

    @torch.no_grad()
    def _held_out(self) -> float:
        """Its error on held-out text, the mean over tokens."""
        sizes = [int(self.masks[number].sum()) for number in sorted(self.held)]
        errors = [float(self._error(number)) * size for number, size in zip(sorted(self.held), sizes, strict=True)]
        return sum(errors) / sum(sizes)
