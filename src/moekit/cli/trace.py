"""moekit trace: record what the routers of a model do on a text, or as it writes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from moekit.cli.screen import bars, check_file, console, table
from moekit.errors import RecipeError

if TYPE_CHECKING:
    import torch

    from moekit.families.model import Model
    from moekit.recording.reading import InMemory
    from moekit.trace import Trace

SHOWN_EXPERTS = 8  # of those that were never used


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("trace")(trace)


def trace(
    model: str = typer.Argument(help="A folder, a hub id, or refmoe."),
    out: Path = typer.Option(..., help="The folder to make."),
    data: list[str] = typer.Option([], help="Text, NAME=PATH; several times.  [default for refmoe: its own texts]"),
    generate: list[str] = typer.Option(
        [], help="Prompts to continue, NAME=PATH (one a line or a record); several times, instead of --data."
    ),
    max_new_tokens: int = typer.Option(128, help="Of each continuation, at most."),
    batch_size: int = typer.Option(1, help="Prompts that are continued together."),
    tokens: bool = typer.Option(False, "--tokens", help="Keep every token's experts and weights, not only sums."),
    logits: bool = typer.Option(False, "--logits", help="With every token, keep the router's logits too (large)."),
    outputs: bool = typer.Option(False, "--outputs", help="Also measure the experts' outputs: norms, peaks, means."),
    tokens_per_domain: int = typer.Option(65_536, help="Tokens of each domain."),
    sequence_length: int = typer.Option(512, help="Tokens of a sequence."),
    seed: int = typer.Option(0, help="Which part of a longer text is taken."),
    in_memory: bool | None = typer.Option(
        None, "--in-memory/--streamed", help="Load the whole model, or a layer at a time.  [default: what fits]"
    ),
    plan: Path | None = typer.Option(None, help="A plan that is applied live: trace what it would make of the model."),
    parquet: Path | None = typer.Option(None, help="Also write every token as a Parquet table (implies --tokens)."),
    dtype: str = typer.Option("auto", help="To run in: auto, float32, bfloat16, float16."),
    device: str = typer.Option("cpu", help="cpu or cuda."),
    overwrite: bool = typer.Option(False, help="Replace the trace that lies in the output folder."),
    trust_remote_code: bool = typer.Option(False, help="Allow code that the checkpoint brings along."),
) -> None:
    """Record which experts every token of a text chooses: sums always, every token on request.

    A trace is a folder that `moekit report` and `moekit view` show, and that `moekit.trace.Trace` opens. A streamed
    recording that was interrupted goes on when the same command is given again.
    """
    import moekit
    from moekit import recording
    from moekit.data import parse_data
    from moekit.plans import Plan
    from moekit.recording.prompts import load_prompts
    from moekit.trace.parquet import library

    if generate and (data or plan):
        raise RecipeError("--generate goes without --data and --plan", fix="record two traces")
    if parquet:
        library()
        check_file(parquet)
    opened = moekit.open(model, trust_remote_code=trust_remote_code)
    with bars() as progress:
        settings: dict[str, Any] = {
            "out": out,
            "tokens": tokens or parquet is not None,
            "logits": logits,
            "outputs": outputs,
            "dtype": _dtype(dtype),
            "device": device,
            "overwrite": overwrite,
            "progress": progress,
        }
        if generate:
            prompts = load_prompts(parse_data(generate))
            found = recording.trace_generation(
                opened, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, **settings
            )
        else:
            texts = moekit.load_data(
                opened, _texts(opened, data), tokens=tokens_per_domain, sequence_length=sequence_length, seed=seed
            )
            whole: InMemory = "auto" if in_memory is None else in_memory
            found = recording.trace(opened, texts, in_memory=whole, plan=Plan.load(plan) if plan else None, **settings)
        if parquet:
            found.to_parquet(parquet, progress=progress)
    summary(found, out)
    if parquet:
        console().print(f"{parquet}: every token, for DuckDB, polars or pandas")


def _texts(model: Model, data: list[str]) -> list[str] | dict[str, str]:
    from moekit import refmoe

    return data if data or model.name != "refmoe" else {name: str(path) for name, path in refmoe.texts().items()}


def _dtype(name: str) -> torch.dtype | None:
    import torch

    known = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise RecipeError("no such dtype", where="--dtype", expected=", ".join(known), got=name)
    return known[name]


def summary(trace: Trace, name: Path) -> None:
    """Say what was recorded, and what stands out at once."""
    from moekit.trace import tables

    screen = console()
    layer = trace.moe_layer(trace.layers[0])
    screen.print(
        f"[bold]{name}[/]  {trace.model}: {len(trace.layers)} MoE layers x {layer.num_experts} experts, "
        f"top-{layer.top_k}; {'every token' if trace.has_tokens else 'statistics only'}"
    )
    for phase, counts in trace.head["phase_tokens"].items():
        screen.print(f"  {phase} tokens: {', '.join(f'{name} {count:,}' for name, count in counts.items())}")
    screen.print()
    rows = {row["layer"]: [f"{row['entropy']:.3f}", f"{row['gini']:.2f}", f"{row['max_over_mean']:.1f}x",
                           str(row["never_used"]), str(row["experts_for_70"])]
            for row in tables.balance(trace).rows()}  # fmt: skip
    columns = ["layer", "evenness", "Gini", "busiest", "never used", "hold 70%"]
    if len(trace.domains) > 1:
        columns += ["domain MI", "by chance"]
        for row in tables.mutual_information(trace).rows():
            rows[row["layer"]] += [f"{row['bits']:.3f} bit", f"< {row['null_high']:.3f}"]
    screen.print(table("", columns, [[index, *cells] for index, cells in rows.items()]))
    screen.print()
    if len(trace.domains) > 1:
        screen.print("most preferred expert of each domain (share of its tokens; of all tokens):")
        for row in tables.preferred(trace).rows():
            screen.print(
                f"  {row['domain']:<12}{row['layer']}.{row['expert']:<6}{row['share']:.0%} ({row['overall']:.0%})"
            )
    unused = [f"{row['layer']}.{row['expert']}" for row in tables.never_used(trace).rows()]
    if unused:
        more = f" and {len(unused) - SHOWN_EXPERTS} more" if len(unused) > SHOWN_EXPERTS else ""
        screen.print(f"never used: {', '.join(unused[:SHOWN_EXPERTS])}{more}")
    screen.print(f"next: moekit report {name}")
