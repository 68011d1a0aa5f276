"""The place of an output folder: what is refused before writing starts, holding it for one process, the final rename.

Work goes on in `OUT.partial/`, which carries the identity of its job; it becomes OUT by one rename.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moekit.errors import OutputError

JOB = "moekit-job.json"  # in OUT.partial: whose work it is


def check_place(out: Path, overwrite: bool) -> None:
    """Refuse a place that cannot be written to or is taken.

    Args:
        out: resolved.
        overwrite: a folder that holds a model may be replaced.
    """
    if not out.parent.is_dir():
        raise OutputError("the folder for the output does not exist", where=out.parent, fix=f"mkdir -p {out.parent}")
    if os.path.ismount(out):
        raise OutputError("the output is a mount point", where=out, fix=f"write into a folder in it: {out / 'model'}")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise OutputError("no permission to write here", where=out.parent, fix="choose another folder")
    if out.exists() and not out.is_dir():
        raise OutputError("the output is a file", where=out, expected="a new folder", fix="choose another name")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise OutputError(
                "the output folder is not empty",
                where=out,
                expected="a new or empty folder",
                fix="choose another folder, or pass --overwrite",
            )
        if not (out / "config.json").is_file():
            raise OutputError(
                "only a model folder can be overwritten",
                where=out,
                expected="a config.json in it",
                fix="choose another folder, or empty this one yourself",
            )


def check_inputs(out: Path, partial: Path, inputs: Iterable[Path]) -> None:
    """Refuse to write where files are read from."""
    for file in set(inputs):
        for path in (file.absolute(), file.resolve()):
            if path.is_relative_to(out) or path.is_relative_to(partial):
                raise OutputError(
                    "the output folder holds files that are read", where=out, got=path, fix="choose another folder"
                )


def check_side_files(sides: Iterable[tuple[Path, Path]], reserved: set[str]) -> None:
    """Refuse names that leave the output folder or are taken, and links that leave the model's folder or hub cache."""
    for source, relative in sides:
        if relative.is_absolute() or ".." in relative.parts or str(relative) in reserved:
            raise OutputError(
                "a side file has a name that is refused",
                where=source,
                expected="a name inside the output folder, other than those of weights and config",
                got=relative,
                fix="remove or rename this file",
            )
        root = source.absolute().parents[len(relative.parts) - 1]
        allowed = [root.resolve()]
        if root.parent.name == "snapshots":  # a hub cache links snapshots/REVISION/FILE to blobs/HASH
            allowed.append((root.parent.parent / "blobs").resolve())
        if not any(source.resolve().is_relative_to(folder) for folder in allowed):
            raise OutputError(
                "a side file links to a place outside the model's folder: refused",
                where=source,
                got=source.resolve(),
                fix="replace the link by the file, if you trust it, or remove it",
            )


def check_space(folder: Path, needed_bytes: int) -> None:
    """Refuse a disk that is too small."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise OutputError(
            "not enough disk space",
            where=folder,
            expected=f"{needed_bytes:,} bytes",
            got=f"{free_bytes:,} bytes free",
            fix=f"free {needed_bytes - free_bytes:,} bytes, or write to another disk",
        )


@contextmanager
def claimed(partial: Path) -> Iterator[None]:
    """Make the folder and hold it for this process; it goes away again if it stays empty.

    The lock dies with its process, so that a kill leaves none behind.
    """
    partial.mkdir(exist_ok=True)
    handle = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError("another process is writing this output", where=partial, fix="wait for it") from None
        except OSError:
            pass  # a file system without locks
        try:
            yield
        finally:
            with suppress(OSError):
                partial.rmdir()  # refuses unless empty
    finally:
        os.close(handle)


def take_over(partial: Path, identity: dict, overwrite: bool) -> None:
    """Clear what may be dropped from the claimed folder: what remains are finished shards of this very job.

    Raises:
        OutputError: it holds another job's work, or something unknown.
    """
    try:
        old = json.loads((partial / JOB).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        old = None
    if old == identity:
        stale = list(partial.glob("*.tmp"))
    elif old is not None and overwrite:
        stale = list(partial.iterdir())
    elif any(partial.iterdir()):
        raise OutputError(
            "another job left unfinished work here" if old else "a folder that this output needs is taken",
            where=partial,
            expected="work of the same model, plan and settings",
            fix="delete that folder, or choose another output (running the other job again finishes it)",
        )
    else:
        stale = []
    for path in stale:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def sign(partial: Path, identity: dict) -> None:
    """Say whose work the claimed folder holds; the signature of a run before is left as it is."""
    if not (partial / JOB).exists():
        write_text(partial / JOB, json.dumps(identity, indent=1))
        sync(partial / JOB)


def move(partial: Path, out: Path) -> None:
    """Give the finished folder its name."""
    replace(partial, out)
    (out / JOB).unlink()  # only now: a partial folder always says whose it is


def replace(new: Path, out: Path) -> None:
    """Give a folder its name; what it replaces is put aside first, so that OUT is never half of anything."""
    if out.is_dir() and any(out.iterdir()):
        aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        out.rename(aside / out.name)
        new.rename(out)
        shutil.rmtree(aside)
    else:
        new.rename(out)
    sync(out.parent)


def failed(error: OSError, partial: Path) -> OutputError:
    """What to tell the user of an error of the operating system in the middle of the work."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return OutputError(
        "the disk is full" if full else "the checkpoint could not be written",
        where=error.filename or partial,
        got=error.strerror or error,
        fix=f"{'free some space' if full else 'mend this'} and run the same again; {partial} keeps finished shards",
    )


def write_text(file: Path, text: str) -> None:
    """Text and a final newline, UTF-8."""
    file.write_text(text + "\n", encoding="utf-8")


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
