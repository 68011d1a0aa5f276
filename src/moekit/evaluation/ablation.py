"""ablate(model, data, experts): the change of loss without an expert, beside that without other experts of its layer.

Switched off, an expert's routing weight is zero wherever the router chooses it; the choice stays and its slot is not
filled again. With n_s(A) the summed -log p of sequence s when the set of experts A is off, t_s its predicted tokens,

    change(A) = sum_s (n_s(A) - n_s) / sum_s t_s                 nats a token, over the sequences of one domain
    excess(A) = change(A) - mean over matched controls C of change(C)

Controls are as many experts of the same layers, not in A: `random` ones are drawn by lot, the same for all experts of a
layer; `matched` ones are those whose share of the domain's tokens is nearest, so each domain has its own. An expert is
for a domain if its excess is: being chosen often explains the rest, as far as others are chosen as often (where none
is, the matched share says how far off the nearest are). Intervals (95%) are bootstrapped over sequences, of differences
on the same sequences; nothing corrects them for testing many experts.

How many sets are tested in one pass over the weights: see `moekit.evaluation.removal`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moekit.data import Dataset
from moekit.errors import DataError, PlanError
from moekit.evaluation.compare import split_rows
from moekit.evaluation.intervals import Interval, ratio_interval
from moekit.evaluation.removal import FORK_BYTES, Removal, Removed
from moekit.families.model import Model
from moekit.layout import ExpertId, Layout
from moekit.progress import Progress, silent
from moekit.trace.table import Table

SCHEMA = 1
HOW = (
    "Change of the loss (nats a token) when the experts' routing weight is zero, with 95% intervals over sequences. "
    "Controls are other experts of the same layer: random, or matched (chosen by nearly the same share of the domain's "
    "tokens); excess: change minus the mean of the matched controls."
)


@dataclass(frozen=True)
class Effect:
    """What switching off experts did to one domain.

    Attributes:
        share: of the domain's tokens that choose them, the mean over the experts.
        touched: sequences in which a token chooses one of them.
        change: of the loss, nats a token.
    """

    share: float
    touched: int
    change: Interval


@dataclass(frozen=True)
class Tested:
    """One set of experts that was switched off, in one domain, with its controls.

    Attributes:
        experts: the set.
        domain: by name.
        effect: of the set.
        random: effect of each random control.
        matched: effect of each control that is matched in frequency.
        mean_random: mean change of the random controls; None without any.
        mean_matched: mean change of the matched controls; None without any.
        excess: change minus `mean_matched`; None without matched controls.
    """

    experts: Removed
    domain: str
    effect: Effect
    random: Mapping[Removed, Effect]
    matched: Mapping[Removed, Effect]
    mean_random: Interval | None
    mean_matched: Interval | None
    excess: Interval | None

    @property
    def matched_share(self) -> float:
        """Of the domain's tokens that choose the matched controls, their mean; NaN without any."""
        return float(np.mean([x.share for x in self.matched.values()])) if self.matched else float("nan")


@dataclass(frozen=True)
class Ablation:
    """The result: every set in every domain.

    Attributes:
        loss: of the model as it is, nats a token, by domain.
        tested: sets in the order given, each in all domains.
        sequences: by domain.
        tokens: predicted, by domain.
        settings: model, layout, data, controls, seed, renormalise.
    """

    loss: Mapping[str, Interval]
    tested: Sequence[Tested]
    sequences: Mapping[str, int]
    tokens: Mapping[str, int]
    settings: Mapping[str, object] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """One flat row for each tested set and domain, then one for each of its controls."""
        out = []
        for x in self.tested:
            means = {"random": x.mean_random, "matched": x.mean_matched, "excess": x.excess}
            compared: dict[str, Any] = {name: None if value is None else list(value) for name, value in means.items()}
            compared["matched_share"] = x.matched_share if x.matched else None
            out.append(_row(x.experts, x, x.effect, None) | compared)
            for name, controls in (("random", x.random), ("matched", x.matched)):
                out += [
                    _row(experts, x, effect, name) | dict.fromkeys(compared) for experts, effect in controls.items()
                ]
        return out

    def table(self) -> Table:
        """The rows of `rows` as columns, intervals without their ends."""
        rows = []
        for row in self.rows():
            values = {key: row[key][0] if row[key] else np.nan for key in ("random", "matched", "excess")}
            rows.append(
                {**row, **values, "control": row["control"] or "", "matched_share": row["matched_share"] or np.nan}
            )
        return Table.of("ablation", rows, HOW)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `rows` as `rows()` gives them."""
        domains = {
            name: {"loss": list(self.loss[name]), "tokens": self.tokens[name], "sequences": self.sequences[name]}
            for name in self.loss
        }
        return {"schema": SCHEMA, **self.settings, "how": HOW, "domains": domains, "rows": self.rows()}

    def save(self, file: str | Path) -> Path:
        """Write as JSON."""
        path = Path(file)
        temporary = path.with_name(path.name + ".partial")
        temporary.write_text(json.dumps(self.to_dict(), indent=1))
        temporary.rename(path)
        return path


def _row(experts: Removed, tested: Tested, effect: Effect, control: str | None) -> dict[str, Any]:
    change, low, high = effect.change
    return {
        "experts": name_of(experts),
        "domain": tested.domain,
        "control": control,
        "of": name_of(tested.experts),
        "share": effect.share,
        "touched": effect.touched,
        "change": change,
        "low": low,
        "high": high,
    }


def name_of(experts: Iterable[ExpertId]) -> str:
    """`3.5`, or `3.5+4.17` for a set."""
    return "+".join(map(str, experts))


def ablate(
    model: Model,
    data: Dataset,
    experts: Sequence[ExpertId | Collection[ExpertId]],
    *,
    controls: int = 2,
    seed: int = 0,
    renormalise: bool = False,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    fork_bytes: int = FORK_BYTES,
    progress: Progress = silent,
) -> Ablation:
    """Test what experts do by switching them off, in two or more streamed passes.

    Args:
        model: from `moekit.open`.
        data: held-out text, tokenised.
        experts: each an expert (layer, number), or several that are switched off together.
        controls: random and matched controls of each, as far as the layer has experts for them.
        seed: of the random controls.
        renormalise: the other chosen experts of a token take over the weight (MoTE's "off").
        dtype: to run in; None for the model's own.
        device: "cpu" or "cuda".
        fork_bytes: what the forks of one pass may hold; less means more passes.
        progress: told as layers pass.

    Raises:
        PlanError: no expert given, or one that the model has not.
        DataError: a domain has no token to predict.
        CheckpointError: weights cannot be read.
    """
    layout = model.layout
    sets = list(dict.fromkeys(checked(layout, x) for x in experts))
    if not sets:
        raise PlanError("no expert to switch off", fix="name experts as LAYER.EXPERT")
    run = Removal(model, split_rows(data, layout.vocab_size), renormalise, dtype, device, progress)
    run.clean()
    if missing := [name for i, name in enumerate(data.domains) if not run.tokens(i).sum()]:
        raise DataError(f"the domain {missing[0]!r} has no token to predict", fix="give longer texts")
    random = {x: random_controls(layout, x, controls, seed) for x in sets}
    matched = {
        (x, i): _matched_controls(x, {layer: run.share(layer, i) for layer in {e.layer for e in x}}, controls)
        for x in sets
        for i in range(len(data.domains))
    }
    wanted = [{y: None for x in sets for y in (x, *random[x], *matched[x, i])} for i in range(len(data.domains))]
    run.without(wanted, fork_bytes)
    tested = [_tested(run, x, i, name, random[x], matched[x, i]) for x in sets for i, name in enumerate(data.domains)]
    settings = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "layout_hash": layout.hash,
        "data": data.describe(),
        "controls": controls,
        "seed": seed,
        "renormalise": renormalise,
        "dtype": str(run.loader.dtype).removeprefix("torch."),
    }
    ids = dict(enumerate(data.domains))
    return Ablation(
        {name: ratio_interval(run.nll(i), run.tokens(i)) for i, name in ids.items()},
        tested,
        {name: len(run.tokens(i)) for i, name in ids.items()},
        {name: int(run.tokens(i).sum()) for i, name in ids.items()},
        settings,
    )


def _tested(
    run: Removal, experts: Removed, domain: int, name: str, random: Sequence[Removed], matched: Sequence[Removed]
) -> Tested:
    tokens = run.tokens(domain)

    def effect(removed: Removed) -> Effect:
        share = float(np.mean([run.share(layer, domain)[expert] for layer, expert in removed]))
        change = ratio_interval(run.change(removed, domain), tokens)
        return Effect(share, int(run.touched(removed, domain).sum()), change)

    def mean(controls: Sequence[Removed]) -> np.ndarray:
        return np.mean([run.change(x, domain) for x in controls], axis=0)

    return Tested(
        experts,
        name,
        effect(experts),
        {x: effect(x) for x in random},
        {x: effect(x) for x in matched},
        ratio_interval(mean(random), tokens) if random else None,
        ratio_interval(mean(matched), tokens) if matched else None,
        ratio_interval(run.change(experts, domain) - mean(matched), tokens) if matched else None,
    )


def checked(layout: Layout, experts: ExpertId | Collection[ExpertId]) -> Removed:
    """One expert or several, ascending.

    Raises:
        PlanError: none, or one that the model has not.
    """
    several = [experts] if isinstance(experts, ExpertId) else experts
    out = tuple(sorted({ExpertId(*x) for x in several}))
    if not out:
        raise PlanError("no expert to switch off", fix="name experts as LAYER.EXPERT")
    for layer, expert in out:
        found = layout.by_index.get(layer)
        if found is None or found.mtp:
            raise PlanError(
                f"layer {layer} is no MoE layer of this model",
                where=f"expert {layer}.{expert}",
                expected=f"one of {', '.join(str(x.index) for x in layout.routed)}",
            )
        if not 0 <= expert < found.num_experts:
            raise PlanError(
                f"layer {layer} has no expert {expert}",
                where=f"expert {layer}.{expert}",
                expected=f"0 to {found.num_experts - 1}",
            )
    return out


def random_controls(layout: Layout, experts: Removed, number: int, seed: int) -> list[Removed]:
    """At most `number` sets like `experts`, drawn by lot from the same layers, the same for all sets of a layer."""
    lots = {}
    for layer in {x.layer for x in experts}:
        order = np.random.default_rng([seed, layer]).permutation(layout.by_index[layer].num_experts).tolist()
        lots[layer] = [ExpertId(layer, e) for e in order if ExpertId(layer, e) not in experts]
    return _drawn(experts, number, lambda member: lots[member.layer])


def _matched_controls(experts: Removed, share: Mapping[int, np.ndarray], number: int) -> list[Removed]:
    """Sets like `experts`, each member replaced by the expert of its layer whose share of tokens is nearest."""

    def nearest(member: ExpertId) -> list[ExpertId]:
        distance = np.abs(share[member.layer] - share[member.layer][member.expert])
        order = [ExpertId(member.layer, int(e)) for e in np.argsort(distance, kind="stable")]
        return [x for x in order if x not in experts]

    return _drawn(experts, number, nearest)


def _drawn(experts: Removed, number: int, candidates: Callable[[ExpertId], list[ExpertId]]) -> list[Removed]:
    """At most `number` disjoint sets of the first candidates of each member that are not taken yet."""
    out: list[Removed] = []
    taken: set[ExpertId] = set()
    for _ in range(number):
        chosen = []
        for member in experts:
            first = next((x for x in candidates(member) if x not in taken), None)
            if first is None:
                return out
            taken.add(first)
            chosen.append(first)
        out.append(tuple(sorted(chosen)))
    return out
