"""moekit ftri: the experts that light up on one kind of prompts and not on the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import typer

from moekit.cli.screen import console, table


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("ftri")(ftri)


def ftri(
    source: Path = typer.Argument(help="A trace, or statistics of `moekit measure`, with a domain for each kind."),
    of: str | None = typer.Option(
        None, help="The kind of prompts.  [default: whichever an expert is most relevant for]"
    ),
    against: list[str] = typer.Option([], help="The kinds to compare with; several.  [default: all others]"),
    top: int = typer.Option(10, min=1, help="How many experts."),
    by: Literal["share", "mass"] = typer.Option("share", help="Share of tokens that choose an expert, or its weight."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of a table."),
) -> None:
    """Find the experts that are active in one kind of prompts and not in others (functional token resonance imaging).

    Activity is averaged over each prompt's tokens, then over the prompts of a kind; relevance is the difference, with
    a 95% interval over prompts. Test what you find: `moekit ablate MODEL --from-trace SOURCE top:10:KIND`.
    """
    from moekit.cli.source import statistics
    from moekit.methods.ftri import ftri as run

    stats = statistics(source)
    found = run(stats, stats.layout, of, against or None, top=top, by=by)
    if as_json:
        typer.echo(json.dumps([x._asdict() | {"expert": str(x.expert)} for x in found], indent=1))
        return
    rows = [
        (x.expert, x.domain, f"{x.rate:.3f}", f"{x.others:.3f}", f"{x.difference:+.3f} [{x.low:+.3f}, {x.high:+.3f}]")
        for x in found
    ]
    console().print(table("", ("expert", "kind", "in it", "in others", "relevance [95%]"), rows))
    prompts = ", ".join(f"{name} {count}" for name, count in zip(stats.domains, stats.sequences.tolist(), strict=True))
    console().print(f"activity by {by}; prompts: {prompts}")
