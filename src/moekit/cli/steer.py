"""moekit steer: change what a model does by its experts; find, label, test and bake are its own verbs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import typer

from moekit.cli.screen import bars, check_file, console

verbs = typer.Typer(
    help="Change what a model does by its experts, without training: find a plan, test it beside controls, bake it.",
    no_args_is_help=True,
)


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.add_typer(verbs, name="steer")


MODEL = typer.Argument(help="A folder, a hub id, or refmoe.")
CHAT = typer.Option(False, "--chat", help="Put each text into the model's chat template, as what a user said.")
LINES = typer.Option(False, "--lines", help="Each line of a text file is a text of its own.")
LENGTH = typer.Option(512, min=2, help="Longer texts are cut into rows of so many tokens.")
TRUST = typer.Option(False, "--trust-remote-code", help="Allow code that the checkpoint brings along.")


@verbs.command()
def find(
    model: str = MODEL,
    a: str = typer.Option(..., "--a", help="Text of the kind to leave: a file, or NAME=FILE. With --data, a label."),
    b: str = typer.Option(..., "--b", help="Text of the kind to go to."),
    out: Path = typer.Option(..., help="The plan, a JSON file."),
    data: Path | None = typer.Option(None, help='JSON lines with "text" and "label"; --a and --b are then labels.'),
    source: Path | None = typer.Option(
        None, "--from", help="Statistics of `moekit measure`, or a trace, instead of a pass; --a and --b are domains."
    ),
    method: str = typer.Option("mote", help="mote, steermoe, rice or contrast."),
    top: int = typer.Option(10, min=1, help="How many experts to change."),
    mode: Literal["off", "on", "both"] = typer.Option(
        "off", help="Switch off those of a, switch on those of b, or whichever sets them apart most."
    ),
    scope: str = typer.Option("all", help="The tokens that it is for: all, prompt, generated, or span:START:END."),
    option: list[str] = typer.Option([], metavar="KEY=VALUE", help="An option of the method, as beta=16; several."),
    marker: list[str] = typer.Option([], help="A word that marks kind b (rice), as Wait; several."),
    protect: Literal["super", "none"] = typer.Option("super", help="Super experts stay as they are."),
    chat: bool = CHAT,
    lines: bool = LINES,
    tokens: int = typer.Option(65_536, min=2, help="Of each kind, at most."),
    sequence_length: int = LENGTH,
    device: str = typer.Option("cpu", help="cpu or cuda."),
    trust_remote_code: bool = TRUST,
) -> None:
    """Find the experts that set two kinds of text apart, and write a plan that leads from a to b.

    Test it before you use it: `moekit steer test PLAN MODEL`. An expert is no switch for a behaviour.
    """
    import moekit
    from moekit.cli.source import statistics
    from moekit.methods.steer import check_request, make_steering
    from moekit.steering import find as run
    from moekit.steering import load_kinds

    check_file(out)
    options: dict[str, Any] = dict(parse_option(x) for x in option)
    check_request(method, top, mode, protect, options)
    reach = parse_scope(scope)
    opened = moekit.open(model, trust_remote_code=trust_remote_code)
    if marker:
        options["markers"] = marker_ids(opened, marker)
        check_request(method, top, mode, protect, options)
    if source is not None:
        stats = statistics(source, opened)
        plan = make_steering(
            method, stats, opened.layout, a, b, top=top, mode=mode, scope=reach, protect=protect, **options
        )
    else:
        texts = load_kinds(
            opened, a, b, data=data, chat=chat, lines=lines, tokens=tokens, sequence_length=sequence_length
        )
        with bars() as progress:
            plan = run(
                opened,
                texts,
                method,
                top=top,
                mode=mode,
                scope=reach,
                protect=protect,
                device=device,
                workdir=out.with_name(out.name + ".work"),
                progress=progress,
                **options,
            )
    plan.save(out)
    for op in plan.steers():
        score = plan.measured["score"][f"{op.layer}.{op.expert}"]
        strength = f" {op.strength:g}" if op.action in ("bias", "scale") else ""
        console().print(f"{op.layer}.{op.expert}  {op.action}{strength}  score {score:+.4f}")
    console().print("\n".join([*plan.notes, f"{out}: test it with moekit steer test {out} {model}"]))


@verbs.command("test")
def examine(
    plan: Path = typer.Argument(help="A plan of `moekit steer find`."),
    model: str = MODEL,
    target: list[str] = typer.Option(..., help="Held-out text that the plan is about, NAME=PATH; several."),
    elsewhere: list[str] = typer.Option(..., help="Text that it should leave alone, NAME=PATH; several."),
    counts: str = typer.Option("1,2,5", help="Also try so many of the plan's experts, the most telling first."),
    strengths: str = typer.Option("", help="Also try the plan at these strengths (bias, scale), as 0.25,0.5,2."),
    controls: int = typer.Option(3, min=0, help="Draws of random and of frequency-matched experts, for each dose."),
    prompts: Path | None = typer.Option(None, help="Prompts to answer, a line each, with --match."),
    match: str | None = typer.Option(None, help="A regular expression: the share of answers in which it is found."),
    max_tokens: int = typer.Option(64, min=1, help="Of an answer, at most."),
    prompt_tokens: int | None = typer.Option(
        None, min=0, help="Tokens at each text's start that count as prompt; the rest as generated.  [default: all]"
    ),
    chat: bool = CHAT,
    lines: bool = LINES,
    tokens: int = typer.Option(4_096, min=2, help="Of each domain, at most."),
    sequence_length: int = typer.Option(128, min=2, help="Tokens of a text; intervals are over texts."),
    seed: int = typer.Option(0, help="Of the controls."),
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = typer.Option("auto", help="To run in."),
    device: str = typer.Option("cpu", help="cpu or cuda."),
    out: Path | None = typer.Option(None, help="Also write the numbers as JSON, for `moekit report --steering`."),
    page: Path | None = typer.Option(None, help="Also write a web page of them."),
    plot: Path | None = typer.Option(None, help="Also draw dose and response: .svg, .pdf or .png."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of tables."),
    trust_remote_code: bool = TRUST,
) -> None:
    """Test a steering plan: side effects first, then the effect, beside random and frequency-matched experts.

    Doses are the plan's first experts by score, and strengths of the plan as a whole. 95% intervals are over texts.
    """
    from dataclasses import replace

    import torch

    import moekit
    from moekit.data import parse_data
    from moekit.errors import RecipeError
    from moekit.plans import Plan
    from moekit.steering import assess, load_texts
    from moekit.steering.doses import check_doses, check_plan

    for file in (out, page, plot):
        if file:
            check_file(file)
    if plot is not None:
        from moekit.report.figures import check_figure, save_doses

        check_figure(plot)
    if (prompts is None) != (match is None):
        raise RecipeError("answers are counted with both", expected="--prompts FILE and --match PATTERN, or neither")
    found = Plan.load(plan)
    opened = moekit.open(model, trust_remote_code=trust_remote_code)
    check_plan(found, opened.layout)
    size = len(found.steers())
    numbers = sorted({min(int(x), size) for x in parse_numbers("--counts", counts)})
    doses = parse_numbers("--strengths", strengths)
    check_doses(found, numbers, doses)
    settings: dict[str, Any] = {"dtype": None if dtype == "auto" else getattr(torch, dtype), "device": device}
    read: dict[str, Any] = {"chat": chat, "lines": lines, "tokens": tokens, "sequence_length": sequence_length}
    texts = [load_texts(opened, parse_data(x), **read) for x in (target, elsewhere)]
    with bars() as progress:
        result = assess(
            opened,
            found,
            *texts,
            counts=numbers,
            strengths=doses,
            draws=controls,
            seed=seed,
            prompt=prompt_tokens,
            progress=progress,
            **settings,
        )
        if prompts is not None and match is not None:
            from moekit.steering import answered

            told = answered(
                opened,
                found,
                prompts,
                match,
                draws=controls,
                seed=seed,
                chat=chat,
                tokens=max_tokens,
                **settings,
                progress=progress,
            )
            result = replace(result, answers=told)
    if out:
        result.save(out)
    if page is not None:
        from moekit.report import steering_page, write

        write(steering_page(result.to_dict()), page)
    if plot is not None:
        save_doses(result.to_dict(), plot)
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=1))
        return
    from moekit.cli.steer_screen import screen

    for line in screen(result):
        console().print(line)


@verbs.command()
def label(
    model: str = MODEL,
    prompts: Path = typer.Option(..., help="Prompts, a line each, or JSON lines."),
    pattern: str = typer.Option(..., help="A regular expression: answers in which it is found get the first label."),
    out: Path = typer.Option(..., help='JSON lines with "text", "answer" and "label", for `moekit steer find --data`.'),
    names: str = typer.Option("match,other", help="The two labels."),
    max_tokens: int = typer.Option(64, min=1, help="Of an answer, at most."),
    chat: bool = CHAT,
    device: str = typer.Option("cpu", help="cpu or cuda."),
    trust_remote_code: bool = TRUST,
) -> None:
    """Let the model answer prompts and label each by what it said: the two kinds that `find --data` compares."""
    import moekit
    from moekit.errors import RecipeError
    from moekit.steering import label_answers
    from moekit.steering.answers import load_questions, pattern_labeller

    check_file(out)
    said = [x.strip() for x in names.split(",")]
    if len(said) != 2 or not all(said) or said[0] == said[1]:
        raise RecipeError("there are two labels", where=f"--names {names}", expected="as refused,answered")
    labeller = pattern_labeller(pattern)
    opened = moekit.open(model, trust_remote_code=trust_remote_code)
    questions = load_questions(opened, prompts, chat)
    with bars() as progress:
        rows = label_answers(
            opened,
            questions,
            lambda answer: said[labeller(answer) != "match"],
            max_new_tokens=max_tokens,
            device=device,
            progress=progress,
        )
    partial = out.with_name(out.name + ".partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    partial.rename(out)
    count = [sum(row["label"] == name for row in rows) for name in said]
    console().print(f"{out}: {said[0]} {count[0]}, {said[1]} {count[1]}")
    if not all(count):
        console().print("all answers have one label: there is nothing to compare yet")


@verbs.command()
def bake(
    plan: Path = typer.Argument(help="A plan of `moekit steer find`."),
    model: str = MODEL,
    out: Path = typer.Option(..., help="A new folder for the model."),
    data: list[str] = typer.Option([], help="Text that the proof is read on, NAME=PATH.  [default: random tokens]"),
    overwrite: bool = typer.Option(False, help="Replace a model that lies in the folder."),
    trust_remote_code: bool = TRUST,
) -> None:
    """Write a plan into a model's weights, for other engines, as far as files can hold it, and prove it.

    All of the plan or nothing: what no file of the family holds is refused, with the reason. The proof compares the
    files, in stock transformers, with the plan applied live.
    """
    import moekit
    from moekit.apply.hold import held
    from moekit.pipeline.production import check_out, produce
    from moekit.plans import Plan
    from moekit.steering.doses import check_plan

    check_out(out.resolve(), overwrite)
    found = Plan.load(plan)
    opened = moekit.open(model, trust_remote_code=trust_remote_code)
    check_plan(found, opened.layout)
    written = held(found, opened.understanding)
    text = moekit.load_data(opened, data, tokens=2_048, sequence_length=128) if data else None
    with bars() as progress:
        result = produce(opened, written.plan, out, text=text, overwrite=overwrite, progress=progress, instead=found)
    proof = result.verification
    assert proof is not None
    console().print(
        f"{out}: {len(found.steers())} ops are in its weights; against the plan applied live, in {proof.loaded_by}: "
        f"largest logit difference {proof.max_difference:.2g} over {proof.positions} positions "
        f"({proof.within:.1%} within {proof.tolerance:g})"
    )
    console().print("\n".join(["engines that will honour it:", *(f"  {line}" for line in written.engines)]))


def parse_numbers(option: str, text: str) -> list[float]:
    """`1,2,5` as numbers.

    Raises:
        RecipeError: something else.
    """
    from moekit.errors import RecipeError

    try:
        return [float(x) for x in text.split(",") if x.strip()]
    except ValueError:
        raise RecipeError("these are no numbers", where=option, expected="as 1,2,5", got=text) from None


def parse_option(text: str) -> tuple[str, Any]:
    """`beta=16` as a name and a value of JSON.

    Raises:
        RecipeError: no equals sign.
    """
    from moekit.errors import RecipeError

    key, equals, value = text.partition("=")
    if not equals:
        raise RecipeError("an option has a value", where=f"--option {text}", expected="KEY=VALUE, as beta=16")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def parse_scope(text: str) -> Any:
    """`all`, `prompt`, `generated` or `span:START:END` as a `Scope`.

    Raises:
        RecipeError: something else.
    """
    import re

    from moekit.errors import RecipeError
    from moekit.plans import Scope

    if text in ("all", "prompt", "generated"):
        return Scope(part=text)
    match = re.fullmatch(r"span:(\d+):(\d*)", text)
    if not match or (match[2] and int(match[2]) <= int(match[1])):
        raise RecipeError(
            "there is no such part of a text",
            where=f"--scope {text}",
            expected="all, prompt, generated, or span:START:END with END behind START, as span:0:16",
        )
    return Scope(part="span", start=int(match[1]), end=int(match[2]) if match[2] else None)


def marker_ids(model: Any, words: list[str]) -> tuple[int, ...]:
    """The ids of the tokens that words begin with, with and without a space before them."""
    from moekit.data import load_tokenizer

    tokenizer = load_tokenizer(model.path, trust_remote_code=model.trust_remote_code)
    found = {
        tokenizer(form, add_special_tokens=False)["input_ids"][0]
        for word in words
        if word
        for form in (word, " " + word)
    }
    return tuple(sorted(found))
