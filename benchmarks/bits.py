"""What bits for experts cost: rounding to nearest, GPTQ, and MC-MoE's bits by expert, at equal bytes.

    python benchmarks/bits.py            # about fifteen minutes on one core; writes its page in docs
    python benchmarks/bits.py --quick    # one domain, few tokens: under a minute
    python benchmarks/bits.py --domain python    # GPTQ and MC-MoE on one domain, more of it

refmoe, calibrated on all six domains; KL to the model itself in nats a token over held-out text of the six, perplexity
over that of the model by the geometric mean over domains, plans applied live, float32. Bytes are those of the routed
experts with their scales, over those before. "drawn" gives half of each layer's experts 2 bits and half 3, by lot: what
2.5 bits are worth when nobody looks which expert gets them.

Goals: at 2.5 bits on average MC-MoE loses at most 0.8 times the KL of drawn bits, rounded by the same means, and is
better than a straight line (in the logarithm of KL) between uniform 2 and uniform 3 bits; its exponents are nowhere
worse than the published ones.
"""

from __future__ import annotations

import argparse
import itertools
import math
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from _goals import finish
from prune_methods import DOCS, LENGTH, fill

import moekit
from moekit import refmoe
from moekit.data import Dataset
from moekit.evaluation.compare import Subject, logits_of
from moekit.fitting import Fit, decide
from moekit.fitting.quantize import round_by_gptq
from moekit.plans import Plan, Quantize

BITS = (2.0, 2.5, 3.0)
OWN = {"format": "moekit"}
PUBLISHED = {"alpha": 1.0, "beta": 1.5}


@dataclass
class Row:
    """One way and what it costs."""

    label: str
    share: float
    kl: float
    ratio: float


class Bench:
    """refmoe, its text, and its own log-probabilities on held-out text."""

    def __init__(self, domains: tuple[str, ...], seen: int, held_out: int, folder: Path):
        self.model, self.folder, self.numbers = moekit.open("refmoe"), folder, itertools.count()
        texts, calibration = refmoe.texts(), refmoe.calibration()
        self.seen = moekit.load_data(
            self.model, {x: calibration[x] for x in domains}, tokens=seen, sequence_length=LENGTH
        )
        self.held: Dataset = moekit.load_data(
            self.model, {x: texts[x] for x in domains}, tokens=held_out, sequence_length=LENGTH
        )
        every = logits_of(Subject(self.model), self.held.batches, torch.float32)
        self.own = [x.log_softmax(-1) for x in every]

    def fit(self) -> Fit:
        return Fit(self.model, self.model, None, self.seen, self.folder / str(next(self.numbers)), torch.float32)

    def row(self, label: str, plan: Plan) -> Row:
        kl, lost, tokens = (np.zeros(len(self.held.domains)) for _ in range(3))
        every = logits_of(Subject(self.model, plan), self.held.batches, torch.float32)
        for batch, p, x in zip(self.held.batches, self.own, every, strict=True):
            q, real = x.log_softmax(-1), batch.following >= 0
            target = batch.following[real][:, None]
            kl[batch.domain] += float((p[real].exp() * (p[real] - q[real])).sum())
            lost[batch.domain] += float((p[real].gather(1, target) - q[real].gather(1, target)).sum())
            tokens[batch.domain] += int(real.sum())
        before = self.model.layout.parts["experts"].bytes
        row = Row(
            label,
            1 - plan.saved_bytes(self.model.layout) / before,
            kl.sum() / tokens.sum(),
            math.exp((lost / tokens).mean()),
        )
        print(f"{label:<46}{row.share:8.1%}{row.kl:9.4f}{row.ratio:9.4f}", flush=True)
        return row

    def decided(self, label: str, method: str, **options: Any) -> Row:
        return self.row(label, decide(method, self.fit(), options=options))

    def drawn(self, seed: int, gptq: bool) -> Row:
        random, layout = np.random.default_rng(seed), self.model.layout
        ops = [
            Quantize(
                layer=x.index,
                bits=tuple(random.permutation([2, 3] * (x.num_experts // 2)).tolist()),
                group_size=64,
                scheme="fitted",
                format="moekit",
            )
            for x in layout.routed
        ]
        plan = Plan(layout_hash=layout.hash, ops=ops)
        if gptq:
            round_by_gptq(self.fit(), self.seen.batches, plan)
        return self.row(f"2.5 bits drawn, {'gptq' if gptq else 'nearest'}, seed {seed}", plan)


def compared(bench: Bench, quick: bool) -> dict[str, Row]:
    """All rows, by a short name."""
    out = {}
    for bits in (2, 3) if quick else (2, 3, 4):
        out[f"rtn {bits}"] = bench.decided(f"rtn-int{bits}", f"rtn-int{bits}")
        out[f"near {bits}"] = bench.decided(f"rtn-int{bits} fitted, moekit", f"rtn-int{bits}", fitted=True, **OWN)
        if not quick:
            out[f"stock {bits}"] = bench.decided(f"rtn-int{bits} fitted", f"rtn-int{bits}", fitted=True)
            out[f"gptq stock {bits}"] = bench.decided(f"gptq-int{bits}", f"gptq-int{bits}")
            out[f"gptq {bits}"] = bench.decided(f"gptq-int{bits}, moekit", f"gptq-int{bits}", **OWN)
    if not quick:
        small = {"fitted": True, "group_size": 16, **OWN}
        out["small groups"] = bench.decided("rtn-int2 fitted, moekit, groups of 16", "rtn-int2", **small)
    for seed in range(1 if quick else 3):
        for gptq in (False,) if quick else (False, True):
            out[f"drawn {'gptq' if gptq else 'near'} {seed}"] = bench.drawn(seed, gptq)
    return out | by_cost(bench, ("nearest",) if quick else ("nearest", "gptq"), (2.5,) if quick else BITS, not quick)


def by_cost(bench: Bench, roundings: Sequence[str], wanted: Sequence[float], whole: bool) -> dict[str, Row]:
    """MC-MoE with its own and the published exponents."""
    out = {}
    for rounding, bits in itertools.product(roundings, wanted):
        given = {"bits": bits, "widths": "1,2,3,4" if bits == 3 else "1,2,3", "rounding": rounding}
        short, said = f"{rounding.replace('nearest', 'near')} {bits}", f"mc-moe {bits}, {rounding}"
        out[f"mc published {short}"] = bench.decided(said + ", published exponents", "mc-moe", **given, **PUBLISHED)
        out[f"mc {short}"] = bench.decided(said, "mc-moe", **given)
        if whole:
            out[f"mc whole {short}"] = bench.decided(said + ", whole model", "mc-moe", **given, scope="model")
    return out


def on_one(domain: str, folder: Path) -> dict[str, Row]:
    """GPTQ in 2 and 3 bits and MC-MoE, calibrated and scored on one domain."""
    bench = Bench((domain,), 8192, 8192, folder)
    uniform = {f"gptq {bits}": bench.decided(f"gptq-int{bits}, moekit", f"gptq-int{bits}", **OWN) for bits in (2, 3)}
    return uniform | by_cost(bench, ("gptq",), BITS, False)


def over_published(rows: dict[str, Row], rounding: str) -> float:
    """KL over that with the published exponents, the largest of all budgets."""
    ours = [x for x in rows if x.startswith(f"mc {rounding} ")]
    return max(rows[x].kl / rows[x.replace("mc ", "mc published ")].kl for x in ours)


def page(rows: dict[str, Row], tokens: int, held: int) -> str:
    """The page in docs."""
    return f"""# Bits of experts

Written by `python benchmarks/bits.py`: refmoe, {tokens:,} tokens of each of six domains to calibrate on, {held:,}
held-out tokens of each to score, plans applied live, float32. Bytes are those of the routed experts with their scales
(groups of 64), over those before; KL is to the model itself, nats a token; perplexity is over the model's own, by the
geometric mean over domains. "moekit" is the [own packed form](../packed-format.md), the rest is as stock transformers
reads it; "published exponents" is `alpha=1 beta=1.5`, "whole model" `scope=model`; "drawn" gives half of each layer's
experts 2 bits and half 3, by lot.

{table(rows.values())}
"""


def table(rows: Iterable[Row]) -> str:
    """Rows as Markdown."""
    body = "\n".join(f"| {x.label} | {x.share:.1%} | {x.kl:.4f} | {x.ratio:.4f} |" for x in rows)
    return f"| way | bytes | KL | perplexity |\n|---|--:|--:|--:|\n{body}"


def fill_pages(rows: dict[str, Row], tokens: int) -> None:
    """The methods' own pages: their rows, and what they are to be compared with."""
    pages = {f"rtn-int{bits}": [f"rtn {bits}", f"stock {bits}", f"near {bits}"] for bits in (2, 3)}
    pages |= {
        f"gptq-int{bits}": [f"stock {bits}", f"gptq stock {bits}", f"near {bits}", f"gptq {bits}"] for bits in (2, 3, 4)
    }
    pages["mc-moe"] = [
        x for x in rows if x.startswith(("mc ", "drawn gptq")) or x in ("gptq 2", "gptq 3", "rtn 2", "rtn 3")
    ]
    said = (
        f"refmoe, {tokens:,} tokens of each of six domains, by `python benchmarks/bits.py`: bytes of the experts over\n"
        "those before, KL in nats a token and perplexity over the model's own; [all ways](../benchmarks/bits.md)."
    )
    for name, wanted in pages.items():
        fill(DOCS / "methods" / f"{name}.md", f"{said}\n\n{table(rows[x] for x in wanted)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one domain, few tokens; no page")
    parser.add_argument("--domain", help="calibrate and score on this domain alone")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    started = time.perf_counter()
    seen, held = (2048, 1024) if args.quick else (2048, 2048)
    with tempfile.TemporaryDirectory() as folder:
        if args.domain:
            rows = on_one(args.domain, Path(folder))
        else:
            domains = ("python",) if args.quick else tuple(refmoe.texts())
            rows = compared(Bench(domains, seen, held, Path(folder)), args.quick)
    if not args.quick and not args.domain:
        (DOCS / "benchmarks" / "bits.md").write_text(page(rows, seen, held), encoding="utf-8")
        fill_pages(rows, held)
    elif args.domain:
        print(table(rows.values()))
    goals = {}
    for short in ("near",) if args.quick else ("gptq",) if args.domain else ("near", "gptq"):
        if not args.domain:
            drawn = np.mean([x.kl for name, x in rows.items() if name.startswith(f"drawn {short}")])
            goals[f"mc over drawn, {short}"] = (rows[f"mc {short} 2.5"].kl / drawn, 0.8, "<=")
        line = math.sqrt(rows[f"{short} 2"].kl * rows[f"{short} 3"].kl)
        goals[f"mc over uniform 2 to 3, {short}"] = (rows[f"mc {short} 2.5"].kl / line, 1.0, "<=")
        goals[f"mc over published exponents, {short}"] = (over_published(rows, short), 1.0, "<=")
    finish("bits", goals, quick=args.quick, seconds=round(time.perf_counter() - started, 1))


if __name__ == "__main__":
    main()
