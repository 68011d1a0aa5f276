"""moekit ablate: what the loss does when experts are switched off, beside control experts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from moekit.cli.screen import bars, check_file, console, table
from moekit.errors import RecipeError

if TYPE_CHECKING:
    from moekit.evaluation.ablation import Ablation
    from moekit.evaluation.intervals import Interval
    from moekit.families.model import Model
    from moekit.layout import ExpertId


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("ablate")(ablate)


def ablate(
    model: str = typer.Argument(help="A folder, a hub id, or refmoe."),
    data: list[str] = typer.Option(..., help="Held-out text, NAME=PATH; may be given several times."),
    expert: list[str] = typer.Option([], help="An expert, LAYER.EXPERT; 3.5+4.1 switches both off together; several."),
    from_trace: tuple[Path, str] | None = typer.Option(
        None,
        metavar="FOLDER WHICH",
        help="Take experts from a trace or statistics: top:20 (most relevant for a domain), top:20:NAME, or super.",
    ),
    tokens: int = typer.Option(8_192, help="Tokens of each domain."),
    sequence_length: int = typer.Option(256, help="Tokens of a sequence; intervals are over sequences."),
    controls: int = typer.Option(2, min=0, help="Random and frequency-matched controls of each expert."),
    renormalise: bool = typer.Option(False, help="The other chosen experts of a token take over the weight."),
    seed: int = typer.Option(0, help="Of the text's sample and the random controls."),
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = typer.Option("auto", help="To run layers in."),
    device: str = typer.Option("cpu", help="cpu or cuda."),
    out: Path | None = typer.Option(None, help="Also write the numbers as JSON, for `moekit report`."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of a table."),
    trust_remote_code: bool = typer.Option(False, help="Allow code that the checkpoint brings along."),
) -> None:
    """Test what experts do: switch them off and see which domains lose, against experts that are used as often.

    Many experts are tested in one streamed pass. Controls are other experts of the same layer, drawn by lot or chosen
    by nearly the same share of the domain's tokens. 95% intervals are over sequences.
    """
    import torch

    import moekit
    from moekit.evaluation.ablation import ablate as run

    if not expert and from_trace is None:
        raise RecipeError("no expert to switch off", fix="name some with --expert LAYER.EXPERT, or pass --from-trace")
    if out:
        check_file(out)
    sets = [parse_experts(x) for x in expert]
    opened = moekit.open(model, trust_remote_code=trust_remote_code)
    if from_trace:
        sets += [(x,) for x in pick(opened, *from_trace)]
    texts = moekit.load_data(opened, data, tokens=tokens, sequence_length=sequence_length, seed=seed)
    with bars() as progress:
        found = run(
            opened,
            texts,
            sets,
            controls=controls,
            seed=seed,
            renormalise=renormalise,
            dtype=None if dtype == "auto" else getattr(torch, dtype),
            device=device,
            progress=progress,
        )
    if out:
        found.save(out)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=1))
    else:
        for line in screen(found):
            console().print(line)


def parse_experts(text: str) -> tuple[ExpertId, ...]:
    """`3.5` or `3.5+4.1` as experts.

    Raises:
        RecipeError: something else.
    """
    from moekit.layout import ExpertId

    parts = [re.fullmatch(r"(\d+)\.(\d+)", x.strip()) for x in text.split("+")]
    if not all(parts):
        raise RecipeError(
            "this names no expert", where=f"--expert {text}", expected="LAYER.EXPERT, as 12.87, or 12.87+3.5 for a set"
        )
    return tuple(ExpertId(int(x[1]), int(x[2])) for x in parts if x)


def pick(model: Model, folder: Path, which: str) -> list[ExpertId]:
    """Experts named by a rule: `top:N`, `top:N:DOMAIN` (by fTRI relevance) or `super`.

    Raises:
        DataError: the folder holds neither trace nor statistics of this model, or no such domain.
        RecipeError: no such rule.
    """
    from moekit.cli.source import statistics
    from moekit.methods.ftri import ftri
    from moekit.methods.super_experts import super_experts

    stats = statistics(folder, model)
    if which == "super":
        if not (found := sorted(super_experts(stats, model.layout))):
            raise RecipeError("no expert stands out as a super expert", where=folder, fix="name experts, or use top:N")
        return found
    match = re.fullmatch(r"top:(\d+)(?::(.+))?", which)
    if not match or not int(match[1]):
        raise RecipeError(
            "unknown rule", where=f"--from-trace {folder} {which}", expected="top:N, top:N:DOMAIN or super"
        )
    return [x.expert for x in ftri(stats, model.layout, match[2], top=int(match[1]))]


def screen(found: Ablation) -> list[object]:
    """A table of every set and domain, and how to read it."""
    rows = [
        (
            "+".join(map(str, x.experts)),
            x.domain,
            f"{x.effect.share:.1%}",
            interval(x.effect.change),
            "-" if x.mean_random is None else f"{x.mean_random.value:+.4f}",
            "-" if x.mean_matched is None else f"{x.mean_matched.value:+.4f} ({x.matched_share:.1%})",
            "-" if x.excess is None else interval(x.excess),
        )
        for x in found.tested
    ]
    columns = ("expert", "domain", "tokens", "loss change [95%]", "random", "matched (tokens)", "beyond matched [95%]")
    tests = [x.excess for x in found.tested if x.excess is not None]
    clear = sum(x.low > 0 or x.high < 0 for x in tests)
    loss = ", ".join(f"{name} {value.value:.3f}" for name, value in found.loss.items())
    lines: list[object] = [table("", columns, rows), f"loss as it is, nats a token: {loss}"]
    if tests:
        lines.append(
            f"{clear} of {len(tests)} differ from their matched controls (interval without 0); "
            f"about {len(tests) * 0.05:.1f} would by chance"
        )
    return lines


def interval(value: Interval) -> str:
    """`+0.0123 [+0.0101, +0.0145]`."""
    return f"{value.value:+.4f} [{value.low:+.4f}, {value.high:+.4f}]"
