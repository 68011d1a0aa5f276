"""moekit inspect: what an MoE checkpoint is, from its config and safetensors headers."""

from __future__ import annotations

import json
from itertools import groupby
from typing import TYPE_CHECKING

import typer

from moekit.cli.screen import console, table
from moekit.recipe import format_bytes

if TYPE_CHECKING:
    from moekit.layout import Layout, MoELayer


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("inspect")(inspect)


def inspect(
    model: str = typer.Argument(help="A folder, a hub id, or refmoe."),
    as_json: bool = typer.Option(False, "--json", help="Print everything as JSON."),
    trust_remote_code: bool = typer.Option(False, help="Allow code that the checkpoint brings along."),
) -> None:
    """Say what a checkpoint is: family, experts, router, bytes by part. Reads headers only, never weights."""
    from moekit.families.model import Model

    opened = Model.open(model, trust_remote_code=trust_remote_code, headers_only=True)
    if as_json:
        typer.echo(json.dumps({"model": model, **opened.layout.to_dict()}, indent=1))
        return
    layout = opened.layout
    out = console()
    out.print(f"[bold]{model}[/]  {layout.family} ({layout.architecture})")
    for name, value in facts(layout):
        out.print(f"  {name:<16}{value}")
    out.print()
    out.print(table("", ("part", "size", "share", "parameters"), part_rows(layout)))
    out.print()
    for line in abilities(layout):
        out.print(line)


def facts(layout: Layout) -> list[tuple[str, str]]:
    """Name and value of everything that is said in one line."""
    total = layout.total
    rows = [
        (
            "size",
            f"{format_bytes(total.bytes)}, {count(total.params)} parameters, "
            f"{count(layout.active_params)} active a token",
        ),
        ("dtype", layout.dtype + (f", quantised as {layout.quantisation}" if layout.quantisation else "")),
        (
            "layers",
            f"{layout.num_layers} decoder layers, {len(layout.routed)} of them MoE; hidden size {layout.hidden_size}",
        ),
        ("vocabulary", f"{layout.vocab_size:,} tokens" + (", tied embeddings" if layout.tied_embeddings else "")),
    ]
    for label, members in groups(layout):
        layer = members[0]
        shared = f" + {layer.shared_experts} shared" if layer.shared_experts else ""
        shared += f" ({len(layer.constants)} of them constants)" if layer.constants else ""
        rows += [
            (
                label,
                f"{layer.num_experts} experts{shared}, top-{layer.top_k}, inner size {layer.inner_size}, "
                f"{format_bytes(layer.expert_bytes)} an expert",
            ),
            ("", f"router: {layer.router.describe()}"),
        ]
    return rows


def groups(layout: Layout) -> list[tuple[str, list[MoELayer]]]:
    """Runs of alike MoE layers, labelled as `layers 3-60` or `mtp`."""

    def kind(layer: MoELayer) -> tuple:
        same = layer.mtp, layer.num_experts, layer.top_k, layer.inner_size, layer.router, layer.shared_experts
        return *same, len(layer.constants)

    out = []
    for key, run in groupby(layout.layers, kind):
        members = list(run)
        first, last = members[0].index, members[-1].index
        out.append(
            ("mtp layer" if key[0] else f"layer {first}" if first == last else f"layers {first}-{last}", members)
        )
    return out


def part_rows(layout: Layout) -> list[tuple[str, str, str, str]]:
    """Bytes and parameters of each part that has any."""
    total = layout.total.bytes
    rows = [
        (name, format_bytes(part.bytes), f"{part.bytes / total:.1%}", count(part.params))
        for name, part in layout.parts.items()
        if part.bytes
    ]
    return [*rows, ("all", format_bytes(total), "", count(layout.total.params))]


def abilities(layout: Layout) -> list[str]:
    """What moekit can do with it, and the most that can go."""
    if layout.cannot_run:
        return [f"can be inspected, not run: {layout.cannot_run}"]
    if layout.cannot_drop:
        return [f"can be measured and evaluated, not pruned: {layout.cannot_drop}"]
    layer = min(layout.routed, key=lambda x: x.num_experts)
    router = layer.router
    need = max(2, -(-layer.top_k // router.groups_kept)) * router.groups if router.groups > 1 else layer.top_k

    def saved(keep: int) -> str:
        experts = sum((x.num_experts - keep) * x.expert_bytes for x in layout.routed)
        return f"keeping {keep} saves {format_bytes(experts + layout.parts['mtp'].bytes)}"

    lines = [
        f"can be measured, pruned and evaluated; at least {need} of {layer.num_experts} experts must stay a layer",
    ]
    if not any(x.constants for x in layout.routed):  # dropping a constant saves next to nothing
        lines.append(", ".join(saved(keep) for keep in sorted({max(need, layer.num_experts // 2), need}, reverse=True)))
    if any(x.mtp for x in layout.layers):
        lines.append(
            "multi-token-prediction layers are dropped when experts are (stock transformers does not run them)"
        )
    return lines


def count(number: float) -> str:
    """A number of parameters for people: `3.46 M`."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(int(number))
