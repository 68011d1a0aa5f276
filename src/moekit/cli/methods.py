"""moekit methods: what there is to choose from."""

from __future__ import annotations

import typer
from rich.markup import escape

from moekit.cli.screen import console, table


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("methods")(methods)


def methods() -> None:
    """List the methods: what each does, its paper (baselines have none) and its options."""
    from moekit.methods import get, names

    found = [get(name) for name in names()]
    rows = [
        (
            x.name,
            x.kind,
            x.summary + (f"\n[dim]{escape(x.paper)}[/]" if x.paper else ""),
            ", ".join(f"{key}={value}" for key, value in x.options.items()) or "-",
        )
        for x in found
    ]
    drawn = table("", ("method", "kind", "what it does, and its paper", "options"), rows)
    for column in drawn.columns:
        column.justify = "left"
    console().print(drawn)
