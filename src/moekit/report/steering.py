"""The report's view of a steering plan: where its experts are, side effects and effect, dose and response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moekit.errors import DataError
from moekit.report.pack import Packed

WORDS = {"scale": "weight times", "bias": "logit plus"}


def steering(result: Mapping[str, Any], layers: Sequence[int], experts: Sequence[int]) -> dict[str, Any]:
    """What the view shows, out of what `moekit steer test --out` wrote.

    Args:
        result: of `moekit.steering.Assessment.to_dict`.
        layers: decoder layer index of each MoE layer.
        experts: number of experts of each.

    Raises:
        DataError: it is something else.
    """
    try:
        score, place = result["plan"]["score"], {index: i for i, index in enumerate(layers)}
        grid = np.full((len(layers), max(experts)), np.nan)
        ops = []
        for op in result["plan"]["ops"]:
            i, e = place[op["layer"]], op["expert"]
            value = score.get(f"{op['layer']}.{e}")
            grid[i, e] = 1.0 if value is None else value
            ops.append({"l": i, "e": e, "what": _words(op), "where": _part(op["scope"]), "score": value})
        domains = [{"name": name, **about} for name, about in result["domains"].items()]
        domains.sort(key=lambda x: x["role"] != "elsewhere")  # side effects first
        doses = [{name: dose[name] for name in ("number", "strength", "domains")} for dose in result["doses"]]
        return {
            "how": str(result["how"]),
            "method": str(result["plan"]["method"]),
            "notes": [str(x) for x in result["plan"]["notes"]],
            "grid": Packed(grid),
            "limit": float(np.nanmax(np.abs(grid))) or 1.0,
            "ops": ops,
            "domains": domains,
            "doses": doses,
            "answers": result["answers"],
        }
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise DataError(
            "this is no test of a steering plan",
            expected="what moekit steer test --out writes",
            got=f"{type(error).__name__}: {error}",
        ) from None


def steering_page(result: Mapping[str, Any]) -> dict[str, Any]:
    """The payload of a page of its own, for `moekit.report.write`.

    Raises:
        DataError: it is something else.
    """
    try:
        layers = [x["index"] for x in result["layers"]]
        experts = [x["experts"] for x in result["layers"]]
        method, model = result["plan"]["method"] or "hand", result["model"]
        tokens = {name: x["tokens"] for name, x in result["domains"].items()}
        facts = [("weights", result["fingerprint"]), ("data", result["data"]["hash"]), ("family", result["family"])]
        top_k = [x["top_k"] for x in result["layers"]]
    except (KeyError, TypeError) as error:
        raise DataError("this is no test of a steering plan", got=f"{type(error).__name__}: {error}") from None
    count = len(result["plan"]["ops"])
    return {
        "schema": 1,
        "title": f"What a steering plan does to {model}",
        "summary": f"A plan by {method} that changes {count} of {sum(experts)} experts, tested on "
        f"{sum(tokens.values()):,} tokens of {len(tokens)} domains.",
        "facts": facts,
        "layers": layers,
        "experts": experts,
        "top_k": top_k,
        "domains": list(tokens),
        "tokens": list(tokens.values()),
        "strings": [],
        "steering": steering(result, layers, experts),
    }


def _words(op: Mapping[str, Any]) -> str:
    if op["action"] in WORDS:
        said = f"{WORDS[op['action']]} {op['strength']:g}"
        return said + (", the rest keep the sum" if op["renormalise"] else "")
    return f"swap with {op['partner']}" if op["action"] == "swap" else str(op["action"])


def _part(scope: Mapping[str, Any]) -> str:
    if scope["part"] != "span":
        return str(scope["part"])
    return f"places {scope['start']} to {'the end' if scope['end'] is None else scope['end'] - 1}"
