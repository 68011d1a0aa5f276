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
