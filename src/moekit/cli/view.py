"""moekit view: the report of a trace on this machine, with a box whose text is traced as one types."""

from __future__ import annotations

import contextlib
import ipaddress
import webbrowser
from pathlib import Path

import typer

from moekit.cli.report import ABLATION, AGAINST, EVALUATION, PLAN, UNLEARNING, payload
from moekit.cli.screen import console


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("view")(view)


def view(
    trace: Path = typer.Argument(help="A folder that `moekit trace` wrote."),
    model: str | None = typer.Argument(None, help="The traced model, to trace typed text: a folder, a hub id, refmoe."),
    host: str = typer.Option("127.0.0.1", help="Address to listen on; the default is reached from this machine only."),
    port: int = typer.Option(8337, min=0, max=65535, help="Port to listen on; 0 takes a free one."),
    no_browser: bool = typer.Option(False, "--no-browser", help="Do not open the browser."),
    device: str = typer.Option("cpu", help="For typed text: cpu or cuda."),
    against: Path | None = AGAINST,
    plan: Path | None = PLAN,
    evaluation: Path | None = EVALUATION,
    ablation: Path | None = ABLATION,
    unlearning: Path | None = UNLEARNING,
    trust_remote_code: bool = typer.Option(False, help="Allow code that the checkpoint brings along."),
) -> None:
    """Look at a trace in the browser; given the model, text typed there is traced and coloured by expert."""
    from moekit.report.server import ReportServer
    from moekit.trace import Trace

    shown = payload(trace, against, plan, evaluation, ablation, unlearning)
    tracer = None
    if model is not None:
        import moekit
        from moekit.recording.live import LiveTracer

        opened = moekit.open(model, trust_remote_code=trust_remote_code)
        Trace.open(trace).check(opened)
        tracer = LiveTracer(opened, device=device)
    with ReportServer(shown, tracer, host, port) as server:
        console().print(f"{server.url}  (Ctrl+C ends it)")
        if not _loopback(host):
            console().print("[bold]Others can reach this[/]: there is no password.")
        if not no_browser:
            webbrowser.open(server.url)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
