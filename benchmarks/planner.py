"""Is the planner right? Predicted errors against the truth, and its choice against the best single method, on refmoe.

    python benchmarks/planner.py            # about ten minutes on one core; writes docs/planner.md
    python benchmarks/planner.py --quick    # one text, two budgets, few tokens: under a minute

Truth is taken twice: the relative squared error of each MoE block's output when it is given the source's inputs (what
is predicted), and the KL divergence of the whole model from the source on held-out text (what is wanted). The choice is
made from calibration text and a held-out part of it, and judged by perplexity on other text, beside every method of the
registry alone at the largest number of experts that fits into as many bytes.

Goals: predicted errors and KL rank alike (Spearman), and the planner is never worse than the best single method by more
than 2%.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from _goals import finish
from prune_methods import fill
from scipy.stats import spearmanr

import moekit
from moekit import refmoe
from moekit.apply.made import editing
from moekit.data import Dataset
from moekit.evaluation import Evaluation, evaluate
from moekit.evaluation.compare import Subject
from moekit.families.model import Model
from moekit.planning import Candidate, Choice, candidates, groups, hold_out, plan_for_budget
from moekit.plans import Plan
from moekit.recipe import format_bytes
from moekit.stats import Stats
from moekit.view import MoEView

PAGE = Path(__file__).resolve().parents[1] / "docs" / "planner.md"
LENGTH = 256
SHARES = (0.75, 0.5, 0.35, 0.25)  # of the experts' bytes; all else of the model counts too
SHOWN = (0.9, 0.75, 0.5, 0.25)  # of a layer's experts, in the table of predictions


class Blocks:
    """What plans really do to the output of each MoE block of refmoe.

    Args:
        model: refmoe.
        data: text whose hidden states the blocks are given.
    """

    def __init__(self, model: Model, data: Dataset):
        self.model, self.loader = model, model.loader(torch.float32)
        self.stock = model.load(torch.float32)
        self.view = MoEView(self.stock, model.layout)
        self.blocks = [x.mlp for x in self.stock.model.layers]
        self.seen: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in self.blocks]
        handles = [
            block.register_forward_hook(lambda _module, args, out, i=i: self.seen[i].append((args[0], _first(out))))
            for i, block in enumerate(self.blocks)
        ]
        with torch.inference_mode():
            for batch in data.batches:
                self.stock(input_ids=batch.ids, use_cache=False)
        for handle in handles:
            handle.remove()

    def error(self, plan: Plan) -> float:
        """Mean over blocks of |changed - stock|^2 / |stock|^2; padding, of which there is little, counts too."""
        errors = []
        editing(self.loader, self.model.layout, plan)
        with torch.inference_mode(), self.view.ban(plan.dropped()):
            for i, block in enumerate(self.blocks):
                own = dict(block.named_parameters())
                prefix = f"model.layers.{i}.mlp."
                stock = {name: x.detach().clone() for name, x in own.items()}
                for key, x in self.loader.read(i).items():
                    if key.startswith(prefix):
                        own[key.removeprefix(prefix)].copy_(x)
                lost = sum(float((_first(block(x)) - y).square().sum()) for x, y in self.seen[i])
                errors.append(lost / sum(float(y.square().sum()) for _, y in self.seen[i]))
                for name, x in stock.items():
                    own[name].copy_(x)
        return float(np.mean(errors))


def _first(out: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return out if isinstance(out, torch.Tensor) else out[0]


def mean(scores: Evaluation, what: str) -> float:
    """Over domains: of "kl" the mean, of "ratio" (perplexity over the source's) the geometric mean."""
    values = [getattr(x, what).value for x in scores.domains.values()]
    return float(np.mean(values)) if what == "kl" else float(np.exp(np.mean(np.log(values))))


def sampled(found: Sequence[Candidate]) -> list[Candidate]:
    """Each way to quantise all experts, and each method at the shares in `SHOWN`; two of them quantised too."""
    wanted = {min({x.keep for x in found}, key=lambda n: abs(n - share * found[0].experts)) for share in SHOWN}
    out = [x for x in found if x.keep == x.experts and x.steps]
    out += [x for x in found if len(x.steps) == 1 and x.keep in wanted and x.keep < x.experts]
    return out + [x for x in found if [y.method for y in x.steps] == ["easy-ep", "rtn-int4"] and x.keep in wanted]


def singles(found: Sequence[Candidate], budget: int) -> list[Candidate]:
    """Of every method alone what fits best."""
    best: dict[str, Candidate] = {}
    for x in sorted(found, key=lambda x: -x.bytes):
        if len(x.steps) == 1 and x.bytes <= budget:
            best.setdefault(x.steps[0].method, x)
    return list(best.values())


def predictions(
    model: Model, stats: Stats, found: Sequence[Candidate], held: Dataset
) -> list[tuple[Candidate, float, float]]:
    """(candidate, true error of the blocks, KL) of some candidates."""
    blocks, rows = Blocks(model, held), []
    for x in sampled(found):
        kl = mean(evaluate(Subject(model, x.plan), held, against=model), "kl")
        rows.append((x, blocks.error(x.plan), kl))
        print(f"{x!s:<50}predicted {x.predicted:<10.3g}blocks {rows[-1][1]:<10.3g}KL {kl:.4f}", flush=True)
    return rows


def choices(
    model: Model, stats: Stats, held: Dataset, texts: Dataset, shares: Sequence[float]
) -> list[tuple[float, int, Choice, float, Candidate, float]]:
    """(share, budget, choice, its perplexity over the source's, best single method, its) for each share."""
    rows = []
    experts = model.layout.parts["experts"].bytes
    for share in shares:
        budget = int(model.checkpoint.bytes - (1 - share) * experts)
        choice = plan_for_budget(model, stats, held, budget)
        chosen = next(x.candidate for x in choice.frontier.points if x.chosen)
        ours = mean(evaluate(Subject(model, chosen.plan), texts, against=model), "ratio")
        alone = singles([x.candidate for x in choice.frontier.points], budget)
        theirs = {id(x): mean(evaluate(Subject(model, x.plan), texts, against=model), "ratio") for x in alone}
        best = min(alone, key=lambda x: theirs[id(x)])
        rows.append((share, budget, choice, ours, best, theirs[id(best)]))
        print(f"{share:.0%} {chosen} x {ours:.4f}; alone {best} x {theirs[id(best)]:.4f}", flush=True)
    return rows


def prediction_table(rows: Sequence[tuple[Candidate, float, float]]) -> list[str]:
    """A row a candidate, least KL first."""
    lines = ["| | predicted | blocks | KL |", "|---|--:|--:|--:|"]
    for x, true, kl in sorted(rows, key=lambda row: row[2]):
        lines.append(f"| {x} | {100 * x.predicted:.2g}% | {100 * true:.2g}% | {kl:.4f} |")
    return lines


def choice_table(name: str, rows: Sequence[tuple[float, int, Choice, float, Candidate, float]]) -> list[str]:
    """A row a budget."""
    lines = [
        f"| {name} | budget | planner | perplexity | best single method | perplexity |",
        "|--:|--:|---|--:|---|--:|",
    ]
    for share, budget, choice, ours, best, theirs in rows:
        chosen = next(x.candidate for x in choice.frontier.points if x.chosen)
        lines.append(f"| {share:.0%} | {format_bytes(budget)} | {chosen} | {ours:.3f} | {best} | {theirs:.3f} |")
    return lines


def page(
    predicted: Mapping[str, Sequence[tuple[Candidate, float, float]]],
    chosen: Mapping[str, Sequence[tuple[float, int, Choice, float, Candidate, float]]],
    what: str,
) -> str:
    """What docs/planner.md says between its marks."""
    lines = [f"By `python benchmarks/planner.py` on refmoe; {what}", "", "Spearman's rank correlation with KL:", ""]
    lines += ["| calibrated on | predicted | blocks | KL over predicted |", "|---|--:|--:|--:|"]
    for name, rows in predicted.items():
        ratios = np.array([kl / x.predicted for x, _, kl in rows])
        low, middle, high = np.quantile(ratios, (0, 0.5, 1))
        cells = [spearman([x.predicted for x, _, _ in rows], rows), spearman([y for _, y, _ in rows], rows)]
        lines.append(f"| {name} | {cells[0]:.3f} | {cells[1]:.3f} | {middle:.2g} ({low:.2g} to {high:.2g}) |")
    first = next(iter(predicted))
    lines += ["", f"Calibrated on {first}:", "", *prediction_table(predicted[first])]
    lines += ["", "The choice at shares of the experts' bytes; perplexity over the source's:"]
    for name, found in chosen.items():
        lines += ["", *choice_table(name, found)]
    return "\n".join(lines)


def spearman(values: Sequence[float], rows: Sequence[tuple[Candidate, float, float]]) -> float:
    """Rank correlation with the rows' KL."""
    return float(spearmanr(values, [kl for _, _, kl in rows]).statistic)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one text, two budgets, few tokens; no page")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    started = time.perf_counter()
    model = moekit.open("refmoe")
    cases = {"python": ("python",)} if args.quick else {"python": ("python",), "all texts": tuple(refmoe.texts())}
    shares = (0.5, 0.25) if args.quick else SHARES
    predicted, chosen = {}, {}
    seen_tokens, held_out = (4096, 1024) if args.quick else (16_384, 8192)
    for name, domains in cases.items():
        sizes = {"tokens": seen_tokens // len(domains), "sequence_length": LENGTH}
        seen = moekit.load_data(model, {x: refmoe.calibration()[x] for x in domains}, **sizes)
        sizes["tokens"] = held_out // len(domains)
        texts = moekit.load_data(model, {x: refmoe.texts()[x] for x in domains}, **sizes)
        data, held = hold_out(seen)
        stats = moekit.measure(model, data, groups=groups(model.layout))
        found, _ = candidates(model, stats, model.checkpoint.bytes // 2)
        predicted[name] = predictions(model, stats, found, held)
        chosen[name] = choices(model, stats, held, texts, shares)
    if not args.quick:
        what = (
            f"{seen_tokens:,} tokens to calibrate on, an eighth of them held out, {held_out:,} of other text to judge."
        )
        fill(PAGE, page(predicted, chosen, what))
    worst = max(ours / theirs for rows in chosen.values() for _, _, _, ours, _, theirs in rows)
    finish(
        "planner",
        {
            "least_rank_correlation_with_kl": (
                min(spearman([x.predicted for x, _, _ in rows], rows) for rows in predicted.values()),
                0.9,
                ">=",
            ),
            "worst_over_best_single_method": (worst, 1.02, "<="),
        },
        quick=args.quick,
        seconds=round(time.perf_counter() - started, 1),
    )


if __name__ == "__main__":
    main()
