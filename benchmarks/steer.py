"""What steering does: away from and towards a domain with 1 to 10 experts, beside controls; and what it costs to run.

    python benchmarks/steer.py            # refmoe, six domains, and the MoE of SmolLM2 (see _smollm2.py): six minutes
    python benchmarks/steer.py --quick    # refmoe, one domain, fewer doses: under a minute
    python benchmarks/steer.py --write    # also writes docs/benchmarks/steer.md and the methods' pages

Plans are found on calibration texts (one domain against all others), tested on held-out ones. Away: the domain's
experts are emptied (mote) or banned (steermoe), texts of 128 tokens. Towards: they are preferred by a bias of 1
(contrast) or forced (steermoe), texts of 16 tokens, which hardly tell their domain. Controls do the same to other
experts of the same layers: drawn by lot, or among the four nearest in frequency on the target.

Goals: away, with 10 experts, the loss rises on every domain beyond matched controls (interval), three times as much as
with them on the mean, and elsewhere a quarter as much; towards, it falls beyond matched controls on five of six
domains. An applied plan costs at most 3% of decode time (CPU time of a step, in turns).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from _goals import finish
from _smollm2 import CACHE
from prune_methods import DOCS, fill

import moekit
from moekit import refmoe
from moekit.apply.steer import steering
from moekit.data import Dataset
from moekit.families.model import Model
from moekit.plans import Steer
from moekit.steering import Assessment, assess, find, load_texts
from moekit.view import MoEView

WAYS: dict[str, tuple[str, str, dict[str, Any]]] = {  # direction, method, options
    "empty (mote)": ("away", "mote", {}),
    "ban (steermoe)": ("away", "steermoe", {}),
    "bias +1 (contrast)": ("towards", "contrast", {"strength": 1.0}),
    "force (steermoe)": ("towards", "steermoe", {}),
}
LENGTH = {"away": 128, "towards": 16}


def rows(model: Model, texts: dict[str, Path], domain: str, tokens: int, length: int) -> list[list[int]]:
    """Token rows of a domain."""
    data = load_texts(model, {domain: str(texts[domain])}, tokens=tokens, sequence_length=length)
    return [ids[mask].tolist() for x in data.batches for ids, mask in zip(x.ids, x.mask, strict=True)]


def against(model: Model, texts: dict[str, Path], domain: str, tokens: int, length: int) -> dict[str, list[list[int]]]:
    """Rows of a domain, and as many tokens of all others together."""
    rest = [x for x in texts if x != domain]
    share = max(2 * length, tokens // len(rest))
    others = [row for x in rest for row in rows(model, texts, x, share, length)]
    return {domain: rows(model, texts, domain, tokens, length), "others": others}


def tried(
    model: Model, domain: str, way: str, tokens: dict[str, int], counts: list[int], draws: int
) -> list[dict[str, Any]]:
    """A plan for a domain, and what it does on held-out text: a flat row for each dose."""
    direction, method, options = WAYS[way]
    seen = against(model, dict(refmoe.calibration()), domain, tokens["find"], LENGTH["away"])
    order = (domain, "others") if direction == "away" else ("others", domain)
    kinds = Dataset.of_rows({name: seen[name] for name in order})
    plan = find(model, kinds, method, top=10, mode="off" if direction == "away" else "on", **options)
    held = against(model, dict(refmoe.texts()), domain, tokens[direction], LENGTH[direction])
    target, elsewhere = (Dataset.of_rows({name: held[name]}) for name in (domain, "others"))
    found = assess(model, plan, target, elsewhere, counts=[x for x in counts if x <= len(plan.ops)], draws=draws)
    return plain(found, domain)


def plain(found: Assessment, domain: str) -> list[dict[str, Any]]:
    """One flat row a dose."""
    out = []
    for dose in found.doses:
        on, off = dose.effects[domain], dose.effects["others"]
        assert on.matched is not None, "controls were asked for"
        assert on.random is not None, "controls were asked for"
        out.append(
            {
                "domain": domain,
                "n": dose.number,
                "change": list(on.change),
                "random": on.random.mean.value,
                "matched": on.matched.mean.value,
                "excess": list(on.matched.excess),
                "elsewhere": off.change.value,
                "kl": off.kl.value,
            }
        )
    return out


def overhead(model: Model, blocks: int, steps: int = 8) -> dict[str, float]:
    """Extra CPU time of a decode step under plans of ten ops for all tokens.

    Plans take turns with none, in another order each time; the quickest step of a turn over the quickest without a plan
    in the same round, so that a machine that slows down for a while slows both; the median of rounds.
    """
    stock = model.load()
    view, layers = MoEView(stock, model.layout), model.layout.routed

    def ops(action: str, **more: Any) -> list[Steer]:
        picked = [layers[i * len(layers) // 10] for i in range(10)]
        return [
            Steer(layer=x.index, expert=(3 * i) % x.num_experts, action=action, **more) for i, x in enumerate(picked)
        ]

    plans = {
        "ban": ops("ban"),
        "bias": ops("bias", strength=1.0),
        "empty": ops("scale", strength=0.0, renormalise=True),
        "scale": ops("scale", strength=2.0),
    }
    ids = torch.randint(1000, (1, 32), generator=torch.Generator().manual_seed(0))

    names, ratios = ["", *plans], {name: [] for name in plans}
    for block in range(blocks):
        quickest = {}
        for name in names[block % len(names) :] + names[: block % len(names)]:
            spent = []
            with steering(view, plans.get(name, [])), torch.inference_mode():
                out = stock(input_ids=ids, use_cache=True)
                for _ in range(steps):
                    started = time.thread_time()
                    out = stock(input_ids=ids[:, -1:], past_key_values=out.past_key_values, use_cache=True)
                    spent.append(time.thread_time() - started)
            quickest[name] = min(spent)
        for name in plans:
            ratios[name].append(quickest[name] / quickest[""])
    return {name: float(np.median(x)) - 1 for name, x in ratios.items()}


def table(found: list[dict[str, Any]], counts: list[int]) -> list[str]:
    """A page's table of one way: by domain, doses and controls."""
    head = ["domain", *(f"n = {n}" for n in counts), "random", "matched", "beyond matched", "elsewhere", "KL elsewhere"]
    lines = [f"| {' | '.join(head)} |", "|---" + "|--:" * (len(head) - 1) + "|"]
    for domain in dict.fromkeys(x["domain"] for x in found):
        mine = {x["n"]: x for x in found if x["domain"] == domain}
        last = mine[max(mine)]
        cells = [f"{mine[n]['change'][0]:+.3f}" if n in mine else "" for n in counts]
        value, low, high = last["excess"]
        cells += [f"{last['random']:+.3f}", f"{last['matched']:+.3f}", f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"]
        lines.append(f"| {domain} | {' | '.join(cells)} | {last['elsewhere']:+.3f} | {last['kl']:.3f} |")
    return lines


def page(results: dict[str, dict[str, list]], costs: dict[str, dict[str, float]], counts: dict[str, list[int]]) -> str:
    """docs/benchmarks/steer.md."""
    lines = [
        "# Steering: away from a domain, and towards it",
        "",
        "By `python benchmarks/steer.py --write`. One domain against all others; plans found on calibration text and",
        "tested on held-out text. Numbers: change of the loss in nats a token with n experts changed. Random and",
        "matched controls do the same to other experts of the same layers, at the largest n; 95% intervals over texts.",
        "",
        "**Away**: the loss on the domain should rise, elsewhere it should not. **Towards**: texts of 16 tokens hardly",
        "tell their domain, so knowing it should lower their loss. Forcing does not, though it harms the domain less",
        "than others: a forced expert takes a slot, with a weight like the strongest's, from one that the token needs.",
    ]
    for model, ways in results.items():
        for way, found in ways.items():
            lines += ["", f"## {model}: {WAYS[way][0]}, {way}", "", *table(found, counts[model])]
    lines += ["", "## What an applied plan costs", "", "Ten ops for all tokens, extra CPU time of a decode step.", ""]
    names = list(next(iter(costs.values())))
    lines += [f"| model | {' | '.join(names)} |", "|---" + "|--:" * len(names) + "|"]
    lines += [f"| {model} | {' | '.join(f'{x[n]:+.1%}' for n in names)} |" for model, x in costs.items()]
    return "\n".join(lines) + "\n"


def slot(found: list[dict[str, Any]], way: str) -> str:
    """What a method's page says."""
    most = max(x["n"] for x in found)
    last = [x for x in found if x["n"] == most]
    mean = {key: np.mean([x[key] for x in last]) for key in ("random", "matched", "elsewhere")}
    change = np.mean([x["change"][0] for x in last])
    lines = [
        f"refmoe, {way} of {most} of 192 experts, {WAYS[way][0]} each of {len(last)} domains: the loss on the domain",
        f"changes by {change:+.3f} nats a token on the mean, by {mean['matched']:+.3f} with matched experts and by",
        f"{mean['random']:+.3f} with random ones; elsewhere by {mean['elsewhere']:+.3f}.",
        "[All domains and doses](../benchmarks/steer.md).",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="refmoe, one domain, fewer doses: under a minute")
    parser.add_argument("--write", action="store_true", help="write the pages in docs/")
    parser.add_argument("--domains", default=",".join(sorted(refmoe.texts())), help="of refmoe; fewer take less time")
    parser.add_argument("--keep", type=Path, help="a file in which results stay, for the next time")
    parser.add_argument("--model", type=Path, default=CACHE, help="the MoE of SmolLM2; left out where it is not")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    started = time.perf_counter()
    small = moekit.open("refmoe")
    domains = ["python"] if args.quick else args.domains.split(",")
    counts = {"refmoe": [2, 10] if args.quick else [1, 3, 10], "SmolLM2 as an MoE": [3, 10]}
    tokens = (
        {"find": 2_048, "away": 1_024, "towards": 512}
        if args.quick
        else {"find": 4_096, "away": 2_048, "towards": 1_024}
    )
    jobs = [("refmoe", small, domains, list(WAYS), tokens, 1 if args.quick else 2)]
    if not args.quick and (args.model / "config.json").is_file():
        few = {"find": 1_024, "away": 384, "towards": 256}
        ways = ["ban (steermoe)", "bias +1 (contrast)"]
        jobs.append(("SmolLM2 as an MoE", moekit.open(args.model), ["kjv", "python"], ways, few, 2))
    kept = json.loads(args.keep.read_text()) if args.keep and args.keep.exists() else {}

    def once(key: str, work: Callable[[], Any]) -> Any:
        if key not in kept:
            kept[key] = work()
            print(key, json.dumps(kept[key]), flush=True)
            if args.keep:
                args.keep.write_text(json.dumps(kept))
        return kept[key]

    results: dict[str, dict[str, list]] = {}
    for name, model, some, ways, sizes, draws in jobs:
        results[name] = {way: [] for way in ways}
        for domain in some:
            for way in ways:
                work = partial(tried, model, domain, way, sizes, counts[name], draws)
                results[name][way] += once(f"{name}, {way}, {domain}", work)
    blocks = {"refmoe": 5 if args.quick else 40}
    costs = {name: once(f"{name}, costs", partial(overhead, model, blocks.get(name, 7))) for name, model, *_ in jobs}
    if args.write:
        (DOCS / "benchmarks" / "steer.md").write_text(page(results, costs, counts))
        for way, method in (
            ("empty (mote)", "mote"),
            ("ban (steermoe)", "steermoe"),
            ("bias +1 (contrast)", "contrast"),
        ):
            fill(DOCS / "methods" / f"{method}.md", slot(results["refmoe"][way], way))
    last = {way: [x for x in found if x["n"] == 10] for way, found in results["refmoe"].items()}
    away, towards = last["empty (mote)"], last["bias +1 (contrast)"]
    change = float(np.mean([x["change"][0] for x in away]))
    finish(
        "steer",
        {
            "away_beyond_matched_share": (np.mean([x["excess"][1] > 0 for x in away]), 1.0, ">="),
            "away_over_matched": (change / float(np.mean([x["matched"] for x in away])), 3.0, ">="),
            "elsewhere_over_away": (float(np.mean([x["elsewhere"] for x in away])) / change, 0.25, "<="),
            "towards_beyond_matched_share": (np.mean([x["excess"][2] < 0 for x in towards]), 5 / 6, ">="),
            "overhead": (max(y for x in costs.values() for y in x.values()), 0.03, "<="),
        },
        quick=args.quick,
        costs=costs,
        towards_change={x["domain"]: x["change"] for x in towards},
        seconds=round(time.perf_counter() - started, 1),
    )


if __name__ == "__main__":
    main()
