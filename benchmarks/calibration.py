"""When does calibration text speak for other text, and when has it too little to say? On refmoe, for docs/benchmarks.

    python benchmarks/calibration.py            # four minutes; writes the page in docs/
    python benchmarks/calibration.py --quick    # fewer tokens, half of the domains: under a minute

Usage of experts on each domain's calibration text is compared to that on each domain's held-out text (Jensen-Shannon
divergence, and the noise that samples of one text would give), and that to what it costs on the held-out text to drop
half of the experts as the calibration text says. Then scores per token of experts on short samples are compared to
those of the whole calibration text, by how many tokens of the sample chose the expert. From these numbers come
`DRIFT_BITS` of moekit.evaluation.coverage and `COLD_TOKENS` of moekit.methods.cold.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import transformers
from _goals import finish
from scipy.stats import spearmanr

import moekit
from moekit import refmoe
from moekit.evaluation import Subject, evaluate
from moekit.evaluation.coverage import DRIFT_BITS, Drift, coverage
from moekit.families.model import Model
from moekit.measurement import measure
from moekit.methods.cold import COLD_TOKENS
from moekit.stats import Stats

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "calibration.md"
LENGTH, KEEP, METHOD = 256, 0.5, "easy-ep"
SCORES = {"gated_norm": "REAP", "easy_ep": "EASY-EP"}
BINS = (1, 5, 10, 20, 50, 100, 200, 400, 10**9)

Cells = dict[tuple[str, str], tuple[Drift, float]]  # by calibration and held-out domain: drift, ratio of perplexities


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer tokens, three domains, one sample")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    started = time.perf_counter()
    model = moekit.open("refmoe")
    names = ["js", "json", "python"] if args.quick else sorted(refmoe.texts())
    tokens = 4_096 if args.quick else 16_384
    measured = _measured(model, refmoe.calibration(), names, tokens)
    cells = _cells(model, measured, names, tokens, 1_024 if args.quick else 4_096)
    errors = _errors(model, measured, names, (512,) if args.quick else (256, 512, 1_024, 2_048, 4_096))
    lines = [*_words(cells, tokens), "", *_matrix(cells, names), "", *_cold(errors)]
    print("\n".join(lines))
    if not args.quick:
        PAGE.write_text(_page(lines))
    own, others = _own(cells), _others(cells)
    finish(
        "calibration",
        {
            "false_alarms": (sum(x.drifted for x, _ in own), 0, "<="),
            "not_told": (sum(not x.drifted for x, _ in others), 0, "<="),
            "rank_correlation_with_loss": (_correlation(cells), 0.7, ">="),
        },
        quick=args.quick,
        own_most_bits=max(x.mean for x, _ in own),
        other_least_bits=min(x.mean for x, _ in others),
        seconds=round(time.perf_counter() - started),
    )


def _measured(model: Model, texts: Mapping[str, Path], names: Sequence[str], tokens: int, seed: int = 0) -> Stats:
    data = moekit.load_data(model, {x: texts[x] for x in names}, tokens=tokens, sequence_length=LENGTH, seed=seed)
    return measure(model, data, groups=("scores",))


def _cells(model: Model, measured: Stats, names: Sequence[str], tokens: int, evaluated: int) -> Cells:
    held_out = _measured(model, refmoe.texts(), names, tokens)
    data = moekit.load_data(model, {x: refmoe.texts()[x] for x in names}, tokens=evaluated, sequence_length=LENGTH)
    cells: Cells = {}
    for name in names:
        plan = moekit.plan(METHOD, measured, keep=KEEP, domain=name)
        scores = evaluate(Subject(model, plan), data, against=model).domains
        found = coverage(measured, model.layout, plan.dropped(), [name], held_out)
        cells |= {(name, x.domain): (x, scores[x.domain].ratio.value) for x in found.drifts}
    return cells


def _errors(
    model: Model, measured: Stats, names: Sequence[str], sizes: Sequence[int]
) -> dict[str, list[tuple[int, float]]]:
    """By score: (tokens of a sample that chose the expert, |ln| of its score per token over that of the whole text)."""
    found: dict[str, list[tuple[int, float]]] = {name: [] for name in SCORES}
    for tokens in sizes:
        for seed in range(1 if len(sizes) == 1 else 3):
            sample = _measured(model, refmoe.calibration(), names, tokens, seed)
            for index in measured.layers:
                for domain in names:
                    few, many = (x.get("count", index, domain) for x in (sample, measured))
                    usable = (few > 0) & (many > 5 * COLD_TOKENS)
                    for name, rows in found.items():
                        a, b = (
                            (x.get(name, index, domain) / np.maximum(n, 1))[usable]
                            for x, n in ((sample, few), (measured, many))
                        )
                        rows += zip(few[usable].astype(int).tolist(), np.abs(np.log(a / b)).tolist(), strict=True)
    return found


def _own(cells: Cells) -> list[tuple[Drift, float]]:
    return [x for (name, other), x in cells.items() if name == other]


def _others(cells: Cells) -> list[tuple[Drift, float]]:
    return [x for (name, other), x in cells.items() if name != other]


def _correlation(cells: Cells) -> float:
    return float(spearmanr([x.mean for x, _ in cells.values()], [ratio for _, ratio in cells.values()]).statistic)


def _words(cells: Cells, tokens: int) -> list[str]:
    own, others = _own(cells), sorted(_others(cells), key=lambda x: x[0].mean)
    near = [x for x in others if x[0].mean < 0.1]
    noise = [x.mean - x.excess for x, _ in own]
    return [
        f"Usage on {tokens:,} tokens of each text. Held-out text of the same domain: "
        f"{min(x.mean for x, _ in own):.4f} to {max(x.mean for x, _ in own):.4f} bits (noise {min(noise):.4f} to "
        f"{max(noise):.4f}). Text of another domain: {others[0][0].mean:.3f} to {others[-1][0].mean:.3f} bits.",
        f"Perplexity of what half of the experts leave: x {_mean(own):.2f} in the same domain (geometric mean), "
        f"x {_mean(near):.2f} below 0.1 bits in another, x {_mean([x for x in others if x not in near]):.2f} above. "
        f"Divergence and loss agree in rank by {_correlation(cells):.2f}.",
        f"moekit warns above {DRIFT_BITS} bits beyond the noise.",
    ]


def _mean(cells: Sequence[tuple[Drift, float]]) -> float:
    return float(np.exp(np.mean(np.log([ratio for _, ratio in cells]))))


def _matrix(cells: Cells, names: Sequence[str]) -> list[str]:
    lines = ["## Divergence in bits, and perplexity ratio", ""]
    lines += [f"| calibrated on | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for name in names:
        row = [f"{drift.mean:.4f}, x {ratio:.2f}" for drift, ratio in (cells[name, other] for other in names)]
        lines.append(f"| {name} | {' | '.join(row)} |")
    return lines


def _cold(errors: Mapping[str, Sequence[tuple[int, float]]]) -> list[str]:
    lines = ["## How far scores of an expert are off, by tokens that chose it", ""]
    lines += [
        f"| tokens | {' | '.join(f'{x} median | {x} one in ten' for x in SCORES.values())} |",
        "|---|---|---|---|---|",
    ]
    for low, high in pairwise(BINS):
        cells = []
        for rows in errors.values():
            off = [error for count, error in rows if low <= count < high]
            cells += [f"{np.expm1(np.quantile(off, q)):.0%}" if len(off) >= 20 else "" for q in (0.5, 0.9)]
        lines.append(f"| {f'{low} to {high - 1}' if high < 10**9 else f'{low} and more'} | {' | '.join(cells)} |")
    return lines


def _page(lines: Sequence[str]) -> str:
    return "\n".join(
        [
            "# When calibration text speaks for other text",
            "",
            "Written by `python benchmarks/calibration.py`: refmoe, six domains; rows are calibrated on one domain's",
            "calibration text and read on the held-out texts, other documents throughout. What the numbers are:",
            "[compress](../verbs/compress.md#does-the-calibration-text-speak-for-yours).",
            f"Ratios are of perplexities, with {KEEP:.0%} of the experts kept by {METHOD}.",
            "",
            *lines,
            "",
            f"moekit calls an expert cold that fewer than {COLD_TOKENS} tokens chose. Samples of 256 to 4,096 tokens",
            "against the whole of 16,384, which holds them; experts that more than 500 tokens of the whole chose.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
