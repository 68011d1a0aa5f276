"""Figures for papers: every kind in every format, the same file each time, clear errors."""

from __future__ import annotations

import sys

import pytest
import typer
from typer.testing import CliRunner

from moekit.cli import figure as verb
from moekit.errors import DataError, OutputError, RecipeError
from moekit.report import figures
from synthetic import synthetic_trace

pytest.importorskip("matplotlib", reason="no matplotlib here: pip install 'moekit[viz]'")
ODD = "a$b_{<c>"
STARTS = {".svg": b"<?xml", ".pdf": b"%PDF", ".png": b"\x89PNG"}


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return synthetic_trace(tmp_path_factory.mktemp("figures") / "t", domains=["python", ODD, "math"])


@pytest.mark.parametrize("kind", figures.FIGURES)
def test_every_figure_is_drawn_the_same_each_time(tmp_path, trace, kind):
    first, second = (figures.save(trace, kind, tmp_path / f"{i}.svg").read_bytes() for i in range(2))
    assert first == second
    assert first.startswith(STARTS[".svg"])
    text = first.decode()
    assert "a$b_{&lt;c&gt;" in text, "names stay text, and are not read as formulas"
    assert {"heatmap": "expert", "specialisation": "chance", "flow": "layer 1", "balance": "Gini"}[kind] in text
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("kind", figures.FIGURES)
@pytest.mark.parametrize("suffix", [".pdf", ".png"])
def test_other_formats(tmp_path, trace, kind, suffix):
    file = figures.save(trace, kind, tmp_path / "new" / f"figure{suffix}")
    assert file.read_bytes().startswith(STARTS[suffix])


def test_the_verb_draws(tmp_path, trace):
    app = typer.Typer()
    app.command()(verb.figure)
    arguments = ["flow", "--domain", "math", "--layer", "2", "--out", str(tmp_path / "f.svg")]
    result = CliRunner().invoke(app, [str(trace.path), *arguments])
    assert result.exit_code == 0, result.output
    assert "layer 2" in (tmp_path / "f.svg").read_text()


def test_one_domain_and_a_later_layer(tmp_path, trace):
    text = figures.save(trace, "heatmap", tmp_path / "h.svg", domain="math").read_text()
    assert "python" not in text
    text = figures.save(trace, "flow", tmp_path / "f.svg", domain="math", first=3).read_text()
    assert "layer 3" in text
    assert "layer 1<" not in text


def test_what_cannot_be_drawn_is_said(tmp_path, trace, monkeypatch):
    with pytest.raises(RecipeError, match="did you mean 'heatmap'"):
        figures.save(trace, "heatmp", tmp_path / "a.svg")
    with pytest.raises(OutputError, match="type"):
        figures.save(trace, "heatmap", tmp_path / "a.docx")
    with pytest.raises(DataError, match="no domain"):
        figures.save(trace, "heatmap", tmp_path / "a.svg", domain="maths")
    with pytest.raises(DataError, match="layer 0 has no experts"):
        figures.save(trace, "flow", tmp_path / "a.svg", first=0)
    with pytest.raises(DataError, match="needs a layer after"):
        figures.save(trace, "flow", tmp_path / "a.svg", first=4)
    one = synthetic_trace(tmp_path / "one", domains=["only"], layers=1)
    with pytest.raises(DataError, match="two domains"):
        figures.save(one, "specialisation", tmp_path / "a.svg")
    with pytest.raises(DataError, match="no transitions"):
        figures.save(one, "flow", tmp_path / "a.svg")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        figures.save(trace, "heatmap", tmp_path / "file" / "a.svg")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(OutputError, match="matplotlib"):
        figures.save(trace, "heatmap", tmp_path / "a.svg")
    assert not (tmp_path / "a.svg").exists()
