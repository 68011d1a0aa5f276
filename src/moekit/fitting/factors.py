"""Healing of factored experts: factors and sparse rest of all layers tuned together towards the source's logits.

The teacher runs first, streamed, and leaves its likeliest tokens on disk; then the student is loaded whole and Adam
runs, in one process. What held-out text likes no better than factors without healing is not used. An interrupted run
goes on from the last look at the held-out text.

Symbols: E experts, O outputs, I inputs of a projection.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pickle import UnpicklingError
from typing import Any

import torch

from moekit import methods
from moekit.errors import DataError, PlanError
from moekit.families.factors import largest, low_rank, pack_sparse
from moekit.families.loader import OUTER, Loader
from moekit.families.matrices import Matrix, expert_matrices
from moekit.fitting.decide import Fit
from moekit.fitting.heal.folder import FitFolder
from moekit.fitting.heal.learner import standing_in, teacher_of, text_of
from moekit.fitting.heal.teacher import Lessons, rows_at_once, take_lessons
from moekit.methods import factor
from moekit.methods.factor import _healing as healing
from moekit.methods.heal import _tuning as tuning
from moekit.methods.heal._tuning import Tuning
from moekit.methods.heal.router_distill import Top, divergence
from moekit.plans import Factor, Plan, PlanTensors
from moekit.plans.factoring import LEFT, RIGHT, entries

STATE, RECORD = "state.pt", "healed.json"
MASTERS = ("left", "right", "rest")


def plan(
    fit: Fit, *, name: str, options: Mapping[str, Any], domain: str | list[str] | None, seed: int, **_: Any
) -> Plan:
    """The plan of a factoring method, healed where it asks for steps.

    Args:
        fit: what it may use.
        name: of the method.
        options: of the method.
        domain: whose text counts.
        seed: of the order of the text.

    Raises:
        PlanError: weights in a form that cannot be factored, or a student that does not fit into memory to be tuned.
        DataError: a single sequence, of which none can be held out.
        UserError: see `moekit.fitting.heal.learner`.
    """
    method, layout = methods.get(name), fit.model.layout
    settings = method.settings(options)
    made = factor.make_plan(method, layout, settings)
    for layer in layout.routed:
        expert_matrices(fit.model.checkpoint, fit.model.understanding, layer)
    if not settings["steps"]:
        return made
    teacher = teacher_of(fit, settings)
    if not fit.model.fits(torch.float64, fit.device):
        raise PlanError(
            "this model is too large to be healed here: all experts learn, in float32, with what Adam keeps of them",
            where=fit.device,
            expected="memory for some 24 bytes a parameter",
            fix="leave steps out, or heal on a larger machine",
        )
    batches = text_of(fit, domain)
    if sum(len(x.ids) for x in batches) < 2:
        raise DataError("too little text to heal on: none of it could be held out", fix="give more text")
    folder = FitFolder(fit, teacher.fingerprint, {"method": name, "domain": domain, "seed": seed, **settings})
    if (record := folder.read_json(RECORD)) is None:
        lessons = take_lessons(
            teacher,
            batches,
            settings["top"],
            folder.path / "teacher",
            temperature=settings["temperature"],
            dtype=fit.dtype,
            device=fit.device,
            progress=fit.progress,
        )
        record = _Healing(fit, made, lessons, settings, seed, folder).run()
        folder.write_json(RECORD, record)
        _forget(folder)
    made.made_from = {"model": fit.model.name, "teacher": teacher.name, "data": fit.data.describe()}
    made.settings |= {"domain": domain, "seed": seed}
    made.measured["held_out_kl"] = [record["before"], record["after"]]
    if record["after"] < record["before"]:
        made.ops = [op.model_copy(update={"scheme": "healed"}) for op in made.factored().values()]
        made.tensors = str(folder.path.resolve())
        made.notes.append(
            f"KL from the source on held-out text at temperature {settings['temperature']:g}, nats a token: "
            f"{record['before']:.4f} as factored, {record['after']:.4f} after {settings['steps']} steps of healing"
        )
    else:
        made.notes.append("held-out text got no better by healing: factors are as they would be without")
    return made


def _forget(folder: FitFolder) -> None:
    """Remove what only an interrupted run needs."""
    for file in (folder.path / STATE, *(folder.path / "teacher").glob("teacher-*.safetensors")):
        file.unlink(missing_ok=True)
    with suppress(OSError):
        (folder.path / "teacher").rmdir()


class _Projection:
    """One projection of all experts of a layer, as factors that learn.

    Args:
        op: rank and density.
        matrices: of the projection, by expert.
        weight: float32 [E, O, I].

    Attributes:
        left, right, rest: float32 leaves [E, O, r], [E, r, I], [E, O, I].
        average: importance of the rest's entries.
    """

    def __init__(self, op: Factor, matrices: Sequence[Matrix], weight: torch.Tensor):
        self.matrices = matrices
        left, right = (x.contiguous() for x in low_rank(weight, op.rank))
        self.rest = (weight - left @ right).requires_grad_()
        self.left, self.right = left.requires_grad_(), right.requires_grad_()
        self.average = torch.zeros_like(weight)
        self.count = entries(weight.shape[1], weight.shape[2], op.density)

    @property
    def masters(self) -> list[torch.Tensor]:
        """What learns."""
        return [self.left, self.right, self.rest]

    def weight(self) -> torch.Tensor:
        """[E, O, I], with its gradient."""
        return self.left @ self.right + self.rest

    @torch.no_grad()
    def thin(self, count: int, ranked: torch.Tensor) -> None:
        """Leave the rest so many entries."""
        if count < self.rest[0].numel():
            self.rest.mul_(largest(ranked, count))

    @torch.no_grad()
    def parts(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """As they will be written, by name."""
        chosen = largest(self.rest, self.count)
        out: dict[str, torch.Tensor] = {}
        for x, left, right, rest, mine in zip(self.matrices, self.left, self.right, self.rest, chosen, strict=True):
            sparse = {key: part.cpu() for key, part in pack_sparse(rest.to(dtype), mine).items()}
            both = {LEFT: left.to(dtype).cpu(), RIGHT: right.to(dtype).cpu()}
            out |= {x.name + suffix: part for suffix, part in (both | sparse).items()}
        return out

    @torch.no_grad()
    def round(self, dtype: torch.dtype) -> None:
        """To the numbers that will be written."""
        self.thin(self.count, self.rest)
        for x in self.masters:
            x.copy_(x.to(dtype))


class _Healing:
    """The student at school.

    Args:
        fit: what it may use.
        made: the plan without healing.
        lessons: the teacher's, at the temperature of the settings.
        settings: of the method.
        seed: of the order of the text.
        folder: of the fit.
    """

    def __init__(
        self, fit: Fit, made: Plan, lessons: Lessons, settings: Mapping[str, Any], seed: int, folder: FitFolder
    ):
        self.fit, self.settings, self.seed, self.folder = fit, settings, seed, folder
        self.steps, self.temperature = settings["steps"], settings["temperature"]
        self.lessons = lessons
        held = tuning.held_out(len(lessons), settings["held_out"])
        self.held, self.others = sorted(held), [i for i in range(len(lessons)) if i not in held]
        self.loader = fit.model.loader(fit.dtype, fit.device)
        self.loader.differentiable()
        for index in (OUTER, *range(len(self.loader.layers))):
            self.loader.attach(index, self.loader.read(index))
        self.model = self.loader.model
        self.projections: dict[str, list[_Projection]] = {}
        self.layer_of: dict[str, int] = {}
        for index, op in made.factored().items():
            for key, found in _projections(fit, self.loader, index, op):
                self.projections[key], self.layer_of[key] = found, index

    @property
    def _all(self) -> list[_Projection]:
        return [x for found in self.projections.values() for x in found]

    def run(self) -> dict[str, float]:
        """Tune, and leave the factors in the folder; the mean KL on held-out text before and after."""
        before = self._as_factored()
        adam = torch.optim.Adam([y for x in self._all for y in x.masters], betas=tuning.BETAS)
        start = self._resumed(adam)
        rates = Tuning(("experts",), "logits", steps=self.steps, rate=self.settings["rate"])
        for step in range(start, self.steps):
            for group in adam.param_groups:
                group["lr"] = tuning.rate_at(step, rates)
            adam.zero_grad()
            self._lesson(self._turn(step), learn=True)
            self._step(adam, step)
            if (step + 1) % tuning.check_every(rates) == 0:
                self._save(adam, step + 1)
            self.fit.progress("heal", step + 1, self.steps)
        for x in self._all:
            x.round(self._dtype(x))
        after = self._held_out()
        store = PlanTensors(self.folder.path)
        by_layer: dict[int, dict[str, torch.Tensor]] = defaultdict(dict)
        for key, found in self.projections.items():
            for x in found:
                by_layer[self.layer_of[key]] |= x.parts(self._dtype(x))
        for index, tensors in by_layer.items():
            store.write(index, tensors)
        return {"before": before, "after": after}

    def _dtype(self, projection: _Projection) -> torch.dtype:
        return self.loader.on_disk(projection.matrices[0].source)

    @torch.no_grad()
    def _step(self, adam: torch.optim.Adam, step: int) -> None:
        """One step of Adam, after which fewer entries of the rests stay."""
        for x in self._all:
            if x.rest.grad is not None:  # of a layer whose experts no token has chosen
                x.average = healing.importance(x.average, x.rest, x.rest.grad)
        adam.step()
        for x in self._all:
            density = healing.density_at(step, self.steps, x.count / x.rest[0].numel())
            count = max(x.count, round(density * x.rest[0].numel()))
            x.thin(count, healing.ranked_by(step, self.steps, x.rest, x.average))

    def _as_factored(self) -> float:
        """Held-out KL of factors without healing; the factors are then whole again."""
        whole = [[y.detach().clone() for y in x.masters] for x in self._all]
        for x in self._all:
            x.round(self._dtype(x))
        found = self._held_out()
        with torch.no_grad():
            for x, copies in zip(self._all, whole, strict=True):
                for y, copy in zip(x.masters, copies, strict=True):
                    y.copy_(copy)
        return found

    def _held_out(self) -> float:
        with torch.no_grad():
            return self._lesson(self.held, learn=False)

    def _turn(self, step: int) -> list[int]:
        """The sequences of a step: each once before any comes again, in an order drawn anew each time."""
        out, count = [], self.settings["sequences"]
        for place in range(step * count, (step + 1) * count):
            round_, at = divmod(place, len(self.others))
            draw = torch.Generator().manual_seed(1_000_003 * self.seed + round_)
            out.append(self.others[int(torch.randperm(len(self.others), generator=draw)[at])])
        return out

    def _lesson(self, numbers: Sequence[int], learn: bool) -> float:
        """Mean KL over some sequences; with `learn`, the gradient of T^2 times it goes to the factors."""
        tokens = sum(self.lessons.tokens(number) for number in numbers)
        longest = max(self.lessons.tokens(number) for number in numbers)
        at_once, total = rows_at_once(self.fit.model.layout.vocab_size, longest), 0.0
        for start in range(0, len(numbers), at_once):
            lessons = [self.lessons[number] for number in numbers[start : start + at_once]]
            ids = torch.nn.utils.rnn.pad_sequence([x.ids for x in lessons], batch_first=True).to(self.loader.device)
            with standing_in(self.model, dict(self._weights())):
                logits = self.model(input_ids=ids, use_cache=False).logits / self.temperature
                sums = [
                    divergence(logits[row, : len(x.ids)], Top(*(y.to(logits.device) for y in x.wanted))).sum()
                    for row, x in enumerate(lessons)
                ]
                loss = torch.stack(sums).sum() / tokens
                if learn:
                    (loss * self.temperature**2).backward()
            total += float(loss.detach())
        return total

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The experts' parameters, made of the factors."""
        for key, found in self.projections.items():
            whole = torch.cat([x.weight() for x in found], 1).to(self.loader.dtype)
            yield key, whole.mT if found[0].matrices[0].turned else whole

    def _save(self, adam: torch.optim.Adam, step: int) -> None:
        """Leave what an interrupted run needs to go on."""
        found = {
            "identity": self.folder.identity,
            "step": step,
            "masters": [[y.detach() for y in x.masters] for x in self._all],
            "averages": [x.average for x in self._all],
            "adam": adam.state_dict(),
        }
        partial = self.folder.path / (STATE + ".partial")
        with partial.open("wb") as stream:
            torch.save(found, stream)
        os.replace(partial, self.folder.path / STATE)

    def _resumed(self, adam: torch.optim.Adam) -> int:
        """The step to go on with."""
        with suppress(OSError, RuntimeError, EOFError, KeyError, UnpicklingError):
            found = torch.load(self.folder.path / STATE, map_location=self.loader.device, weights_only=True)
            if found["identity"] == self.folder.identity:
                with torch.no_grad():
                    for x, masters, average in zip(self._all, found["masters"], found["averages"], strict=True):
                        for y, copy in zip(x.masters, masters, strict=True):
                            y.copy_(copy)
                        x.average = average
                adam.load_state_dict(found["adam"])
                return found["step"]
        return 0


def _projections(fit: Fit, loader: Loader, index: int, op: Factor) -> Iterator[tuple[str, list[_Projection]]]:
    """The factored projections of a layer by the parameter that they are rows of, in the order of these rows."""
    groups: dict[str, dict[int, list[Matrix]]] = defaultdict(lambda: defaultdict(list))
    layer = fit.model.layout.by_index[index]
    for x in expert_matrices(fit.model.checkpoint, fit.model.understanding, layer):
        groups[x.key][x.start].append(x)
    for key, by_start in groups.items():
        parameter = loader.model.get_parameter(key).detach()
        found = []
        for _, matrices in sorted(by_start.items()):
            weight = torch.stack([x.view(parameter) for x in matrices]).float()
            found.append(_Projection(op, matrices, weight))
        yield key, found
