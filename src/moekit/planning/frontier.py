"""The frontier: bytes against predicted error of all that was considered, and what was measured of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moekit.checkpoint.place import write_text
from moekit.errors import OutputError
from moekit.markup import html_table
from moekit.planning.candidates import Candidate
from moekit.planning.plot import Dot, draw
from moekit.recipe import format_bytes

HEADS = ("experts", "size", "of the model", "predicted error", "measured KL", "")
FILES = ("frontier.svg", "frontier.md", "frontier.json")


@dataclass(frozen=True)
class Point:
    """One candidate.

    Attributes:
        candidate: what it is.
        measured: KL divergence from the source on held-out text, nats a token, mean over domains; None: not measured.
        front: nothing that is as small is predicted to be better.
        chosen: it is what the planner takes.
    """

    candidate: Candidate
    measured: float | None = None
    front: bool = False
    chosen: bool = False


@dataclass(frozen=True)
class Frontier:
    """All points, smallest first.

    Attributes:
        points: of every candidate.
        source_bytes: of the model as it is.
        budget_bytes: what the result may have.
    """

    points: tuple[Point, ...]
    source_bytes: int
    budget_bytes: int

    @property
    def front(self) -> list[Point]:
        """Points that no other beats in both size and predicted error, smallest first."""
        return [x for x in self.points if x.front]

    @property
    def measured(self) -> list[Point]:
        """Points that were measured, the best first."""
        known = [(x.measured, i) for i, x in enumerate(self.points) if x.measured is not None]
        return [self.points[i] for _, i in sorted(known)]

    def rows(self) -> Iterator[tuple[str, ...]]:
        """Cells for `HEADS`, of the front and of what was measured."""
        for point in self.points:
            if not (point.front or point.measured is not None):
                continue
            x = point.candidate
            yield (
                str(x),
                format_bytes(x.bytes),
                f"{x.bytes / self.source_bytes:.1%}",
                x.said,
                "" if point.measured is None else f"{point.measured:.4f}",
                "chosen" if point.chosen else "over the budget" if x.bytes > self.budget_bytes else "",
            )

    def markdown(self) -> str:
        """The table."""
        lines = ["| " + " | ".join(HEADS) + " |", "|---|--:|--:|--:|--:|---|"]
        return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in self.rows())])

    def _repr_html_(self) -> str:
        return html_table(f"Budget {format_bytes(self.budget_bytes)}", HEADS, self.rows())

    def to_dict(self) -> dict:
        """Plain data for JSON: every point."""
        flags = [{"measured": x.measured, "front": x.front, "chosen": x.chosen} for x in self.points]
        points = [x.candidate.row() | flag for x, flag in zip(self.points, flags, strict=True)]
        return {"source_bytes": self.source_bytes, "budget_bytes": self.budget_bytes, "points": points}

    def svg(self) -> str:
        """The plot."""
        dots = [
            Dot(
                x.candidate.bytes,
                x.candidate.predicted,
                x.measured,
                x.candidate.kind,
                x.front,
                x.chosen,
                str(x.candidate),
            )
            for x in self.points
        ]
        return draw(dots, self.source_bytes, self.budget_bytes)

    def save(self, folder: str | Path) -> Path:
        """Write the plot, the table and all points (`FILES`) into a folder.

        Raises:
            OutputError: it cannot be made or written.
        """
        path = Path(folder)
        try:
            path.mkdir(parents=True, exist_ok=True)
            for name, text in zip(
                FILES, (self.svg(), self.markdown(), json.dumps(self.to_dict(), indent=1)), strict=True
            ):
                write_text(path / name, text)
        except OSError as error:
            raise OutputError("the frontier cannot be written", where=path, got=error.strerror or str(error)) from None
        return path


def frontier(
    found: Sequence[Candidate], measured: Sequence[tuple[Candidate, float]], chosen: Candidate, source: int, budget: int
) -> Frontier:
    """Put candidates in order and mark those that nothing as small is predicted to beat."""
    known = {id(x): kl for x, kl in measured}
    points, least = [], float("inf")
    for x in sorted(found, key=lambda x: (x.bytes, x.predicted)):
        front = x.predicted < least
        least = min(least, x.predicted)
        points.append(Point(x, known.get(id(x)), front, x is chosen))
    return Frontier(tuple(points), source, budget)
