"""The last line of every benchmark: one JSON object that says what was hoped for, what was measured, what was met."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from operator import ge, le
from typing import Any

HOLDS = {"<=": le, ">=": ge}


def finish(name: str, goals: Mapping[str, tuple[float, float, str]], **extra: Any) -> dict[str, Any]:
    """Print the goals of a benchmark as one JSON line, to be called last.

    Args:
        name: of the benchmark.
        goals: (value, goal, "<=" or ">=") by name; a value that is not finite is never met, and is printed as null.
        extra: anything else that a reader needs: sizes, conditions, single times.

    Returns:
        What was printed.
    """
    rows = {}
    for goal, (value, bound, sign) in goals.items():
        value = float(value)
        finite = math.isfinite(value)
        met = finite and HOLDS[sign](value, bound)
        rows[goal] = {"value": float(f"{value:.4g}") if finite else None, "goal": bound, "sign": sign, "met": met}
    line = {"benchmark": name, "goals": rows, **extra}
    print(json.dumps(line), flush=True)
    return line
