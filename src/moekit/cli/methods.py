"""moekit methods: what there is to choose from."""

from __future__ import annotations

import typer

from moekit.cli.screen import console, table


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("methods")(methods)


def methods() -> None:
    """List the methods: what each does, its options and its paper."""
    from moekit.methods import get, names

    found = [get(name) for name in names()]
    rows = [
        (x.name, x.kind, x.summary, ", ".join(f"{key}={value}" for key, value in x.options.items()) or "-")
        for x in found
    ]
    drawn = table("", ("method", "kind", "what it does", "options"), rows)
    for column in drawn.columns:
        column.justify = "left"
    console().print(drawn)
