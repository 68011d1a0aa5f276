"""Table: named columns of equal length, which is what every statistic of a trace comes as."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

SHOWN_ROWS = 20


@dataclass(frozen=True, eq=False)
class Table:
    """Named columns of equal length.

    Attributes:
        name: what it is about.
        columns: one-dimensional arrays by name, in order.
        note: one sentence: how the numbers are computed, and under which assumption.
    """

    name: str
    columns: Mapping[str, np.ndarray]
    note: str = ""

    def __post_init__(self) -> None:
        lengths = {name: len(column) for name, column in self.columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"columns of different lengths: {lengths}")

    @classmethod
    def of(cls, name: str, rows: list[dict[str, Any]], note: str = "") -> Table:
        """From rows with equal keys."""
        keys = rows[0].keys() if rows else ()
        return cls(name, {key: np.array([row[key] for row in rows]) for key in keys}, note)

    @classmethod
    def stacked(cls, tables: list[Table]) -> Table:
        """Tables with the same columns, one below the other."""
        first = tables[0]
        columns = {name: np.concatenate([table[name] for table in tables]) for name in first.columns}
        return cls(first.name, columns, first.note)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def __getitem__(self, column: str) -> np.ndarray:
        return self.columns[column]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Each row as a dict of plain Python values."""
        lists = [column.tolist() for column in self.columns.values()]
        for values in zip(*lists, strict=True):
            yield dict(zip(self.columns, values, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: name, note, and each column as a list."""
        columns = {name: [_plain(x) for x in column.tolist()] for name, column in self.columns.items()}
        return {"name": self.name, "note": self.note, "columns": columns}

    def where(self, **values: Any) -> Table:
        """The rows in which every named column has the given value, as `where(layer=3, domain="python")`."""
        keep = np.ones(len(self), bool)
        for name, value in values.items():
            keep &= self.columns[name] == value
        return self.take(np.flatnonzero(keep))

    def top(self, count: int, by: str) -> Table:
        """The rows with the `count` largest values in column `by`, largest first."""
        return self.take(np.argsort(-self.columns[by], kind="stable")[:count])

    def take(self, rows: np.ndarray) -> Table:
        """Rows by number."""
        return Table(self.name, {name: column[rows] for name, column in self.columns.items()}, self.note)

    def __repr__(self) -> str:
        return f"<Table {self.name}: {len(self):,} rows of {', '.join(self.columns)}>"

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self.columns)
        shown = self.take(np.arange(min(len(self), SHOWN_ROWS)))
        rows = ["".join(f"<td>{html.escape(_short(x))}</td>" for x in row.values()) for row in shown.rows()]
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        more = f"<p>{len(self):,} rows, the first {SHOWN_ROWS} are shown</p>" if len(self) > SHOWN_ROWS else ""
        return (
            f"<table><caption>{html.escape(self.name)}. {html.escape(self.note)}</caption>"
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}"
        )


def _plain(value: Any) -> Any:
    """NaN and infinities have no place in JSON."""
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
