"""moekit report: one self-contained web page of a trace, and all of its numbers as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from moekit.cli.screen import console
from moekit.recipe import format_bytes

AGAINST = typer.Option(None, help="A trace of the model that this one was made from: before and after.")
PLAN = typer.Option(None, help="The plan that removed experts from the one to make the other (its plan.json).")
EVALUATION = typer.Option(None, help="What `moekit eval --out` wrote: divergence and perplexity.")
ABLATION = typer.Option(None, help="What `moekit ablate --out` wrote: the loss without experts.")
UNLEARNING = typer.Option(None, help="Scores of an unlearning run (see the verb's page for the format).")

STEERING = typer.Option(None, help="What `moekit steer test --out` wrote: a plan that was tested.")


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("report")(report)


def report(
    trace: Path = typer.Argument(help="A folder that `moekit trace` wrote."),
    out: Path = typer.Option(Path("report.html"), help="The page; its numbers go beside it, as .json."),
    against: Path | None = AGAINST,
    plan: Path | None = PLAN,
    evaluation: Path | None = EVALUATION,
    ablation: Path | None = ABLATION,
    unlearning: Path | None = UNLEARNING,
    steering: Path | None = STEERING,
) -> None:
    """Make a web page of what experts do: one file that works offline, prints, and can be sent to others."""
    from moekit.report import write

    page, numbers = write(payload(trace, against, plan, evaluation, ablation, unlearning, steering), out)
    for file, what in ((page, "open it in a browser"), (numbers, "every number of the page")):
        console().print(f"{file}  {format_bytes(file.stat().st_size)}  ({what})")


def payload(
    trace: Path,
    against: Path | None,
    plan: Path | None,
    evaluation: Path | None,
    ablation: Path | None,
    unlearning: Path | None,
    steering: Path | None = None,
) -> dict[str, Any]:
    """What the options name, gathered for the page.

    Raises:
        UserError: see `moekit.report.collect`.
    """
    from moekit.plans import Plan
    from moekit.report import collect, read_json
    from moekit.trace import Trace

    return collect(
        Trace.open(trace),
        against=Trace.open(against) if against else None,
        plan=Plan.load(plan) if plan else None,
        evaluation=read_json(evaluation) if evaluation else None,
        ablation=read_json(ablation) if ablation else None,
        unlearning=read_json(unlearning) if unlearning else None,
        steering=read_json(steering) if steering else None,
    )
