"""moekit eval: perplexity by domain, how far a model is from another, and scores of tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from moekit.cli.compress import evaluation_table
from moekit.cli.screen import bars, check_file, console, table
from moekit.errors import RecipeError


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("eval")(evaluate)


def evaluate(
    model: str = typer.Argument(help="A folder, a hub id, or refmoe."),
    data: list[str] = typer.Option([], help="Text, NAME=PATH; may be given several times."),
    tasks: list[str] = typer.Option([], help="Tasks of lm-evaluation-harness, A,B; may be given several times."),
    task_folder: Path | None = typer.Option(None, help="YAML files with tasks of your own."),
    limit: int | None = typer.Option(None, help="Documents of each task, at most.  [default: all]"),
    num_fewshot: int | None = typer.Option(None, help="Examples before each question.  [default: the task's]"),
    batch_size: int = typer.Option(8, help="Sequences at once in tasks, for a model in memory."),
    against: str | None = typer.Option(None, help="A source model to compare with."),
    plan: Path | None = typer.Option(None, help="A plan (JSON) to apply live; compared with the model without it."),
    tokens: int = typer.Option(16_384, help="Tokens of each domain."),
    sequence_length: int = typer.Option(512, help="Tokens of a sequence."),
    device: str = typer.Option("cpu", help="cpu or cuda."),
    out: Path | None = typer.Option(None, help="Also write the numbers as JSON."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of a table."),
    trust_remote_code: bool = typer.Option(False, help="Allow code that the checkpoint brings along."),
) -> None:
    """Score a model on text, layer by layer, with 95% intervals over sequences; and on tasks, with standard errors."""
    import moekit
    from moekit.plans import Plan

    names = [name for item in tasks for name in item.split(",") if name]
    if not data and not names:
        raise RecipeError(
            "--data or --tasks must be given",
            where=f"moekit eval {model}",
            fix=f"e.g. moekit eval {model} --data mine=texts/, or moekit eval {model} --tasks arc_easy",
        )
    if out:
        check_file(out)
    opened = moekit.open(model, trust_remote_code=trust_remote_code)
    source = moekit.open(against, trust_remote_code=trust_remote_code) if against else None
    live = Plan.load(plan) if plan else None
    if live:
        live.check(opened.layout)
    found: dict[str, Any] = {}
    shown: list[object] = []
    with bars() as progress:
        if names:
            from moekit.evaluation.tasks import run_tasks

            scores = run_tasks(
                opened,
                names,
                task_folder=task_folder,
                limit=limit,
                num_fewshot=num_fewshot,
                against=source,
                plan=live,
                batch_size=batch_size,
                device=device,
                progress=progress,
            )
            found["tasks"] = scores.to_dict()
            shown.append(_task_table(*scores.rows()))
        if data:
            texts = moekit.load_data(opened, data, tokens=tokens, sequence_length=sequence_length)
            evaluation = moekit.evaluate(
                opened, data=texts, against=source, plan=live, device=device, progress=progress
            )
            found = evaluation.to_dict() | found
            shown.insert(0, evaluation_table(evaluation))
    if out:
        out.write_text(json.dumps(found, indent=1))
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    for number, drawn in enumerate(shown):
        if number:
            console().print()
        console().print(drawn)


def _task_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> object:
    drawn = table("", columns, rows)
    drawn.columns[1].justify = "left"
    return drawn
