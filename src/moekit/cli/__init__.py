"""The command line: one thin file a verb, found by its name; heavy imports happen inside the verbs."""

from __future__ import annotations

import errno
import importlib
import os
import pkgutil
import sys
from functools import cache
from typing import Any

import typer
from rich.markup import escape

import moekit
from moekit.cli.screen import errors_to
from moekit.errors import UserError, VerificationError

# What the operating system may refuse at any moment, and what the user can do about it.
REFUSALS = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some space and run the same command again",
    errno.EACCES: "choose another place, or change the permissions",
    errno.EPERM: "choose another place, or change the permissions",
    errno.EROFS: "choose another place: this one is read-only",
}

INTERRUPTED = 130  # what shells say of a program that ctrl-c has ended
# Verbs that an interrupt does not set back to the start; all others have kept nothing.
RESUMED = {
    "compress": "it goes on where it stopped",
    "measure": "it goes on where it stopped",
    "pack": "it goes on where it stopped",
    "trace": "a streamed recording goes on where it stopped",
}
UsageError: Any = typer.BadParameter.__mro__[1]  # of the click that this typer uses: its own, or the library

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


@cache
def _register() -> None:
    """Every module of this package with a `register(app)` is a verb."""
    for found in sorted(pkgutil.iter_modules(__path__), key=lambda x: x.name):
        module = importlib.import_module(f"{__name__}.{found.name}")
        if "register" in vars(module):
            module.register(app)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 when it worked, 2 for a user's mistake, 1 for moekit's own (a result that fails its proof too), 130 when
        interrupted.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        _register()
        result = app(args=arguments, prog_name="moekit", standalone_mode=False)
        if result == INTERRUPTED:  # some versions of typer make this of the interrupt, others an Abort
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except UserError as error:
        _say(f"[bold red]{error.kind} error[/] {escape(str(error))}")
        return 1 if isinstance(error, VerificationError) else 2
    except UsageError as error:
        verb = error.ctx.command_path if error.ctx else "moekit"
        _say(f"[bold red]usage error[/] {escape(error.format_message())}\n  fix:      see {verb} --help")
        return 2
    except (KeyboardInterrupt, typer.Abort):
        _say(f"interrupted; run the same command again ({_after_interrupt(arguments)})")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("MOEKIT_DEBUG"):
            raise
        if isinstance(error, OSError) and error.errno in REFUSALS:
            where = f"\n  where:    {escape(str(error.filename))}" if error.filename else ""
            _say(f"[bold red]output error[/] {error.strerror}{where}\n  fix:      {REFUSALS[error.errno]}")
            return 2
        _say(
            f"[bold red]internal error[/] {type(error).__name__}: {escape(str(error))}\n"
            "  This is moekit's mistake, not yours. Set MOEKIT_DEBUG=1 for the traceback and report it."
        )
        return 1


def _after_interrupt(arguments: list[str] | None) -> str:
    """What the interrupted verb will do when it is given again."""
    given = sys.argv[1:] if arguments is None else arguments
    verb = next((x for x in given if not x.startswith("-")), "")
    return RESUMED.get(verb, "it starts from the beginning")


def _say(message: str) -> None:
    errors_to(sys.stderr).print(message, highlight=False, soft_wrap=True)
