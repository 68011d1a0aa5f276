"""Every cache policy and predictor on the same recorded routing: hits, bytes, predicted time, recall; against Belady.

    python benchmarks/policies.py            # ten minutes; --write: writes docs/benchmarks/policies.md
    python benchmarks/policies.py --quick    # refmoe alone, on less text, under a minute

refmoe (6 layers of 32 experts, top-4), and where it has been made the MoE of SmolLM2 (30 layers of 16, top-4,
`benchmarks/_smollm2.py`), read their held-out texts of six domains with every token recorded. Policies that learn from
a trace are given one of the calibration texts, which are others. Texts of 256 tokens are replayed token by token, the
domains in turn, from an empty memory, with places for 15, 25, 50 and 75% of the experts.

Times are computed, not measured: the disk gives 1 GB/s, a token of refmoe computes for 6 ms, of the other for 20.
Goals:

reuse_over_best_other   hit rate of `reuse` less that of the best other online policy, the smallest of all models and
                        sizes
reuse_over_static       the same, less that of the static hot set
belady_over_best        hit rate of Belady less that of the best online policy, the smallest: no less than 0
fresh_recall            of the control, each layer's own router: exactly 1
ahead_time              predicted time of a token with the best predictor over that without, at 25%, the largest
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _goals import finish

import moekit
from moekit import refmoe
from moekit.recording import trace
from moekit.serve.policies import POLICIES
from moekit.serve.predictors import PREDICTORS, predictor_named
from moekit.serve.predictors.routers import recorded
from moekit.serve.routes import Routes
from moekit.serve.simulate import Machine, Recall, Replay, fresh_recall, recall, simulate

SMOLLM2 = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moekit" / "smollm2-moe"
SHARES = (0.15, 0.25, 0.50, 0.75)
PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "policies.md"
LENGTH = 256
BYTES_PER_S = 1e9


@dataclass(frozen=True)
class Setting:
    """A model, how much of it is replayed, and how long a token computes."""

    name: str
    source: str
    tokens: int
    replayed: int
    compute_s: float


@dataclass(frozen=True)
class Found:
    """What one model showed."""

    setting: Setting
    routes: Routes
    replays: dict[tuple[str, float], Replay]
    alone: dict[str, list[float]]
    recalls: dict[str, Recall]
    ahead: dict[str, Replay]
    control: float

    def others(self, share: float) -> float:
        """Hit rate of the best online policy but `reuse`."""
        names = POLICIES.keys() - {"reuse", "belady"}
        return max(self.replays[name, share].hit_rate for name in names)

    def rate(self, name: str, share: float) -> float:
        """Hit rate of a policy."""
        return self.replays[name, share].hit_rate


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="refmoe alone, on less text")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name} in docs/benchmarks")
    arguments = parser.parse_args()
    small = 512 if arguments.quick else 1024
    settings = [Setting("refmoe", "refmoe", small, 1536 if arguments.quick else 3072, 0.006)]
    if SMOLLM2.is_dir() and not arguments.quick:
        settings.append(Setting("SmolLM2 as an MoE", str(SMOLLM2), 512, 1024, 0.020))
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for setting in settings:
            found.append(measured(setting, Path(folder) / setting.name))
            print(tables(found[-1]), flush=True)
    if arguments.write:
        PAGE.write_text(page(found), encoding="utf-8")
    pairs = [(x, share) for x in found for share in SHARES]
    finish(
        "policies",
        {
            "reuse_over_best_other": (min(x.rate("reuse", s) - x.others(s) for x, s in pairs), 0.0, ">="),
            "reuse_over_static": (min(x.rate("reuse", s) - x.rate("static", s) for x, s in pairs), 0.0, ">="),
            "belady_over_best": (
                min(x.rate("belady", s) - max(x.others(s), x.rate("reuse", s)) for x, s in pairs), 0.0, ">=",
            ),
            "fresh_recall": (min(x.control for x in found), 1.0, ">="),
            "ahead_time": (max(faster(x) for x in found), 1.0, "<="),
        },
        quick=arguments.quick,
        models=[x.setting.name for x in found],
    )  # fmt: skip


def measured(setting: Setting, folder: Path) -> Found:
    """Record, replay, ask."""
    model = moekit.open(setting.source)
    known = routes_of(model, refmoe.calibration(), setting.tokens, folder / "known")
    routes = routes_of(model, refmoe.texts(), setting.tokens, folder / "texts").spread(setting.replayed).interleaved()
    machine = Machine(max(x.expert_bytes for x in model.layout.routed), BYTES_PER_S, setting.compute_s)
    every = routes.layers * routes.experts
    replays = {
        (name, share): simulate(routes, name, round(share * every), machine, trace=known)
        for name in POLICIES
        for share in SHARES
    }
    quarter = every // 4
    alone: dict[str, list[float]] = {}
    for name in ("lru", "moe-infinity", "static", "reuse", "belady"):
        for domain in np.unique(routes.domains):
            part = routes.texts(np.flatnonzero(routes.domains == domain))
            alone.setdefault(name, []).append(simulate(part, name, quarter, machine, trace=known).hit_rate)
    seen, routers = recorded(model, routes)
    learned, _ = recorded(model, known)
    recalls, ahead = {}, {}
    for name in PREDICTORS:
        made = predictor_named(name, learned, routers)
        recalls[name] = recall(seen, made)
        ahead[name] = simulate(seen, "reuse", quarter, machine, trace=known, predictor=made, name=name)
    ahead["none"] = simulate(seen, "reuse", quarter, machine, trace=known)
    control = fresh_recall(seen, lambda layer, x: routers.scores(layer, x.hidden[layer]))
    return Found(setting, routes, replays, alone, recalls, ahead, float(control.at_k.min()))


def routes_of(model: object, texts: dict[str, Path], tokens: int, folder: Path) -> Routes:
    """Every token's experts, as the model reads these texts."""
    named = {name: str(path) for name, path in texts.items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    data = moekit.load_data(model, named, tokens=tokens, sequence_length=LENGTH)
    return Routes.of(trace(model, data, out=folder, tokens=True))


def faster(found: Found) -> float:
    """Predicted time with the best predictor over that without."""
    plain = found.ahead["none"].expected_s.mean()
    return float(min(x.expected_s.mean() for name, x in found.ahead.items() if name != "none") / plain)


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def tables(found: Found) -> str:
    """Hits, time and recall of one model."""
    routes, setting = found.routes, found.setting
    shares = [f"{share:.0%}" for share in SHARES]
    order = sorted(POLICIES, key=lambda name: -sum(found.rate(name, s) for s in SHARES))
    hits = [[f"`{name}`", *(f"{found.rate(name, s):.1%}" for s in SHARES)] for name in order]
    reads = [
        [f"`{name}`"]
        + [f"{found.replays[name, s].token_bytes / 1e6:.2f} MB, {1e3 * found.replays[name, s].expected_s.mean():.1f} ms"
           for s in SHARES]
        for name in order
    ]  # fmt: skip
    alone = [
        [f"`{name}`", f"{np.mean(rates):.1%}", f"{min(rates):.1%}", f"{max(rates):.1%}"]
        for name, rates in found.alone.items()
    ]
    told = []
    for name in ("none", *PREDICTORS):
        x = found.ahead[name]
        cells = ["", "", ""]
        if name != "none":
            rates = [np.nanmean(r) for r in (found.recalls[name].at_k, found.recalls[name].at_2k)]
            cells = [f"{share:.1%}" for share in (*rates, x.ahead.sum() / max(1, x.ahead.sum() + x.wasted))]
        told.append([f"`{name}`", *cells, f"{x.token_bytes / 1e6:.2f} MB", f"{1e3 * x.expected_s.mean():.1f} ms"])
    cycle = routes.top_k / routes.experts
    return "\n\n".join(
        [
            f"## {setting.name}",
            f"{routes.layers} MoE layers of {routes.experts} experts, top-{routes.top_k}; {len(routes.ids):,} tokens "
            f"of {len(routes.starts)} texts.\nAn expert has {found.ahead['none'].expert_bytes / 1e3:.0f} kB, a token "
            f"computes for {1e3 * setting.compute_s:.0f} ms.\nOne token needs {cycle:.1%} of the experts.",
            "Experts found in memory, by the share of all experts that fit:",
            grid(["policy", *shares], hits),
            "Read for a token, and its expected time:",
            grid(["policy", *shares], reads),
            "One domain at a time, at 25%: the mean of the domains, the worst, the best:",
            grid(["policy", "mean", "worst", "best"], alone),
            "Predictors: the share of a layer's experts among the k, and the 2 k, likeliest; then, with `reuse`\n"
            "at 25%, the share of what was read ahead that was needed, what a token reads, its expected time:",
            grid(["predictor", "by k", "by 2 k", "useful", "read", "time"], told),
            f"The control, each layer's own router, tells {found.control:.0%}.\n",
        ]
    )


def page(found: Sequence[Found]) -> str:
    """The page of docs."""
    return (
        "# Cache policies and predictors\n\n"
        "Which experts should stay in memory, and which should be read ahead? Every policy and predictor of\n"
        "[caching](../caching.md), replayed on the same recorded routing by `benchmarks/policies.py --write`, against\n"
        "Belady's, who knows the future. Held-out texts of six domains, 256 tokens each, the domains in turn; what\n"
        "learns from a trace was given one of other texts. Times are computed for a disk of 1 GB/s: what a layer\n"
        "misses is waited for, but for what was read ahead.\n\n" + "\n".join(tables(x) for x in found)
    )


if __name__ == "__main__":
    main()
