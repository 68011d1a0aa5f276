"""What it costs on refmoe to leave out experts token by token (odp): experts that run against perplexity and KL.

    python benchmarks/dynamic_pruning.py            # about five minutes on one core; writes odp's page in docs/
    python benchmarks/dynamic_pruning.py --quick    # two domains, two settings, few tokens: under a minute

Thresholds come from the packaged calibration texts, all domains together; held-out texts are scored, the source beside
its own live plan. "fewer experts" is the floor: the weights of all but a token's first n experts are left out, whatever
they are.

Goals: at the published median no more than 5% of perplexity for half of the experts; thresholds cost no more KL than
the floor that runs as many experts.
"""

from __future__ import annotations

import argparse
import time
from contextlib import closing
from typing import Any

import numpy as np
import torch
import transformers
from _goals import finish
from prune_methods import DOCS, LENGTH, fill, mean

import moekit
from moekit import refmoe
from moekit.data import Dataset
from moekit.evaluation.compare import Evaluation
from moekit.families.model import Model
from moekit.families.seam import rescaled
from moekit.stream import Stream
from moekit.view import MoEView

SETTINGS: dict[str, dict[str, Any]] = {
    "median of w_2 / w_1": {},
    "the same, importance: norm": {"importance": "norm"},
    "the same, importance: none": {"importance": "none"},
    "quarter of w_2 / w_1": {"quantile": 0.25},
    "median of all ranks": {"ranks": "all"},
    "quarter of all ranks": {"ranks": "all", "quantile": 0.25},
}
FLOORS = (3, 2)


def numbers(found: Evaluation) -> dict[str, float]:
    """Means over domains."""
    rows = list(found.domains.values())
    assert all(x.ratio and x.kl and x.agreement for x in rows), "the model is compared with itself"
    return {
        "experts": float(np.mean([x.active_experts for x in rows])),
        "ratio": mean(x.ratio.value for x in rows if x.ratio),
        "kl": float(np.mean([x.kl.value for x in rows if x.kl])),
        "agreement": float(np.mean([x.agreement.value for x in rows if x.agreement])),
    }


def first_only(model: Model, data: Dataset, count: int) -> dict[str, float]:
    """The floor: every token runs its first `count` experts."""

    def change(_hidden: torch.Tensor, _ids: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        rank_TK = weights_TK.argsort(-1, descending=True).argsort(-1)
        return rescaled(weights_TK, (rank_TK < count).float(), True)

    def logits(changed: bool) -> Any:
        loader = model.loader()
        view = MoEView(loader.model, model.layout)
        with view.adapt({x.index: change for x in model.layout.routed} if changed else {}):
            yield from Stream(loader).run([x.ids for x in data.batches])

    nll, kl, agree, tokens = (np.zeros((2, len(data.domains))), *(np.zeros(len(data.domains)) for _ in range(3)))
    with closing(logits(True)) as ours, closing(logits(False)) as theirs:
        for batch, mine, other in zip(data.batches, ours, theirs, strict=True):
            real = batch.mask[:, 1:]
            q, p = (x[:, :-1][real].float().log_softmax(-1) for x in (mine, other))
            target = batch.ids[:, 1:][real][:, None]
            for row, logs in enumerate((q, p)):
                nll[row, batch.domain] -= float(logs.gather(1, target).sum())
            kl[batch.domain] += float((p.exp() * (p - q)).sum())
            agree[batch.domain] += int((p.argmax(-1) == q.argmax(-1)).sum())
            tokens[batch.domain] += len(target)
    ratio = np.exp((nll[0] - nll[1]) / tokens)
    return {
        "experts": float(count),
        "ratio": mean(ratio.tolist()),
        "kl": float(np.mean(kl / tokens)),
        "agreement": float(np.mean(agree / tokens)),
    }


def slot(rows: dict[str, dict[str, float]], what: str) -> str:
    """What the method's page says."""
    lines = [
        f"refmoe, four experts a token, means over six domains, by `python benchmarks/dynamic_pruning.py` ({what}):",
        "",
        "| threshold | experts a token | perplexity over the full model's | KL | same top token |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, x in rows.items():
        lines.append(f"| {name} | {x['experts']:.2f} | {x['ratio']:.3f} | {x['kl']:.4f} | {x['agreement']:.1%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two domains, two settings, few tokens; no pages")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    started = time.perf_counter()
    names = ("kjv", "python") if args.quick else tuple(refmoe.texts())
    seen_tokens, held_out = (4096, 1024) if args.quick else (16_384, 4096)
    model = moekit.open("refmoe")
    seen = moekit.load_data(
        model, {x: refmoe.calibration()[x] for x in names}, tokens=seen_tokens, sequence_length=LENGTH
    )
    texts = moekit.load_data(model, {x: refmoe.texts()[x] for x in names}, tokens=held_out, sequence_length=LENGTH)
    stats = moekit.measure(model, seen, groups=("scores", "routing"))
    rows: dict[str, dict[str, float]] = {}
    for name, options in list(SETTINGS.items())[: 2 if args.quick else None]:
        rows[name] = numbers(moekit.evaluate(model, data=texts, plan=moekit.plan("odp", stats, **options)))
        print(name, rows[name], flush=True)
    for count in FLOORS:
        rows[f"fewer experts: the first {count}"] = first_only(model, texts, count)
        print(count, rows[f"fewer experts: the first {count}"], flush=True)
    if not args.quick:
        fill(
            DOCS / "methods" / "odp.md",
            slot(rows, f"{seen_tokens:,} tokens of each domain to calibrate on, {held_out:,} held-out ones, bfloat16"),
        )
    published, floor = rows["median of w_2 / w_1"], rows["fewer experts: the first 2"]
    finish(
        "dynamic_pruning",
        {
            "perplexity_at_the_median": (published["ratio"], 1.05, "<="),
            "kl_over_the_first_two": (published["kl"] / floor["kl"], 1.0, "<="),
        },
        quick=args.quick,
        seconds=round(time.perf_counter() - started, 1),
        rows=rows,
    )


if __name__ == "__main__":
    main()
