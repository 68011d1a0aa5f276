"""moekit compress: a recipe, or the same as flags, from a model to a smaller proven one."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from moekit.cli.screen import bars, check_file, console, table
from moekit.errors import PlanError, RecipeError
from moekit.recipe import Recipe, Step, format_bytes

if TYPE_CHECKING:
    from moekit.evaluation import Evaluation
    from moekit.pipeline import Estimate, Job, Result


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("compress")(compress)


def compress(
    model: str = typer.Argument(help="A recipe (.yaml), or a model: a folder, a hub id, or refmoe."),
    data: list[str] = typer.Option([], help="Calibration text, NAME=PATH; may be given several times."),
    eval_data: list[str] = typer.Option([], "--eval", help="Text to compare the result on, NAME=PATH; several times."),
    method: str | None = typer.Option(None, help="How it is decided (see `moekit methods`).  [default: easy-ep]"),
    keep: str | None = typer.Option(None, help="Share (0.5, 50%) or number (64) of experts that a layer keeps."),
    step: list[str] = typer.Option(
        [], help="One of several steps, as 'easy-ep keep=0.75'; several times, instead of --method and --keep."
    ),
    budget: str | None = typer.Option(
        None, help="Bytes of the result (8GB) or share of the source's (50%), at most: what to do for it is chosen."
    ),
    frontier: Path | None = typer.Option(
        None, help="With --budget: a folder for what was considered, bytes against predicted error, as plot and table."
    ),
    domain: list[str] = typer.Option([], help="Domains whose statistics count.  [default: all]"),
    out: str | None = typer.Option(None, help="The folder to make."),
    tokens: int | None = typer.Option(None, help="Calibration tokens of each domain.  [default: 65536]"),
    sequence_length: int | None = typer.Option(None, help="Tokens of a sequence.  [default: 512]"),
    seed: int | None = typer.Option(None, help="Of every draw.  [default: 0]"),
    protect: str | None = typer.Option(None, help="Keep super experts whatever their score: super or none."),
    option: list[str] = typer.Option([], help="Option of the method, NAME=VALUE; several times."),
    shard_size: str | None = typer.Option(None, help="Largest output file, as 5GB."),
    dtype: str | None = typer.Option(None, help="To run layers in: auto, float32, bfloat16, float16."),
    stats: Path | None = typer.Option(None, help="Keep statistics in this folder, and use those that lie there."),
    device: str = typer.Option("cpu", help="To measure and evaluate on: cpu or cuda."),
    plan_only: bool = typer.Option(False, "--plan-only", help="Measure and plan, write no model."),
    plan: Path | None = typer.Option(
        None, help="Measure and plan only, and write the plan (JSON) here; the way to plans of live methods (odp)."
    ),
    no_verify: bool = typer.Option(False, "--no-verify", help="Skip the proof in stock transformers."),
    overwrite: bool = typer.Option(False, help="Replace the model that lies in the output folder."),
    trust_remote_code: bool = typer.Option(False, help="Allow code that the checkpoint brings along."),
) -> None:
    """Make a model smaller for your text: measure, decide, write, prove, compare.

    Statistics are taken in one streamed pass (one layer in memory); the new checkpoint is written file to file and
    loads in stock transformers. An interrupted run goes on when the same command is given again.
    """
    from moekit.data import parse_data

    if plan is not None:
        check_file(plan)
        plan_only = True
    flags: dict[str, Any] = {
        "method": method,
        "keep": keep,
        "steps": step or None,
        "budget": budget,
        "domain": domain or None,
        "out": out,
        "tokens": tokens,
        "sequence_length": sequence_length,
        "seed": seed,
        "protect": protect,
        "options": option or None,
        "shard_size": shard_size,
        "dtype": dtype,
        "data": _texts(parse_data(data)) if data else None,
        "evaluation_data": _texts(parse_data(eval_data)) if eval_data else None,
        "verify": False if no_verify else None,
    }
    if model.endswith((".yaml", ".yml")):
        given = [name for name, value in flags.items() if value is not None]
        if given:
            raise RecipeError(
                "a recipe file and flags for what it says", got=", ".join(given), fix="write it in the recipe"
            )
        _carry_out(Recipe.load(model), plan_only, stats, device, overwrite, trust_remote_code, frontier, plan)
        return
    with tempfile.TemporaryDirectory(prefix="moekit-plan-") as scratch:
        if plan_only and not out:
            flags["out"] = str(Path(scratch) / "plan-only")
        if budget and (given := [f"--{x}" for x in ("method", "keep", "step") if flags[_KEYS.get(x, x)] is not None]):
            raise RecipeError(
                "what to do is chosen for a budget, or given, not both",
                where=f"moekit compress {model}",
                got=f"--budget and {', '.join(given)}",
                fix="leave out --budget, or the others",
            )
        needed = ("data", "keep", "out") if not budget and _needs_keep(method, step) else ("data", "out")
        missing = [f"--{name}" for name in needed if flags[name] is None]
        if missing:
            raise RecipeError(
                f"{' and '.join(missing)} must be given",
                where=f"moekit compress {model}",
                fix=f"e.g. moekit compress {model} --data python=texts/ --keep 0.5 --out smaller/",
            )
        recipe = Recipe.from_flags(model=model, **flags)
        _carry_out(recipe, plan_only, stats, device, overwrite, trust_remote_code, frontier, plan)


_KEYS = {"step": "steps"}  # of a recipe, where the option has another name


def _needs_keep(method: str | None, steps: list[str]) -> bool:
    """Whether a number of experts must be given beside the method."""
    from moekit.methods import METHODS, get

    return not steps and (method is None or method not in METHODS or get(method).kind in ("prune", "merge", "replace"))


def _carry_out(
    recipe: Recipe,
    plan_only: bool,
    stats: Path | None,
    device: str,
    overwrite: bool,
    trust_remote_code: bool,
    frontier: Path | None,
    plan: Path | None,
) -> None:
    """Run a recipe: under torchrun in the first process, which the others help where a model is tuned."""
    from moekit.fitting.heal.team import gathered

    with gathered(device) as first:
        if first:
            run_recipe(recipe, plan_only, stats, device, overwrite, trust_remote_code, frontier, plan)


def _texts(sources: dict[str, str]) -> dict[str, str]:
    return {name: str(path) for name, path in sources.items()}


def run_recipe(
    recipe: Recipe,
    plan_only: bool = False,
    stats: Path | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    frontier: Path | None = None,
    plan: Path | None = None,
) -> Result:
    """Prepare, say what will happen, run, say what happened; `plan`: where to write the plan."""
    from moekit.pipeline import estimate, prepare, run

    screen = console()
    job = prepare(recipe, overwrite=overwrite, trust_remote_code=trust_remote_code, plan_only=plan_only)
    for line in before(job, estimate(job, device)):
        screen.print(line)
    if not job.steps:
        job = planned_for(job, frontier, stats, device)
        if not job.steps:
            return nothing_to_do(job)
    if plan is not None:
        check_one_file(plan, job.steps)
    with bars() as progress:
        result = run(
            job, plan_only=plan_only, stats_folder=stats, device=device, overwrite=overwrite, progress=progress
        )
    for line in notes(result):
        screen.print(f"  {line}")
    if plan is not None:
        screen.print(f"{result.plan.save(plan)}: apply it live with moekit eval MODEL --plan {plan} --data ...")
        return result
    if result.path is None:
        saved = format_bytes(planned_saving(job, result))
        screen.print(f"planned only: {saved} would be saved; run again without --plan-only to write it")
        return result
    screen.print()
    if result.evaluation:
        screen.print(evaluation_table(result.evaluation))
        screen.print()
    for line in after(job, result):
        screen.print(line)
    return result


def check_one_file(file: Path, steps: list[Step]) -> None:
    """Refuse, before anything is measured, what is several plans, or a plan with numbers, which lie in no such file.

    Raises:
        PlanError: see above.
    """
    from moekit.fitting import needs_model

    if len(steps) > 1 or needs_model(steps[0].method, steps[0].options):
        raise PlanError(
            "this plan cannot be one file",
            where=file,
            expected="a single step of a method that decides from statistics alone",
            got=", ".join(step.method for step in steps),
            fix="write the model (--out) instead",
        )


def planned_for(job: Job, frontier: Path | None, stats: Path | None, device: str) -> Job:
    """The job with the steps that the planner chooses for its budget; says why."""
    from moekit.pipeline import choose

    with bars() as progress:
        job, choice = choose(job, stats_folder=stats, device=device, progress=progress)
    for line in choice.words:
        console().print(f"  {line}")
    if frontier is not None and choice.steps:
        console().print(f"  what was considered: {choice.frontier.save(frontier)}")
    return job


def nothing_to_do(job: Job) -> Result:
    """What comes of a budget that the model keeps as it is."""
    from moekit.pipeline import Result
    from moekit.plans import Plan

    return Result(Plan(layout_hash=job.model.layout.hash, notes=list(job.words)))


def before(job: Job, expected: Estimate) -> list[str]:
    """What will be done, and how long it may take."""
    layout, steps = job.model.layout, job.steps
    what = [_what(step) for step in steps]
    tokens = sum(job.calibration.tokens.values())
    lines = [f"{n}. {said}" for n, said in enumerate(what, 1)] if len(steps) > 1 else what
    lines = lines or [f"the best that fits into {format_bytes(expected.bytes_after)}"]
    return [
        f"[bold]{job.model.name}[/]: {len(layout.routed)} MoE layers of {layout.routed[0].num_experts} experts, "
        f"{format_bytes(layout.total.bytes)}",
        *(f"  {line}" for line in lines[:-1]),
        f"  {lines[-1]}, measured on {tokens:,} tokens",
        f"  expected: {'at most ' if not steps else ''}{format_bytes(expected.bytes_after)} at the end; "
        f"about {duration(expected.measure_s)} to measure, {duration(expected.bake_s)} to write",
    ]


def _what(step: Step) -> str:
    """`keep 0.5 of the experts by easy-ep`."""
    from moekit.methods import get

    match get(step.method).kind:
        case "quantize":
            return f"quantise the experts by {step.method}"
        case _ if step.keep is not None:
            return f"keep {step.keep} of the experts by {step.method}"
        case kind:
            return f"{kind} by {step.method}"


def notes(result: Result) -> list[str]:
    """What the plans say that a reader should know; of several steps each with its number."""
    from moekit.pipeline import PLANNED

    several = len(result.steps) > 1
    return [
        f"step {number} ({done.plan.method}): {note}" if several else note
        for number, done in enumerate(result.steps, 1)
        for note in done.plan.notes
        if not note.startswith(PLANNED)  # said when it was chosen
    ]


def planned_saving(job: Job, result: Result) -> int:
    """Bytes that the plans made so far save together."""
    return job.model.layout.total.bytes - job.expected()[len(result.steps) - 1].total.bytes


def after(job: Job, result: Result) -> list[str]:
    """What was made, and what can be done with it."""
    from moekit.families.packings import in_own_form

    baked = result.baked
    proven_on = "the source" if len(result.steps) < 2 else "the model before the last step"
    lines = [
        f"[bold]{result.path}[/]: {format_bytes(baked.bytes_before)} -> {format_bytes(baked.bytes_after)} "
        f"({baked.bytes_after / baked.bytes_before:.0%})"
    ]
    for number, step in enumerate(result.steps, 1) if len(result.steps) > 1 else ():
        size = f"{format_bytes(step.baked.bytes_before)} -> {format_bytes(step.baked.bytes_after)}"
        said = f", logits within {step.verification.max_difference:.2g}" if step.verification else ""
        lines.append(f"  step {number} ({step.plan.method}): {size}{said}")
    if proof := result.verification:
        lines.append(
            f"  proven: {proof.loaded_by} on the new files agrees with the plan applied live to {proven_on} "
            f"(largest logit difference {proof.max_difference:.2g}, {proof.dtype})"
        )
    lines += [f"  {note}" for note in (*baked.notes, *(result.coverage.warnings() if result.coverage else ()))]
    lines.append("  " + ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in result.seconds.items()))
    how = "run it with moekit" if in_own_form(result.path) else "load it with AutoModelForCausalLM.from_pretrained"
    lines.append(f"  read {result.path / 'report.md'}; {how}")
    return lines


def evaluation_table(evaluation: Evaluation) -> object:
    """Perplexity before and after by domain, with 95% intervals."""
    rows = []
    for name, x in evaluation.domains.items():
        row = [name, f"{x.tokens:,}", f"{x.perplexity.value:.2f}"]
        if x.ratio and x.kl and x.agreement and x.source_perplexity:
            row = [
                *row[:2],
                f"{x.source_perplexity.value:.2f}",
                row[2],
                f"x {x.ratio.value:.3f} [{x.ratio.low:.3f}, {x.ratio.high:.3f}]",
                f"{x.kl.value:.3f}",
                f"{x.agreement.value:.1%}",
            ]
        active = [] if x.active_experts is None else [f"{x.active_experts:.2f}"]
        rows.append([*row, *active])
    columns: tuple[str, ...] = ("domain", "tokens", "perplexity")
    if evaluation.max_logit_difference is not None:
        columns = ("domain", "tokens", "ppl before", "after", "ratio [95%]", "KL", "same top token")
    if any(x.active_experts is not None for x in evaluation.domains.values()):
        columns = (*columns, "experts a token")
    return table("", columns, rows)


def duration(seconds: float) -> str:
    """`45 s`, `3 min`, `2.1 h`."""
    if seconds < 90:
        return f"{max(seconds, 0.1):.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
