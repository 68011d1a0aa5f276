"""C3PO: experts mixed anew for each prompt, by the pathways of questions like it that were answered right.

    kernel      w_hat = sum_i K(x_i, x) w_i / sum_i K(x_i, x); then a w_hat + (1 - a) w with the a that minimises L
    mode        w <- a w + (1 - a) w_bar, w_bar the mean of the nearest pathways, weighted by K(w_i, w); repeated
    gradient    w <- w - rate grad L(w); L(w) = sum_i K(x_i, x) loss(f(x_i, w), y_i) / sum_i K(x_i, x)

x       the prompt: the mean of the model's last hidden states, less the mean of the references', of length one
w       its pathway: scores of all experts at its last token (`moekit.decoding.pathways`)
x_i     the k nearest references, but none that is nearer than `same` (as good as the prompt itself)
f, y_i  the model on reference i with w in the place of its own pathway; the answer that was right
K       Gaussian kernel; its variance is the mean squared distance of the k neighbours

Paper: Li, Li, Zhou, "C3PO: Critical-Layer, Core-Expert, Collaborative Pathway Optimization for Test-Time Expert
Re-Mixing", 2025; its defaults: k = 3, the last 5 layers, the 20 experts with the highest scores in each, the last token
of the prompt, 10 steps with rates from 1e-2 to 1e-5 (cosine).

Deviations: the embedding is the model's own (there: a sentence encoder). The width of the kernel and a of "mode" (0.5)
are not told there. The published code (kernel regression by cosine similarity, a = 1) overrides the last token of every
forward, so every token that is written too; here, as in the paper, only the prompt's last one.

Symbols: N references, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

import torch

from moekit.decoding.loop import Branch, Runner, decode
from moekit.decoding.pathways import Answers, Pathway, overriding, read
from moekit.decoding.references import References
from moekit.errors import DataError, ModelError, RecipeError
from moekit.layout import MoELayer
from moekit.progress import Progress, silent
from moekit.serve.sampling import Sampling
from moekit.view import MoEView

Surrogate = Literal["gradient", "kernel", "mode"]
GRID = 10  # steps of a from 0 to 1


@dataclass(frozen=True)
class C3PO:
    """Settings.

    Attributes:
        surrogate: what is optimised.
        neighbours: k.
        layers: how many of the last MoE layers are changed.
        experts: how many experts of each: those with the highest scores of the prompt's own pathway.
        steps: of gradient descent, or of mean shift.
        rate: of the first step of gradient descent.
        last_rate: of the last one.
        stay: a of "mode": how much of the pathway stays in each step.
        same: references whose similarity to the prompt is over this are left out.
    """

    surrogate: Surrogate = "gradient"
    neighbours: int = 3
    layers: int = 5
    experts: int = 20
    steps: int = 10
    rate: float = 1e-2
    last_rate: float = 1e-5
    stay: float = 0.5
    same: float = 0.95

    def check(self) -> None:
        """Refuse impossible settings.

        Raises:
            RecipeError: naming the setting.
        """
        if self.surrogate not in get_args(Surrogate):
            raise RecipeError("there is no such surrogate", where="surrogate", expected=", ".join(get_args(Surrogate)))
        for row in fields(self)[1:]:
            value, whole = getattr(self, row.name), row.name in ("neighbours", "layers", "experts", "steps")
            if (whole and value < 1) or not value >= 0 or (row.name in ("stay", "same") and value > 1):
                raise RecipeError("a setting is out of range", where=row.name, got=value)


@dataclass(frozen=True)
class Found:
    """A pathway and how it came about.

    Attributes:
        pathway: scores [E] of each changed layer; empty where no reference could be used.
        neighbours: which references, nearest first.
        loss: L before and after, nats a token; None where it was not asked for.
    """

    pathway: Pathway
    neighbours: list[int]
    loss: tuple[float, float] | None = None


def weights_of(squared_N: torch.Tensor) -> torch.Tensor:
    """A Gaussian kernel of squared distances, summing to one."""
    return (-squared_N / (2 * squared_N.mean().clamp_min(1e-12))).softmax(-1)


def nearest(references: References, embedding: torch.Tensor, settings: C3PO) -> tuple[torch.Tensor, torch.Tensor]:
    """(the k references nearest to a prompt that are not the prompt itself, their weights K / sum K)."""
    similar_N = references.directions @ references.direction(embedding)
    allowed = torch.nonzero(similar_N <= settings.same).flatten()
    order = allowed[similar_N[allowed].argsort(descending=True, stable=True)][: settings.neighbours]
    return order, weights_of(2 - 2 * similar_N[order]) if len(order) else similar_N[order]


def core(own_E: torch.Tensor, new_E: torch.Tensor, experts: int) -> torch.Tensor:
    """New scores for the experts that had the highest, the others' own; [..., E]."""
    mask_E = torch.zeros_like(own_E, dtype=torch.bool)
    mask_E[own_E.topk(min(experts, len(own_E))).indices] = True
    return torch.where(mask_E, new_E, own_E)


def regressed(references: References, neighbours: torch.Tensor, weights_N: torch.Tensor, index: int) -> torch.Tensor:
    """Kernel regression: the neighbours' mean pathway in one layer [E]."""
    return weights_N @ references.pathways[index][neighbours]


def shifted(pathways_N: torch.Tensor, start: torch.Tensor, settings: C3PO) -> torch.Tensor:
    """Mean shift: towards where pathways are dense.

    Args:
        pathways_N: of references, flat [N, F].
        start: the prompt's [F].
        settings: k, steps, stay.
    """
    point = start
    for _ in range(settings.steps):
        squared_N = (pathways_N - point).square().sum(-1)
        near = squared_N.topk(min(settings.neighbours, len(squared_N)), largest=False).indices
        point = settings.stay * point + (1 - settings.stay) * weights_of(squared_N[near]) @ pathways_N[near]
    return point


class Pathfinder:
    """Finds pathways for prompts.

    Args:
        runner: the model, nothing changed in it.
        references: of the same model.
        settings: of the method.

    Raises:
        RecipeError: impossible settings.
        DataError: the references lack a layer.
    """

    def __init__(self, runner: Runner, references: References, settings: C3PO | None = None):
        self.settings = settings or C3PO()
        self.settings.check()
        self.runner, self.view, self.references = runner, runner.view, references
        runner.model.requires_grad_(False)  # gradients are for pathways only
        self.layers: tuple[MoELayer, ...] = self.view.layout.routed[-self.settings.layers :]
        if missing := [x.index for x in self.layers if x.index not in references.pathways]:
            raise DataError("the reference set lacks layers", got=missing, fix="make it again: moekit steer reference")

    def find(self, prompt: Sequence[int]) -> Found:
        """The pathway for a prompt (token ids)."""
        own, embedding = read(self.runner.model, self.view, prompt)
        near, weights_N = nearest(self.references, embedding, self.settings)
        if not len(near):
            return Found({}, [])
        mine = {x.index: own[x.index] for x in self.layers}
        if self.settings.surrogate == "kernel":
            return self._interpolated(mine, near, weights_N)
        if self.settings.surrogate == "mode":
            return self._densest(mine, embedding, near)
        return self._descended(mine, near, weights_N)

    def _core(self, mine: Pathway, new: Pathway) -> Pathway:
        return {index: core(own, new[index], self.settings.experts) for index, own in mine.items()}

    def _answers(self, near: torch.Tensor) -> Answers:
        prompts, answers = (
            [of[row] for row in near.tolist()] for of in (self.references.prompts, self.references.answers)
        )
        return Answers(self.runner.model, self.view, prompts, answers)

    def _loss(self, pathway: Pathway, answers: Answers, weights_N: torch.Tensor) -> torch.Tensor:
        """L of one pathway, nats a token."""
        each = {index: x.expand(len(weights_N), -1) for index, x in pathway.items()}
        losses_N = answers.losses(each)
        return losses_N @ weights_N.to(losses_N.device)

    def _interpolated(self, mine: Pathway, near: torch.Tensor, weights_N: torch.Tensor) -> Found:
        mean = {index: regressed(self.references, near, weights_N, index) for index in mine}
        target = self._core(mine, mean)
        answers = self._answers(near)
        tried, losses = [], []
        for step in range(GRID + 1):
            tried.append({index: own + step / GRID * (target[index] - own) for index, own in mine.items()})
            with torch.no_grad():
                losses.append(float(self._loss(tried[-1], answers, weights_N)))
        best = min(range(GRID + 1), key=losses.__getitem__)
        return Found(tried[best], near.tolist(), (losses[0], losses[best]))

    def _densest(self, mine: Pathway, embedding: torch.Tensor, near: torch.Tensor) -> Found:
        similar_N = self.references.directions @ self.references.direction(embedding)
        allowed = similar_N <= self.settings.same
        flat = torch.cat([self.references.pathways[index][allowed] for index in mine], -1)
        moved = shifted(flat, torch.cat(list(mine.values())), self.settings).split([len(x) for x in mine.values()])
        return Found(self._core(mine, dict(zip(mine, moved, strict=True))), near.tolist())

    def _descended(self, mine: Pathway, near: torch.Tensor, weights_N: torch.Tensor) -> Found:
        """Gradient descent on the core experts' scores."""
        settings = self.settings
        point = {index: own.clone() for index, own in mine.items()}
        history: list[float] = []
        answers = self._answers(near)
        for step in range(settings.steps + 1):
            leaves = {index: x.clone().requires_grad_() for index, x in point.items()}
            with torch.enable_grad():
                loss = self._loss(self._core(mine, leaves), answers, weights_N)
            history.append(float(loss.detach()))
            if step == settings.steps:
                break
            if not loss.requires_grad:
                raise ModelError("the routers of this family let no gradient through", fix="use the surrogate kernel")
            slopes = torch.autograd.grad(loss, list(leaves.values()))
            share = step / max(settings.steps - 1, 1)
            rate = settings.last_rate + (settings.rate - settings.last_rate) * (1 + math.cos(math.pi * share)) / 2
            for index, slope in zip(point, slopes, strict=True):
                point[index] = point[index] - rate * slope
        return Found(self._core(mine, point), near.tolist(), (history[0], history[-1]))


def branch(pathway: Pathway) -> Branch:
    """Read one prompt with a pathway put in at its last token, and at no token that is written behind it."""

    def change(view: MoEView, _tag: int) -> AbstractContextManager[None]:
        def places(count: int) -> torch.Tensor | None:
            tokens = view.running
            return None if tokens is None or bool(tokens.generated.any()) else torch.tensor([count - 1])

        return overriding(view, {index: x[None] for index, x in pathway.items()}, places)

    return Branch(change)


def decode_mixed(
    pathfinder: Pathfinder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    finished: Callable[[list[int]], bool] | None = None,
    progress: Progress = silent,
) -> tuple[list[list[int]], list[Found]]:
    """Continue texts, each by a pathway of its own; see `moekit.decoding.loop.decode` for the arguments.

    Returns:
        (token ids that were written, how each pathway came about)
    """
    settings, runner = sampling or Sampling(), pathfinder.runner
    written, found = [], []
    for number, prompt in enumerate(prompts):
        found.append(pathfinder.find(prompt))
        mixed = Runner(runner.model, runner.view.layout, [branch(found[-1].pathway)])
        written += decode(
            [mixed],
            [prompt],
            max_new_tokens=max_new_tokens,
            sampling=replace(settings, seed=settings.seed + number),
            finished=finished,
        )
        progress("texts", number + 1, len(prompts))
    return written, found
