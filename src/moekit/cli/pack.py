"""moekit pack: a checkpoint made an expert store, to be run in less memory than it needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from moekit.cli.screen import bars, console
from moekit.errors import RecipeError

if TYPE_CHECKING:
    from moekit.families.model import Model
    from moekit.serve.store import ExpertStore


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("pack")(pack)


def pack(
    model: str = typer.Argument(help="A folder, a hub id, or refmoe."),
    out: Path = typer.Option(..., help="The folder to make."),
    bits: str = typer.Option(
        "16", help="Of experts' weights: 16 keeps every number, 8 and 4 round to nearest, mixed: each expert its own."
    ),
    rest_bits: int = typer.Option(
        16,
        help="Of the other matrices: 16 keeps every number, 8 and 4 round to nearest; the vocabulary's gets 8.",
    ),
    plan: Path | None = typer.Option(
        None, help="With mixed: the bits of a plan that quantises, as mc-moe makes; what stores do not have is raised."
    ),
    average_bits: float | None = typer.Option(
        None, help="With mixed: of a weight on average; experts whose rounding costs most get more.  [default: 5]"
    ),
    stats: Path | None = typer.Option(
        None, help="With mixed: statistics of moekit measure, which say how much each expert matters."
    ),
    overwrite: bool = typer.Option(False, help="Replace what lies in the output folder."),
    trust_remote_code: bool = typer.Option(False, help="Allow code that the checkpoint brings along."),
) -> None:
    """Pack a model into an expert store: one read an expert, everything else beside it.

    One layer is in memory at a time. An interrupted run goes on when the same command is given again.
    """
    import moekit
    from moekit.recipe import format_bytes
    from moekit.serve.packing import check_packable
    from moekit.serve.packing import pack as run
    from moekit.serve.store import ExpertStore

    mixed = bits == "mixed"
    if not mixed and (plan is not None or average_bits is not None or stats is not None):
        raise RecipeError("the same bits for all experts leave nothing to choose", got=bits, fix="say --bits mixed")
    if plan is not None and (average_bits is not None or stats is not None):
        raise RecipeError("a plan says all bits", expected="either --plan or --average-bits and --stats")
    if not mixed and not bits.isdecimal():
        raise RecipeError("impossible bits", where="--bits", expected="16, 8, 4 or mixed", got=bits)
    opened = moekit.open(model, trust_remote_code=trust_remote_code)
    check_packable(opened, 16 if mixed else int(bits), rest_bits)
    with bars() as progress:
        widths = _widths(opened, plan, average_bits, stats, progress) if mixed else None
        path = run(
            opened,
            out,
            bits=16 if mixed else int(bits),
            by_expert=widths,
            rest_bits=rest_bits,
            overwrite=overwrite,
            progress=progress,
        )
    store = ExpertStore(path)
    count = sum(len(layer.offsets) for layer in store.layers.values())
    console().print(
        f"[bold]{path}[/]: {count:,} experts in {format_bytes(store.expert_bytes)} ({_kept(store)}), "
        f"{format_bytes(store.rest_bytes)} of everything else"
        + (f" (matrices rounded to {store.rest_bits} bits)" if store.rest_bits < 16 else "")
    )
    console().print(f'  run it: moekit run {out} --memory 2GiB --prompt "..."')


def _widths(model: Model, plan: Path | None, average: float | None, stats: Path | None, progress: Any) -> dict:
    from moekit.plans import Plan
    from moekit.serve.widths import widths_by_sensitivity, widths_of
    from moekit.stats import Stats

    if plan is None:
        known = Stats.load(stats) if stats else None
        return widths_by_sensitivity(model, 5.0 if average is None else average, known, progress)
    found, notes = widths_of(Plan.load(plan), model)
    for note in notes:
        console().print(note)
    return found


def _kept(store: ExpertStore) -> str:
    """What became of the numbers, in words."""
    bits = [layer.of(e).bits for layer in store.layers.values() for e in range(len(layer.offsets))]
    if min(bits) == 16:
        return "every number kept"
    if len(set(bits)) == 1:
        return f"rounded to {bits[0]} bits"
    parts = ", ".join(f"{bits.count(b)} of {b} bits" for b in sorted(set(bits), reverse=True))
    return f"{parts}; {sum(bits) / len(bits):.2f} on average"
