"""What the lossy knobs of `moekit run` cost on refmoe: KL against reads avoided, token by token with few experts kept.

    python benchmarks/lossy.py --write    # ten minutes on one core; writes docs/benchmarks/lossy.md
    python benchmarks/lossy.py --quick    # two domains, few tokens: under a minute

Held-out texts of each domain, each token fed alone as in decoding, in memory for a quarter of the experts. Reads are
those of a run that loses nothing, less those of this one. KL is of the lossless distribution from the lossy one, nats a
token. "8 bits", "4 bits", "mixed": the same experts, rounded when packed (`moekit pack --bits`); their reads are as
many, and smaller.

Goals: dropping what is missing and small (F = 0.5) avoids a third of the reads for at most 0.05 nats; a similar expert
in a dropped one's place is worth having; leaving out by residency costs less KL a read than leaving out by weight.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from _goals import finish
from prune_methods import DOCS, fill

import moekit
from moekit import refmoe
from moekit.families.model import Model
from moekit.families.resident import empty_cache
from moekit.methods import make_plan
from moekit.serve.engine import Engine
from moekit.serve.lossy import Losses, Lossy
from moekit.serve.packing import pack
from moekit.serve.store import ExpertStore
from moekit.serve.widths import widths_by_sensitivity
from moekit.stats import Stats
from moekit.view import MoEView

HELD = 0.25  # of the experts
SETTINGS: dict[str, dict[str, Any]] = {
    **{f"drop={x:g}": {"drop": x} for x in (0.25, 0.5, 0.75, 1.0)},
    **{f"substitute={x:g}": {"substitute": x} for x in (0.5, 1.0)},
    **{f"adaptive-k={x:g}": {"adaptive_k": x} for x in (0.95, 0.9, 0.8, 0.7)},
    "odp (median of w_2 / w_1)": {"odp": 0.5},
    "odp (quarter)": {"odp": 0.25},
    "drop=0.5,adaptive-k=0.95": {"drop": 0.5, "adaptive_k": 0.95},
}
QUICK = ("drop=0.5", "drop=1", "substitute=0.5", "adaptive-k=0.9")
BITS = ("8 bits", "mixed, 6 on average", "mixed, 6 on average, by statistics", "4 bits")


@torch.inference_mode()
def decoded(engine: Engine, texts: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], int]:
    """(log-probabilities [T, V] of each text, experts read), each token alone."""
    before = sum(engine.cache.counts.misses)
    out = {}
    for name, ids in texts.items():
        past = empty_cache(engine.model)
        parts = [engine.forward(x[None], past, "decode")[0] for x in ids.split(1)]
        out[name] = torch.stack(parts).float().log_softmax(-1)
    return out, sum(engine.cache.counts.misses) - before


def divergence(exact: dict[str, torch.Tensor], rough: dict[str, torch.Tensor]) -> tuple[float, float]:
    """(KL in nats a token, share of tokens with the same likeliest next token), means over texts."""
    kl = [float((p.exp() * (p - rough[x])).sum(-1).mean()) for x, p in exact.items()]
    same = [float((p.argmax(-1) == rough[x].argmax(-1)).float().mean()) for x, p in exact.items()]
    return float(np.mean(kl)), float(np.mean(same))


def settings_of(asked: dict[str, Any], stats: Stats) -> Lossy:
    """The knobs; ODP's plan is made from statistics."""
    if "odp" in asked:
        return Lossy(odp=make_plan("odp", stats, stats.layout, quantile=asked["odp"], importance="norm"))
    return Lossy(**asked)


def knobs(
    engine: Engine, texts: dict[str, torch.Tensor], stats: Stats, names: list[str]
) -> dict[str, dict[str, float]]:
    """A row for each setting."""
    exact, all_reads = decoded(engine, texts)
    view, rows = MoEView(engine.model, engine.layout), {}
    for name in names:
        losses = Losses(settings_of(SETTINGS[name], stats), view).attach()
        rough, reads = decoded(engine, texts)
        losses.close()
        kl, same = divergence(exact, rough)
        lost = losses.lost
        rows[name] = {
            "kl": kl,
            "same": same,
            "avoided": 1 - reads / all_reads,
            "dropped": lost.dropped / lost.tokens,
            "substituted": lost.substituted / lost.tokens,
        }
        print(name, {x: round(y, 4) for x, y in rows[name].items()}, flush=True)
    return rows


def rounded(
    model: Model, store: ExpertStore, texts: dict[str, torch.Tensor], stats: Stats, folder: Path, names: list[str]
) -> dict[str, dict[str, float]]:
    """A row for each way of packing."""
    ways: dict[str, dict[str, Any]] = {"8 bits": {"bits": 8}, "4 bits": {"bits": 4}}
    engine = Engine(store)
    exact, rows = {x: engine.logits(ids).float().log_softmax(-1) for x, ids in texts.items()}, {}
    for number, name in enumerate(names):
        way = ways.get(name) or {
            "by_expert": widths_by_sensitivity(model, 6.0, stats if name.endswith("statistics") else None)
        }
        small = Engine(pack(model, folder / str(number), **way))
        kl, same = divergence(exact, {x: small.logits(ids).float().log_softmax(-1) for x, ids in texts.items()})
        rows[name] = {"kl": kl, "same": same, "bytes": small.store.expert_bytes / store.expert_bytes}
        print(name, {x: round(y, 4) for x, y in rows[name].items()}, flush=True)
        small.close()
    engine.close()
    return rows


def page(rows: dict[str, dict[str, float]], packed: dict[str, dict[str, float]], what: str) -> str:
    """docs/benchmarks/lossy.md, as measured."""
    lines = [
        what,
        "",
        "| setting | reads avoided | router weight left out | given to others | KL, nats | same top token |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, x in rows.items():
        lines.append(
            f"| `{name}` | {x['avoided']:.0%} | {x['dropped']:.1%} | {x['substituted']:.1%} | {x['kl']:.4f} "
            f"| {x['same']:.1%} |"
        )
    lines += ["", "| packed with | bytes of 16 bits | KL, nats | same top token |", "|---|--:|--:|--:|"]
    lines += [f"| {name} | {x['bytes']:.0%} | {x['kl']:.4f} | {x['same']:.1%} |" for name, x in packed.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two domains, few settings and tokens; no page")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks/lossy.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    started = time.perf_counter()
    names = ("kjv", "python") if args.quick else tuple(refmoe.texts())
    tokens = 48 if args.quick else 192
    model = moekit.open("refmoe")
    seen = moekit.load_data(
        model, {x: refmoe.calibration()[x] for x in names}, tokens=1024 if args.quick else 8192, sequence_length=256
    )
    stats = moekit.measure(model, seen, groups=("scores", "routing"))
    held_out = moekit.load_data(model, {x: refmoe.texts()[x] for x in names}, tokens=tokens, sequence_length=tokens)
    texts = {held_out.domains[x.domain]: x.ids[0] for x in held_out.batches}
    with tempfile.TemporaryDirectory(prefix="moekit-lossy-") as folder:
        store = ExpertStore(pack(model, Path(folder) / "whole"))
        engine = Engine(store)
        engine.cache.close()  # of a model as small as this the whole process's memory says nothing: places are counted
        engine.cache = engine._cache(int(HELD * store.expert_bytes), "lru", verify=True)
        rows = knobs(engine, texts, stats, list(QUICK if args.quick else SETTINGS))
        packed = rounded(model, store, texts, stats, Path(folder), list(BITS[-1:] if args.quick else BITS))
        slots, every = engine.cache.slots, sum(len(x.offsets) for x in store.layers.values())
        engine.close()
    if args.write:
        what = (
            f"refmoe, {tokens} held-out tokens of each of {len(names)} domains, places for {slots} of {every} experts, "
            "by `python benchmarks/lossy.py --write`:"
        )
        fill(DOCS / "benchmarks" / "lossy.md", page(rows, packed, what))
    drop, similar = rows["drop=0.5"], rows["substitute=0.5"]
    by_weight = rows["adaptive-k=0.9"]
    finish(
        "lossy",
        {
            "reads_avoided_by_drop_0.5": (drop["avoided"], 1 / 3, ">="),
            "kl_of_drop_0.5": (drop["kl"], 0.05, "<="),
            "kl_of_substitutes_over_dropping": (similar["kl"] / drop["kl"], 1.0, "<="),
            "kl_a_read_over_adaptive_k": (
                (drop["kl"] / drop["avoided"]) / (by_weight["kl"] / by_weight["avoided"]),
                1.0,
                "<=",
            ),
        },
        quick=args.quick,
        seconds=round(time.perf_counter() - started, 1),
        slots=slots,
        rows=rows,
        packed=packed,
    )


if __name__ == "__main__":
    main()
