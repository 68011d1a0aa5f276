"""Half of the experts for one domain, pruned and then healed: how near that comes to the full model.

    python benchmarks/healed_half.py            # the six domains of refmoe, an hour of CPU time
    python benchmarks/healed_half.py --write    # and write the page in docs/
    python benchmarks/healed_half.py --quick    # kjv alone, few tokens and steps: under a minute

For each domain: easy-ep chooses 16 of 32 experts on the domain's calibration text, reconstruct trains what is left on
the same text, layer by layer, to give the full model's hidden states, distill then trains experts and routers of all
layers together to give the full model's next-token distribution. Perplexity on held-out text of the domain over the
full model's. Goal: within 3% (geometric mean over domains). What is found is kept, domain by domain, so that an
interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import shlex
import tempfile
import time
from pathlib import Path

import torch
import transformers
from _goals import finish
from _smollm2 import CACHE
from prune_methods import mean, perplexities

import moekit
from moekit import refmoe
from moekit.families.model import Model
from moekit.fitting import Fit, decide
from moekit.plans import Plan

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "healed_half.md"
KEPT = CACHE.with_name("healed_half.json")
LENGTH = 256
STEPS: dict[str, dict[str, int | float | bool]] = {
    "reconstruct": {"steps": 300, "routers": True, "sequences": 4},
    "distill": {"steps": 200},
}


def healed(domain: str, tokens: int, held_out: int, few: int | None, folder: Path) -> dict[str, float]:
    """Perplexity over the full model's, after each step; `few`: steps of Adam instead of what is usual."""
    source = moekit.open("refmoe")
    seen = moekit.load_data(source, {domain: refmoe.calibration()[domain]}, tokens=tokens, sequence_length=LENGTH)
    text = moekit.load_data(source, {domain: refmoe.texts()[domain]}, tokens=held_out, sequence_length=LENGTH)
    full = perplexities(source.load(torch.float32), text)[domain]
    out: dict[str, float] = {}

    def made(model: Model, plan: Plan, name: str) -> Model:
        path = moekit.bake(model, plan, folder / name).path
        assert path is not None
        found = moekit.open(path)
        out[name] = perplexities(found.load(torch.float32), text)[domain] / full
        print(f"{domain}, {sum(x.tokens for x in seen.batches):,} tokens: {name} x {out[name]:.3f}", flush=True)
        return found

    stats = moekit.measure(source, seen, dtype=torch.float32)
    model = made(source, moekit.plan("easy-ep", stats, keep=0.5), "easy-ep")
    for name, options in STEPS.items():
        fit = Fit(model, source, None, seen, folder / f"{name}.tensors", torch.float32)
        model = made(model, decide(name, fit, options=options | ({"steps": few} if few else {})), name)
    return out


def page(found: dict[str, dict[str, float]], tokens: int, held_out: int) -> str:
    """The page in docs/benchmarks/."""
    rows = {name: [x[name] for x in found.values()] for name in ("easy-ep", *STEPS)}
    told = {
        name: "--step " + shlex.quote(" ".join([name, *(f"{x}={str(y).lower()}" for x, y in options.items())]))
        for name, options in STEPS.items()
    }
    return "\n".join(
        [
            "# Half of the experts, in the domain, healed",
            "",
            "Written by `python benchmarks/healed_half.py --write`. For each domain of refmoe, 16 of 32 experts",
            f"are kept by [easy-ep](../methods/easy-ep.md) on up to {tokens:,} tokens of the domain;",
            "[reconstruct](../methods/reconstruct.md) trains them on the same text layer by layer, and then",
            "[distill](../methods/distill.md) trains all layers together. Perplexity of "
            f"{held_out:,} held-out tokens of the domain",
            "over the full model's, float32. Experts are trained in float32 and written in bfloat16.",
            "",
            f"| after | {' | '.join(found)} | mean |",
            f"|---|{'--:|' * (len(found) + 1)}",
            *(f"| {name} | {' | '.join(f'{x:.3f}' for x in [*row, mean(row)])} |" for name, row in rows.items()),
            "",
            "The same for one domain, from the command line:",
            "",
            "    moekit compress refmoe --data python=src/moekit/refmoe/calibration/python.txt \\",
            "        --eval python=src/moekit/refmoe/texts/python.txt --tokens 45000 --sequence-length 256 \\",
            '        --dtype float32 --step "easy-ep keep=0.5" \\',
            *(f"        {told[name]} \\" for name in STEPS),
            "        --out out",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one domain, few tokens and steps; no page")
    parser.add_argument("--write", action="store_true", help="write the page in docs/")
    parser.add_argument("--keep", type=Path, default=KEPT, help="file in which results stay; not with --quick")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    started = time.perf_counter()
    tokens, held_out, few = (4096, 2048, 10) if args.quick else (45_000, 8192, None)
    what = repr([tokens, held_out, STEPS])
    kept = json.loads(args.keep.read_text()) if args.keep.is_file() and not args.quick else {}
    found = kept.get(what, {})
    for domain in ("kjv",) if args.quick else refmoe.texts():
        if domain in found:
            continue
        with tempfile.TemporaryDirectory(prefix="moekit-healed-") as folder:
            found[domain] = healed(domain, tokens, held_out, few, Path(folder))
        if not args.quick:
            args.keep.parent.mkdir(parents=True, exist_ok=True)
            args.keep.write_text(json.dumps(kept | {what: found}))
    if args.write and not args.quick:
        PAGE.write_text(page(found, tokens, held_out), encoding="utf-8")
    finish(
        "healed_half",
        {"healed_in_domain": (mean([list(x.values())[-1] for x in found.values()]), 1.03, "<=")},
        quick=args.quick,
        seconds=round(time.perf_counter() - started, 1),
        ratios={name: {x: round(y, 4) for x, y in row.items()} for name, row in found.items()},
    )


if __name__ == "__main__":
    main()
