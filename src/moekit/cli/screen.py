"""What all verbs share on the screen: consoles, tables, progress bars with rate and estimate."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from moekit.errors import OutputError
from moekit.progress import Progress


def console() -> Console:
    """Standard output; as wide as the terminal, or 120 columns where there is none (a file, a pipe, a log)."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=120)


def check_file(file: Path) -> None:
    """Refuse, before work starts, a file that could not be written when it ends.

    Raises:
        OutputError: there is no such folder, or a folder has that name.
    """
    if not file.parent.is_dir():
        raise OutputError(
            "the folder for the output does not exist", where=file.parent, fix=f"mkdir -p {file.parent.absolute()}"
        )
    if file.is_dir():
        raise OutputError("the output is a folder", where=file, expected="the name of a file", fix="add a name to it")


def errors_to(stream: TextIO) -> Console:
    """A console for messages, apart from results."""
    return Console(file=stream, highlight=False)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "", style="dim")


@contextmanager
def bars() -> Iterator[Progress]:
    """A progress callback that draws one bar a stage on standard error (nothing when that is no terminal)."""
    columns = (
        TextColumn("{task.description:>12}"),
        BarColumn(30),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
    )
    screen = Console(file=sys.stderr)  # this very stream: a library may be kept quiet by another in its place
    with Bars(*columns, console=screen, transient=True, disable=not screen.is_terminal) as drawn:
        tasks: dict[str, TaskID] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = drawn.add_task(stage, total=total)
            drawn.update(tasks[stage], completed=done, total=total)

        yield progress


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A plain table: first column left, numbers right."""
    out = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(columns):
        out.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        out.add_row(*(str(cell) for cell in row))
    return out
