"""The command line: one thin file a verb, found by its name; heavy imports happen inside the verbs."""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys

import click
import typer
from rich.markup import escape

import moekit
from moekit.cli.screen import errors_to
from moekit.errors import UserError

app = typer.Typer(
    name="moekit",
    help="The workbench for Mixture-of-Experts language models: see what experts do, make models smaller, prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"moekit {moekit.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def _register() -> None:
    """Every module of this package with a `register(app)` is a verb."""
    for found in sorted(pkgutil.iter_modules(__path__), key=lambda x: x.name):
        module = importlib.import_module(f"{__name__}.{found.name}")
        if "register" in vars(module):
            module.register(app)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 when it worked, 2 for a user's mistake, 1 for moekit's own, 130 when interrupted.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    _register()
    try:
        result = app(args=arguments, standalone_mode=False)
        code = result if isinstance(result, int) else 0
    except UserError as error:
        errors_to(sys.stderr).print(
            f"[bold red]{error.kind} error[/] {escape(str(error))}", highlight=False, soft_wrap=True
        )
        code = 2
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except click.ClickException as error:
        error.show()
        code = 2
    except (KeyboardInterrupt, click.exceptions.Abort):
        errors_to(sys.stderr).print("interrupted; run the same command again to go on where it stopped")
        code = 130
    except Exception as error:
        if os.environ.get("MOEKIT_DEBUG"):
            raise
        errors_to(sys.stderr).print(
            f"[bold red]internal error[/] {type(error).__name__}: {escape(str(error))}\n"
            "  This is moekit's mistake, not yours. Set MOEKIT_DEBUG=1 for the traceback and report it.",
            highlight=False,
            soft_wrap=True,
        )
        code = 1
    sys.exit(code)
