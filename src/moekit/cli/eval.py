"""moekit eval: perplexity by domain, and how far a model is from another."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from moekit.cli.compress import evaluation_table
from moekit.cli.screen import bars, check_file, console


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("eval")(evaluate)


def evaluate(
    model: str = typer.Argument(help="A folder, a hub id, or refmoe."),
    data: list[str] = typer.Option(..., help="Text, NAME=PATH; may be given several times."),
    against: str | None = typer.Option(None, help="A source model to compare with: KL divergence and agreement."),
    tokens: int = typer.Option(16_384, help="Tokens of each domain."),
    sequence_length: int = typer.Option(512, help="Tokens of a sequence."),
    device: str = typer.Option("cpu", help="cpu or cuda."),
    out: Path | None = typer.Option(None, help="Also write the numbers as JSON."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of a table."),
    trust_remote_code: bool = typer.Option(False, help="Allow code that the checkpoint brings along."),
) -> None:
    """Score a model on text, layer by layer, with 95% intervals over sequences."""
    import moekit

    if out:
        check_file(out)
    opened = moekit.open(model, trust_remote_code=trust_remote_code)
    source = moekit.open(against, trust_remote_code=trust_remote_code) if against else None
    texts = moekit.load_data(opened, data, tokens=tokens, sequence_length=sequence_length)
    with bars() as progress:
        found = moekit.evaluate(opened, data=texts, against=source, device=device, progress=progress)
    if out:
        found.save(out)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=1))
    else:
        console().print(evaluation_table(found))
