"""What healing wins back on refmoe, by method: after merging, after pruning, and on experts of low rank.

    python benchmarks/healing.py            # a quarter of an hour on one core
    python benchmarks/healing.py --write    # and write the page in docs/
    python benchmarks/healing.py --quick    # one way to make it smaller, few tokens and steps: under a minute

Two domains together: calibrated and healed on their packaged calibration text, scored on held-out text of the same, all
streamed, float32. Half of the experts by m-smoe, half by frequency, and all experts at rank 16 (mc-smoe, multiplied
out, since what is healed has full rank again). Perplexity over refmoe's, geometric mean over domains, and the share of
the loss (in nats) that each way to heal wins back.

Goals: the best way to heal wins back a quarter of the loss, of each; and none makes a model worse.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from _goals import finish
from factoring import DOMAINS, Bench
from prune_methods import DOCS, LENGTH

import moekit
from moekit.families.model import Model
from moekit.fitting import Fit, decide

SMALLER: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # label -> (method, settings, options)
    "m-smoe, half of the experts": ("m-smoe", {"keep": 0.5}, {}),
    "frequency, half of the experts": ("frequency", {"keep": 0.5}, {}),
    "mc-smoe, rank 16": ("mc-smoe", {}, {"rank": 16, "format": "dense"}),
}
HEALERS: dict[str, dict[str, Any]] = {
    "router-lstsq": {},
    "router-distill": {"steps": 60},
    "reconstruct": {},
    "distill": {"steps": 60},
}
FEW = {"router-lstsq": {}, "router-distill": {"steps": 3}, "reconstruct": {"steps": 6}, "distill": {"steps": 3}}


def ratios(
    bench: Bench, given: tuple[str, dict[str, Any], dict[str, Any]], steps: Mapping[str, Any]
) -> dict[str, float]:
    """Perplexity over refmoe's of a model made smaller ("before") and of it healed, by method."""
    method, settings, options = given
    name = method
    stats = None
    if method != "mc-smoe":
        stats = moekit.measure(bench.source, bench.seen, groups=("scores", "routing"), dtype=torch.float32)
    fit = Fit(bench.source, bench.source, stats, bench.seen, bench.folder / f"{name}.tensors", torch.float32)
    plan = decide(method, fit, options=options, **settings)
    model = written(bench, bench.source, plan, name)
    found = {"before": bench.ratio(model)}
    for healer, how in steps.items():
        if healer == "router-lstsq" and method == "mc-smoe":
            continue  # no expert is gone: its rows are right but for what layers before them changed
        started = time.process_time()
        fit = Fit(model, bench.source, None, bench.seen, bench.folder / f"{name}-{healer}.tensors", torch.float32)
        healed = decide(healer, fit, options=how)
        seconds = time.process_time() - started
        found[healer] = (
            bench.ratio(written(bench, model, healed, f"{name}-{healer}")) if healed.ops else found["before"]
        )
        print(f"{method}: x {found['before']:.3f}, {healer} x {found[healer]:.3f} ({seconds:.0f} s)", flush=True)
    return found


def written(bench: Bench, model: Model, plan: Any, name: str) -> Model:
    """What a plan makes of a model."""
    return moekit.open(moekit.bake(model, plan, bench.folder / name, prove=False).path)


def won_back(found: Mapping[str, float]) -> dict[str, float]:
    """Share of the loss in nats that each way to heal wins back."""
    loss = math.log(found["before"])
    return {name: 1 - math.log(x) / loss for name, x in found.items() if name != "before"}


def page(rows: Mapping[str, Mapping[str, float]], seen: int, held: int) -> str:
    """The page in docs."""
    lines = []
    for label, found in rows.items():
        cells = [f"x {found[name]:.3f} ({won_back(found)[name]:.0%})" if name in found else "" for name in HEALERS]
        lines.append(f"| {label} | x {found['before']:.3f} | {' | '.join(cells)} |")
    body = "\n".join(lines)
    return f"""# What healing wins back

Written by `python benchmarks/healing.py --write`: refmoe, {" and ".join(DOMAINS)} together, {seen:,} tokens of each to
calibrate and to heal on, {held:,} held-out tokens of each to score, sequences of {LENGTH}, float32. Perplexity over
refmoe's, geometric mean over the two; in brackets the share of the loss in nats that is won back. router-distill and
distill take 60 steps, reconstruct its default of 100 for each layer.

| | smaller | {" | ".join(f"[{x}](../methods/{x}.md)" for x in HEALERS)} |
|---|{"--:|" * (1 + len(HEALERS))}
{body}

The experts of rank 16 are multiplied out (`format: dense`), so that gradients can tune them: what is healed has full
rank again, and is as large as before. To keep them small, [mc-smoe](../methods/mc-smoe.md) heals the factors itself.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="m-smoe alone, few tokens and steps; no page")
    parser.add_argument("--write", action="store_true", help="write the page in docs/")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    started = time.perf_counter()
    seen, held = (1024, 512) if args.quick else (8192, 4096)
    wanted = dict(list(SMALLER.items())[: 1 if args.quick else None])
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), seen, held)
        rows = {label: ratios(bench, given, FEW if args.quick else HEALERS) for label, given in wanted.items()}
    if args.write and not args.quick:
        (DOCS / "benchmarks" / "healing.md").write_text(page(rows, seen, held), encoding="utf-8")
    shares = {label: won_back(found) for label, found in rows.items()}
    finish(
        "healing",
        {f"won back, {label}": (max(x.values()), 0.25, ">=") for label, x in shares.items()}
        | {f"worst, {label}": (min(x.values()), 0.0, ">=") for label, x in shares.items()},
        quick=args.quick,
        seconds=round(time.perf_counter() - started, 1),
        rows={label: {name: round(x, 4) for name, x in found.items()} for label, found in rows.items()},
    )


if __name__ == "__main__":
    main()
