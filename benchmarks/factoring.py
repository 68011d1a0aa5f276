"""What factored experts cost on refmoe, as they come and healed: perplexity by rank, bytes and steps of healing.

    python benchmarks/factoring.py            # about a quarter of an hour on one core; writes the page of mc-smoe
    python benchmarks/factoring.py --quick    # one rank, few tokens, six steps: under a minute

Calibrated on the packaged text of two domains together, scored on held-out text of the same, everything streamed. The
teacher of healing is refmoe itself, also where experts were merged by m-smoe before.

Goal: healing halves the loss of rank 8, in nats a token.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path

import torch
import transformers
from _goals import finish
from prune_methods import DOCS, LENGTH, fill, mean

import moekit
from moekit import refmoe
from moekit.families.model import Model
from moekit.fitting import Fit, decide

DOMAINS = ("kjv", "python")
RANKS = (8, 16, 32)
STEPS = 60


def expert_bytes(model: Model) -> int:
    """On disk."""
    return model.layout.parts["experts"].bytes


class Bench:
    """Models made of refmoe, written and scored.

    Args:
        folder: for what is written.
        seen_tokens: of each domain, to calibrate on.
        held_out: tokens of each domain, to score on.
    """

    def __init__(self, folder: Path, seen_tokens: int, held_out: int):
        self.folder, self.source = folder, moekit.open("refmoe")
        calibration, texts = ({x: y[x] for x in DOMAINS} for y in (refmoe.calibration(), refmoe.texts()))
        self.seen = moekit.load_data(self.source, calibration, tokens=seen_tokens, sequence_length=LENGTH)
        self.text = moekit.load_data(self.source, texts, tokens=held_out, sequence_length=LENGTH)
        self.full = self.perplexities(self.source)
        self.rows: dict[
            str, tuple[float, float]
        ] = {}  # name -> (share of the experts' bytes, perplexity over refmoe's)

    def perplexities(self, model: Model) -> dict[str, float]:
        """By domain."""
        found = moekit.evaluate(model, data=self.text, dtype=torch.float32).domains
        return {x: y.perplexity.value for x, y in found.items()}

    def ratio(self, model: Model) -> float:
        """Perplexity over the source's, geometric mean over domains."""
        found = self.perplexities(model)
        return mean(found[x] / self.full[x] for x in DOMAINS)

    def add(self, name: str, model: Model) -> None:
        """Score a model."""
        self.rows[name] = (expert_bytes(model) / expert_bytes(self.source), self.ratio(model))
        print(f"{name}: {self.rows[name][0]:.1%} of the bytes, perplexity x {self.rows[name][1]:.3f}", flush=True)

    def factored(self, model: Model, name: str, **options: object) -> Model:
        """`model` by mc-smoe, written."""
        fit = Fit(model, self.source, None, self.seen, self.folder / f"{name}.tensors", torch.float32)
        plan = decide("mc-smoe", fit, options=options)
        return moekit.open(moekit.bake(model, plan, self.folder / name, prove=False).path)

    def merged(self) -> Model:
        """refmoe with half of its experts merged into the others, written."""
        stats = moekit.measure(self.source, self.seen, groups=("scores", "routing"), dtype=torch.float32)
        plan = moekit.plan("m-smoe", stats, keep=0.5)
        return moekit.open(moekit.bake(self.source, plan, self.folder / "merged", prove=False).path)


def slot(rows: dict[str, tuple[float, float]], steps: int) -> str:
    """What the page of mc-smoe says."""
    return "\n".join(
        [
            f"refmoe, {' and '.join(DOMAINS)} together, healed for {steps} steps of 8 sequences of {LENGTH} tokens at"
            " most, by `python benchmarks/factoring.py`. Perplexity over refmoe's on held-out text, geometric mean:",
            "",
            "| | bytes of the experts | perplexity |",
            "|---|--:|--:|",
            *(f"| {name} | {share:.0%} | x {ratio:.2f} |" for name, (share, ratio) in rows.items()),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one rank, few tokens, six steps; no page")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    started = time.perf_counter()
    ranks, steps = ((8,), 6) if args.quick else (RANKS, STEPS)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), *((2048, 512) if args.quick else (16_384, 4096)))
        for rank in ranks:
            bench.add(f"rank {rank}", bench.factored(bench.source, f"free-{rank}", rank=rank))
        for rank in ranks[:1]:
            healed = bench.factored(bench.source, f"healed-{rank}", rank=rank, steps=steps)
            bench.add(f"rank {rank}, healed", healed)
        if not args.quick:
            merged = bench.merged()
            bench.add("16 of 32 experts by m-smoe", merged)
            bench.add("the same, rank 8", bench.factored(merged, "merged-8", rank=8))
            bench.add("the same, rank 8, healed", bench.factored(merged, "merged-healed-8", rank=8, steps=steps))
    print(slot(bench.rows, steps))
    if not args.quick:
        fill(DOCS / "methods" / "mc-smoe.md", slot(bench.rows, steps))
    left = math.log(bench.rows["rank 8, healed"][1]) / math.log(bench.rows["rank 8"][1])
    finish(
        "factoring",
        {"loss_left_after_healing": (left, 0.5, "<=")},
        quick=args.quick,
        seconds=round(time.perf_counter() - started, 1),
        rows={name: [round(x, 4) for x in row] for name, row in bench.rows.items()},
    )


if __name__ == "__main__":
    main()
