"""moekit figure: a figure of a trace for a paper."""

from __future__ import annotations

from pathlib import Path

import typer

from moekit.cli.screen import console


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("figure")(figure)


def figure(
    trace: Path = typer.Argument(help="A folder that `moekit trace` wrote."),
    kind: str = typer.Argument(help="heatmap, specialisation, flow or balance."),
    out: Path = typer.Option(..., help="The file: .svg, .pdf or .png."),
    domain: str | None = typer.Option(None, help="One domain instead of all (heatmap, specialisation, flow)."),
    layer: int | None = typer.Option(None, help="Decoder layer with which the flow begins.  [default: the first]"),
) -> None:
    """Draw a figure for a paper: page-wide, 8 pt, text as text (needs matplotlib: the extra `viz`)."""
    from moekit.report.figures import save
    from moekit.trace import Trace

    console().print(save(Trace.open(trace), kind, out, domain=domain, first=layer))
