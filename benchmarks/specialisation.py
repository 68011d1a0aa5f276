"""What refmoe's experts are for: how much they tell about the domain, and whether frequency or ablation says so.

    python benchmarks/specialisation.py            # all 192 experts, about ten minutes; writes the page in docs/
    python benchmarks/specialisation.py --quick    # the strongest expert of each domain only: under a minute

Experts are chosen on the packaged calibration texts and switched off on the packaged held-out texts. Of each layer:
the normalised mutual information of domain and chosen expert, against sequences that swap their domains. Of each
domain: its strongest expert (largest relevance: share of a sequence's tokens that choose it, minus the same in other
domains), and what its absence does to each domain's loss, beside random experts and experts of the layer that are
chosen as often.
The long run switches off every expert, and says where frequency and effect disagree.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from _goals import finish

import moekit
from moekit import refmoe
from moekit.evaluation.ablation import Ablation, Tested, ablate
from moekit.evaluation.intervals import Interval
from moekit.layout import ExpertId
from moekit.methods.ftri import Relevance, ftri
from moekit.recording import trace
from moekit.trace import Table, tables

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "specialisation.md"
LENGTH = 128
SHOWN = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer tokens, six experts")
    parser.add_argument("--tokens", type=int, help="held-out tokens of each domain (default 3072; quick: 1024)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    started = time.perf_counter()
    model = moekit.open("refmoe")
    seen = moekit.load_data(model, refmoe.calibration(), tokens=4096 if args.quick else 16_384, sequence_length=LENGTH)
    held_out = args.tokens or (1024 if args.quick else 3072)
    texts = moekit.load_data(model, refmoe.texts(), tokens=held_out, sequence_length=LENGTH)
    with tempfile.TemporaryDirectory(prefix="moekit-specialisation-") as folder:
        traced = trace(model, seen, out=Path(folder) / "trace", tokens=True)
        information = tables.mutual_information(traced)
        strongest = {x: ftri(traced.stats, model.layout, x, top=1)[0] for x in traced.domains}
    every = [ExpertId(layer.index, e) for layer in model.layout.routed for e in range(layer.num_experts)]
    experts = list(dict.fromkeys(x.expert for x in strongest.values())) if args.quick else every
    found = ablate(model, texts, experts, controls=1 if args.quick else 2)
    effects = {(x.experts[0], x.domain): x for x in found.tested}
    lines = [*words(information, strongest, effects), "", *layers(information), "", *domains(strongest, effects)]
    if not args.quick:
        lines += ["", *disagreements(effects, list(strongest))]
    print("\n".join(lines))
    if not args.quick:
        PAGE.parent.mkdir(parents=True, exist_ok=True)
        PAGE.write_text(page(lines, held_out, found))
    own, most, clear = outcomes(strongest, effects)
    finish(
        "specialisation",
        {
            "layers_above_null": (float(np.mean(information["p"] <= 0.05)), 1.0, ">="),
            "own_domain_hurt_most": (most / len(strongest), 0.8, ">="),
        },
        quick=args.quick,
        nmi=[round(x, 4) for x in information["normalised"].tolist()],
        strongest={domain: str(x.expert) for domain, x in strongest.items()},
        effect={domain: round(x.effect.change.value, 4) for domain, x in zip(strongest, own, strict=True)},
        clear_of_matched=clear,
        seconds=round(time.perf_counter() - started),
    )


Effects = dict[tuple[ExpertId, str], Tested]


def outcomes(strongest: dict[str, Relevance], effects: Effects) -> tuple[list[Tested], int, int]:
    """Each domain without its strongest expert; how many lose more than all others, how many than without controls."""
    own = [effects[x.expert, domain] for domain, x in strongest.items()]
    others = [max(effects[x.expert, y].effect.change.value for y in strongest) for x in strongest.values()]
    most = sum(x.effect.change.value >= y for x, y in zip(own, others, strict=True))
    return own, most, sum(x.excess is not None and x.excess.low > 0 for x in own)


def words(information: Table, strongest: dict[str, Relevance], effects: Effects) -> list[str]:
    """What was found."""
    own, most, clear = outcomes(strongest, effects)
    order = np.argsort(-information["normalised"])
    first, second = (information.take(order[i : i + 1]) for i in (0, 1))
    return [
        f"- Layer {first['layer'][0]} tells most about the domain: normalised mutual information "
        f"{first['normalised'][0]:.2f}; the next, layer {second['layer'][0]}, {second['normalised'][0]:.2f}.",
        f"- Without its strongest expert, {most} of {len(own)} domains lose more than every other domain does;",
        f"  {clear} of {len(own)} more than without the experts of the layer that come nearest in frequency.",
    ]


def layers(information: Table) -> list[str]:
    """What a choice tells about the domain, by layer."""
    rows = [
        (x["layer"], f"{x['bits']:.3f}", f"{x['normalised']:.3f}", f"{x['null_mean']:.4f}", f"{x['p']:.3f}")
        for x in information.rows()
    ]
    head = ("layer", "mutual information, bits", "normalised", "when domains are swapped, bits", "p")
    return ["## What one choice tells about the domain", "", *markdown(head, rows)]


def domains(strongest: dict[str, Relevance], effects: Effects) -> list[str]:
    """The strongest expert of each domain, and what its absence does."""
    rows = []
    for domain, x in strongest.items():
        one = effects[x.expert, domain]
        others = [effects[x.expert, y].effect.change.value for y in strongest if y != domain]
        rows.append(
            (
                domain,
                str(x.expert),
                f"{one.effect.share:.0%}",
                f"{x.others:.0%}",
                bounds(one.effect.change),
                f"{max(others):+.4f}",
                "-" if one.mean_random is None else f"{one.mean_random.value:+.4f}",
                "-" if one.mean_matched is None else f"{one.mean_matched.value:+.4f} ({one.matched_share:.0%})",
                "-" if one.excess is None else bounds(one.excess),
            )
        )
    head = (
        "domain", "strongest expert", "tokens that choose it", "elsewhere", "loss without it [95%]",
        "largest change elsewhere", "random experts", "nearest in frequency", "beyond those [95%]",
    )  # fmt: skip
    return ["## The strongest expert of each domain", "", *markdown(head, rows)]


def disagreements(effects: Effects, names: Sequence[str]) -> list[str]:
    """Where frequency and effect part: rank correlations, and the experts that are furthest apart."""
    rows = []
    for domain in names:
        here = [x for (_, name), x in effects.items() if name == domain]
        share, change = (
            np.array(x) for x in zip(*((y.effect.share, y.effect.change.value) for y in here), strict=True)
        )
        top = set(np.argsort(-share)[:SHOWN].tolist())
        harmful = set(np.argsort(-change)[:SHOWN].tolist())
        beyond = [x.excess for x in here if x.excess is not None]
        rows.append(
            (
                domain,
                f"{spearman(share, change):.2f}",
                f"{len(top & harmful)} of {SHOWN}",
                sum(x.low > 0 for x in beyond),
                sum(x.high < 0 for x in beyond),
                f"{len(beyond) * 0.025:.0f}",
            )
        )
    head = (
        "domain", "rank correlation of share and loss change",
        f"of the {SHOWN} most frequent, among the {SHOWN} that cost most", "cost more than the nearest in frequency",
        "cost less", "each expected by chance",
    )  # fmt: skip
    low, high = min(float(x[1]) for x in rows), max(float(x[1]) for x in rows)
    out = [
        "## Frequency against effect, all experts",
        "",
        f"Share of tokens and loss change agree in rank by {low:.2f} to {high:.2f}: being chosen says something about",
        "being needed, and far from all.",
        "",
        *markdown(head, rows),
        "",
    ]
    tested = list(effects.values())
    idle = [x for x in tested if x.effect.share > 0.3 and x.effect.change.low <= 0]
    out += ["Chosen by over 30% of a domain's tokens, and yet not surely of any use (the interval reaches 0):", ""]
    out += _list(sorted(idle, key=lambda x: -x.effect.share))
    heavy = [x for x in tested if x.effect.share < 0.15 and x.effect.change.low > 0]
    out += ["", "Chosen by under 15%, and yet among those that cost most:", ""]
    return out + _list(sorted(heavy, key=lambda x: -x.effect.change.value))


def _list(found: list[Tested]) -> list[str]:
    rows = [
        (str(x.experts[0]), x.domain, f"{x.effect.share:.0%}", bounds(x.effect.change), bounds(x.excess))
        for x in found[:SHOWN]
    ]
    return markdown(
        ("expert", "domain", "tokens that choose it", "loss without it [95%]", "beyond the nearest in frequency"), rows
    )


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation."""
    ranks = [np.argsort(np.argsort(x)) for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def bounds(value: Interval | None) -> str:
    """`+0.012 [+0.010, +0.015]`."""
    return "-" if value is None else f"{value.value:+.4f} [{value.low:+.4f}, {value.high:+.4f}]"


def markdown(head: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    """A table."""
    return [f"| {' | '.join(map(str, x))} |" for x in (head, ["---"] * len(head), *rows)]


def page(lines: list[str], tokens: int, found: Ablation) -> str:
    """The page in docs/."""
    sequences = next(iter(found.sequences.values()))
    loss = ", ".join(f"{name} {value.value:.2f}" for name, value in found.loss.items())
    return "\n".join(
        [
            "# What refmoe's experts are for",
            "",
            "Written by `python benchmarks/specialisation.py`. Experts are chosen on refmoe's calibration texts and",
            f"switched off on its held-out texts: {tokens:,} tokens ({sequences} sequences) of each domain. Loss",
            "changes are nats a token, with 95% intervals over sequences; nothing corrects them for looking at many",
            "experts. In brackets: the share of tokens that choose the controls, which cannot be near where no other",
            "expert of the layer is as frequent. Loss of the model as it is:",
            f"{loss}. What the columns mean: [ablate](../verbs/ablate.md), [ftri](../methods/ftri.md).",
            "",
            *lines,
            "",
        ]
    )


if __name__ == "__main__":
    main()
