"""moekit serve: an OpenAI-compatible server, in a given amount of memory."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from moekit.cli.engine import CONTEXT, DEVICE, FAST, LOSSY, MEMORY, POLICY, PREDICTOR, TRACE, open_engine
from moekit.cli.screen import console
from moekit.errors import DataError, RecipeError

if TYPE_CHECKING:
    from moekit.plans import Plan
    from moekit.serve.engine import Engine

KEY_VARIABLE = "MOEKIT_API_KEY"
LOOPBACK = ("127.", "localhost", "::1")
GRACE_S = 30  # for answers that are being written when the server is told to end


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("serve")(serve)


def serve(
    store: Path = typer.Argument(help="A folder that `moekit pack` made."),
    memory: str | None = MEMORY,
    host: str = typer.Option("127.0.0.1", help="Where to listen; 0.0.0.0: on all networks."),
    port: int = typer.Option(8000, min=0, max=65535, help="0: any that is free."),
    api_key: str | None = typer.Option(None, help=f"That requests must bring.  [default: ${KEY_VARIABLE}, or none]"),
    context: int = CONTEXT,
    parallel: int = typer.Option(16, min=1, help="Requests that are answered at once."),
    kept_tokens: int | None = typer.Option(
        None, min=16, help="Whose keys and values are kept, of all requests together.  [default: 4 contexts]"
    ),
    queue: int = typer.Option(64, min=0, help="Requests that may wait; others get 429."),
    steer: list[str] = typer.Option([], help="NAME=plan.json, to be picked by requests; may be repeated."),
    chat_template: Path | None = typer.Option(None, help="A Jinja file, instead of the tokenizer's own."),
    name: str | None = typer.Option(None, help="Of the model in the API.  [default: the store's folder]"),
    policy: str = POLICY,
    predictor: str = PREDICTOR,
    trace: Path | None = TRACE,
    lossy: str | None = LOSSY,
    fast: bool = FAST,
    device: str = DEVICE,
    max_body: str = typer.Option("1MiB", help="Of a request, at most."),
) -> None:
    """Serve a packed model to clients of OpenAI's API, in less memory than it needs.

    Requests are answered together, a token of each at a time, and join and leave as they come and go. The memory is
    that of the whole process, with the keys and values of all requests.
    """
    try:  # before the engine measures what is left: they take memory too
        import uvicorn

        from moekit.serve.http.app import create_app
    except ImportError as error:
        raise RecipeError(
            "the server needs libraries that are not installed", got=error, fix="pip install 'moekit[serve]'"
        ) from None
    from moekit.data import load_tokenizer
    from moekit.recipe import parse_bytes
    from moekit.serve.batching import Batcher
    from moekit.serve.http.calls import Service
    from moekit.serve.scheduler import Scheduler
    from moekit.serve.steering import Steering
    from moekit.serve.trial import why_not
    from moekit.view import MoEView

    plans, template = _plans(steer), _template(chat_template)
    max_body_bytes = parse_bytes(max_body)
    listening = _listen(host, port)
    tokenizer = load_tokenizer(store)
    engine = open_engine(
        store,
        plans,
        lossy,
        fast,
        memory=memory,
        context=context,
        texts=parallel,
        kept_tokens=kept_tokens or 4 * context,
        policy=policy,
        predictor=predictor,
        trace=trace,
        device=device,
    )
    steering = Steering(MoEView(engine.model, engine.layout), plans) if plans else None
    reason = why_not(engine)
    scheduler = Scheduler(Batcher(engine, tokenizer, steering, batched=reason is None), queue)
    service = Service(scheduler, tokenizer, name or store.resolve().name, int(time.time()), template, reason)
    key = api_key or os.environ.get(KEY_VARIABLE) or None
    _tell(engine, service.name, listening, key, reason)
    config = uvicorn.Config(
        create_app(service, key, max_body_bytes), log_level="warning", timeout_graceful_shutdown=GRACE_S
    )
    try:
        with suppress(KeyboardInterrupt):  # which uvicorn hands on when it has ended well
            uvicorn.Server(config).run(sockets=[listening])
    finally:
        scheduler.close(grace_s=0)
        engine.close()


def _plans(given: list[str]) -> dict[str, Plan]:
    from moekit.plans import Plan

    out: dict[str, Plan] = {}
    for item in given:
        name, _, file = item.partition("=")
        if not name or not file or name in out:
            raise RecipeError(
                "a plan to steer by needs a name of its own", where="--steer", expected="NAME=plan.json", got=item
            )
        out[name] = Plan.load(Path(file))
    return out


def _template(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("the chat template cannot be read", where=file, got=error) from None


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens; taken before the model is loaded."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(128)
    except OSError as error:
        raise RecipeError(
            "the server cannot listen there", where=f"{host}:{port}", got=error.strerror or error, fix="another --port"
        ) from None
    return sock


def _tell(engine: Engine, name: str, listening: Any, key: str | None, reason: str | None) -> None:
    from moekit.recipe import format_bytes

    memory, (host, port, *_) = engine.memory, listening.getsockname()
    screen = console()
    screen.print(
        f"{name}: {memory.slots} places for experts ({format_bytes(memory.experts)}) of {format_bytes(memory.budget)}; "
        f"context {engine.context:,} tokens, {engine.kept_tokens:,} kept of up to {engine.texts} requests"
    )
    if reason:
        screen.print(f"requests take turns, a forward each: {reason}")
    if key is None and not str(host).startswith(LOOPBACK):
        screen.print("[yellow]anybody who reaches this host can use the server: give it an --api-key[/]")
    screen.print(f"serving http://{f'[{host}]' if ':' in str(host) else host}:{port}/v1", soft_wrap=True)
