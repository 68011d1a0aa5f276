"""collect(trace, ...) -> the report's payload: everything that its views show, as plain values and `Packed` arrays.

A view's key is absent where the trace (or what was given beside it) has not what the view needs. Every number comes
from `moekit.trace.tables`, or is a plain sum, share or coordinate of such numbers.

Symbols: N domains, L MoE layers, E the most experts that a layer has, P position buckets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moekit.methods import super_experts
from moekit.plans import Plan
from moekit.report import compare, structure, words
from moekit.report.pack import Packed
from moekit.report.source import Source
from moekit.trace import Trace, tables

SPECIALISTS = 12  # experts named for each domain
BALANCE = ("entropy", "gini", "max_over_mean", "never_used", "experts_for_70")


def collect(
    trace: Trace,
    *,
    against: Trace | None = None,
    plan: Plan | None = None,
    evaluation: Mapping[str, Any] | None = None,
    ablation: Mapping[str, Any] | None = None,
    unlearning: Mapping[str, Any] | None = None,
    steering: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that the report shows.

    Args:
        trace: of the model that the report is about.
        against: a trace of the model that it came from, on the same texts where it has tokens.
        plan: what made the one model out of the other, where experts were removed.
        evaluation: what `moekit eval --out` wrote.
        ablation: what `moekit ablate --out` wrote.
        unlearning: see `moekit.report.compare.unlearning`.
        steering: what `moekit steer test --out` wrote.

    Raises:
        DataError: a domain has no tokens, the traces do not belong together, or a file holds something else.
    """
    source = Source(trace)
    payload: dict[str, Any] = {
        "schema": 1,
        "title": f"What the experts of {trace.model} do",
        "summary": summary(source),
        "facts": facts(source),
        "layers": source.layers,
        "experts": source.experts,
        "top_k": source.top_k,
        "domains": source.domains,
        "tokens": source.tokens,
    }
    strings = words.Strings(trace)
    excerpts = words.Excerpts.of(source, words.TEXT_BYTES if against is None else words.TEXT_BYTES * 2 // 3)
    sections = {
        "usage": usage(source),
        "specialisation": specialisation(source),
        "balance": balance(source),
        "confidence": confidence(source),
        "super": peaks(source),
        "flow": structure.flow(source),
        "coactivation": structure.coactivation(source),
        "similarity": structure.similarity(source),
        "text": words.text(source, strings, excerpts),
        "cards": words.cards(source, strings),
        "ablation": ablation and compare.ablation(source, ablation),
        "against": compare.against(source, against, plan, evaluation, excerpts),
        "steering": steering and compare.steered(source, steering),
        "unlearning": unlearning and compare.unlearning(unlearning),
    }
    payload |= {name: section for name, section in sections.items() if section}
    return payload | {"strings": strings.texts}


def summary(source: Source) -> str:
    """One sentence on what was traced."""
    layout, trace = source.trace.layout, source.trace
    experts = " or ".join(str(x) for x in sorted(set(source.experts)))
    chosen = " or ".join(str(x) for x in sorted(set(source.top_k)))
    kept = "every token kept" if trace.has_tokens else "statistics only"
    return (
        f"A {layout.family} model with {len(source.layers)} MoE layers of {experts} experts, {chosen} of them chosen "
        f"for each token, on {sum(source.tokens):,} tokens of {len(source.domains)} "
        f"{'domain' if len(source.domains) == 1 else 'domains'} ({' and '.join(trace.phases)}; {kept})."
    )


def facts(source: Source) -> list[tuple[str, str]]:
    """What identifies the numbers: names and values."""
    head, layer = source.trace.head, source.moe[0]
    rows = [
        ("router", layer.router.describe()),
        ("shared experts", str(layer.shared_experts)),
        ("weights", source.trace.fingerprint),
        ("data", str(head.get("data", {}).get("hash", ""))),
        ("made with", ", ".join(f"{name} {version}" for name, version in head.get("versions", {}).items())),
    ]
    return [(name, value) for name, value in rows if value and value != "0"]


def usage(source: Source) -> dict[str, Any]:
    """View 1: shares by domain, layer and expert."""
    everyone = source.counts / max(sum(source.tokens), 1)
    return {
        "share": Packed(source.cube(tables.usage(source.trace), "share")),
        "all": Packed(everyone),
        "uniform": [k / e for k, e in zip(source.top_k, source.experts, strict=True)],
    }


def specialisation(source: Source) -> dict[str, Any] | None:
    """View 2: the experts that each domain uses most beyond the others, and what a choice tells about the domain."""
    if len(source.domains) < 2:
        return None
    table = tables.specialisation(source.trace)
    tokens = dict(zip(source.domains, source.tokens, strict=True))
    own = np.array([tokens[x] for x in table["domain"].tolist()])
    everyone = sum(source.tokens)
    elsewhere = (table["overall"] * everyone - table["count"]) / (everyone - own)
    rows = []
    for domain in source.domains:
        mine = np.flatnonzero(table["domain"] == domain)
        best = mine[np.argsort(elsewhere[mine] - table["share"][mine], kind="stable")[:SPECIALISTS]]
        for rank, row in enumerate(table.take(best).rows()):
            row |= {"l": source.layers.index(row["layer"]), "rank": rank, "elsewhere": float(elsewhere[best[rank]])}
            rows.append(row)
    information = tables.mutual_information(source.trace)
    bits = np.log2(len(source.domains))
    return {
        "rows": rows,
        "note": table.note,
        "information": {
            "observed": information["normalised"].tolist(),
            "null": (information["null_high"] / bits).tolist(),
            "note": information.note,
        },
    }


def balance(source: Source) -> dict[str, Any]:
    """View 6: by layer, for all domains together and for each."""
    found = [tables.balance(source.trace, domain) for domain in (None, *source.domains)]
    return {name: Packed(np.stack([table[name].astype(np.float64) for table in found])) for name in BALANCE}


def confidence(source: Source) -> dict[str, Any] | None:
    """View 7: margin and entropy [N, L, P] by phase and place in the sequence."""
    if not source.has("margin"):
        return None
    found = [tables.confidence(source.trace, domain) for domain in source.domains]
    first = sorted({int(x) for table in found for x in table["first"]})
    last = {int(a): int(b) for table in found for a, b in zip(table["first"], table["last"], strict=True)}
    phases = []
    for phase in source.trace.phases:
        values = {name: np.full((len(found), len(source.layers), len(first)), np.nan) for name in ("margin", "entropy")}
        for n, table in enumerate(found):
            mine = table.where(phase=phase)
            i = np.searchsorted(source.layers, mine["layer"])
            p = np.searchsorted(first, mine["first"])
            for name, array in values.items():
                array[n, i, p] = mine[name]
        phases.append(
            {"name": phase} | {name: Packed(array, 16 if array.size < 2_000 else 8) for name, array in values.items()}
        )
    return {"positions": [str(x) if x == last[x] else f"{x}–{last[x]}" for x in first], "phases": phases}


def peaks(source: Source) -> dict[str, Any] | None:
    """View 10: the largest element of each expert's output, and which experts are super by the rule of the method."""
    if not source.has("peak"):
        return None
    peak = np.full((len(source.layers), source.width), np.nan)
    for i, index in enumerate(source.layers):
        peak[i, : source.experts[i]] = source.stats.get("peak", index)
    named = sorted(super_experts(source.stats, source.trace.layout))
    return {"peak": Packed(peak, log=True), "named": [(source.layers.index(x.layer), x.expert) for x in named]}
