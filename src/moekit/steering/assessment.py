"""assess(model, plan, target, elsewhere): what a steering plan does, and to what else, beside control experts.

With n_r the summed -log p of text r, t_r its predicted tokens, and S a set of ops,

    change(S) = sum_r (n_r(S) - n_r) / sum_r t_r                       nats a token
    excess(S) = change(S) - mean over controls C of S of change(C)

Controls do the same to other experts of the same layers: `random` ones are drawn by lot, `matched` ones among the four
that are chosen about as often on the target. Both are drawn several times; the draws' own values are kept. Intervals
(95%) are bootstrapped over texts, of differences on the same texts. Doses: the plan's first 1 .. n experts by score,
and its strength.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moekit.data import Dataset
from moekit.errors import DataError
from moekit.evaluation.intervals import Interval, ratio_interval
from moekit.families.model import Model
from moekit.layout import ExpertId
from moekit.measurement import measure
from moekit.methods import super_experts
from moekit.plans import Plan, Steer
from moekit.progress import Progress, silent
from moekit.steering.doses import by_score, check_doses, check_plan, controls, weakened
from moekit.steering.trial import Scores, trial

SCHEMA = 1
HOW = (
    "Change of the loss, nats a token, on the same texts with and without the plan. Controls do the same to other "
    "experts of the same layers: drawn by lot, or among those that are chosen about as often on the target; excess is "
    "the change beyond their mean. 95% intervals are over texts."
)


@dataclass(frozen=True)
class Controls:
    """What the same ops on other experts did.

    Attributes:
        mean: change of the loss, over all draws.
        draws: change of each draw.
        excess: change of the plan less `mean`, paired.
    """

    mean: Interval
    draws: tuple[float, ...]
    excess: Interval


@dataclass(frozen=True)
class Effect:
    """What a dose did to one domain.

    Attributes:
        change: of the loss, nats a token.
        ratio: perplexity over that of the model as it is.
        kl: KL(model as it is || steered), nats a token.
        agreement: share of positions at which the likeliest token stays.
        random: of random experts; None without any.
        matched: of experts that are chosen about as often on the target; None without any.
    """

    change: Interval
    ratio: Interval
    kl: Interval
    agreement: Interval
    random: Controls | None
    matched: Controls | None


@dataclass(frozen=True)
class Dose:
    """Part of a plan: its `number` strongest experts at a `strength`, and what it did by domain."""

    number: int
    strength: float
    effects: Mapping[str, Effect]


@dataclass(frozen=True)
class Assessment:
    """The result.

    Attributes:
        plan: what was tested.
        targets: domains that the plan is about.
        elsewhere: domains that it should leave alone.
        loss: of the model as it is, nats a token, by domain.
        tokens: predicted, by domain.
        texts: by domain.
        doses: ascending; the plan itself is the last.
        answers: shares of answers that match, where they were asked for (`moekit.steering.answers`).
        settings: model, layout, data, controls, seed.
    """

    plan: Plan
    targets: tuple[str, ...]
    elsewhere: tuple[str, ...]
    loss: Mapping[str, Interval]
    tokens: Mapping[str, int]
    texts: Mapping[str, int]
    doses: Sequence[Dose]
    answers: Mapping[str, Any] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def whole(self) -> Dose:
        """The plan itself."""
        return self.doses[-1]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        domains = {
            name: {
                "role": "target" if name in self.targets else "elsewhere",
                "loss": list(self.loss[name]),
                "tokens": self.tokens[name],
                "texts": self.texts[name],
            }
            for name in (*self.elsewhere, *self.targets)
        }
        doses = [
            {
                "number": x.number,
                "strength": x.strength,
                "domains": {name: _plain(x.effects[name]) for name in domains},
            }
            for x in self.doses
        ]
        ops = [op.model_dump(exclude={"op"}) for op in self.plan.steers()]
        plan = {"method": self.plan.method, "settings": self.plan.settings, "notes": self.plan.notes, "ops": ops}
        plan["score"] = self.plan.measured.get("score", {})
        return {
            "schema": SCHEMA,
            **self.settings,
            "how": HOW,
            "plan": plan,
            "domains": domains,
            "doses": doses,
            "answers": self.answers,
        }

    def save(self, file: str | Path) -> Path:
        """Write as JSON."""
        path = Path(file)
        temporary = path.with_name(path.name + ".partial")
        temporary.write_text(json.dumps(self.to_dict(), indent=1))
        temporary.rename(path)
        return path


def _plain(effect: Effect) -> dict[str, Any]:
    out: dict[str, Any] = {name: list(getattr(effect, name)) for name in ("change", "ratio", "kl", "agreement")}
    for name in ("random", "matched"):
        found = getattr(effect, name)
        out[name] = found and {
            "mean": list(found.mean),
            "draws": list(found.draws),
            "excess": list(found.excess),
        }
    return out


def assess(
    model: Model,
    plan: Plan,
    target: Dataset,
    elsewhere: Dataset | None = None,
    *,
    counts: Sequence[int] = (),
    strengths: Sequence[float] = (),
    draws: int = 3,
    seed: int = 0,
    prompt: int | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> Assessment:
    """Measure a steering plan beside controls.

    Args:
        model: from `moekit.open`.
        plan: a steering plan for it.
        target: texts that the plan is about.
        elsewhere: texts that it should leave alone; None: side effects are not measured.
        counts: also try so many of the plan's experts, those first that tell the kinds apart best.
        strengths: also try the plan at these strengths; 1 is its own.
        draws: random and matched controls of each dose; 0: none.
        seed: of the controls.
        prompt: tokens at the start of each text that were given and not written, for plans that tell them apart.
        dtype: to run in; None for the model's own.
        device: "cpu" or "cuda".
        progress: told as layers pass.

    Raises:
        PlanError: the plan is for another model, or steers nothing.
        RecipeError: a dose that the plan cannot have.
        DataError: a domain is both target and elsewhere, or has no token to predict.
    """
    layout = model.layout
    check_plan(plan, layout)
    doses = check_doses(plan, counts, strengths)
    data = _joined(target, elsewhere)
    ops = by_score(plan)
    others: dict[str, list[list[Steer]]] = {"random": [], "matched": []}
    if draws:
        stats = measure(model, target, groups=("scores",), dtype=dtype, device=device, progress=progress)
        share = {x.index: stats.get("count", x.index) / max(1, stats.token_count()) for x in layout.routed}
        spare: frozenset[ExpertId] = super_experts(stats, layout)
        others["random"] = controls(ops, layout, draws, seed=seed, spare=spare)
        others["matched"] = controls(ops, layout, draws, seed=seed, spare=spare, share=share)
    sets = [weakened(x[:n], s) for n, s in doses for x in (ops, *others["random"], *others["matched"])]
    found = trial(model, data, sets, prompt=prompt, dtype=dtype, device=device, progress=progress)
    clean, each = found[0], 1 + len(others["random"]) + len(others["matched"])
    if missing := [name for i, name in enumerate(data.domains) if not clean.tokens[clean.domain == i].sum()]:
        raise DataError(f"the domain {missing[0]!r} has no token to predict", fix="give longer texts")
    results = []
    for number, (n, s) in enumerate(doses):
        mine, *rest = found[1 + number * each : 1 + (number + 1) * each]
        random, matched = rest[: len(others["random"])], rest[len(others["random"]) :]
        effects = {name: _effect(clean, mine, random, matched, i) for i, name in enumerate(data.domains)}
        results.append(Dose(n, s, effects))
    ids = dict(enumerate(data.domains))
    rows = {i: clean.domain == i for i in ids}
    settings = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "layout_hash": layout.hash,
        "layers": [{"index": x.index, "experts": x.num_experts, "top_k": x.top_k} for x in layout.routed],
        "family": layout.family,
        "data": data.describe(),
        "controls": draws,
        "seed": seed,
    }
    return Assessment(
        plan,
        tuple(target.domains),
        tuple(elsewhere.domains) if elsewhere else (),
        {name: ratio_interval(clean.nll[rows[i]], clean.tokens[rows[i]]) for i, name in ids.items()},
        {name: int(clean.tokens[rows[i]].sum()) for i, name in ids.items()},
        {name: int(rows[i].sum()) for i, name in ids.items()},
        results,
        settings=settings,
    )


def _effect(clean: Scores, mine: Scores, random: Sequence[Scores], matched: Sequence[Scores], domain: int) -> Effect:
    rows = clean.domain == domain
    tokens = clean.tokens[rows]
    change = mine.nll[rows] - clean.nll[rows]

    def beside(drawn: Sequence[Scores]) -> Controls | None:
        if not drawn:
            return None
        each = [x.nll[rows] - clean.nll[rows] for x in drawn]
        mean = np.mean(each, axis=0)
        return Controls(
            ratio_interval(mean, tokens),
            tuple(float(x.sum() / tokens.sum()) for x in each),
            ratio_interval(change - mean, tokens),
        )

    return Effect(
        ratio_interval(change, tokens),
        ratio_interval(change, tokens, exponential=True),
        ratio_interval(mine.kl[rows], tokens),
        ratio_interval(mine.agree[rows], tokens),
        beside(random),
        beside(matched),
    )


def _joined(target: Dataset, elsewhere: Dataset | None) -> Dataset:
    """Both, as domains of one dataset.

    Raises:
        DataError: one name twice.
    """
    if elsewhere is None:
        return target
    if both := set(target.domains) & set(elsewhere.domains):
        raise DataError(
            "a domain cannot be target and elsewhere", got=sorted(both)[0], fix="name them apart: NAME=PATH"
        )
    rows: dict[str, list[list[int]]] = {}
    for data in (target, elsewhere):
        for number, name in enumerate(data.domains):
            rows[name] = [
                ids[mask].tolist()
                for x in data.batches
                if x.domain == number
                for ids, mask in zip(x.ids, x.mask, strict=True)
            ]
    return Dataset.of_rows(rows, origins={**target.origins, **elsewhere.origins})
