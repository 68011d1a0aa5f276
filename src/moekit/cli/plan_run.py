"""moekit plan-run: what running a model in some memory will be like, before it is packed or loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from moekit.cli.screen import console, table
from moekit.errors import RecipeError

if TYPE_CHECKING:
    from moekit.serve.outlook import Outlook, Speeds

LIMITS = {"disk": "the disk", "memory": "reading weights from memory", "calls": "Python and PyTorch's calls"}


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("plan-run")(plan_run)


def plan_run(
    place: str = typer.Argument(metavar="MODEL|STORE", help="A folder, a hub id, refmoe, or a store."),
    memory: str = typer.Option("", help="Of the whole process, as 2GiB.  [default: what is free now]"),
    bits: int = typer.Option(0, help="Of experts: 16, 8 or 4; 0: all three side by side. A store has its own."),
    context: int = typer.Option(2048, min=1, help="Tokens of prompt and answer together."),
    as_json: bool = typer.Option(False, "--json", help="Print everything as JSON."),
    trust_remote_code: bool = typer.Option(False, help="Allow code that the checkpoint brings along."),
) -> None:
    """Say whether a model fits, how the memory divides, how fast it will write, and why. Exit code 1: no fit."""
    from dataclasses import asdict

    from moekit.families.model import Model
    from moekit.recipe import parse_bytes
    from moekit.serve.forms import BITS
    from moekit.serve.outlook import outlooks
    from moekit.serve.packing import check_packable
    from moekit.serve.store import MANIFEST, ExpertStore

    if bits not in (0, *BITS):
        raise RecipeError("experts cannot be packed so", where="--bits", expected="16, 8 or 4", got=bits)
    budget = parse_bytes(memory) if memory else None
    store = ExpertStore(place) if (Path(place) / MANIFEST).is_file() else None
    if store is not None:
        folder, layout = store.path, store.layout
        widths = [max(form.bits for layer in store.layers.values() for form in layer.forms)]
        if bits and bits != widths[0]:
            raise RecipeError("a store has its own bits", where="--bits", expected=widths[0], got=bits)
    else:
        model = Model.open(place, trust_remote_code=trust_remote_code, headers_only=True)
        check_packable(model, bits or 16)
        folder, layout, widths = model.path, model.layout, [bits] if bits else list(reversed(BITS))
    found, sizes, speeds = outlooks(folder, layout, budget, context, widths, store)
    if as_json:
        plans = [asdict(x) for x in found]
        typer.echo(json.dumps({"model": asdict(sizes), "machine": asdict(speeds), "plans": plans}, indent=1))
    else:
        _show(place, found, speeds, context, sizes.context is None)
    if not any(x.fits for x in found):
        raise typer.Exit(1)


def _show(place: str, found: list[Outlook], speeds: Speeds, context: int, blind: bool) -> None:
    from moekit.recipe import format_bytes

    out, first = console(), found[0]
    out.print(
        f"[bold]{place}[/]: {format_bytes(first.libraries)} for Python and libraries, {format_bytes(first.rest)} for "
        f"the model without experts, {format_bytes(first.context)} for a context of {context:,} tokens"
        f"{' (not known before it is loaded)' if blind else ''}, {format_bytes(first.work)} to work in, "
        f"{format_bytes(first.cache)} left for experts"
    )
    rows = []
    for x in found:
        hits = f"{x.held:.0%}", f"{x.hit[0]:.0%} to {x.hit[1]:.0%}"
        speed = f"{_short(x.tokens_s[0])} to {_short(x.tokens_s[1])}"
        rest = (*hits, speed, LIMITS[x.limit]) if x.fits else ("", "", "does not fit", "")
        rows.append((f"{x.bits}", *rest))
    out.print()
    out.print(table("", ("bits", "of experts in memory", "found there", "tokens/s", "limited most by"), rows))
    out.print()
    expert = ", ".join(f"{bits} bits {speed / 1e9:.1f}" for bits, speed in speeds.expert.items())
    out.print(
        f"measured here, GB/s: disk {speeds.disk.large / 1e9:.2f} (small reads {speeds.disk.small / 1e9:.2f}"
        f"{'' if speeds.disk.direct else ', through the page cache'}); experts {expert}; "
        f"a call of PyTorch takes {speeds.call_s * 1e6:.1f} us"
    )
    for line in advice(found):
        out.print(f"  {line}")


def advice(found: list[Outlook]) -> list[str]:
    """What to change."""
    from moekit.recipe import format_bytes

    out = []
    for x in found:
        if not x.fits:
            out.append(f"{x.bits} bits: give at least {format_bytes(x.least)}, or a shorter --context")
        elif x.held < 1:
            out.append(f"{x.bits} bits: with {format_bytes(x.all_experts)} every expert stays in memory")
    running = [x for x in found if x.fits]
    if running and all(x.limit == "calls" for x in running):
        out.append("neither more memory nor fewer bits make it faster: the model is small for what a call costs")
    return out


def _short(speed: float) -> str:
    return f"{speed:.2g}" if speed < 10 else f"{speed:.0f}"
