"""Smaller models at equal bytes: every method of the registry, and what the planner chooses, by budget and calibration.

    python benchmarks/shrink.py            # refmoe and the MoE of SmolLM2 (see _smollm2.py), about an hour
    python benchmarks/shrink.py --write    # and write the page in docs/
    python benchmarks/shrink.py --only smollm2      # one of the two, its scores kept for the next time
    python benchmarks/shrink.py --quick    # refmoe, one domain, two budgets, few tokens: under a minute

A budget is a share of the bytes of all experts. Each method gets the largest size that fits: fewer experts, lower rank,
fewer bits, or fewer experts and fewer bits. Each plan is applied live and compared with the source on held-out text:
perplexity over the source's, KL divergence from it. Calibrated on the domain that is scored ("in the domain"), and on
all domains together ("mixed"). On refmoe one plan of each kind is baked too, and proven.

Goals: on refmoe, in the domain, at half of the experts' bytes, the best is within 3% of the full model's perplexity,
by any means and by fewer experts alone; the planner's choice is never worse than the best single method by more than
2%; bits by what experts cost (mc-moe) diverge clearly less than bits that are the same for all, rounded to nearest, in
as many bytes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import transformers
from _goals import finish
from _shrink_page import Sheet, page
from _shrinking import (
    INSIDE,
    MIXED,
    PLANNER,
    Entry,
    Lab,
    Row,
    Score,
    combined,
    mean_score,
    planned,
    quantised,
    singles,
)
from _smollm2 import CACHE

import moekit
from moekit import methods, refmoe
from moekit.methods import quantize
from moekit.plans import Plan

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "shrink.md"
LENGTH = 256
BUDGETS = (0.75, 0.5, 0.35, 0.25)
FEWER = ("prune", "merge", "replace")  # kinds of methods that leave fewer experts
CLEARLY = 0.8  # of the other's divergence


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        model: a folder, or "refmoe".
        domains: of refmoe's texts.
        inside: the domains that are also calibrated on alone.
        budgets: shares of the experts' bytes.
        seen: tokens of each domain to calibrate on.
        held_out: tokens of each domain to score.
    """

    model: str
    domains: tuple[str, ...]
    inside: tuple[str, ...]
    budgets: tuple[float, ...]
    seen: int
    held_out: int


class Found:
    """Everything that was found out about one model.

    Args:
        size: how much was measured.
        lab: the model.
    """

    def __init__(self, size: Size, lab: Lab):
        self.size, self.lab, self.name = size, lab, size.model if size.model == "refmoe" else "SmolLM2 as an MoE"
        self.rows: list[Row] = []
        for budget in size.budgets:
            for calibration in (INSIDE, MIXED):
                self.rows += self._at(budget, calibration)

    def _at(self, budget: float, calibration: str) -> list[Row]:
        def row(entry: Entry) -> Row:
            made = Row(budget, calibration, entry, self.lab.scores(entry, calibration == INSIDE))
            print(
                f"{self.name}, {calibration}, {budget:.0%}: {entry.label}, {entry.detail}: "
                f"x {made.mean.ratio:.3f}, KL {made.mean.kl:.4f}",
                flush=True,
            )
            return made

        found = [row(x) for x in singles(self.lab, budget)]
        for kind in ("prune", "merge"):
            best = min((x for x in found if x.entry.kind == kind), key=lambda x: x.mean.kl)
            found += [row(x) for x in combined(self.lab, best.entry.label, budget)]
        return sorted([*found, row(planned(self.lab, budget))], key=lambda x: x.mean.kl)

    def at(self, budget: float, calibration: str) -> list[Row]:
        """Rows of one table, the best first."""
        return [x for x in self.rows if (x.budget, x.calibration) == (budget, calibration)]

    def best(self, budget: float, calibration: str, kinds: Sequence[str] = ()) -> Row:
        """The lowest perplexity; the planner is not among them."""
        rows = [
            x for x in self.at(budget, calibration) if x.entry.kind in kinds or (not kinds and x.entry.label != PLANNER)
        ]
        return min(rows, key=lambda x: x.mean.ratio)


def planner_over_best(found: Found) -> float:
    """The planner's perplexity over that of the best single method: the largest of all budgets and calibrations."""
    worst = 0.0
    for budget in found.size.budgets:
        for calibration in (INSIDE, MIXED):
            rows = found.at(budget, calibration)
            ours = next(x.mean.ratio for x in rows if x.entry.label == PLANNER)
            worst = max(worst, ours / min(x.mean.ratio for x in rows if x.entry.kind not in (PLANNER, "combination")))
    return worst


def rounded_alike(lab: Lab, wanted: Sequence[float]) -> Iterator[tuple[float, Entry]]:
    """(bits, experts rounded to nearest whatever they cost): 2 and 3 bits for all, and 2.5, every other at 3."""
    ways = {
        x: quantize.ways(methods.get(f"rtn-int{x}"), lab.layout, methods.get(f"rtn-int{x}").settings({}))
        for x in (2, 3)
    }
    for bits in wanted:
        ops = ways[int(bits)]
        if bits == 2.5:
            each = {"bits": tuple(3 - e % 2 for e in range(lab.experts)), "format": "moekit"}
            ops = [op.model_copy(update=each) for op in ops]
        plan = Plan(layout_hash=lab.layout.hash, ops=[*ops])
        yield (
            bits,
            Entry(
                f"nearest at {bits:g}", "quantize", f"{bits:g} bits", lab.share(plan), True, lambda _, plan=plan: [plan]
            ),
        )


def by_cost(lab: Lab, wanted: Sequence[float]) -> dict[float, tuple[Score, Score]]:
    """(mc-moe, rounded to nearest without looking at experts) by bits, calibrated on all domains."""
    out = {}
    for bits, alike in rounded_alike(lab, wanted):
        widths = "2,3,4" if bits == 3 else "1,2,3"
        ours = quantised(lab, methods.get("mc-moe"), alike.share, bits=float(bits), widths=widths)
        assert ours is not None, f"mc-moe at {bits} bits is larger than {alike.label}"
        out[bits] = tuple(mean_score(lab.scores(x, False).values()) for x in (ours, alike))
        print(f"{bits:g} bits: mc-moe KL {out[bits][0].kl:.4f}, rounded alike {out[bits][1].kl:.4f}", flush=True)
    return out


def proven(found: Found, kinds: Sequence[str], folder: Path) -> dict[str, float]:
    """The largest logit difference of a baked model from its plan applied live, by method: one of each kind."""
    out = {}
    for kind in kinds:
        entry = next(x.entry for x in found.at(0.5, MIXED) if x.entry.kind == kind)
        result = moekit.bake(found.lab.model, entry.plans(None)[0], folder / f"baked-{kind}")
        assert result.verification is not None
        out[entry.label] = result.verification.max_difference
        print(f"baked {entry.label}: the largest logit difference is {out[entry.label]:.2g}", flush=True)
    return out


def about(size: Size, lab: Lab) -> str:
    """What was measured, for the page."""
    layers, whole = lab.layout.routed, lab.model.checkpoint.bytes
    return (
        f"{len(layers)} layers of {layers[0].num_experts} experts, {layers[0].top_k} of them chosen a token; experts "
        f"are {lab.expert_bytes / whole:.0%} of the model's {whole / 1e6:.0f} MB. {size.seen:,} tokens of each domain "
        f"to calibrate on (a part of them held out for the planner), {size.held_out:,} of each to score; calibrated on "
        f"alone: {', '.join(size.inside)}."
    )


def sizes(args: argparse.Namespace) -> list[Size]:
    """What to measure."""
    domains = tuple(refmoe.texts())
    if args.quick:
        one = ("python",)
        return [Size("refmoe", one, one, (0.5, 0.25), args.calibration or 2048, args.tokens or 1024)]
    out = [Size("refmoe", domains, domains, BUDGETS, args.calibration or 8192, args.tokens or 2048)]
    if args.smollm2.is_dir():
        budgets = tuple(float(x) for x in args.smollm2_budgets.split(","))
        out.append(Size(str(args.smollm2), domains, ("kjv", "python"), budgets, 1024, 256))
    else:
        print(f"left out: the MoE of SmolLM2, there is no {args.smollm2}; make it by benchmarks/_smollm2.py")
    return out


def opened(size: Size, folder: Path, notes: Path | None) -> Lab:
    """The model and its texts; what was found before is in the folder `notes`."""
    model = moekit.open(size.model)

    def load(texts: dict[str, Path], tokens: int) -> moekit.data.Dataset:
        return moekit.load_data(model, {x: texts[x] for x in size.domains}, tokens=tokens, sequence_length=LENGTH)

    seen, texts = load(refmoe.calibration(), size.seen), load(refmoe.texts(), size.held_out)
    measured = 4 if size.model == "refmoe" else 2
    notebook = notes / f"{Path(size.model).name}-{size.seen}-{size.held_out}.json" if notes else None
    return Lab(model, seen, texts, folder, inside=size.inside, measured=measured, notebook=notebook)


def goals(found: Sequence[Found], costs: dict[float, tuple[Score, Score]]) -> dict[str, tuple[float, float, str]]:
    """What was hoped for; the first model is refmoe."""
    ref = found[0]
    out = {
        "best_at_half_of_the_bytes": (ref.best(0.5, INSIDE).mean.ratio, 1.03, "<="),
        "fewer_experts_at_half_of_the_bytes": (ref.best(0.5, INSIDE, FEWER).mean.ratio, 1.03, "<="),
    }
    out |= {f"planner_over_best_{x.name.split()[0].lower()}": (planner_over_best(x), 1.02, "<=") for x in found}
    return out | {
        f"mc_moe_over_rounded_{bits:g}_bits": (ours.kl / alike.kl, CLEARLY, "<=")
        for bits, (ours, alike) in costs.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="refmoe, one domain, two budgets, few tokens; no page")
    parser.add_argument("--write", action="store_true", help="write the page in docs/")
    parser.add_argument("--calibration", type=int, help="tokens of each domain to calibrate on")
    parser.add_argument("--tokens", type=int, help="held-out tokens of each domain")
    parser.add_argument("--smollm2", type=Path, default=CACHE, help="folder of the model that _smollm2.py makes")
    parser.add_argument("--smollm2-budgets", default="0.75,0.5,0.35,0.25", help="shares of the experts' bytes there")
    parser.add_argument("--only", choices=("refmoe", "smollm2"), help="measure one, keep its scores, judge nothing")
    parser.add_argument("--notes", type=Path, default=CACHE.parent / "shrink", help="folder for scores that are kept")
    args = parser.parse_args()
    transformers.logging.disable_progress_bar()
    started = time.perf_counter()
    found, sheets, seconds = [], [], {}
    with tempfile.TemporaryDirectory(prefix="moekit-shrink-") as folder:
        for number, size in enumerate(sizes(args)):
            begun = time.perf_counter()
            if args.only and (size.model == "refmoe") != (args.only == "refmoe"):
                continue
            lab = opened(size, Path(folder) / str(number), None if args.quick else args.notes)
            found.append(Found(size, lab))
            costs = by_cost(lab, (2.5,) if args.quick else (2, 2.5, 3)) if size.model == "refmoe" else {}
            sheets.append(Sheet(found[-1].name, about(size, lab), lab.full, found[-1].rows, costs))
            seconds[found[-1].name] = round(time.perf_counter() - begun, 1)
        if args.only:
            return
        kinds = ("prune",) if args.quick else ("prune", "merge", "replace", "factor", "quantize")
        differences = proven(found[0], kinds, Path(folder))
    if args.write and not args.quick:
        notes = ["Baked and proven on refmoe, the largest logit difference from the plan applied live: "]
        notes[0] += ", ".join(f"{x} {y:.2g}" for x, y in differences.items()) + "."
        PAGE.write_text(page(sheets, notes), encoding="utf-8")
    finish(
        "shrink",
        goals(found, sheets[0].by_cost),
        quick=args.quick,
        seconds=round(time.perf_counter() - started, 1),
        by_model=seconds,
        baked=differences,
        means={
            x.name: {
                f"{r.budget:g} {r.calibration} {r.entry.label}": [round(r.mean.ratio, 4), round(r.mean.kl, 5)]
                for r in x.rows
            }
            for x in found
        },
    )


if __name__ == "__main__":
    main()
