"""moekit doctor: can this machine run models from a store?"""

from __future__ import annotations

import json

import typer

from moekit.cli.screen import console

COLOURS = {"good": "green", "note": "yellow", "broken": "red"}


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("doctor")(doctor)


def doctor(
    place: str = typer.Argument("", metavar="[STORE|MODEL]", help="A store or a model to look at as well."),
    as_json: bool = typer.Option(False, "--json", help="Print the findings as JSON."),
) -> None:
    """Look at this machine and run a real expert; exit code 1 if something that is needed does not work."""
    from dataclasses import asdict

    from rich.markup import escape

    from moekit.serve.checkup import BROKEN, Check, checkup

    found: list[Check] = []
    out = console()
    for check in checkup(place):
        found.append(check)
        if not as_json:
            out.print(f"[{COLOURS[check.state]}]{check.state:<7}[/]{escape(check.name):<16}{escape(check.says)}")
    broken = [x.name for x in found if x.state == BROKEN]
    if as_json:
        typer.echo(json.dumps({"healthy": not broken, "checks": [asdict(x) for x in found]}, indent=1))
    elif broken:
        out.print(f"[red]broken: {escape(', '.join(broken))}[/]")
    if broken:
        raise typer.Exit(1)
