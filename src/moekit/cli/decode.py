"""moekit decode: write on by methods that let experts, or other models, take part in the next token."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from moekit.cli.screen import bars, check_file, console
from moekit.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from moekit.decoding.questions import Marking, Question
    from moekit.families.model import Model

# The options of each method; those of another one are refused.
OPTIONS = {
    "greedy": (),
    "scmoe": ("weak", "alpha", "beta"),
    "c3po": ("reference", "surrogate", "neighbours", "layers", "experts", "steps"),
    "guidance": ("plus", "minus", "negative", "strength", "alpha"),
    "emulated": ("small-tuned", "small-base"),
}
NEEDED = {"c3po": ("reference",), "emulated": ("small-tuned", "small-base")}


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("decode")(decode)


def decode(
    model: str = typer.Argument(help="A folder, a hub id, or refmoe; it is loaded into memory."),
    method: str = typer.Option("greedy", help="greedy, scmoe, c3po, guidance or emulated."),
    prompt: str | None = typer.Option(None, help="The text to continue."),
    data: Path | None = typer.Option(None, help='JSON lines with "prompt", and "answer" where accuracy is wanted.'),
    out: Path | None = typer.Option(None, help="With --data: where the answers go, as JSON lines."),
    weak: str | None = typer.Option(None, help="scmoe: rank:R, random, top-1 or fewer:N.  [default: rank:3]"),
    alpha: float | None = typer.Option(
        None, help="scmoe, guidance: least share of the likeliest token.  [default: 0.1; guidance: 0]"
    ),
    beta: float | None = typer.Option(None, help="scmoe: strength of the contrast.  [default: 0.5]"),
    reference: Path | None = typer.Option(None, help="c3po: a folder that `moekit steer reference` made."),
    surrogate: str | None = typer.Option(None, help="c3po: gradient, kernel or mode.  [default: gradient]"),
    neighbours: int | None = typer.Option(None, help="c3po: references that count.  [default: 3]"),
    layers: int | None = typer.Option(None, help="c3po: last layers that change.  [default: 5]"),
    experts: int | None = typer.Option(None, help="c3po: experts of each that change.  [default: 20]"),
    steps: int | None = typer.Option(None, help="c3po: steps of gradient or mode.  [default: 10]"),
    plus: str | None = typer.Option(None, help="guidance: whom to follow, a steering plan (.json) or a model."),
    minus: str | None = typer.Option(None, help="guidance: whom to leave, a steering plan (.json) or a model."),
    negative: str | None = typer.Option(None, help="guidance: text put before the prompt of the one to leave."),
    strength: float | None = typer.Option(None, help="guidance: how much.  [default: 1]"),
    small_tuned: str | None = typer.Option(None, help="emulated: the small model that was tuned."),
    small_base: str | None = typer.Option(None, help="emulated: the small model before it was tuned."),
    max_tokens: int = typer.Option(256, min=1, help="Of an answer, at most."),
    stop: str | None = typer.Option(None, help="An answer ends before this text.  [default: with --data, its line]"),
    extract: str = typer.Option("", help="With answers: a regular expression; its last match is the answer."),
    temperature: float = typer.Option(0.0, min=0.0, help="0: always the likeliest token."),
    top_p: float = typer.Option(1.0, min=0.0, max=1.0, help="Only the likeliest tokens that have this share."),
    seed: int = typer.Option(0, help="Of all draws."),
    batch_size: int = typer.Option(8, min=1, help="Texts that are continued together (c3po: one by one)."),
    device: str = typer.Option("cpu", help="cpu or cuda."),
    trust_remote_code: bool = typer.Option(False, "--trust-remote-code", help="Allow code that a checkpoint brings."),
) -> None:
    """Continue texts by SCMoE, C3PO, contrastive guidance or emulated fine-tuning, beside plain greedy decoding."""
    import moekit
    from moekit.data import load_tokenizer
    from moekit.decoding.questions import Marking, Question, load_questions, unescaped
    from moekit.serve.sampling import Sampling

    given = {
        **{"weak": weak, "alpha": alpha, "beta": beta, "reference": reference, "surrogate": surrogate},
        **{"neighbours": neighbours, "layers": layers, "experts": experts, "steps": steps, "plus": plus},
        **{"minus": minus, "negative": negative, "strength": strength},
        **{"small-tuned": small_tuned, "small-base": small_base},
    }
    options = {name: value for name, value in given.items() if value is not None}
    check_options(method, options)
    if (prompt is None) == (data is None):
        raise RecipeError("there is nothing to continue", expected="either --prompt TEXT or --data FILE")
    if out is not None:
        check_file(out)
        if data is None:
            raise RecipeError("one answer goes to the screen", where="--out", fix="leave it out, or give --data")
    questions = [Question(prompt or "")] if data is None else load_questions(data, answers=False)
    ending = ("" if data is None else "\n") if stop is None else unescaped(stop)
    marking = Marking(ending, extract)
    marking.check()
    sampling = Sampling(temperature, top_p, seed)
    opened = moekit.open(model, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(opened.path, trust_remote_code=trust_remote_code)
    common = {"max_new_tokens": max_tokens, "sampling": sampling, "finished": marking.finished(tokenizer)}
    prompts = [tokenizer(x.prompt).input_ids for x in questions]
    with bars() if data is not None else nullcontext(lambda *_: None) as progress:
        write = writer(opened, method, options, seed, device, trust_remote_code)
        written = write(prompts, batch_size=batch_size, progress=progress, **common)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
    if data is None:
        typer.echo(texts[0].partition(ending)[0] if ending else texts[0])
    else:
        tell(questions, texts, marking, method, out)


def check_options(method: str, options: dict[str, Any]) -> None:
    """Refuse an unknown method, an option of another one, and a method without what it needs.

    Raises:
        RecipeError: which.
    """
    if method not in OPTIONS:
        raise RecipeError(
            f"there is no decoding method {method!r}", where="--method", fix=did_you_mean(method, OPTIONS)
        )
    for name in options:
        if name not in OPTIONS[method]:
            owners = [other for other, names in OPTIONS.items() if name in names]
            raise RecipeError(f"{method} has no option --{name}", expected=f"--method {' or '.join(owners)}")
    if absent := [name for name in NEEDED.get(method, ()) if name not in options]:
        raise RecipeError(f"{method} needs more", expected=" and ".join(f"--{name}" for name in absent))
    if method == "guidance" and not {"plus", "minus", "negative"} & options.keys():
        raise RecipeError("nobody guides", expected="--plus, --minus or --negative")


def writer(opened: Model, method: str, options: dict[str, Any], seed: int, device: str, trust_remote_code: bool) -> Any:
    """The function that continues prompts; what it needs is checked first, then loaded."""
    import moekit
    from moekit.decoding.c3po import C3PO, Pathfinder, decode_mixed
    from moekit.decoding.loop import Runner
    from moekit.decoding.loop import decode as run
    from moekit.decoding.methods import Voice, check_share, emulation, greedy, guidance, scmoe
    from moekit.decoding.references import References
    from moekit.decoding.vocabulary import check_same_vocabulary
    from moekit.decoding.weak import Weak
    from moekit.plans import Plan

    def load(one: Model) -> tuple[Any, Any]:
        return one.load(device=device), one.layout

    if method == "c3po":
        names = ("surrogate", "neighbours", "layers", "experts", "steps")
        settings = C3PO(**{name: options[name] for name in names if name in options})
        settings.check()
        references = References.load(options["reference"], opened)
        pathfinder = Pathfinder(Runner(*load(opened)), references, settings)
        return lambda prompts, batch_size, **common: decode_mixed(pathfinder, prompts, **common)[0]
    if method == "greedy":
        made = greedy(load(opened))
    elif method == "scmoe":
        rule = Weak.parse(options.get("weak", "rank:3"), seed)
        rule.check(opened.layout)
        check_share(alpha=options.get("alpha", 0.1))
        made = scmoe(load(opened), rule, options.get("alpha", 0.1), options.get("beta", 0.5))
    elif method == "emulated":
        others = [moekit.open(options[x], trust_remote_code=trust_remote_code) for x in NEEDED["emulated"]]
        check_same_vocabulary([opened, *others])
        made = emulation(load(opened), *map(load, others))
    else:
        check_share(alpha=options.get("alpha", 0.0))
        sides: dict[str, tuple[Plan | None, Model | None]] = {}
        for side in ("plus", "minus"):
            name = options.get(side, "")
            if name.endswith(".json"):
                plan = Plan.load(name)
                Voice(plan=plan).branch(opened.layout)  # refuses it before anything is loaded
                sides[side] = plan, None
            else:
                sides[side] = None, moekit.open(name, trust_remote_code=trust_remote_code) if name else None
        check_same_vocabulary([opened, *(model for _, model in sides.values() if model is not None)])
        before = tuple(_ids(opened, options.get("negative", "")))
        voices = {
            side: Voice(None if model is None else load(model), plan, before if side == "minus" else ())
            for side, (plan, model) in sides.items()
        }
        made = guidance(
            load(opened), voices["plus"], voices["minus"], options.get("strength", 1.0), options.get("alpha", 0.0)
        )
    return lambda prompts, **common: run(made.runners, prompts, made.combine, **common)


def _ids(opened: Model, text: str) -> list[int]:
    from moekit.data import load_tokenizer

    return load_tokenizer(opened.path, trust_remote_code=opened.trust_remote_code)(text).input_ids if text else []


def tell(questions: list[Question], texts: list[str], marking: Marking, method: str, out: Path | None) -> None:
    """Write the answers, and say how many are right where that is known."""
    import numpy as np

    from moekit.checkpoint.place import write_text
    from moekit.decoding.questions import accuracy
    from moekit.evaluation.intervals import ratio_interval

    rows: list[dict[str, str | bool]] = [
        {"prompt": x.prompt, "written": text} for x, text in zip(questions, texts, strict=True)
    ]
    known = [number for number, x in enumerate(questions) if x.answer]
    marks = accuracy([texts[x] for x in known], [questions[x] for x in known], marking)
    for number, right in zip(known, marks, strict=True):
        rows[number] |= {"answer": questions[number].answer, "right": right}
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    if out is None:
        typer.echo(lines)
    else:
        aside = out.with_name(out.name + ".tmp")
        write_text(aside, lines)
        aside.replace(out)
    if known:
        share = ratio_interval(np.array(marks, float), np.ones(len(marks)))
        console().print(
            f"{method}: {sum(marks)} of {len(marks)} right, {share.value:.1%} [{share.low:.1%}, {share.high:.1%}]"
        )
