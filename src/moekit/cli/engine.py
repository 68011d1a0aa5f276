"""What `run` and `serve` share: options of the engine, and plans that are checked before a model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from moekit.plans import Plan
    from moekit.serve.engine import Engine

MEMORY: Any = typer.Option(None, help="Of the whole process, as 2GiB.  [default: as much as all experts need]")
CONTEXT: Any = typer.Option(2048, min=16, help="Tokens of prompt and answer together, at most.")
POLICY: Any = typer.Option("reuse", help="Which experts stay in memory; auto: the best one for --trace.")
PREDICTOR: Any = typer.Option("none", help="What tells the next layer's experts, which are then read ahead.")
TRACE: Any = typer.Option(None, help="A folder of `moekit trace --tokens`, for policy and predictor to learn from.")
LOSSY: Any = typer.Option(
    None, help="Read less, and lose something: drop=0.5,adaptive-k=0.95,substitute=0.5,odp=PLAN, each or some."
)
DEVICE: Any = typer.Option("cpu", help="Where to compute; on cuda, --memory is the GPU's.")
FAST: Any = typer.Option(False, "--fast", help="Sum 16-bit products in another order than transformers, faster.")


def open_engine(
    store: Path,
    plans: dict[str, Plan],
    lossy: str | None,
    fast: bool,
    **settings: Any,
) -> Engine:
    """An engine, after everything that needs no loaded model has been checked.

    Args:
        store: the folder.
        plans: that will be applied, by name.
        lossy: as `Lossy.parse` reads it.
        fast: not bit for bit transformers' numbers.
        settings: of `Engine`.

    Raises:
        CheckpointError: no store, or a damaged one.
        PlanError: a plan for another model.
    """
    from moekit.serve.engine import Engine
    from moekit.serve.lossy import Lossy
    from moekit.serve.store import ExpertStore

    losses = None if lossy is None else Lossy.parse(lossy)
    opened = ExpertStore(store)
    for plan in plans.values():
        plan.check(opened.layout)
    return Engine(opened, lossy=losses, exact=False if fast else None, **settings)
