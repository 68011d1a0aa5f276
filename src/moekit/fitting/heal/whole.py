"""The whole student tuned at once: routers, or experts too, learn the teacher's next-token distributions.

The teacher runs first, streamed, and leaves its likeliest tokens on disk; then the student is loaded, in one process or
over several (`moekit.fitting.heal.team`), and Adam runs. What held-out text likes best is kept.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from moekit import methods
from moekit.errors import DataError
from moekit.families.loader import Loader
from moekit.families.model import Model
from moekit.fitting.decide import Fit
from moekit.fitting.heal.folder import FitFolder
from moekit.fitting.heal.learner import Learner, teacher_of, text_of, to_tune
from moekit.fitting.heal.teacher import Lessons, rows_at_once, take_lessons
from moekit.fitting.heal.team import Team
from moekit.methods.heal import _tuning as tuning
from moekit.methods.heal._tuning import Tuning
from moekit.methods.heal.router_distill import Top, divergence
from moekit.plans import Plan
from moekit.progress import Progress, silent

STATE = "state.pt"


@dataclass(frozen=True)
class Order:
    """What every process must know.

    Attributes:
        model: folder of the student.
        trust_remote_code: as it was opened.
        dtype: to run in; None for its own.
        device: "cpu" or "cuda".
        folder: of the fit, with the teacher's lessons.
        identity: of the fit.
        tuning: what is to be done.
        seed: of the order of the text.
    """

    model: str
    trust_remote_code: bool
    dtype: torch.dtype | None
    device: str
    folder: Path
    identity: str
    tuning: Tuning
    seed: int
    progress: Progress = field(default=silent, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"progress": silent}  # only the first process has a screen


def plan(
    fit: Fit, *, name: str, options: Mapping[str, Any], domain: str | list[str] | None, seed: int, **_: Any
) -> Plan:
    """New weights of routers, or of experts too, all layers tuned together.

    Args:
        fit: what it may use.
        name: of the method.
        options: of the method.
        domain: whose text counts.
        seed: of the order of the text.

    Raises:
        DataError: a single sequence, of which none can be held out.
        PlanError: weights that are quantised on disk.
        UserError: see `moekit.fitting.heal.learner`.
    """
    settings = methods.check_options(name, options)[2]
    wanted: Tuning = methods.get(name)(**settings)
    teacher = teacher_of(fit, settings)
    loader = fit.model.loader(fit.dtype)
    keys = _keys(loader, fit.model, wanted)
    batches = text_of(fit, domain)
    if sum(len(x.ids) for x in batches) < 2:
        raise DataError("too little text to heal on: none of it could be held out", fix="give more text")
    folder = FitFolder(fit, teacher.fingerprint, {"method": name, "domain": domain, "seed": seed, **settings})
    if (record := folder.read_json("distilled.json")) is None:
        take_lessons(
            teacher,
            batches,
            wanted.top,
            folder.path / "teacher",
            dtype=fit.dtype,
            device=fit.device,
            progress=fit.progress,
        )
        order = Order(
            str(fit.model.path),
            fit.model.trust_remote_code,
            fit.dtype,
            fit.device,
            folder.path,
            folder.identity,
            wanted,
            seed,
            fit.progress,
        )
        tensors, record = Team.here().call(distil, order)
        for index, names in keys.items():
            folder.finish(index, {key: tensors[key] for key in names if key in tensors}, {})
        folder.write_json("distilled.json", record)
        _forget(folder.path)
    made = Plan(layout_hash=fit.model.layout.hash, method=name, settings={"domain": domain, "seed": seed, **settings})
    made.made_from = {"model": fit.model.name, "teacher": teacher.name, "data": fit.data.describe()}
    folder.add_values(made, sorted(keys))
    made.measured["held_out_kl"] = [record["before"], record["after"]]
    made.notes.append(
        f"KL from the source on held-out text, nats a token: {record['before']:.4f} -> {record['after']:.4f}, "
        f"after {record['step']} of {wanted.steps} steps"
        if record["step"]
        else "held-out text got no better: the weights stay as they are"
    )
    return made


def _keys(loader: Loader, student: Model, wanted: Tuning) -> dict[int, tuple[str, ...]]:
    """Keys of the parameters that learn, by decoder layer."""
    return {
        layer.index: tuple(key for part in wanted.parts for key in to_tune(loader, layer, part))
        for layer in student.layout.routed
    }


def _forget(folder: Path) -> None:
    """Remove what only an interrupted fit needs."""
    for file in (folder / STATE, *(folder / "teacher").glob("teacher-*.safetensors")):
        file.unlink(missing_ok=True)
    with suppress(OSError):
        (folder / "teacher").rmdir()


def distil(order: Order) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Run in every process: (new tensors as the disk will hold them, none if that is no better; what is to be told)."""
    return _Distillation(order).run()


class _Distillation:
    """The student at school.

    Args:
        order: what to do.
    """

    def __init__(self, order: Order):
        self.order, self.tuning, self.team = order, order.tuning, Team.here()
        student = Model.open(order.model, trust_remote_code=order.trust_remote_code)
        loader = student.loader(order.dtype, self.team.device(order.device))
        loader.differentiable()
        keys = _keys(loader, student, order.tuning)
        self.team.load(loader, frozenset(key for names in keys.values() for key in names))
        if self.tuning.recompute:
            for layer in loader.layers:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        self.learner = Learner.of(loader, keys)
        self.model, self.device, self.vocab_size = loader.model, loader.device, student.layout.vocab_size
        self.lessons = Lessons(order.folder / "teacher")
        self.held = sorted(tuning.held_out(len(self.lessons), self.tuning.held_out))
        self.others = [i for i in range(len(self.lessons)) if i not in set(self.held)]

    def run(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """See `distil`."""
        adam = torch.optim.Adam(list(self.learner.masters.values()), betas=tuning.BETAS)
        start, best, history, state = self._resumed(adam)
        every = tuning.check_every(self.tuning)
        for step in range(start, self.tuning.steps):
            if tuning.no_longer_better(history):
                break
            self._step(adam, step)
            if (step + 1) % every == 0 or step + 1 == self.tuning.steps:
                history.append(self._held_out())
                if history[-1] == min(history) and history[-1] < history[0]:
                    best, state = step + 1, self.learner.state()
                self._save(adam, step + 1, best, history, state)
        self.learner.load(state)
        self.learner.round()
        after = self._held_out() if best else history[0]
        better = after < history[0]
        record = {"before": history[0], "after": after if better else history[0], "step": best if better else 0}
        return (self.learner.written() if better else {}), record

    def _step(self, adam: torch.optim.Adam, step: int) -> None:
        """One step of Adam on the sequences whose turn it is."""
        for group in adam.param_groups:
            group["lr"] = tuning.rate_at(step, self.tuning)
        adam.zero_grad()
        self._lesson(self._turn(step), learn=True)
        for x in self.learner.masters.values():
            if x.grad is None:
                x.grad = torch.zeros_like(x)
        self.team.add([x.grad for x in self.learner.masters.values() if x.grad is not None])
        adam.step()
        self.order.progress("distil", step + 1, self.tuning.steps)

    def _turn(self, step: int) -> list[int]:
        """The sequences of a step: each once before any comes again, in an order drawn anew each time."""
        out: list[int] = []
        for place in range(step * self.tuning.sequences, (step + 1) * self.tuning.sequences):
            round_, at = divmod(place, len(self.others))
            draw = torch.Generator().manual_seed(1_000_003 * self.order.seed + round_)
            out.append(self.others[int(torch.randperm(len(self.others), generator=draw)[at])])
        return out

    def _held_out(self) -> float:
        """Mean KL on held-out text, nats a token."""
        with torch.no_grad():
            return self._lesson(self.held, learn=False)

    def _lesson(self, numbers: Sequence[int], learn: bool) -> float:
        """Mean KL over some sequences, all processes taken together; with `learn`, its gradient goes to the masters."""
        tokens = sum(self.lessons.tokens(number) for number in numbers)
        longest = max(self.lessons.tokens(number) for number in numbers)
        total = torch.zeros((), dtype=torch.float64)
        for part in self.team.share(list(numbers), rows_at_once(self.vocab_size, longest)):
            # Gathering a layer takes all processes: one that has nothing left runs along and counts nothing.
            lessons = [self.lessons[number] for number in part or numbers[:1]]
            ids = torch.nn.utils.rnn.pad_sequence([x.ids for x in lessons], batch_first=True).to(self.device)
            with self.learner.in_use():
                logits = self.model(input_ids=ids, use_cache=False).logits
                sums = [
                    divergence(logits[row, : len(x.ids)], Top(*(y.to(self.device) for y in x.wanted))).sum()
                    for row, x in enumerate(lessons)
                ]
                loss = torch.stack(sums).sum() / tokens * bool(part)
                if learn:
                    loss.backward()
            total += loss.detach().double().cpu()
        self.team.add([total])
        return float(total)

    def _save(
        self, adam: torch.optim.Adam, step: int, best: int, history: list[float], state: dict[str, torch.Tensor]
    ) -> None:
        """Leave what an interrupted run needs to go on."""
        if self.team.rank:
            return
        found = {
            "identity": self.order.identity,
            "step": step,
            "best": best,
            "history": history,
            "masters": self.learner.state(),
            "state": state,
            "adam": adam.state_dict(),
        }
        partial_ = self.order.folder / (STATE + ".partial")
        with partial_.open("wb") as stream:
            torch.save(found, stream)
        os.replace(partial_, self.order.folder / STATE)

    def _resumed(self, adam: torch.optim.Adam) -> tuple[int, int, list[float], dict[str, torch.Tensor]]:
        """(the first step, the best so far, the errors so far, the masters that gave it)."""
        with suppress(OSError, RuntimeError, EOFError, KeyError, UnpicklingError):
            found = torch.load(self.order.folder / STATE, map_location=self.device, weights_only=True)
            if found["identity"] == self.order.identity:
                self.learner.load(found["masters"])
                adam.load_state_dict(found["adam"])
                return found["step"], found["best"], found["history"], found["state"]
        return 0, 0, [self._held_out()], self.learner.state()
