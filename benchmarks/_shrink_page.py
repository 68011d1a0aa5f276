"""The page of shrink.py: tables by model, calibration and budget, and what they say about what papers report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from _shrinking import INSIDE, MIXED, PLANNER, Row, Score

CALIBRATIONS = (INSIDE, MIXED)


@dataclass(frozen=True)
class Sheet:
    """What the page says of one model.

    Attributes:
        title: its name.
        about: what it is and how much was measured.
        full: perplexity of the source by domain.
        rows: everything that was scored, of each table the best first.
        by_cost: by bits: mc-moe, and experts rounded to nearest whatever they cost.
    """

    title: str
    about: str
    full: Mapping[str, float]
    rows: Sequence[Row]
    by_cost: Mapping[float, tuple[Score, Score]]

    @property
    def budgets(self) -> list[float]:
        return sorted({x.budget for x in self.rows}, reverse=True)

    def at(self, budget: float, calibration: str) -> list[Row]:
        """The rows of one table."""
        return [x for x in self.rows if (x.budget, x.calibration) == (budget, calibration)]

    def ratio(self, name: str, budget: float, calibration: str) -> float:
        """Of a method's perplexity and the source's; nan where it was not measured."""
        return next((x.mean.ratio for x in self.at(budget, calibration) if x.entry.label == name), float("nan"))


def linked(label: str) -> str:
    """Each method of a label as a link to its page."""
    names = label.split(" + ")
    return " + ".join("the planner" if x == PLANNER else f"[{x}](../methods/{x}.md)" for x in names)


def table(rows: Sequence[Row]) -> Iterator[str]:
    """One row an entry: perplexity over the source's, and in brackets KL divergence, by domain and on average."""
    domains = list(rows[0].scores)
    yield f"| | what stays | bytes | {' | '.join(domains)} | mean |"
    yield f"|---|---|--:|{'--:|' * (len(domains) + 1)}"
    for row in rows:
        cells = [f"{x.ratio:.3f} ({x.kl:.3f})" for x in (*row.scores.values(), row.mean)]
        yield f"| {linked(row.entry.label)} | {row.entry.detail} | {row.entry.share:.1%} | {' | '.join(cells)} |"


def overview(sheet: Sheet) -> Iterator[str]:
    """One row a single method: mean perplexity ratio by budget, in the domain and mixed."""
    columns = [(b, c) for b in sheet.budgets for c in CALIBRATIONS]
    names = {x.entry.label: None for x in sheet.rows if x.entry.kind not in ("combination", PLANNER)}
    yield "| | " + " | ".join(f"{b:.0%}, {c}" for b, c in columns) + " |"
    yield f"|---|{'--:|' * len(columns)}"
    middle = sheet.budgets[len(sheet.budgets) // 2 - 1]
    for name in sorted([*names, PLANNER], key=lambda x: sheet.ratio(x, middle, INSIDE)):
        cells = [sheet.ratio(name, *x) for x in columns]
        yield f"| {linked(name)} | " + " | ".join("" if np.isnan(x) else f"{x:.3f}" for x in cells) + " |"


def holds(truth: bool) -> str:
    """The verdict."""
    return "holds" if truth else "**does not hold**"


def compared(sheet: Sheet) -> Iterator[str]:
    """What papers report, on other models and tasks, beside what was found here."""

    def said(names: Sequence[str], budget: float, calibration: str) -> str:
        return ", ".join(f"{x} {sheet.ratio(x, budget, calibration):.2f}" for x in names)

    def pruned(budget: float, calibration: str) -> dict[str, float]:
        rows = [x for x in sheet.at(budget, calibration) if x.entry.kind == "prune" and x.entry.label != "random"]
        return {x.entry.label: x.mean.ratio for x in rows}

    saliency, counts = ("reap", "easy-ep"), ("frequency", "ean")
    for budget, claim in (
        (0.75, "In the domain REAP-like scores are best, frequency and EAN close behind when a quarter goes"),
        (0.5, "and far behind when half goes"),
    ):
        ratios = pruned(budget, INSIDE)
        best, others = (min(ratios[x] for x in names) for names in (saliency, counts))
        behind = others / best - 1
        verdict = best <= min(ratios.values()) and (behind < 0.03 if budget == 0.75 else behind > 0.05)
        yield f"- {claim}: {holds(verdict)}. {said([*saliency, *counts], budget, INSIDE)}."
    ratios = pruned(0.5, MIXED)
    merged = sheet.ratio("hc-smoe", 0.5, MIXED)
    yield (
        f"- On text that is not of the domain, merging by outputs (HC-SMoE) loses least: "
        f"{holds(merged <= min(ratios.values()))} for the mix of all domains at half. hc-smoe {merged:.2f}, "
        f"{said(list(ratios), 0.5, MIXED)}."
    )
    inside = pruned(0.5, INSIDE)
    names = [x for x in inside if x in ratios]
    text = float(np.median([ratios[x] / inside[x] for x in names]))
    choice = float(np.median([inside[x] for x in names])) / min(inside.values())
    yield (
        f"- The calibration text matters more than the method: {holds(text > choice)} at half. The mix instead of the "
        f"domain costs x {text:.2f} (median over pruning methods), the median method instead of the best "
        f"x {choice:.2f}."
    )
    for bits, (ours, alike) in sorted(sheet.by_cost.items()):
        yield (
            f"- MC-MoE at {bits:g} bits diverges less than {bits:g} bits for all, rounded: "
            f"{holds(ours.kl < alike.kl)}. KL {ours.kl:.4f} against {alike.kl:.4f}, perplexity x {ours.ratio:.3f} "
            f"against x {alike.ratio:.3f}."
        )


def section(sheet: Sheet) -> Iterator[str]:
    """All of one model."""
    yield from ("", f"## {sheet.title}", "", sheet.about, "")
    yield f"| | {' | '.join(sheet.full)} |"
    yield f"|---|{'--:|' * len(sheet.full)}"
    yield f"| perplexity of the source | {' | '.join(f'{x:.2f}' for x in sheet.full.values())} |"
    yield from ("", "Perplexity over the source's, geometric mean over domains, by share of the experts' bytes:", "")
    yield from overview(sheet)
    yield from ("", "Beside what papers report, on other models and tasks:", "")
    yield from compared(sheet)
    for budget in sheet.budgets:
        for calibration in CALIBRATIONS:
            yield from ("", f"### {budget:.0%} of the experts' bytes, calibrated {_where(calibration)}", "")
            yield from table(sheet.at(budget, calibration))


def _where(calibration: str) -> str:
    return "on the column's domain" if calibration == INSIDE else "on all domains"


def page(sheets: Sequence[Sheet], notes: Sequence[str]) -> str:
    """The page in docs/benchmarks/."""
    lines = [
        "# Smaller models at equal bytes",
        "",
        "Written by `python benchmarks/shrink.py --write`. Every method gets the largest size that fits into a share",
        "of the bytes of all experts; plans are applied live and scored on held-out text in float32. Perplexity is",
        "over the source's, 1.000 is no loss; in brackets KL divergence from the source, nats a token. Fewer experts",
        "and fewer bits together (`easy-ep + rtn-int8`) are tried with the best pruning and the best merging method.",
        "The planner may also keep what every token uses in 8 bits; its bytes are those of the whole",
        "model that the others leave.",
        "Random: mean of three draws.",
        "",
        *notes,
    ]
    for sheet in sheets:
        lines += section(sheet)
    return "\n".join(lines) + "\n"
