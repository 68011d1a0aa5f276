"""The methods put together: which branches of which models run, and what their logits say together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from moekit.apply.steer import steering
from moekit.decoding.formulas import emulated, guided, self_contrast
from moekit.decoding.loop import Branch, Combine, Runner, first
from moekit.decoding.vocabulary import cut_alike
from moekit.decoding.weak import Weak, weakened
from moekit.errors import PlanError, RecipeError
from moekit.layout import Layout
from moekit.plans import Plan

Loaded = tuple[nn.Module, Layout]


@dataclass(frozen=True)
class Decoder:
    """What `moekit.decoding.loop.decode` needs: runners and how their logits are combined."""

    runners: tuple[Runner, ...]
    combine: Combine = first


def check_share(**settings: float) -> None:
    """Refuse shares that are none.

    Raises:
        RecipeError: naming the setting.
    """
    for name, value in settings.items():
        if not 0 <= value <= 1:
            raise RecipeError("a share is out of range", where=name, expected="0 to 1", got=value)


def greedy(model: Loaded) -> Decoder:
    """No method: the model alone."""
    return Decoder((Runner(*model),))


def scmoe(model: Loaded, weak: Weak, alpha: float = 0.1, beta: float = 0.5) -> Decoder:
    """Self-contrast (SCMoE): both passes of all texts in one batch.

    Args:
        model: loaded, and its layout.
        weak: which experts the weak pass runs.
        alpha: least probability of a token, as a share of the likeliest one's.
        beta: strength.

    Raises:
        RecipeError: alpha is no share, or the weak pass asks for more than there is.
    """
    check_share(alpha=alpha)
    weak.check(model[1])

    def combine(logits: Sequence[torch.Tensor]) -> torch.Tensor:
        return self_contrast(logits[0], logits[1], alpha, beta)

    return Decoder((Runner(*model, [Branch(), Branch(lambda view, tag: weakened(view, weak, tag))]),), combine)


@dataclass(frozen=True)
class Voice:
    """An expert or anti-expert of guidance.

    Attributes:
        model: another model, loaded; None: the one that writes.
        plan: steers it.
        before: token ids in front of each prompt.
    """

    model: Loaded | None = None
    plan: Plan | None = None
    before: tuple[int, ...] = ()

    def branch(self, layout: Layout) -> Branch:
        """As a branch of its model.

        Raises:
            PlanError: the plan is of another model, or does not only steer.
        """
        if self.plan is None:
            return Branch(before=self.before)
        self.plan.check(layout)
        ops = self.plan.steers()
        if len(ops) != len(self.plan.ops):
            raise PlanError("only plans that steer can be guided by", expected="ban, force, bias, scale, swap")
        return Branch(lambda view, tag: steering(view, ops, tag), self.before)


def guidance(model: Loaded, plus: Voice, minus: Voice, strength: float = 1.0, alpha: float = 0.0) -> Decoder:
    """Contrastive expert guidance; voices of the model that writes are rows of its batch, others run beside it.

    Args:
        model: loaded, and its layout.
        plus: whom to follow.
        minus: whom to leave.
        strength: how much.
        alpha: least probability of a token, as a share of the likeliest one's; 0: no limit.

    Raises:
        RecipeError: alpha is no share.
        PlanError: a voice's plan does not fit its model.
    """
    check_share(alpha=alpha)
    # Who is the model itself says what it says, without a row of its own.
    voices = {name: voice for name, voice in (("plus", plus), ("minus", minus)) if voice != Voice()}
    order = sorted(voices, key=lambda name: voices[name].model is not None)  # those of the model that writes first
    inside = [voices[name].branch(model[1]) for name in order if voices[name].model is None]
    runners = [Runner(*model, [Branch(), *inside])]
    for name in order:
        if (other := voices[name].model) is not None:
            runners.append(Runner(*other, [voices[name].branch(other[1])]))

    def combine(logits: Sequence[torch.Tensor]) -> torch.Tensor:
        base, *others = cut_alike(logits)
        said = dict(zip(order, others, strict=True))
        return guided(base, said.get("plus", base), said.get("minus", base), strength, alpha)

    return Decoder(tuple(runners), combine)


def emulation(large_base: Loaded, small_tuned: Loaded, small_base: Loaded) -> Decoder:
    """Emulated fine-tuning: three models that share a vocabulary, each with its own cache."""

    def combine(logits: Sequence[torch.Tensor]) -> torch.Tensor:
        return emulated(*cut_alike(logits))

    return Decoder(tuple(Runner(*x) for x in (large_base, small_tuned, small_base)), combine)
