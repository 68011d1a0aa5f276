"""What trying every set of experts is worth over scoring them: naee and the scores, on layers of 8 experts.

    python benchmarks/small_layers.py            # about five minutes on one core; writes the page of naee
    python benchmarks/small_layers.py --quick    # one domain, few tokens: under a minute

No small trained model has 8 experts a layer, so refmoe's 32 are first cut to 8 by easy-ep, for each domain on its own
text, and written. Of these 8 (4 are chosen for each token), 7, 6 and 5 are kept by each method, decided from one pass
over the calibration text of the domain, and scored on its held-out text with the plan applied live.

Goal: at 6 of 8 naee is not worse than the best score by more than 1%, by the geometric mean over domains.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
import transformers
from _goals import finish
from prune_methods import DOCS, LENGTH, SEEDS, fill, mean, perplexities

import moekit
from moekit import methods, refmoe
from moekit.apply.live import live
from moekit.stats import ALL_GROUPS
from moekit.view import MoEView

KEEPS = (7, 6, 5)
METHODS = methods.names("prune")
Ratios = dict[tuple[str, int], list[float]]  # (method, experts kept) -> perplexity over that of 8 experts, by domain


def scored(domain: str, folder: Path, seen_tokens: int, held_out: int) -> Ratios:
    """One domain's perplexities over that of its model of 8 experts."""
    source = moekit.open("refmoe")
    calibration, texts = {domain: refmoe.calibration()[domain]}, {domain: refmoe.texts()[domain]}
    seen = moekit.load_data(source, calibration, tokens=seen_tokens, sequence_length=LENGTH)
    stats = moekit.measure(source, seen, groups=("scores",), dtype=torch.float32)
    moekit.bake(source, moekit.plan("easy-ep", stats, keep=8), folder / domain, prove=False)
    model = moekit.open(folder / domain)
    stats = moekit.measure(model, seen, groups=[x for x in ALL_GROUPS if x in ("scores", "subsets")])
    text = moekit.load_data(model, texts, tokens=held_out, sequence_length=LENGTH)
    stock = model.load(torch.float32)
    view = MoEView(stock, model.layout)
    full = perplexities(stock, text)[domain]
    out: Ratios = {}
    for keep in KEEPS:
        for name in METHODS:
            found = []
            for seed in range(SEEDS if name == "random" else 1):
                seeds = {"seed": seed} if name == "random" else {}
                with live(view, moekit.plan(name, stats, keep=keep, **seeds)):
                    found.append(perplexities(stock, text)[domain] / full)
            out[name, keep] = [mean(found)]
        print(domain, keep, {name: round(out[name, keep][0], 4) for name in METHODS}, flush=True)
    return out


def slot(ratios: Ratios, domains: int) -> str:
    """What the page of naee says."""
    rows = sorted(METHODS, key=lambda x: mean(ratios[x, 6]))
    return "\n".join(
        [
            "Perplexity over that of the model with 8 experts a layer (refmoe, cut from 32 to 8 by easy-ep on the"
            f" domain's text), geometric mean over {domains} domains, by `python benchmarks/small_layers.py`:",
            "",
            f"| | {' | '.join(f'{keep} of 8' for keep in KEEPS)} |",
            f"|---|{'--:|' * len(KEEPS)}",
            *(f"| [{x}]({x}.md) | {' | '.join(f'{mean(ratios[x, keep]):.3f}' for keep in KEEPS)} |" for x in rows),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one domain, few tokens; no page")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    started = time.perf_counter()
    names = ("python",) if args.quick else tuple(refmoe.texts())
    ratios: Ratios = {}
    with tempfile.TemporaryDirectory() as folder:
        for domain in names:
            for key, values in scored(domain, Path(folder), *((2048, 1024) if args.quick else (16_384, 4096))).items():
                ratios.setdefault(key, []).extend(values)
    print(slot(ratios, len(names)))
    if not args.quick:
        fill(DOCS / "methods" / "naee.md", slot(ratios, len(names)))
    best = min(mean(ratios[x, 6]) for x in METHODS if x != "naee")
    finish(
        "small_layers",
        {"naee_over_best_score": (mean(ratios["naee", 6]) / best, 1.01, "<=")},
        quick=args.quick,
        seconds=round(time.perf_counter() - started, 1),
        ratios={f"{name} {keep}": [round(x, 4) for x in values] for (name, keep), values in ratios.items()},
    )


if __name__ == "__main__":
    main()
