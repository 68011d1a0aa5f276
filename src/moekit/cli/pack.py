"""moekit pack: a checkpoint made an expert store, to be run in less memory than it needs."""

from __future__ import annotations

from pathlib import Path

import typer

from moekit.cli.screen import bars, console


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("pack")(pack)


def pack(
    model: str = typer.Argument(help="A folder, a hub id, or refmoe."),
    out: Path = typer.Option(..., help="The folder to make."),
    bits: int = typer.Option(16, help="Of experts' weights: 16 keeps every number, 8 and 4 round to nearest."),
    overwrite: bool = typer.Option(False, help="Replace what lies in the output folder."),
    trust_remote_code: bool = typer.Option(False, help="Allow code that the checkpoint brings along."),
) -> None:
    """Pack a model into an expert store: one read an expert, everything else beside it.

    One layer is in memory at a time. An interrupted run goes on when the same command is given again.
    """
    import moekit
    from moekit.recipe import format_bytes
    from moekit.serve.packing import pack as run
    from moekit.serve.store import ExpertStore

    opened = moekit.open(model, trust_remote_code=trust_remote_code)
    with bars() as progress:
        path = run(opened, out, bits=bits, overwrite=overwrite, progress=progress)
    store = ExpertStore(path)
    count = sum(len(layer.offsets) for layer in store.layers.values())
    kept = "every number kept" if store.lossless else f"rounded to {bits} bits"
    console().print(
        f"[bold]{path}[/]: {count:,} experts in {format_bytes(store.expert_bytes)} ({kept}), "
        f"{format_bytes(store.rest_bytes)} of everything else"
    )
    console().print(f'  run it: moekit run {out} --memory 2GiB --prompt "..."')
