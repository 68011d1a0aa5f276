"""The pages say what the code does: every verb, option, method, recipe key and floor is there, what is there exists.

A failure names the page and what to write. Python blocks marked `runnable` are run as they stand.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import typer
import yaml

import moekit
from moekit import cli, errors, methods
from moekit.pipeline import prepare
from moekit.recipe import Calibration, Evaluation, Recipe, Step
from test_house import FLOORS

ROOT = Path(__file__).resolve().parents[1]
DOCS, EXAMPLES = ROOT / "docs", ROOT / "examples"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *EXAMPLES.rglob("*.md")])
SOURCES = "\n".join(path.read_text("utf-8") for path in (ROOT / "src").rglob("*.py"))

cli._register()
VERBS = typer.main.get_command(cli.app).commands


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


every_page = pytest.mark.parametrize("page", PAGES, ids=name)


def text(page: Path) -> str:
    return page.read_text("utf-8")


def blocks(page: Path, language: str) -> Iterator[str]:
    yield from re.findall(rf"^```{language}\n(.*?)^```$", text(page), re.MULTILINE | re.DOTALL)


def options(verb: str) -> set[str]:
    """Long names of a verb's options, and of those of its own verbs."""
    commands = [VERBS[verb], *getattr(VERBS[verb], "commands", {}).values()]
    found = {option for x in commands for parameter in x.params for option in parameter.opts if option.startswith("--")}
    return found - {"--help"}


def anchors(page: Path) -> set[str]:
    """The fragments that headings get: lower case, punctuation left out, spaces as dashes."""
    headings = re.findall(r"^#+ (.+)$", text(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def rows(page: Path, column: int = 0) -> list[str]:
    """One column of all tables of a page."""
    lines = [line for line in text(page).splitlines() if line.startswith("| ")]
    return [re.split(r"(?<!\\)\|", line)[column + 1].strip() for line in lines]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_page_with_every_option(verb):
    page = DOCS / "verbs" / f"{verb}.md"
    assert page.is_file(), f"write docs/verbs/{verb}.md"
    absent = [option for option in sorted(options(verb)) if not re.search(rf"`{option}\b", text(page))]
    assert not absent, f"docs/verbs/{verb}.md does not say what {absent} do"


@pytest.mark.parametrize("folder", ["verbs", "methods", "adr"])
def test_every_page_stands_in_its_index(folder):
    index = text(DOCS / folder / "README.md")
    pages = {page.name for page in (DOCS / folder).glob("*.md")} - {"README.md"}
    absent = sorted(x for x in pages if f"({x})" not in index)
    assert not absent, f"add a row to docs/{folder}/README.md for {absent}"


@every_page
def test_links_lead_somewhere(page):
    for target, fragment in re.findall(r"\]\((?!https?://|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)", text(page)):
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), f"{target} is not there"
        assert not fragment or fragment in anchors(there), f"{target} has no heading {fragment}"


@every_page
def test_commands_exist(page):
    """Every `moekit VERB ...` that a page shows has an existing verb and existing options."""
    lines = re.sub(r"\\\n\s*", "", text(page)).splitlines()
    shown = [line.strip().removeprefix("$ ") for line in lines if re.match(r"( {4}|\t)+(\$ )?moekit \w", line)]
    shown += re.findall(r"`(moekit \w[^`\n]*)`", text(page))
    for command in shown:
        _, verb, *words = command.split()
        if verb == "VERB":
            continue
        assert verb in VERBS, command
        used = {word.partition("=")[0] for word in words if re.match(r"--\w", word)}
        assert used <= options(verb) | {"--help"}, command


def test_every_method_has_a_page():
    absent = [method for method in methods.names() if not (DOCS / "methods" / f"{method}.md").is_file()]
    assert not absent, f"write docs/methods/{absent}.md"


RUN = [(page, code) for page in PAGES for code in blocks(page, "python runnable")]


@pytest.mark.parametrize(("page", "code"), RUN, ids=[name(page) for page, _ in RUN])
def test_code_runs(page, code, tmp_path, monkeypatch):
    """As it stands, but on less text than the defaults take."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(moekit, "load_data", partial(moekit.load_data, tokens=1_024))
    exec(compile(code, str(page), "exec"), {"__name__": "__main__"})


def test_the_readme_has_code_that_runs():
    assert ROOT / "README.md" in {page for page, _ in RUN}


def test_the_recipe_page_has_every_key_with_its_default(tmp_path):
    shown = [yaml.safe_load(code) for code in blocks(DOCS / "recipe.md", "yaml")]
    recipes = []
    for number, raw in enumerate(shown):
        file = tmp_path / f"{number}.yaml"
        file.write_text(yaml.safe_dump(raw))
        recipes.append(Recipe.load(file))
    small, full, stepped = shown
    assert full.keys() | stepped.keys() == Recipe.model_fields.keys()
    assert full.keys() & stepped.keys() == small.keys() - {"keep"}
    assert any(step.keys() == Step.model_fields.keys() for step in stepped["steps"])
    plain = Step(method="man").model_dump(exclude={"method", "keep", "domain"})
    assert all(step.model_dump(exclude={"method", "keep", "domain"}) == plain for step in recipes[2].steps or ())
    assert recipes[2].keep_steps is recipes[0].keep_steps
    assert full["calibration"].keys() == Calibration.model_fields.keys()
    assert full["evaluation"].keys() == Evaluation.model_fields.keys()
    given = {*small, "domain", "evaluation"}
    assert recipes[1].model_dump(exclude=given) == recipes[0].model_dump(exclude=given), "a default is told wrongly"
    assert recipes[1].evaluation == Evaluation(data=recipes[1].evaluation.data)


def test_example_recipes_are_ready_to_run(tmp_path):
    for file in EXAMPLES.glob("*.yaml"):
        recipe = Recipe.load(file)
        job = prepare(recipe.model_copy(update={"out": str(tmp_path / "out")}))
        assert sum(job.calibration.tokens.values()) > 1_000


def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(moekit, "load_data", partial(moekit.load_data, tokens=1_024))
    spec = importlib.util.spec_from_file_location("python_api", EXAMPLES / "python_api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(str(tmp_path / "out"))
    assert "x source" in capsys.readouterr().out
    assert moekit.open(tmp_path / "out").layout.layers[0].num_experts == 16


def test_every_kind_of_error_is_explained():
    page = text(DOCS / "errors.md")
    kinds = errors.UserError.__subclasses__()
    assert len(kinds) >= 7
    assert not [kind.__name__ for kind in kinds if f"`{kind.__name__}`" not in page]


def test_messages_are_those_of_the_code():
    """What stands between the dots of a message in the table of docs/errors.md stands in the source too."""
    table = text(DOCS / "errors.md").split("## What people meet")[1].split("\n\nSome of them")[0]
    messages = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")][1:]
    parts = [part.strip() for message in messages if "**" not in message for part in message.split("...")]
    parts = [part for part in parts if len(part) > 12 and not part.startswith(("No such", "file is "))]
    assert len(parts) > 30
    plain = re.sub(r'"\s+f?"', "", SOURCES)
    assert not [part for part in parts if part not in plain]


def test_the_architecture_page_names_what_exists():
    checked = 0
    for file, functions in zip(rows(DOCS / "architecture.md", 0), rows(DOCS / "architecture.md", 1), strict=True):
        if found := re.fullmatch(r"`([\w/]+\.py)`", file):
            source = (ROOT / "src" / "moekit" / found.group(1)).read_text("utf-8")
            for symbol in re.findall(r"`(\w+)`", functions):
                assert re.search(rf"^\s*(def|class) {symbol}\b|^{symbol}\b", source, re.MULTILINE), (file, symbol)
                checked += 1
    assert checked > 30


@every_page
def test_files_that_pages_name_exist(page):
    for file in re.findall(r"`([\w/]+\.py)`", text(page)):
        places = [ROOT / file, ROOT / "src" / "moekit" / file, page.parent / file]
        assert any(place.is_file() for place in places) or file.endswith("/loud.py"), f"{file} is not there"


def test_the_floors_are_those_of_the_test():
    table = text(ROOT / "CONTRIBUTING.md").split("## The floors")[1].split("##")[0]
    floors = {int(number): line for number, line in re.findall(r"^\| (\d+) \|(.*)\|$", table, re.MULTILINE)}
    wrong = [x for x, n in FLOORS.items() if x != "__main__" and not re.search(rf"`{x}/?`", floors.get(n, ""))]
    assert not wrong, f"CONTRIBUTING.md puts {wrong} on another floor than tests/test_house.py"
