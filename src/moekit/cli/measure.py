"""moekit measure: take statistics once, for several methods and tables."""

from __future__ import annotations

from pathlib import Path

import typer

from moekit.cli.screen import bars, console


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("measure")(measure)


def measure(
    model: str = typer.Argument(help="A folder, a hub id, or refmoe."),
    data: list[str] = typer.Option(..., help="Text, NAME=PATH; may be given several times."),
    out: Path = typer.Option(..., help="The folder of the statistics; what lies there of the same kind is added to."),
    tokens: int = typer.Option(65_536, help="Tokens of each domain."),
    sequence_length: int = typer.Option(512, help="Tokens of a sequence."),
    seed: int = typer.Option(0, help="Which part of a longer text is taken."),
    device: str = typer.Option("cpu", help="cpu or cuda."),
    add: bool = typer.Option(False, help="Add to the statistics that lie in the folder."),
    trust_remote_code: bool = typer.Option(False, help="Allow code that the checkpoint brings along."),
) -> None:
    """Take every statistic in one streamed pass and keep it, for `moekit compress --stats` and the Python API."""
    import moekit
    from moekit.errors import DataError, OutputError, PlanError
    from moekit.stats import Stats

    old = None
    Stats.check_place(out)
    if (out / "stats.json").exists():
        if not add:
            raise OutputError("the folder holds statistics already", where=out, fix="pass --add, or choose another")
        old = Stats.load(out)
    opened = moekit.open(model, trust_remote_code=trust_remote_code)
    texts = moekit.load_data(opened, data, tokens=tokens, sequence_length=sequence_length, seed=seed)
    for part in old.parts if old else ():
        if part.get("fingerprint") != opened.fingerprint:
            raise PlanError("the folder holds statistics of another model", where=out, fix="choose another folder")
        if part["data"]["hash"] == texts.hash:
            raise DataError("the folder's statistics hold this very text already", where=out, fix="give other text")
    work = out.with_name(out.name + ".work")
    with bars() as progress:
        stats = moekit.measure(opened, texts, device=device, workdir=work, progress=progress)
    (old + stats if old else stats).save(out)
    counted = ", ".join(f"{name} {count:,}" for name, count in texts.tokens.items())
    console().print(f"{out}: {len(stats.layers)} MoE layers; tokens: {counted}")
