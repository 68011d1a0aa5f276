"""The report's views of change: against another trace, without an expert, and through an unlearning run.

"Before" is the trace compared with, "after" the trace that the report is about; where experts were removed, all numbers
of experts are those of the model before.

Symbols: N domains, L MoE layers, E experts, T tokens, S sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moekit.errors import DataError
from moekit.plans import Plan
from moekit.report.pack import Packed
from moekit.report.source import Source
from moekit.report.steering import steering
from moekit.report.words import Excerpts
from moekit.trace import Trace, resample, tables
from moekit.trace.overlap import common

RESAMPLES = 1000
FLIPS, WORDS_BEFORE = 30, 12  # flipped tokens named, and the tokens shown before each

Kept = dict[int, Sequence[int]]


def against(
    source: Source,
    before: Trace | None,
    plan: Plan | None,
    evaluation: Mapping[str, Any] | None,
    excerpts: Excerpts | None,
) -> dict[str, Any] | None:
    """View 11: what changed between two models.

    Raises:
        DataError: the traces have other layers, no domain in common, or other numbers of experts and no plan.
        PlanError: the plan is not one for the model before.
    """
    if before is None:
        return {"domains": scores(evaluation), "how": HOW_EVALUATION} if evaluation else None
    old = Source(before)
    kept = _kept(source, old, plan)
    same = _same_tokens(source.trace, before)
    out: dict[str, Any] = {
        "name": before.model,
        "renumbered": plan is not None,
        "how": HOW + (HOW_SAME if same else ""),
    }
    out |= _use(source, old, kept)
    if same and excerpts:
        out |= _choices(source, old, kept, excerpts.rows)
    out["domains"] = scores(evaluation) if evaluation else _predictions(source, before) if same else []
    return out


HOW = (
    "Same use: the sum over experts of the smaller of the two shares of all choices, 1 where both use all alike; "
    "change of use: share of a domain's tokens after minus before, in percentage points."
)
HOW_SAME = (
    " Same experts: the mean share of a token's experts that both models chose (router saturation); flipped: tokens "
    "after which the likeliest next token is another one; intervals (95%) are bootstrapped over sequences."
)
HOW_EVALUATION = "Scores on held-out text by moekit eval; intervals (95%) are bootstrapped over sequences."


def _kept(after: Source, before: Source, plan: Plan | None) -> Kept:
    """By layer, the number before of each expert after."""
    if after.layers != before.layers:
        raise DataError(
            "the two models have other MoE layers", where=before.trace.path, expected=after.layers, got=before.layers
        )
    if not set(after.domains) & set(before.domains):
        raise DataError(
            "the two traces have no domain in common",
            where=before.trace.path,
            expected=", ".join(after.domains),
            got=", ".join(before.domains),
            fix="record both with the same --data",
        )
    if plan is not None:
        plan.check(before.trace.layout)
    kept: Kept = {layer.index: plan.kept(layer) if plan else range(layer.num_experts) for layer in before.moe}
    for index, experts in zip(after.layers, after.experts, strict=True):
        if len(kept[index]) != experts:
            raise DataError(
                f"the models have other numbers of experts in layer {index}",
                expected=f"{experts} experts left of {before.trace.moe_layer(index).num_experts}",
                got=f"{len(kept[index])} by the plan" if plan else "no plan that says which",
                fix="give the plan that removed them: --plan PLAN.json (plan.json in the smaller model's folder)",
            )
    return kept


def _same_tokens(one: Trace, other: Trace) -> bool:
    if not (one.has_tokens and other.has_tokens) or one.domains != other.domains:
        return False
    mine, theirs = one.tokens(), other.tokens()
    return all(np.array_equal(mine[name], theirs[name]) for name in ("id", "sequence", "position"))


def _use(after: Source, before: Source, kept: Kept) -> dict[str, Any]:
    """Overlap of the use of experts by layer [L], and the change of each expert's share [N, L, E]."""
    counts = _moved(after.counts[None], kept, before)[0]
    shares = [x / np.nansum(x, 1, keepdims=True) for x in (counts, before.counts)]
    new = _moved(after.cube(tables.usage(after.trace), "share"), kept, before)
    old = before.cube(tables.usage(before.trace), "share")
    change = np.full((len(after.domains), *old.shape[1:]), np.nan)
    for n, domain in enumerate(after.domains):
        if domain in before.domains:
            change[n] = new[n] - old[before.domains.index(domain)]
    return {
        "usage": np.nansum(np.minimum(*shares), 1).tolist(),
        "change": Packed(change, 16 if change.size < 10_000 else 8),
        "limit": float(np.nanquantile(np.abs(change), 0.995)) or 0.01,
    }


def _moved(values_NLE: np.ndarray, kept: Kept, before: Source) -> np.ndarray:
    """Values by expert after, put where the experts were before; 0 for removed ones."""
    out = np.full((*values_NLE.shape[:2], before.width), np.nan)
    for i, index in enumerate(before.layers):
        out[:, i, : before.experts[i]] = 0.0
        out[:, i, list(kept[index])] = values_NLE[:, i, : len(kept[index])]
    return out


def _choices(after: Source, before: Source, kept: Kept, rows: np.ndarray) -> dict[str, Any]:
    """Overlap of the choices for a token: by layer, for all domains and each [1 + N, L]; of the tokens shown [T, L]."""
    table = tables.saturation(before.trace, after.trace, renumbered=kept)
    by_domain = np.stack([table.where(domain=domain)["overlap"] for domain in after.domains])
    shown = np.stack(
        [
            common(np.asarray(old.ids)[rows], np.asarray(new.ids)[rows], old.num_experts, np.asarray(kept[old.index]))
            / old.top_k
            for old, new in ((before.trace.layer(i), after.trace.layer(i)) for i in after.layers)
        ],
        1,
    )
    overall = np.average(by_domain, axis=0, weights=after.tokens)
    flips = _flips(after.trace, before.trace)
    return {"overlap": Packed(np.vstack([overall, by_domain])), "text_overlap": Packed(shown, 8), "flips": flips}


def _flips(after: Trace, before: Trace) -> list[dict[str, Any]]:
    """The flipped tokens that cost most: what came before, what came, what each model found likeliest."""
    new, old = after.tokens(), before.tokens()
    worse = np.asarray(new["loss"], np.float64) - np.asarray(old["loss"], np.float64)
    flipped = np.flatnonzero((np.asarray(new["predicted"]) != np.asarray(old["predicted"])) & np.isfinite(worse))
    found = []
    for row in flipped[np.argsort(-worse[flipped], kind="stable")[:FLIPS]].tolist():
        start = max(row - WORDS_BEFORE + 1, row - int(new["position"][row]))
        found.append(
            {
                "domain": after.head["domains"][int(new["domain"][row])],
                "context": "".join(after.text(new["id"][start : row + 1])),
                "next": after.text(new["id"][row + 1 : row + 2])[0],
                "before": before.text(old["predicted"][row : row + 1])[0],
                "after": after.text(new["predicted"][row : row + 1])[0],
                "loss": float(worse[row]),
            }
        )
    return found


def _predictions(source: Source, before: Trace) -> list[dict[str, Any]]:
    """By domain: perplexity, its ratio to that before, and flipped tokens, each [value, low, high]."""
    new, old = source.trace.tokens(), before.tokens()
    sequences = resample.Sequences.of(source.trace)
    losses = [np.asarray(x["loss"], np.float64) for x in (new, old)]
    scored = np.isfinite(losses[0]) & np.isfinite(losses[1])
    flipped = np.asarray(new["predicted"]) != np.asarray(old["predicted"])

    def sums(values_T: np.ndarray) -> np.ndarray:
        return np.bincount(sequences.number, weights=values_T, minlength=len(sequences.tokens))

    columns: dict[str, tuple[np.ndarray, np.ndarray, Any]] = {
        "perplexity": (sums(np.where(scored, losses[0], 0)), sums(scored), np.exp),
        "ratio": (sums(np.where(scored, losses[0] - losses[1], 0)), sums(scored), np.exp),
        "flipped": (sums(flipped), sequences.tokens, np.asarray),
    }
    rng = np.random.default_rng(0)
    found: list[dict[str, Any]] = []
    for n, domain in enumerate(source.domains):
        mine = np.flatnonzero(sequences.domain == n)
        draws = resample.draws(len(mine), RESAMPLES, rng)
        row: dict[str, Any] = {"domain": domain, "tokens": int(sums(scored)[mine].sum())}
        for name, (top, bottom, shown) in columns.items():
            value = top[mine].sum() / max(bottom[mine].sum(), 1)
            low, high = resample.bootstrap(top[mine, None], bottom[mine], draws)[:, 0]
            row[name] = shown(np.array([value, low, high])).tolist()
        found.append(row)
    return found


def scores(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows by domain out of what `moekit eval --out` wrote.

    Raises:
        DataError: it is something else.
    """
    rows = []
    try:
        for domain, score in evaluation["domains"].items():
            row = {"domain": domain, "tokens": int(score["tokens"])}
            row |= {name: score[name] and [float(x) for x in score[name]] for name in ("perplexity", "ratio", "kl")}
            agree = score["agreement"]
            rows.append(row | {"flipped": agree and [1 - agree[0], 1 - agree[2], 1 - agree[1]]})
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise DataError(
            "this is no evaluation",
            expected="what moekit eval --out writes",
            got=f"{type(error).__name__}: {error}"[:200],
        ) from None
    return rows


def ablation(source: Source, result: Mapping[str, Any]) -> dict[str, Any]:
    """The change of loss without experts beside that without their controls, out of what `moekit ablate --out` wrote.

    Raises:
        DataError: it is something else, or of another model.
    """
    try:
        if result["fingerprint"] != source.trace.fingerprint:
            raise DataError(
                "the ablation is of another model",
                expected=f"{source.trace.model}, fingerprint {source.trace.fingerprint}",
                got=f"{result['model']}, fingerprint {result['fingerprint']}",
                fix="ablate experts of the model that was traced",
            )
        names = ("experts", "domain", "share", "touched", "change", "low", "high", "random", "matched", "excess")
        rows = [{name: row[name] for name in names} for row in result["rows"] if row["control"] is None]
        how = str(result["how"])
        place = {f"{index}.{expert}": (i, expert) for i, index, expert in _experts(source)}
        rows = [row | {"at": place.get(row["experts"])} for row in rows]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            "this is no ablation", expected="what moekit ablate --out writes", got=f"{type(error).__name__}: {error}"
        ) from None
    return {"rows": rows, "how": how}


def steered(source: Source, result: Mapping[str, Any]) -> dict[str, Any]:
    """A steering plan that was tested, out of what `moekit steer test --out` wrote.

    Raises:
        DataError: it is something else, or of another model.
    """
    if result.get("fingerprint") != source.trace.fingerprint:
        raise DataError(
            "the steering plan was tested on another model",
            expected=f"{source.trace.model}, fingerprint {source.trace.fingerprint}",
            got=f"{result.get('model')}, fingerprint {result.get('fingerprint')}",
            fix="test it on the model that was traced",
        )
    return steering(result, source.layers, source.experts)


def _experts(source: Source) -> list[tuple[int, int, int]]:
    return [(i, index, e) for i, index in enumerate(source.layers) for e in range(source.experts[i])]


def unlearning(run: Mapping[str, Any]) -> dict[str, Any]:
    """View 12: `{"rows": [{"step": 0, "forget": 0.7, "utility": 0.6, "overlap": 1.0}, ...]}`.

    forget: score on what should be forgotten; utility: score on what should stay; overlap: mean share of a token's
    experts that the model before chose too. A number may be null.

    Raises:
        DataError: it is something else.
    """
    names = ("forget", "utility", "overlap")
    try:
        rows = [
            {"step": str(row["step"])} | {name: None if row[name] is None else float(row[name]) for name in names}
            for row in run["rows"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            "this is no unlearning run",
            expected='{"rows": [{"step", "forget", "utility", "overlap"}, ...]}',
            got=f"{type(error).__name__}: {error}"[:200],
        ) from None
    return {"rows": rows, "how": str(run.get("how", "Scores and routing overlap as the run wrote them."))}
