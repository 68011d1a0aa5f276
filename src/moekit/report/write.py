"""Write a report: report.html and, beside it, report.json with every number that it shows."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moekit.errors import DataError, OutputError
from moekit.report.pack import to_plain
from moekit.report.page import render


def write(payload: Mapping[str, Any], out: str | Path) -> tuple[Path, Path]:
    """Write page and numbers; both appear whole or not at all.

    Args:
        payload: from `moekit.report.collect`.
        out: the page's file; the numbers go into the same name with .json.

    Raises:
        OutputError: the files cannot be written.
    """
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise OutputError("the report is a web page", where=out, expected="a name that ends in .html")
    numbers = out.with_suffix(".json")
    text = json.dumps(to_plain(payload), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    parts = [(file, file.with_name(file.name + ".partial")) for file in (out, numbers)]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for (_, part), content in zip(parts, (render(payload), text), strict=True):
            part.write_text(content, "utf-8")
        for file, part in parts:
            part.replace(file)
    except OSError as error:
        for _, part in parts:
            with contextlib.suppress(OSError):
                part.unlink()
        raise OutputError("the report cannot be written", where=out, got=error.strerror or str(error)) from None
    return out, numbers


def read_json(file: Path) -> dict[str, Any]:
    """An object from a JSON file.

    Raises:
        DataError: no such file, or it holds no JSON object.
    """
    try:
        found = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise DataError("no such file", where=file) from None
    except (OSError, ValueError) as error:
        raise DataError("this is no JSON file", where=file, got=str(error)[:200]) from None
    if not isinstance(found, dict):
        raise DataError(
            "this file holds something else", where=file, expected="a JSON object", got=type(found).__name__
        )
    return found
