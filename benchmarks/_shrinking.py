"""Everything that the registry can do to make a model's experts smaller, fitted into a budget of bytes, and scored.

A `Lab` holds one model, its texts, one statistics pass and what the source says about the held-out text. Plans are
applied live. A method whose size is a number (experts, bits, rank) gets the largest that fits; of methods that differ
only in their bits, as rtn-int8 and rtn-int4, the one with the most bits that fit. What saves no bytes is left out.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moekit import methods
from moekit.data import Batch, Dataset
from moekit.errors import PlanError
from moekit.evaluation.compare import Subject, logits_of, split_rows
from moekit.families.model import Model
from moekit.fitting import FITTED, Fit, decide
from moekit.measurement import measure
from moekit.methods import Method, quantize
from moekit.planning import groups, hold_out, plan_for_budget
from moekit.plans import Plan
from moekit.plans.factoring import largest_rank

INSIDE, MIXED = "in the domain", "mixed"
SEEDS = 3  # of what is drawn
DENSITY = 0.1  # of the sparse rest of factored experts
PLANNER = "planner"
FAMILY = re.compile(r"-int\d+$")


@dataclass(frozen=True)
class Score:
    """On one domain: perplexity over the source's, and KL divergence from it, nats a token."""

    ratio: float
    kl: float


@dataclass(frozen=True)
class Entry:
    """One thing to do.

    Attributes:
        label: what a reader calls it: the method's name, or two with a plus.
        kind: of the method, "combination" or "planner".
        detail: its size: "16 of 32 experts", "4 bits".
        share: of the experts' bytes that stay.
        textless: what it does depends on no text.
        plans: its plans for a domain's calibration text (None: all); several where it is drawn.
    """

    label: str
    kind: str
    detail: str
    share: float
    textless: bool
    plans: Callable[[str | None], list[Plan]]

    @property
    def key(self) -> tuple[str, str]:
        return self.label, self.detail


class Lab:
    """A model with all that is needed to make it smaller and to see what that costs.

    Args:
        model: the source.
        seen: calibration text; a part of every domain is held out for the planner.
        texts: to score on, of the same domains.
        folder: for numbers of fitted methods.
        inside: domains that are also calibrated on alone.
        measured: candidates that the planner measures.
        notebook: what was found is kept there, and not measured again; None: nowhere.
    """

    def __init__(
        self,
        model: Model,
        seen: Dataset,
        texts: Dataset,
        folder: Path,
        *,
        inside: tuple[str, ...],
        measured: int = 4,
        notebook: Path | None = None,
    ):
        self.model, self.layout, self.domains, self.folder = model, model.layout, texts.domains, folder
        self.inside, self.measured = inside, measured
        self.seen, self.held = hold_out(seen)
        self.stats = measure(model, self.seen, groups=groups(self.layout), dtype=torch.float32)
        self.batches: dict[str, list[Batch]] = defaultdict(list)
        for batch in split_rows(texts, self.layout.vocab_size):
            self.batches[self.domains[batch.domain]].append(batch)
        order = [x for name in self.domains for x in self.batches[name]]
        logits = logits_of(Subject(model), order, torch.float32)
        said = [next(logits).log_softmax(-1) for _ in order]
        self.said = {name: [said.pop(0) for _ in self.batches[name]] for name in self.domains}
        self.full = {x: float(np.exp(_nll(self.said[x], self.batches[x]))) for x in self.domains}
        self.experts = min(x.num_experts for x in self.layout.routed)
        self.expert_bytes = sum(x.num_experts * x.expert_bytes for x in self.layout.routed)
        self.notebook = notebook
        noted = json.loads(notebook.read_text()) if notebook and notebook.is_file() else {"scores": [], "sizes": []}
        self.known = {tuple(key): {x: Score(*y) for x, y in row.items()} for key, row in noted["scores"]}
        self.sizes = {tuple(key): (keep, share) for key, keep, share in noted["sizes"]}
        self.decided: dict[tuple, Plan] = {}

    def note(self) -> None:
        """Write down what is known."""
        if self.notebook:
            scores = [[key, {x: [y.ratio, y.kl] for x, y in row.items()}] for key, row in self.known.items()]
            sizes = [[key, *value] for key, value in self.sizes.items()]
            self.notebook.parent.mkdir(parents=True, exist_ok=True)
            draft = self.notebook.with_suffix(".partial")
            draft.write_text(json.dumps({"scores": scores, "sizes": sizes}))
            draft.replace(self.notebook)

    def share(self, plan: Plan) -> float:
        """Of the experts' bytes, what a plan leaves."""
        return 1 - plan.saved_bytes(self.layout) / self.expert_bytes

    def score(self, plan: Plan, domains: Iterable[str]) -> dict[str, Score]:
        """By domain, of a plan applied live."""
        order = [(name, i) for name in domains for i in range(len(self.batches[name]))]
        logits = logits_of(Subject(self.model, plan), [self.batches[x][i] for x, i in order], torch.float32)
        sums: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(3))
        for (name, i), mine in zip(order, logits, strict=True):
            sums[name] += _compared(mine.log_softmax(-1), self.said[name][i], self.batches[name][i])
        return {x: Score(float(np.exp(more / tokens)), float(kl / tokens)) for x, (more, kl, tokens) in sums.items()}

    def scores(self, entry: Entry, inside: bool) -> dict[str, Score]:
        """By domain: each calibrated on itself (`inside`), or on all together."""
        if not inside or len(self.domains) == 1:
            return self._scored(entry, None)
        return {x: self._scored(entry, None if entry.textless else x)[x] for x in self.inside}

    def _scored(self, entry: Entry, domain: str | None) -> dict[str, Score]:
        key = *entry.key, domain
        if key not in self.known:
            found = [self.score(x, self.domains if domain is None else [domain]) for x in entry.plans(domain)]
            self.known[key] = {x: mean_score([y[x] for y in found]) for x in found[0]}
            self.note()
        return self.known[key]

    def decide(self, name: str, domain: str | None, **settings: Any) -> Plan:
        """A plan of any method; numbers that it carries lie in a folder of their own."""
        key = (name, domain, json.dumps(settings, sort_keys=True))
        if key not in self.decided:
            folder = self.folder / str(len(self.decided))
            fit = Fit(self.model, self.model, self.stats, self.seen, folder, torch.float32)
            self.decided[key] = decide(name, fit, domain=domain, **settings)
        return self.decided[key]


def _nll(said: list[torch.Tensor], batches: list[Batch]) -> float:
    total, tokens = 0.0, 0
    for p_BTV, batch in zip(said, batches, strict=True):
        real = batch.mask[:, 1:]
        total -= float(p_BTV[:, :-1].gather(2, batch.ids[:, 1:, None])[..., 0][real].sum())
        tokens += int(real.sum())
    return total / tokens


def _compared(q_BTV: torch.Tensor, p_BTV: torch.Tensor, batch: Batch) -> np.ndarray:
    """Sums over predicted tokens: negative log-likelihood above the source's, KL(p || q), their number."""
    real, ids = batch.mask[:, 1:], batch.ids[:, 1:, None]
    q_BTV, p_BTV = q_BTV[:, :-1], p_BTV[:, :-1]
    more = (p_BTV.gather(2, ids) - q_BTV.gather(2, ids))[..., 0][real].sum()
    kl = (p_BTV.exp() * (p_BTV - q_BTV)).sum(2)[real].sum()
    return np.array([float(more), float(kl), float(real.sum())])


@dataclass(frozen=True)
class Row:
    """What an entry costs.

    Attributes:
        budget: share of the experts' bytes that it was made for.
        calibration: `INSIDE` or `MIXED`.
        entry: what it is.
        scores: by domain.
    """

    budget: float
    calibration: str
    entry: Entry
    scores: Mapping[str, Score]

    @property
    def mean(self) -> Score:
        """Over domains."""
        return mean_score(self.scores.values())


def mean_score(scores: Iterable[Score]) -> Score:
    """Geometric mean of ratios, mean of divergences."""
    each = list(scores)
    return Score(float(np.exp(np.mean([np.log(x.ratio) for x in each]))), float(np.mean([x.kl for x in each])))


def singles(lab: Lab, budget: float) -> Iterator[Entry]:
    """Each method of the registry at the largest size whose bytes are at most `budget` of the experts'."""
    families: dict[str, list[Entry]] = defaultdict(list)
    for name in methods.names():
        method = methods.get(name)
        if method.kind in ("prune", "merge", "replace"):
            found = reduced(lab, method, budget)
        elif method.kind == "factor":
            found = factored(lab, method, budget)
        elif method.kind == "quantize":
            found = quantised(lab, method, budget)
        else:
            continue
        if found is None:
            continue
        if method.kind == "quantize":
            families[FAMILY.sub("", name)].append(found)
        else:
            yield found
    for entries in families.values():
        yield max(entries, key=lambda x: x.share)


def possible(lab: Lab, method: Method) -> bool:
    """Whether a method can take a model with so many experts."""
    try:
        methods.check_layout(method, lab.layout)
    except PlanError:
        return False
    return True


def reduced(lab: Lab, method: Method, budget: float) -> Entry | None:
    """Fewer experts; None where a token needs more than fit."""
    if not possible(lab, method):
        return None
    keep = int(budget * lab.experts + 1e-9)
    drawn = "seed" in method.options

    def plans(domain: str | None, keep: int = keep) -> list[Plan]:
        seeds = range(SEEDS if drawn else 1)
        return [lab.decide(method.name, domain, keep=keep, seed=seed) for seed in seeds]

    key = (method.name, budget)
    try:
        if key not in lab.sizes:
            share = keep / lab.experts
            while keep and (share := lab.share(plans(None, keep)[0])) > budget + 1e-9:  # what stands for them has bytes
                keep -= 1
            lab.sizes[key] = keep, share
        keep, share = lab.sizes[key]
        return Entry(
            method.name, method.kind, f"{keep} of {lab.experts}", share, drawn, lambda x, keep=keep: plans(x, keep)
        )
    except PlanError:
        return None


def factored(lab: Lab, method: Method, budget: float) -> Entry | None:
    """The largest rank that fits, a multiple of 4."""
    top = min(largest_rank(x, DENSITY, 2) for x in lab.layout.routed)
    for rank in range(top // 4 * 4, 0, -4):
        plan = methods.make_plan(method.name, None, lab.layout, rank=rank, density=DENSITY)
        if (share := lab.share(plan)) <= budget:
            detail = f"rank {rank}, density {DENSITY:.0%}"
            return Entry(method.name, method.kind, detail, share, True, lambda _, plan=plan: [plan])
    return None


def quantised(lab: Lab, method: Method, budget: float, **options: Any) -> Entry | None:
    """Fewer bits: those of the method, or as many as fit where it is told how many."""
    tries: list[dict[str, Any]] = [options]
    if type(method.options.get("bits")) is float and not options:
        tries = [{"bits": x / 4, "widths": widths_around(x / 4)} for x in range(32, 3, -1)]
    textless = method.name not in FITTED
    for given in tries:
        ways = quantize.ways(method, lab.layout, method.settings(given))
        share = lab.share(Plan(layout_hash=lab.layout.hash, ops=[*ways]))
        if share <= budget + 1e-9:

            def plans(domain: str | None, given: dict[str, Any] = given) -> list[Plan]:
                return [lab.decide(method.name, None if textless else domain, options=given)]

            bits = given.get("bits") or next(op.bits for op in ways)
            return Entry(method.name, method.kind, f"{bits:g} bits", share, textless, plans)
    return None


def widths_around(bits: float) -> str:
    """The widths that are mixed for so many bits on average."""
    near = sorted({max(1, int(bits) - 1), int(bits), min(8, int(bits) + 1)})
    return ",".join(map(str, near))


def combined(lab: Lab, reducer: str, budget: float) -> Iterator[Entry]:
    """Fewer experts by one method, and each way to round that alone is too large for the budget."""
    for name in methods.names("quantize"):
        method = methods.get(name)
        if name in FITTED:
            continue
        ways = quantize.ways(method, lab.layout, method.settings({}))
        whole = lab.share(Plan(layout_hash=lab.layout.hash, ops=[*ways]))
        keep = int(budget / whole * lab.experts + 1e-9)
        if keep >= lab.experts:
            continue

        def plans(domain: str | None, keep: int = keep, ways: list = ways) -> list[Plan]:
            plan = lab.decide(reducer, domain, keep=keep)
            return [plan.model_copy(update={"ops": [*plan.ops, *ways]})]

        try:
            share = lab.share(plans(None)[0])
        except PlanError:
            continue
        bits = next(op.bits for op in ways)
        detail = f"{keep} of {lab.experts}, {bits} bits"
        yield Entry(f"{reducer} + {name}", "combination", detail, share, False, plans)


def planned(lab: Lab, budget: float) -> Entry:
    """What the planner chooses when the whole model may have what is left of its bytes."""
    total = lab.model.checkpoint.bytes - round((1 - budget) * lab.expert_bytes)
    said: list[str] = []

    def plans(domain: str | None) -> list[Plan]:
        choice = plan_for_budget(
            lab.model,
            lab.stats,
            lab.held,
            total,
            formats="moekit",
            domain=domain,
            measure=lab.measured,
            dtype=torch.float32,
        )
        point = next(x for x in choice.frontier.points if x.chosen)
        said.append(f"{domain or MIXED}: {point.candidate}")
        print(f"planner, {budget:.0%}, {said[-1]}", flush=True)
        return [point.candidate.plan]

    return Entry(PLANNER, PLANNER, f"{total / lab.model.checkpoint.bytes:.0%} of the model", budget, False, plans)
