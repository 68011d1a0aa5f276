"""moekit super: super experts, the massive activations and attention sinks that they make, and what the loss says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from moekit.cli.screen import bars, check_file, console, table

if TYPE_CHECKING:
    from moekit.evaluation.ablation import Ablation
    from moekit.evaluation.sinks import LayerState, Sinks
    from moekit.layout import ExpertId

SHOWN = 8  # experts with the largest peaks


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("super")(super_experts)


def super_experts(
    model: str = typer.Argument(help="A folder, a hub id, or refmoe."),
    data: list[str] = typer.Option(..., help="Text, NAME=PATH; may be given several times."),
    expert: list[str] = typer.Option([], help="Look at this LAYER.EXPERT instead of those that are found; several."),
    tokens: int = typer.Option(4_096, help="Tokens of each domain."),
    sequence_length: int = typer.Option(256, help="Tokens of a sequence; attention weights need its square."),
    seed: int = typer.Option(0, help="Of the text's sample and the random control."),
    device: str = typer.Option("cpu", help="cpu or cuda."),
    out: Path | None = typer.Option(None, help="Also write the numbers as JSON."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of tables."),
    trust_remote_code: bool = typer.Option(False, help="Allow code that the checkpoint brings along."),
) -> None:
    """Find super experts over all tokens, and show what goes when they are switched off.

    Massive activations and attention sinks are compared layer by layer with the model as it is and with random experts
    switched off instead; the change of loss has random and frequency-matched controls.
    """
    import moekit
    from moekit import methods
    from moekit.cli.ablate import parse_experts
    from moekit.evaluation.ablation import ablate
    from moekit.evaluation.sinks import sinks

    if out:
        check_file(out)
    named = [x for text in expert for x in parse_experts(text)]
    opened = moekit.open(model, trust_remote_code=trust_remote_code)
    texts = moekit.load_data(opened, data, tokens=tokens, sequence_length=sequence_length, seed=seed)
    with bars() as progress:
        stats = moekit.measure(opened, texts, groups=("scores",), device=device, progress=progress)
        found = sorted(methods.super_experts(stats, opened.layout))
        chosen = tuple(sorted(set(named))) or tuple(found)
        seen = loss = None
        if chosen:
            seen = sinks(opened, texts, chosen, seed=seed, device=device, progress=progress)
            loss = ablate(opened, texts, [chosen], seed=seed, device=device, progress=progress)
    peaks = methods.peaks(stats, opened.layout)
    result = {
        "model": opened.name,
        "super": [str(x) for x in found],
        "peaks": [x._asdict() | {"expert": str(x.expert)} for x in peaks[:SHOWN]],
        "sinks": seen.to_dict() if seen else None,
        "ablation": loss.to_dict() if loss else None,
    }
    if out:
        out.write_text(json.dumps(result, indent=1))
    if as_json:
        typer.echo(json.dumps(result, indent=1))
        return
    for line in screen(peaks, found, seen, loss):
        console().print(line)


def screen(peaks: list[Any], found: list[ExpertId], seen: Sinks | None, loss: Ablation | None) -> list[object]:
    """The tables, and what they say in words."""
    rows = [
        (x.expert, f"{x.peak:.1f}", f"x {x.over_median:.1f}", f"{x.share:.2%}", "super" if x.expert in found else "")
        for x in peaks[:SHOWN]
    ]
    lines: list[object] = [table("", ("expert", "peak", "median expert's", "tokens", ""), rows), ""]
    if not (seen and loss):
        rule = "peak above the 99.5th percentile and a tenth of the largest, in the first 75% of the layers"
        return [*lines, f"no super expert ({rule}); look at one all the same with --expert LAYER.EXPERT"]
    names = "+".join(map(str, seen.experts))
    columns = (
        f"without {names}:  layer",
        "largest |h|",
        "without",
        "top-3 share",
        "without",
        "sink",
        "without",
        "random",
    )
    lines += [table("", columns, [_layer(index, runs) for index, runs in seen.layers.items()]), ""]
    massive = [index for index, runs in seen.layers.items() if runs["as_is"].massive]
    gone = [index for index in massive if not seen.layers[index]["without"].massive]
    lines.append(
        f"massive activations after {len(massive)} of {len(seen.layers)} layers, {len(gone)} of them gone without"
        if massive
        else "no massive activations (over 100 and over 1000 times the median) in this model"
    )
    if (decay := seen.decay()) == decay:
        control = f", {seen.decay('control'):.1%} with random experts off instead" if seen.control else ""
        lines.append(f"attention to the first position that goes in later layers: {decay:.1%}{control}")
    for x in loss.tested:
        control = f"; random experts {x.mean_random.value:+.4f}" if x.mean_random else ""
        change = x.effect.change
        lines.append(f"{x.domain}: loss {change.value:+.4f} [{change.low:+.4f}, {change.high:+.4f}]{control}")
    return lines


def _layer(index: int, runs: dict[str, LayerState]) -> tuple[str, ...]:
    before, without = runs["as_is"], runs["without"]
    sinks = [runs[x].mean_sink if x in runs else float("nan") for x in ("as_is", "without", "control")]
    return (
        str(index),
        f"{before.largest:.1f} ({before.largest / max(before.median, 1e-30):.0f} x median)",
        f"{without.largest:.1f}",
        f"{before.top_share:.1%}",
        f"{without.top_share:.1%}",
        *("-" if x != x else f"{x:.3f}" for x in sinks),
    )
