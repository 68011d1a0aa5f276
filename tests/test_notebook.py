"""What the main objects show of themselves in a notebook, and the example notebook, run cell by cell."""

from __future__ import annotations

import ast
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import moekit
from moekit.evaluation import DomainScore, Evaluation
from moekit.evaluation.intervals import Interval
from moekit.markup import html_table
from moekit.plans import Drop, Plan
from moekit.stats import LayerStats, Stats

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "notebook.ipynb"
HOSTILE = "<script>alert(1)</script>"


class Tags(HTMLParser):
    """Checks that tags are closed in order, and counts them."""

    def __init__(self, text):
        super().__init__()
        self.open, self.count = [], {}
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_tables_are_escaped():
    tags = Tags(html_table(HOSTILE, ("a", HOSTILE), [(1, HOSTILE), (None, "&")])).count
    assert (tags["tr"], tags["td"], tags["th"]) == (3, 4, 2)
    assert "script" not in tags


def test_main_objects_show_themselves():
    model = moekit.open("refmoe")
    shown = model._repr_html_()
    assert Tags(shown).count["tr"] == 1 + sum(part.bytes > 0 for part in model.layout.parts.values())
    assert "qwen3_moe" in shown
    layers = {3: LayerStats({"count": np.ones((2, 4))})}
    stats = Stats("0" * 16, ("python", HOSTILE), np.array([7_000, 5]), np.array([2, 1]), layers)
    shown = stats._repr_html_()
    assert Tags(shown).count["tr"] == 3
    assert "7000" in shown
    assert "measured: count" in shown
    plan = Plan(layout_hash="0" * 16, method=HOSTILE, ops=[Drop(layer=3, experts=(1, 4))])
    shown = plan._repr_html_()
    assert Tags(shown).count["tr"] == 2
    assert "(1, 4)" in shown
    score = DomainScore(100, 4, Interval(12.5, 12, 13))
    assert "12.5 [12, 13]" in Evaluation({HOSTILE: score})._repr_html_()
    assert "KL" not in Evaluation({HOSTILE: score})._repr_html_()
    compared = DomainScore(100, 4, *[Interval(0.5, 0.25, 0.75)] * 5)
    assert Tags(Evaluation({"a": compared}, 0.1)._repr_html_()).count["th"] == 6


def test_the_example_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load_data = moekit.load_data  # as it stands, but on less text
    monkeypatch.setattr(moekit, "load_data", lambda *args, **kwargs: load_data(*args, **{**kwargs, "tokens": 1_024}))
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    names = {"__name__": "__main__"}
    shown = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            tree = ast.parse("".join(cell["source"]))
            *before, last = tree.body
            is_shown = isinstance(last, ast.Expr)
            exec(compile(ast.Module([*before, *([] if is_shown else [last])], []), str(NOTEBOOK), "exec"), names)
            if is_shown:
                shown.append(eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), names))
            assert cell["outputs"] == [], "commit the notebook without outputs"
    assert len(shown) == sum(cell["cell_type"] == "code" for cell in notebook["cells"])
    for value in shown:
        if not isinstance(value, Path):
            Tags(value._repr_html_())
    assert (tmp_path / "report.html").stat().st_size > 100_000
    overlap = names["tables"].saturation(names["recorded"], names["after"])
    kept = {domain: overlap.where(domain=domain)["overlap"].mean() for domain in ("python", "math")}
    assert kept["python"] > kept["math"], "the plan was made for Python"


@pytest.mark.parametrize("cell", json.loads(NOTEBOOK.read_text("utf-8"))["cells"], ids=lambda x: x["id"])
def test_the_notebook_is_short_lines(cell):
    assert all(len(line.rstrip("\n")) <= 120 for line in cell["source"])
    assert not re.search(r"/(tmp|work|home)/", "".join(cell["source"]))
