"""moekit demo: the whole job on the model that comes with moekit, in under two minutes on two cores."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from moekit.cli.screen import bars, console, table
from moekit.recipe import Recipe, format_bytes

if TYPE_CHECKING:
    from moekit.data import Dataset
    from moekit.evaluation import Evaluation
    from moekit.families.model import Model
    from moekit.stats import Stats

METHODS = ("easy-ep", "frequency", "random")
KEEP = 0.5
CALIBRATION_TOKENS, EVALUATION_TOKENS, SEQUENCE = 16_384, 6_144, 256


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("demo")(demo)


def demo(
    domain: str = typer.Option("python", help="The domain to keep: c, js, json, kjv, math or python."),
    out: Path | None = typer.Option(None, help="Keep the smaller model in this new folder.  [default: thrown away]"),
) -> None:
    """Cut the packaged trained model to half of its experts for one domain, prove it, and compare three methods."""
    from moekit import refmoe
    from moekit.errors import DataError, did_you_mean
    from moekit.pipeline import prepare, run

    started = time.perf_counter()
    texts = refmoe.texts()
    if domain not in texts:
        raise DataError(f"the demo has no domain {domain!r}", where="--domain", fix=did_you_mean(domain, texts))
    other = "kjv" if domain != "kjv" else "python"
    screen = console()
    screen.print(
        f"[bold]refmoe[/]: a small MoE model that was really trained, 6 layers of 32 experts, 4 chosen a token.\n"
        f"We keep half of its experts, for [bold]{domain}[/], and see what that does to {domain} and to {other}.\n"
    )
    with tempfile.TemporaryDirectory() as scratch:
        recipe = Recipe.from_flags(
            model="refmoe",
            data={domain: str(refmoe.calibration()[domain])},
            evaluation_data={name: str(texts[name]) for name in (domain, other)},
            evaluation_tokens=EVALUATION_TOKENS,
            evaluation_sequence_length=SEQUENCE,
            tokens=CALIBRATION_TOKENS,
            sequence_length=SEQUENCE,
            batch_tokens=4096,
            method=METHODS[0],
            keep=KEEP,
            out=str(out or Path(scratch) / "refmoe-half"),
        )
        job = prepare(recipe)
        with bars() as progress:
            result = run(job, progress=progress)
            others = {
                name: _score(job.model, result.stats, job.evaluation, name, domain, progress) for name in METHODS[1:]
            }
        evaluations = {METHODS[0]: result.evaluation, **others}
        screen.print(_table(domain, other, evaluations, result.baked.bytes_before, result.baked.bytes_after))
        proof = result.verification
        screen.print(
            f"\nThe smaller model, loaded by {proof.loaded_by}, does what the plan says: its logits differ by at most\n"
            f"{proof.max_difference:.1e} from the full model with the same experts switched off ({proof.dtype}).\n"
            f"Everything took {time.perf_counter() - started:.0f} s; measuring {result.seconds['measure']:.0f} s, "
            f"writing {result.seconds['bake']:.1f} s.\n"
        )
    screen.print(
        "[bold]Next[/]\n"
        "  moekit inspect MODEL                   what a checkpoint of yours is made of\n"
        "  moekit compress MODEL --data mine=TEXTS --eval mine=HELD_OUT --keep 0.5 --out DIR\n"
        "  moekit methods                         what else can decide which experts stay"
        + (f"\n  less {out / 'report.md'}          what was done here" if out else "")
    )


def _score(model: Model, stats: Stats, data: Dataset, method: str, domain: str, progress: object) -> Evaluation:
    """What another method's choice would do, by applying its plan live."""
    import moekit
    from moekit.evaluation import Subject, evaluate

    plan = moekit.plan(method, stats, keep=KEEP, domain=domain)
    return evaluate(Subject(model, plan), data, against=model, progress=progress)


def _table(domain: str, other: str, evaluations: dict[str, Evaluation], before: int, after: int) -> object:
    first = next(iter(evaluations.values())).domains
    rows = [
        (
            "full model",
            *(f"{first[name].source_perplexity.value:.1f}" for name in (domain, other)),
            "",
            "",
            format_bytes(before),
        )
    ]
    for method, evaluation in evaluations.items():
        cells = [evaluation.domains[name] for name in (domain, other)]
        rows.append(
            (
                f"half, by {method}",
                *(f"{x.perplexity.value:.1f} (x {x.ratio.value:.2f})" for x in cells),
                f"{cells[0].kl.value:.3f}",
                f"{cells[0].agreement.value:.0%}",
                format_bytes(after),
            )
        )
    columns = ("perplexity", domain, f"elsewhere: {other}", "KL", "same top token", "size")
    return table("", columns, rows)
