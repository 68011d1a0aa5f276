"""Half of the experts for one domain, pruned and then healed: how near that comes to the full model.

    python benchmarks/healed_half.py            # the six domains of refmoe, about half an hour of CPU time
    python benchmarks/healed_half.py --write    # and write the page in docs/
    python benchmarks/healed_half.py --quick    # kjv alone, few tokens and steps: under a minute

For each domain: easy-ep chooses 16 of 32 experts on the domain's calibration text, reconstruct trains what is left on
the same text, layer by layer, to give the full model's hidden states. Perplexity on held-out text of the domain over
the full model's. Goal: within 3% (geometric mean over domains).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
import transformers
from _goals import finish
from prune_methods import mean, perplexities

import moekit
from moekit import refmoe
from moekit.families.model import Model
from moekit.fitting import Fit, decide
from moekit.plans import Plan

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "healed_half.md"
LENGTH = 256
OPTIONS = {"routers": True, "steps": 300, "sequences": 4}


def healed(domain: str, tokens: int, held_out: int, steps: int, folder: Path) -> dict[str, float]:
    """Perplexity over the full model's: of the pruned model, and of the healed one."""
    model = moekit.open("refmoe")
    seen = moekit.load_data(model, {domain: refmoe.calibration()[domain]}, tokens=tokens, sequence_length=LENGTH)
    text = moekit.load_data(model, {domain: refmoe.texts()[domain]}, tokens=held_out, sequence_length=LENGTH)
    full = perplexities(model.load(torch.float32), text)[domain]

    def baked(source: Model, plan: Plan, name: str) -> Model:
        path = moekit.bake(source, plan, folder / name).path
        assert path is not None
        return moekit.open(path)

    def ratio(found: Model) -> float:
        return perplexities(found.load(torch.float32), text)[domain] / full

    stats = moekit.measure(model, seen, dtype=torch.float32)
    pruned = baked(model, moekit.plan("easy-ep", stats, keep=0.5), "pruned")
    fit = Fit(pruned, model, None, seen, folder / "fit", torch.float32)
    plan = decide("reconstruct", fit, options=OPTIONS | {"steps": steps})
    out = {"pruned": ratio(pruned), "healed": ratio(baked(pruned, plan, "healed"))}
    count = sum(x.tokens for x in seen.batches)
    print(f"{domain}, {count:,} tokens: pruned x {out['pruned']:.3f}, healed x {out['healed']:.3f}", flush=True)
    return out


def page(found: dict[str, dict[str, float]], tokens: int, held_out: int) -> str:
    """The page in docs/benchmarks/."""
    rows = {
        name: [*(x[name] for x in found.values()), mean([x[name] for x in found.values()])]
        for name in ("pruned", "healed")
    }
    options = ", ".join(f"`{name}: {str(value).lower()}`" for name, value in OPTIONS.items())
    return "\n".join(
        [
            "# Half of the experts, in the domain, healed",
            "",
            "Written by `python benchmarks/healed_half.py --write`. For each domain of refmoe, 16 of 32 experts",
            f"are kept by [easy-ep](../methods/easy-ep.md) on up to {tokens:,} tokens of the domain; "
            f"[reconstruct](../methods/reconstruct.md) ({options}) then",
            f"trains them on the same text. Perplexity of {held_out:,} held-out tokens of the domain over the full",
            "model's, float32. Experts are trained in float32 and written in bfloat16.",
            "",
            f"| | {' | '.join(found)} | mean |",
            f"|---|{'--:|' * (len(found) + 1)}",
            *(f"| {name} | {' | '.join(f'{x:.3f}' for x in row)} |" for name, row in rows.items()),
            "",
            "The same for one domain, from the command line:",
            "",
            "    moekit compress refmoe --data python=src/moekit/refmoe/calibration/python.txt \\",
            "        --eval python=src/moekit/refmoe/texts/python.txt --tokens 45000 --sequence-length 256 \\",
            '        --dtype float32 --step "easy-ep keep=0.5" \\',
            '        --step "reconstruct steps=300 routers=true sequences=4" --out out',
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one domain, few tokens and steps; no page")
    parser.add_argument("--write", action="store_true", help="write the page in docs/")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    started = time.perf_counter()
    tokens, held_out, steps = (4096, 2048, 20) if args.quick else (45_000, 8192, int(OPTIONS["steps"]))
    found = {}
    for domain in ("kjv",) if args.quick else refmoe.texts():
        with tempfile.TemporaryDirectory(prefix="moekit-healed-") as folder:
            found[domain] = healed(domain, tokens, held_out, steps, Path(folder))
    if args.write and not args.quick:
        PAGE.write_text(page(found, tokens, held_out), encoding="utf-8")
    finish(
        "healed_half",
        {"healed_in_domain": (mean([x["healed"] for x in found.values()]), 1.03, "<=")},
        quick=args.quick,
        seconds=round(time.perf_counter() - started, 1),
        ratios={name: {x: round(y, 4) for x, y in row.items()} for name, row in found.items()},
    )


if __name__ == "__main__":
    main()
