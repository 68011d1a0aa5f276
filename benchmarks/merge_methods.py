"""What merging experts, or letting constants stand for them, costs on refmoe beside dropping them.

    python benchmarks/merge_methods.py            # about a quarter of an hour on one core; writes the pages in docs/
    python benchmarks/merge_methods.py --quick    # two domains, one budget, few tokens: under a minute

The protocol of prune_methods.py: one statistics pass over the packaged calibration texts, plans for every method, share
of experts kept and calibration (one domain, or all: "mixed"), scored on held-out text: those of one domain on text of
the same, the mixed ones on all. "ream, sequential" takes the statistics of each layer with the merged layers before it.
By bytes a method that keeps half of the experts is like any other here: a constant is as good as nothing.

Goals, at half of the experts: no method loses to dropping experts by lot; MoNE does not lose to dropping those that it
replaces, by its own scores; REAM does not lose to M-SMoE.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import transformers
from _goals import finish
from prune_methods import DOCS, KEEPS, LENGTH, MIXED, fill, mean, perplexities

import moekit
from moekit import refmoe
from moekit.apply.live import live
from moekit.data import Dataset
from moekit.families.loader import OUTER
from moekit.families.model import Model
from moekit.fitting import Fit, decide
from moekit.plans import Drop, Plan
from moekit.view import MoEView

PAGE = DOCS / "benchmarks" / "merge_methods.md"
METHODS: dict[str, tuple[str, dict]] = {
    "m-smoe": ("m-smoe", {}),
    "hc-smoe": ("hc-smoe", {}),
    "ream": ("ream", {}),
    "ream, sequential": ("ream", {"sequential": True}),
    "mone": ("mone", {}),
}
DROPPED = "mone's experts dropped"
FLOORS = ("easy-ep", "random")
Scores = dict[tuple[str, float, str], dict[str, float]]  # (method, keep, calibration) -> perplexity by domain


def scored(model: Model, plan: Plan, data: Dataset) -> dict[str, float]:
    """Perplexity by domain, the model changed as it is read."""
    loader = model.loader(torch.float32)
    with live(MoEView(loader.model, model.layout), plan, loader):
        for index in (OUTER, *range(len(loader.layers))):
            loader.attach(index, loader.read(index))
        return perplexities(loader.model, data)


def dropped_instead(plan: Plan) -> Plan:
    """The plan that drops what this one replaces."""
    ops = [Drop(layer=op.layer, experts=op.experts) for op in plan.replaced().values()]
    return Plan(layout_hash=plan.layout_hash, ops=ops)


def plans(fit: Fit, keep: float, calibration: str) -> Iterator[tuple[str, Plan]]:
    """Every plan for a budget and a calibration."""
    domain = None if calibration == MIXED else calibration
    for label, (name, options) in METHODS.items():
        with tempfile.TemporaryDirectory() as folder:
            own = Fit(fit.model, fit.source, fit.stats, fit.data, Path(folder), fit.dtype)
            plan = decide(name, own, keep=keep, domain=domain, options=options)
            yield label, plan
            if name == "mone":
                yield DROPPED, dropped_instead(plan)
    for name in FLOORS:
        yield name, decide(name, fit, keep=keep, domain=domain)


class Results:
    """Perplexities over the full model's."""

    def __init__(self, full: Mapping[str, float], scores: Scores):
        self.full, self.scores = full, scores

    def inside(self, method: str, keep: float) -> list[float]:
        """In each domain, calibrated on that domain."""
        return [self.scores[method, keep, x][x] / self.full[x] for x in self.full]

    def mixed(self, method: str, keep: float) -> list[float]:
        """In each domain, calibrated on all."""
        return [self.scores[method, keep, MIXED][x] / self.full[x] for x in self.full]

    def over(self, method: str, other: str, kind: str) -> float:
        """The mean of a method over that of another, at half of the experts."""
        return mean(getattr(self, kind)(method, 0.5)) / mean(getattr(self, kind)(other, 0.5))


def table(results: Results, kind: str, keep: float) -> list[str]:
    """One row a method, one column a domain, the mean last, the best method first."""
    rows = {name: getattr(results, kind)(name, keep) for name in (*METHODS, DROPPED, *FLOORS)}
    lines = [f"| keep {keep:.0%} | {' | '.join(results.full)} | mean |", f"|---|{'--:|' * (len(results.full) + 1)}"]
    for name, values in sorted(rows.items(), key=lambda row: mean(row[1])):
        lines.append(f"| {name} | {' | '.join(f'{x:.2f}' for x in [*values, mean(values)])} |")
    return lines


def page(results: Results, what: str) -> str:
    """The page in docs/benchmarks/."""
    lines = [
        "# Merging and replacing experts on refmoe",
        "",
        "Perplexity over the full model's, by `python benchmarks/merge_methods.py`; 1.00 is no loss. " + what,
        "Means are geometric. easy-ep and random drop experts ([all pruning methods](prune_methods.md)).",
    ]
    for kind, title in (("inside", "Calibrated on the column's domain"), ("mixed", "Calibrated on all domains")):
        lines += ["", f"## {title}"]
        for keep in KEEPS:
            lines += ["", *table(results, kind, keep)]
    return "\n".join(lines) + "\n"


def slot(results: Results, labels: tuple[str, ...]) -> str:
    """What a method's page says."""
    known = [(label, kind) for label in (*labels, "easy-ep") for kind in ("inside", "mixed")]
    head = [f"{label}, {'in the domain' if kind == 'inside' else 'mixed'}" for label, kind in known]
    lines = [
        "Perplexity over the full model's on refmoe, geometric mean over six domains, calibrated on the domain or on"
        " all mixed ([all numbers](../benchmarks/merge_methods.md)); easy-ep drops experts:",
        "",
        f"| keep | {' | '.join(head)} |",
        f"|---|{'--:|' * len(head)}",
    ]
    for keep in KEEPS:
        cells = [mean(getattr(results, kind)(label, keep)) for label, kind in known]
        lines.append(f"| {keep:.0%} | {' | '.join(f'{x:.2f}' for x in cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two domains, half of the experts, few tokens; no pages")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    started = time.perf_counter()
    names = ("kjv", "python") if args.quick else tuple(refmoe.texts())
    seen_tokens, held_out = (4096, 1024) if args.quick else (16_384, 4096)
    model = moekit.open("refmoe")
    seen = moekit.load_data(
        model, {x: refmoe.calibration()[x] for x in names}, tokens=seen_tokens, sequence_length=LENGTH
    )
    texts = {x: moekit.load_data(model, {x: refmoe.texts()[x]}, tokens=held_out, sequence_length=LENGTH) for x in names}
    stats = moekit.measure(model, seen, groups=("scores", "outputs", "routing"), dtype=torch.float32)
    unchanged = Plan(layout_hash=model.layout.hash)
    full = {x: scored(model, unchanged, data)[x] for x, data in texts.items()}
    scores: Scores = {}
    for keep in (0.5,) if args.quick else KEEPS:
        for calibration in (*names, MIXED):
            parts = [names.index(calibration)] if calibration != MIXED else range(len(names))
            batches = [x for x in seen.batches if x.domain in parts]
            fit = Fit(model, model, stats, Dataset(seen.domains, batches, LENGTH), Path(), torch.float32)
            for method, plan in plans(fit, keep, calibration):
                found = {
                    x: scored(model, plan, texts[x])[x] for x in (names if calibration == MIXED else [calibration])
                }
                scores[method, keep, calibration] = found
                print(method, keep, calibration, {x: round(y / full[x], 3) for x, y in found.items()}, flush=True)
    results = Results(full, scores)
    for kind in ("inside", "mixed"):
        print("\n".join(table(results, kind, 0.5)))
    if not args.quick:
        what = f"{seen_tokens:,} tokens of each domain to calibrate on, {held_out:,} held-out ones to score, float32."
        PAGE.write_text(page(results, what), encoding="utf-8")
        for name, labels in (
            ("m-smoe", ("m-smoe",)),
            ("hc-smoe", ("hc-smoe",)),
            ("ream", ("ream", "ream, sequential")),
            ("mone", ("mone", DROPPED)),
        ):
            fill(DOCS / "methods" / f"{name}.md", slot(results, labels))
    worst = max(results.over(x, "random", kind) for x in METHODS for kind in ("inside", "mixed"))
    finish(
        "merge_methods",
        {
            "worst_over_random": (worst, 1.0, "<="),
            "mone_over_dropping_in_domain": (results.over("mone", DROPPED, "inside"), 1.0, "<="),
            "mone_over_dropping_mixed": (results.over("mone", DROPPED, "mixed"), 1.0, "<="),
            "ream_over_m_smoe_mixed": (results.over("ream", "m-smoe", "mixed"), 1.0, "<="),
        },
        quick=args.quick,
        seconds=round(time.perf_counter() - started, 1),
    )


if __name__ == "__main__":
    main()
