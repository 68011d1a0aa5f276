"""What each pruning method costs on refmoe, in its own domain and elsewhere: perplexity by method, budget, calibration.

    python benchmarks/prune_methods.py            # about ten minutes on one core; writes the pages in docs/
    python benchmarks/prune_methods.py --quick    # two domains, one budget, few tokens: under a minute

One statistics pass over the packaged calibration texts serves every plan: methods x share of experts kept x calibration
(one domain, or all: "mixed"). Each plan is applied live to the model in memory and scored on the packaged held-out
texts of all domains. Random is drawn with five seeds, the same for every calibration.

Goals, at half of the experts, by geometric means over domains of perplexities in the domain that was calibrated on:
EASY-EP and REAP do not lose to frequency, and no method loses to random, there or calibrated on the mix.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
import transformers
from _goals import finish

import moekit
from moekit import methods, refmoe
from moekit.apply.live import live
from moekit.data import Dataset
from moekit.plans import Plan
from moekit.view import MoEView

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = DOCS / "benchmarks" / "prune_methods.md"
LENGTH = 256
KEEPS = (0.75, 0.5, 0.25)
MIXED = "mixed"
SEEDS = 5
SCORING = tuple(x for x in methods.names("prune") if not methods.get(x).most_experts)  # refmoe has 32 experts a layer
Scores = Mapping[tuple[str, float, str], list[dict[str, float]]]  # (method, keep, calibration) -> perplexities by seed


def perplexities(model: torch.nn.Module, data: Dataset) -> dict[str, float]:
    """By domain, of a model in memory."""
    nll, tokens = np.zeros(len(data.domains)), np.zeros(len(data.domains))
    with torch.inference_mode():
        for batch in data.batches:
            logits = model(input_ids=batch.ids, use_cache=False).logits[:, :-1].float()
            real = batch.mask[:, 1:]
            nll[batch.domain] += float(
                torch.nn.functional.cross_entropy(logits[real], batch.ids[:, 1:][real], reduction="sum")
            )
            tokens[batch.domain] += int(real.sum())
    return dict(zip(data.domains, np.exp(nll / tokens).tolist(), strict=True))


def plans(
    stats: moekit.stats.Stats, keeps: Iterable[float], seeds: int
) -> Iterable[tuple[tuple[str, float, str], Plan]]:
    """Every plan with what it is: (method, keep, calibration)."""
    for keep in keeps:
        for name in SCORING:
            if name == "random":
                for seed in range(seeds):
                    yield (name, keep, MIXED), moekit.plan(name, stats, keep=keep, seed=seed)
                continue
            for domain in (*stats.domains, MIXED):
                yield (
                    (name, keep, domain),
                    moekit.plan(name, stats, keep=keep, domain=None if domain == MIXED else domain),
                )


def mean(values: Iterable[float]) -> float:
    """The geometric mean."""
    return float(np.exp(np.mean(np.log(list(values)))))


class Results:
    """Perplexities over the full model's.

    Args:
        full: the full model's perplexity by domain.
        scores: of every plan.
    """

    def __init__(self, full: Mapping[str, float], scores: Scores):
        self.full, self.scores = full, scores

    def ratio(self, method: str, keep: float, calibration: str, domain: str) -> float:
        """In one domain; the geometric mean of the seeds, where there are several."""
        rows = self.scores[method, keep, MIXED if method == "random" else calibration]
        return mean(row[domain] for row in rows) / self.full[domain]

    def inside(self, method: str, keep: float) -> list[float]:
        """In each domain, calibrated on that domain."""
        return [self.ratio(method, keep, x, x) for x in self.full]

    def outside(self, method: str, keep: float) -> list[float]:
        """In each domain, calibrated on one of the others: the mean over them."""
        return [mean(self.ratio(method, keep, y, x) for y in self.full if y != x) for x in self.full]

    def mixed(self, method: str, keep: float) -> list[float]:
        """In each domain, calibrated on all."""
        return [self.ratio(method, keep, MIXED, x) for x in self.full]

    def luck(self, keep: float) -> tuple[float, float]:
        """The best and the worst seed of random, by the mean over domains."""
        each = [mean(row[x] / self.full[x] for x in self.full) for row in self.scores["random", keep, MIXED]]
        return min(each), max(each)


def table(results: Results, kind: str, keep: float) -> list[str]:
    """One row a method, one column a domain, the mean last, the best method first."""
    rows = {name: getattr(results, kind)(name, keep) for name in SCORING}
    lines = [f"| keep {keep:.0%} | {' | '.join(results.full)} | mean |", f"|---|{'--:|' * (len(results.full) + 1)}"]
    for name, values in sorted(rows.items(), key=lambda row: mean(row[1])):
        lines.append(f"| [{name}](../methods/{name}.md) | {' | '.join(f'{x:.2f}' for x in [*values, mean(values)])} |")
    return lines


def page(results: Results, keeps: Iterable[float], what: str) -> str:
    """The page in docs/benchmarks/."""
    kinds = {
        "inside": ("In the domain", "Calibrated on a column's domain, scored on held-out text of the same."),
        "outside": ("Elsewhere", "Calibrated on one domain, scored on another: the column's, mean over all others."),
        "mixed": ("Mixed calibration", "Calibrated on all domains together, scored on the column's."),
    }
    lines = [
        "# Pruning methods on refmoe",
        "",
        "Perplexity over the full model's, by `python benchmarks/prune_methods.py`; 1.00 is no loss. " + what,
        "Means are geometric. Random does not look at the text: its rows are the same everywhere.",
        "",
        f"| | {' | '.join(results.full)} |",
        f"|---|{'--:|' * len(results.full)}",
        f"| perplexity of the full model | {' | '.join(f'{x:.2f}' for x in results.full.values())} |",
    ]
    for kind, (title, text) in kinds.items():
        lines += ["", f"## {title}", "", text]
        for keep in keeps:
            lines += ["", *table(results, kind, keep)]
    lines += ["", "## Luck", "", "The mean over domains of the best and the worst of random's seeds:", ""]
    for keep in keeps:
        low, high = results.luck(keep)
        lines.append(f"- keep {keep:.0%}: {low:.2f} to {high:.2f}")
    return "\n".join(lines) + "\n"


def slot(results: Results, method: str, keeps: Iterable[float]) -> str:
    """What a method's page says, beside the floor and the usual baseline."""
    lines = [
        "Perplexity over the full model's on refmoe, geometric mean over six domains"
        " ([all numbers](../benchmarks/prune_methods.md)):",
        "",
        "| keep | in the domain | elsewhere | mixed calibration |",
        "|---|--:|--:|--:|",
    ]
    for keep in keeps:
        cells = [mean(getattr(results, kind)(method, keep)) for kind in ("inside", "outside", "mixed")]
        lines.append(f"| {keep:.0%} | {' | '.join(f'{x:.2f}' for x in cells)} |")
    floors = [f"{mean(results.mixed('random', keep)):.2f} at {keep:.0%}" for keep in keeps]
    if method == "random":
        lines += [
            "",
            "Best to worst seed: " + ", ".join("{:.2f} to {:.2f}".format(*results.luck(x)) for x in keeps) + ".",
        ]
    else:
        lines += ["", f"Random: {', '.join(floors)}."]
    return "\n".join(lines)


def fill(file: Path, text: str) -> None:
    """Put a text between the marks of a method's page."""
    old = file.read_text(encoding="utf-8")
    new = re.sub(
        r"(<!-- measured:start -->\n).*?(<!-- measured:end -->)", lambda x: f"{x[1]}{text}\n{x[2]}", old, flags=re.S
    )
    file.write_text(new, encoding="utf-8")


def goals(results: Results) -> dict[str, tuple[float, float, str]]:
    """Ratios of means at half of the experts."""

    def over(kind: str, method: str, other: str) -> float:
        return mean(getattr(results, kind)(method, 0.5)) / mean(getattr(results, kind)(other, 0.5))

    scored = [x for x in SCORING if x != "random"]
    return {
        "easy_ep_over_frequency": (over("inside", "easy-ep", "frequency"), 1.0, "<="),
        "reap_over_frequency": (over("inside", "reap", "frequency"), 1.0, "<="),
        "worst_over_random_in_domain": (max(over("inside", x, "random") for x in scored), 1.0, "<="),
        "worst_over_random_mixed": (max(over("mixed", x, "random") for x in scored), 1.0, "<="),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two domains, half of the experts, few tokens; no pages")
    parser.add_argument(
        "--calibration", type=int, help="tokens of each domain to calibrate on (default 16384; quick: 4096)"
    )
    parser.add_argument("--tokens", type=int, help="held-out tokens of each domain (default 4096; quick: 1024)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    started = time.perf_counter()
    names = ("kjv", "python") if args.quick else tuple(refmoe.texts())
    keeps, seeds = ((0.5,), 2) if args.quick else (KEEPS, SEEDS)
    seen_tokens = args.calibration or (4096 if args.quick else 16_384)
    held_out = args.tokens or (1024 if args.quick else 4096)
    model = moekit.open("refmoe")
    seen = moekit.load_data(
        model, {x: refmoe.calibration()[x] for x in names}, tokens=seen_tokens, sequence_length=LENGTH
    )
    texts = moekit.load_data(model, {x: refmoe.texts()[x] for x in names}, tokens=held_out, sequence_length=LENGTH)
    stats = moekit.measure(model, seen, groups=("scores",), dtype=torch.float32)
    stock = model.load(torch.float32)
    view = MoEView(stock, model.layout)
    full = perplexities(stock, texts)
    scores: dict[tuple[str, float, str], list[dict[str, float]]] = {}
    for key, plan in plans(stats, keeps, seeds):
        with live(view, plan):
            scores.setdefault(key, []).append(perplexities(stock, texts))
        print(*key, {x: round(y / full[x], 3) for x, y in scores[key][-1].items()}, flush=True)
    results = Results(full, scores)
    print(
        "\n".join(
            line for keep in keeps for kind in ("inside", "outside", "mixed") for line in table(results, kind, keep)
        )
    )
    if not args.quick:
        what = (
            f"{seen_tokens:,} tokens of each domain to calibrate on, {held_out:,} held-out tokens of each to score, "
            f"random with {seeds} seeds, float32."
        )
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(results, keeps, what), encoding="utf-8")
        for name in SCORING:
            fill(DOCS / "methods" / f"{name}.md", slot(results, name, keeps))
    finish(
        "prune_methods",
        goals(results),
        quick=args.quick,
        seconds=round(time.perf_counter() - started, 1),
        full={x: round(y, 4) for x, y in full.items()},
        perplexities={
            f"{m} {k} {c}": [{d: round(y, 4) for d, y in x.items()} for x in rows] for (m, k, c), rows in scores.items()
        },
    )


if __name__ == "__main__":
    main()
