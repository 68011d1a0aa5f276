"""moekit run: write on from a prompt, or chat, in a given amount of memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from moekit.cli.engine import CONTEXT, DEVICE, FAST, LOSSY, MEMORY, POLICY, PREDICTOR, TRACE, open_engine
from moekit.cli.screen import console
from moekit.errors import PlanError, RecipeError

if TYPE_CHECKING:
    from moekit.plans import Plan
    from moekit.serve.engine import Engine
    from moekit.serve.sampling import Sampling


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("run")(run)


def run(
    store: Path = typer.Argument(help="A folder that `moekit pack` made."),
    prompt: str | None = typer.Option(None, help="The text to continue."),
    chat: bool = typer.Option(False, "--chat", help="Talk: a line from you, an answer, until an empty line."),
    memory: str | None = MEMORY,
    max_tokens: int = typer.Option(256, min=1, help="Of an answer, at most."),
    context: int = CONTEXT,
    temperature: float = typer.Option(0.0, min=0.0, help="0: always the likeliest token."),
    top_p: float = typer.Option(1.0, min=0.0, max=1.0, help="Only the likeliest tokens that have this share."),
    seed: int = typer.Option(0, help="Of the draws."),
    policy: str = POLICY,
    predictor: str = PREDICTOR,
    trace: Path | None = TRACE,
    lossy: str | None = LOSSY,
    fast: bool = FAST,
    device: str = DEVICE,
    steer: Path | None = typer.Option(None, help="A steering plan to apply."),
    stats: bool = typer.Option(False, "--stats", help="Say afterwards where the time and the memory went."),
) -> None:
    """Run a packed model in less memory than it needs: experts are read when a token chooses them.

    The memory is that of the whole process, with Python, the context and all; reads go past the page cache. With
    experts in 16 bits the text is the stock model's, token for token.
    """
    from moekit.data import load_tokenizer
    from moekit.plans import Plan
    from moekit.serve.sampling import Sampling

    if (prompt is None) == (not chat):
        raise RecipeError("there is nothing to answer", expected="either --prompt TEXT or --chat")
    plan = None if steer is None else Plan.load(steer)
    tokenizer = load_tokenizer(store)
    engine = open_engine(
        store,
        {} if plan is None else {"steer": plan},
        lossy,
        fast,
        memory=memory,
        context=context,
        policy=policy,
        predictor=predictor,
        trace=trace,
        device=device,
    )
    sampling = Sampling(temperature, top_p, seed)
    with _steered(engine, plan):
        if prompt is not None:
            _answer(engine, tokenizer, tokenizer(prompt).input_ids, max_tokens, sampling)
        else:
            _talk(engine, tokenizer, max_tokens, sampling)
    if stats:
        _tell(engine)
    engine.close()


def _steered(engine: Engine, plan: Plan | None) -> Any:
    from contextlib import nullcontext

    from moekit.apply.live import live
    from moekit.view import MoEView

    if plan is None:
        return nullcontext()
    if plan.dynamic():
        raise PlanError(
            "a store runs every expert that the router chooses: this plan leaves some out, token by token",
            where="--steer",
            got=plan.method,
            fix="score it with moekit eval MODEL --plan, or apply it around generate (moekit.apply.live)",
        )
    return live(MoEView(engine.model, engine.layout), plan)


def _answer(engine: Engine, tokenizer: Any, ids: list[int], max_tokens: int, sampling: Sampling) -> str:
    """Write an answer on the screen as it comes; what is not whole characters yet waits."""
    from moekit.serve.text import TextStream

    stream, said = TextStream(tokenizer), []
    for token in engine.stream(ids, max_tokens, sampling):
        said.append(stream.push(token))
        typer.echo(said[-1], nl=False)
    said.append(stream.finish())
    typer.echo(said[-1])
    return "".join(said)


def _talk(engine: Engine, tokenizer: Any, max_tokens: int, sampling: Sampling) -> None:
    if tokenizer.chat_template is None:
        raise RecipeError("this model has no chat template", where="--chat", fix="use --prompt")
    said: list[dict[str, str]] = []
    while line := typer.prompt("you", default="", show_default=False).strip():
        said.append({"role": "user", "content": line})
        ids = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
        said.append({"role": "assistant", "content": _answer(engine, tokenizer, ids, max_tokens, sampling)})


def _tell(engine: Engine) -> None:
    """Where time and memory went, since the start."""
    from moekit.recipe import format_bytes

    told, counts, memory = engine.telemetry, engine.cache.counts, engine.memory
    screen, written = console(), told.tokens["decode"]
    if told.first.count:
        screen.print(
            f"first token after {told.first.sum_s / told.first.count:.2f} s; "
            f"prompt {told.tokens['prefill'] / told.forward_s['prefill']:.0f} tokens/s"
        )
    if written:
        times = "  ".join(f"p{100 * share:.0f} {1e3 * x:.1f} ms" for share, x in told.token.quantiles().items())
        screen.print(f"{written / told.forward_s['decode']:.1f} tokens/s: {times} a token")
    if told.total_s:
        stalled = sum(told.stall_s.values())
        screen.print(
            f"time: {told.compute_s / told.total_s:.0%} computing, {stalled / told.total_s:.0%} waiting for the disk "
            f"({stalled:.2f} s); readers were busy for {counts.read_s:.2f} s"
        )
    a_token = f"{format_bytes(told.read_bytes['decode'] / written)} a token; " if written else ""
    screen.print(
        f"{counts.hit_rate:.0%} of experts found in memory; {format_bytes(counts.read_bytes)} read, {a_token}"
        f"{memory.slots} places for experts ({format_bytes(memory.experts)}) of {format_bytes(memory.budget)}"
    )
    pairs = zip(engine.cache.indices, counts.hits, counts.misses, strict=True)
    rates = "  ".join(f"{layer}: {hits / (hits + misses):.0%}" for layer, hits, misses in pairs if hits + misses)
    screen.print(f"found, by layer: {rates}", soft_wrap=True)
    if engine.losses is not None:
        screen.print(engine.losses.lost.describe())
