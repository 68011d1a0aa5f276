"""Recipes: what is read, what is refused and how, and that what is written reads back."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from moekit.errors import RecipeError
from moekit.recipe import Recipe, format_bytes, parse_bytes

FULL = """\
model: models/tiny
data:
  python: texts/python
  web: hf:org/web
domain: python
method: man
keep: 50%
spread: global
protect: none
options: {squared: true}
calibration:
  tokens: 1000
  sequence_length: 128
  batch_tokens: 512
  seed: 7
evaluation:
  data: {python: held/python.txt}
  tokens: 200
out: out
shard_size: 2GB
dtype: bfloat16
verify: false
"""
LEAST = {"model": "refmoe", "data": {"python": "hf:org/code"}, "keep": 0.5, "out": "out"}


def write(folder: Path, text: str) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def refused(file: Path) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        Recipe.load(file)
    return caught.value


def test_everything_is_read_and_paths_count_from_the_recipe(tmp_path, monkeypatch):
    for name in ("texts/python", "models/tiny", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    recipe = Recipe.load(write(tmp_path, FULL))
    assert recipe.model == str(tmp_path / "models/tiny")
    assert recipe.data == {"python": str(tmp_path / "texts/python"), "web": "hf:org/web"}
    assert recipe.out == str(tmp_path / "out")
    assert (recipe.domain, recipe.method, recipe.keep) == (["python"], "man", 0.5)
    assert (recipe.spread, recipe.protect, recipe.options) == ("global", "none", {"squared": True})
    assert recipe.calibration.model_dump() == {
        "tokens": 1000,
        "sequence_length": 128,
        "batch_tokens": 512,
        "seed": 7,
    }
    assert recipe.evaluation is not None
    assert (recipe.evaluation.tokens, recipe.shard_size, recipe.dtype) == (200, 2_000_000_000, "bfloat16")
    assert recipe.verify is False


@pytest.mark.parametrize("name", ["refmoe", "Qwen/Qwen3-30B-A3B", "org/model.v0.1"])
def test_names_are_no_paths(tmp_path, name):
    (tmp_path / "refmoe").mkdir()  # an earlier output, say: the name still means the model that comes with moekit
    assert Recipe.load(write(tmp_path, yaml.safe_dump(LEAST | {"model": name}))).model == name


@pytest.mark.parametrize("path", ["./refmoe", "../refmoe", "a/b/c"])
def test_paths_are_no_names(tmp_path, path):
    recipe = Recipe.load(write(tmp_path, yaml.safe_dump(LEAST | {"model": path})))
    assert Path(recipe.model) == (tmp_path / path).resolve()


def test_a_teacher_is_a_path_like_others(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    steps = [{"method": "reap", "keep": 4}, {"method": "reconstruct", "options": {"teacher": "models/big"}}]
    (tmp_path / "models" / "big").mkdir(parents=True)
    recipe = Recipe.load(
        write(tmp_path, yaml.safe_dump({k: x for k, x in LEAST.items() if k != "keep"} | {"steps": steps}))
    )
    assert recipe.steps_[1].options == {"teacher": str(tmp_path / "models" / "big")}
    short = LEAST | {"method": "router-distill", "options": {"teacher": "org/model"}}
    assert Recipe.load(write(tmp_path, yaml.safe_dump(short))).options == {"teacher": "org/model"}


def test_a_path_from_the_working_folder_is_not_guessed(tmp_path, monkeypatch):
    (tmp_path / "here" / "texts").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    recipe = Recipe.load(write(tmp_path, yaml.safe_dump(LEAST | {"data": {"python": "texts"}})))
    assert recipe.data == {"python": str(tmp_path / "texts")}


@pytest.mark.parametrize(
    "text", [FULL, yaml.safe_dump(LEAST), yaml.safe_dump(LEAST | {"keep": 4, "domain": ["python"]})]
)
def test_what_is_written_reads_back(tmp_path, text):
    recipe = Recipe.load(write(tmp_path, text))
    (tmp_path / "other").mkdir()
    assert Recipe.load(write(tmp_path / "other", recipe.to_yaml())) == recipe


def test_flags_make_the_same_recipe(tmp_path, monkeypatch):
    for name in ("texts/python", "models/tiny"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    flags = {
        "model": "models/tiny",
        "data": {"python": "texts/python", "web": "hf:org/web"},
        "domain": "python",
        "method": "man",
        "keep": "50%",
        "spread": "global",
        "protect": "none",
        "options": ["squared=true"],
        "tokens": 1000,
        "sequence_length": 128,
        "batch_tokens": 512,
        "seed": 7,
        "evaluation_data": {"python": "held/python.txt"},
        "evaluation_tokens": 200,
        "evaluation_sequence_length": None,
        "out": "out",
        "shard_size": "2GB",
        "dtype": "bfloat16",
        "verify": False,
    }
    assert Recipe.from_flags(**flags) == Recipe.load(write(tmp_path, FULL))


@pytest.mark.parametrize(
    ("given", "keep"), [("0.5", 0.5), ("50%", 0.5), ("64", 64), ("1", 1), ("1.0", 1.0), (0.25, 0.25), (3, 3)]
)
def test_keep_is_a_share_or_a_number(given, keep):
    found = Recipe.from_flags(**LEAST | {"keep": given}).keep
    assert (found, type(found)) == (keep, type(keep))


@pytest.mark.parametrize("keep", [0, 0.0, -1, 1.5, True, "half", "", "%", "nan", "inf", "150%", [1]])
def test_keep_that_is_neither_is_refused(tmp_path, keep):
    error = refused(write(tmp_path, yaml.safe_dump(LEAST | {"keep": keep})))
    assert "keep" in str(error.where)
    assert "share in (0, 1]" in str(error)


@pytest.mark.parametrize(
    ("old", "new", "line", "key", "words"),
    [
        ("method: man", "metod: man", 6, "metod", "did you mean 'method'?"),
        ("keep: 50%", "kep: 50%", 7, "kep", "did you mean 'keep'?"),  # rather than: lacks 'keep'
        ("  seed: 7", "  sed: 7", 15, "calibration.sed", "did you mean 'seed'?"),
        ("  tokens: 200", "  token: 200", 18, "evaluation.token", "did you mean 'tokens'?"),
        ("  tokens: 1000", "  tokens: many", 12, "calibration.tokens", "a valid integer"),
        ("  tokens: 1000", "  tokens: 0", 12, "calibration.tokens", "greater than or equal to 1"),
        ("  tokens: 1000", "  tokens: true", 12, "calibration.tokens", "a valid integer"),
        ("  tokens: 1000", "  tokens: 1000.5", 12, "calibration.tokens", "a valid integer"),
        ("spread: global", "spread: globl", 8, "spread", "'uniform' or 'global'"),
        ("protect: none", "protect: all", 9, "protect", "'super' or 'none'"),
        ("dtype: bfloat16", "dtype: int4", 21, "dtype", "'float32'"),
        ("verify: false", "verify: 1", 22, "verify", "a valid boolean"),
        ("shard_size: 2GB", "shard_size: 2 apples", 20, "shard_size", "as 5GB or 512MiB"),
        ("shard_size: 2GB", "shard_size: 5", 20, "shard_size", "greater than or equal to 1000000"),
        ("model: models/tiny", "model: 3", 1, "model", "a valid string"),
        ("method: man", "method: null", 6, "method", "a valid string"),
        ("domain: python", "domain: pyton", 5, "domain", "did you mean 'python'?"),
        ("domain: python", "domain: []", 5, "domain", "at least 1 item"),
        ("domain: python", "domain: 3", 5, "domain", "a valid list"),
        ("  python: texts/python", "  python: 3", 3, "data.python", "a valid string"),
        ("  python: texts/python", "  1: texts/python", 3, "data.1", "a valid string"),
        ("  web: hf:org/web", "  python: again", 4, "", "'data.python' is given twice"),
        ("options: {squared: true}", "options: [squared]", 10, "options", "a valid dictionary"),
        ("options: {squared: true}", "options: {keep: 3}", 10, "options.keep", "beside options"),
        ("options: {squared: true}", "options: {seed: 3}", 10, "options.seed", "write it in calibration"),
        ("  data: {python: held/python.txt}", "  data: {}", 17, "evaluation.data", "at least 1 item"),
        ("  data: {python: held/python.txt}", "", 16, "evaluation", "lacks 'evaluation.data'"),
        ("  data: {python: held/python.txt}\n  tokens: 200", "  3", 16, "evaluation", "expected: a valid dictionary\n"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path, old, new, line, key, words):
    assert FULL.count(old) == 1
    file = write(tmp_path, FULL.replace(old, new))
    error = refused(file)
    assert error.where == f"{file}:{line}" + (f": {key}" if key else "")
    assert words in str(error)
    assert len(str(error).splitlines()) <= 5


@pytest.mark.parametrize("key", [key for key in LEAST if key != "keep"])  # which methods that quantise do without
def test_what_is_lacking_is_named(tmp_path, key):
    error = refused(write(tmp_path, yaml.safe_dump({k: v for k, v in LEAST.items() if k != key})))
    assert error.problem == f"the recipe lacks {key!r}"


@pytest.mark.parametrize(
    "text",
    ["", "- a\n- b\n", "just words", "a: [", "a: b: c", "\tx: 1", "when: 2024-13-45", "x: !!python/none x", "[" * 5000],
)
def test_what_is_no_recipe_is_refused(tmp_path, text):
    assert str(refused(write(tmp_path, text)).where).startswith(str(tmp_path / "recipe.yaml"))


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    assert refused(tmp_path / "none.yaml").problem == refused(tmp_path).problem == "the recipe cannot be read"
    (tmp_path / "latin.yaml").write_bytes("model: \xe9".encode("latin-1"))
    assert refused(tmp_path / "latin.yaml").problem == "the recipe cannot be read"


def test_mistakes_in_flags():
    for flags, words in [
        ({"kep": 1}, "did you mean 'keep'?"),
        ({"tokens": 0}, "calibration.tokens"),
        ({"options": ["squared"]}, "expected: NAME=VALUE"),
        ({"evaluation_token": 3}, "did you mean 'tokens'?"),
    ]:
        with pytest.raises(RecipeError, match=None) as caught:
            Recipe.from_flags(**LEAST, **flags)
        assert words in str(caught.value)


def test_options_as_flags_are_read_as_yaml():
    found = Recipe.from_flags(**LEAST, options=["a=true", "b=1.5", "c=x=y", "d=[1", "e="]).options
    assert found == {"a": True, "b": 1.5, "c": "x=y", "d": "[1", "e": None}


def test_errors_survive_a_process_border(tmp_path):
    error = refused(write(tmp_path, "kep: 1"))
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("5GB", 5 * 10**9),
        ("5 gb", 5 * 10**9),
        ("1.5G", 15 * 10**8),
        ("512MiB", 512 * 2**20),
        ("2Ti", 2 * 2**40),
        ("10kB", 10_000),
        ("7B", 7),
        ("7", 7),
        (7, 7),
    ],
)
def test_sizes(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "5XB", "-5GB", "5iB", "1,5GB", "5GBs", "1e9", True, 5.0, -5, None, "nan"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(RecipeError, match="not a size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (16_234_000_000, "16.2 GB"), (999_700, "1 MB"), (2.5e15, "2.5 PB")],
)
def test_sizes_for_people(count, text):
    assert format_bytes(count) == text


@given(st.integers(0, 10**17))
def test_sizes_for_people_are_true_to_three_digits(count):
    text = format_bytes(count)
    assert abs(parse_bytes(text) - count) <= 0.005 * count
    assert len(text) <= 9


# ---- several steps

STEPS = """\
model: refmoe
data:
  python: hf:org/code
  web: hf:org/web
domain: web
steps:
  - method: easy-ep
    keep: 75%
  - {method: man, keep: 4, domain: python, spread: global, protect: none, options: {squared: true}}
  - method: rtn-int4
    remeasure: true
keep_steps: true
out: out
"""


def test_steps_are_read_and_the_recipes_domain_is_theirs(tmp_path):
    recipe = Recipe.load(write(tmp_path, STEPS))
    first, second, third = recipe.steps_
    assert (first.method, first.keep, first.domain, first.spread, first.protect) == (
        "easy-ep",
        0.75,
        ["web"],
        "uniform",
        "super",
    )
    assert (second.keep, second.domain, second.spread, second.protect) == (4, ["python"], "global", "none")
    assert second.options == {"squared": True}
    assert (third.method, third.keep, third.remeasure) == ("rtn-int4", None, True)
    assert recipe.keep_steps
    assert Recipe.load(write(tmp_path, recipe.to_yaml())) == recipe


def test_the_short_form_is_one_step(tmp_path):
    recipe = Recipe.load(write(tmp_path, FULL))
    (step,) = recipe.steps_
    assert (step.method, step.keep, step.spread, step.protect) == ("man", 0.5, "global", "none")
    assert (step.options, step.domain, step.remeasure) == ({"squared": True}, ["python"], False)
    assert "steps" not in yaml.safe_load(recipe.to_yaml())


def test_steps_as_flags():
    steps = [
        "easy-ep keep=75%",
        "man keep=4 domain=python spread=global protect=none squared=true",
        "rtn-int4 remeasure=yes",
    ]
    flags = LEAST | {"data": {"python": "hf:org/code", "web": "hf:org/web"}, "domain": "web", "keep_steps": True}
    del flags["keep"]
    assert Recipe.from_flags(**flags, steps=steps) == Recipe.from_flags(**flags, steps=yaml.safe_load(STEPS)["steps"])


@pytest.mark.parametrize(
    ("old", "new", "line", "key", "words"),
    [
        ("keep: 75%", "kep: 75%", 8, "steps.1.kep", "did you mean 'keep'?"),
        ("keep: 75%", "keep: 175%", 8, "steps.1.keep", "share in (0, 1]"),
        ("- method: easy-ep\n    keep", "- keep", 7, "steps.1", "lacks 'steps.1.method'"),
        ("spread: global", "spread: globl", 9, "steps.2.spread", "'uniform' or 'global'"),
        ("domain: python", "domain: pyton", 9, "steps.2.domain", "did you mean 'python'?"),
        ("{squared: true}", "{seed: 3}", 9, "steps.2.options.seed", "write it in calibration"),
        ("{squared: true}", "[squared]", 9, "steps.2.options", "a valid dictionary"),
        ("remeasure: true", "remeasure: 1", 11, "steps.3.remeasure", "a valid boolean"),
        ("remeasure: true", "method: again", 11, "", "'steps.3.method' is given twice"),
        ("steps:\n", "steps: []\nx:\n", 7, "x", "no key 'x'"),
        ("domain: web\n", "keep: 0.5\n", 6, "steps", "not both"),
        ("domain: web\n", "method: man\n", 6, "steps", "steps and method"),
    ],
)
def test_a_mistake_in_a_step_is_named_with_its_line(tmp_path, old, new, line, key, words):
    assert STEPS.count(old) == 1
    file = write(tmp_path, STEPS.replace(old, new))
    error = refused(file)
    assert error.where == f"{file}:{line}" + (f": {key}" if key else "")
    assert words in str(error)
    assert len(str(error).splitlines()) <= 5


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (["easy-ep keep"], "expected: NAME=VALUE"),
        (["easy-ep keep=0"], "share in (0, 1]"),
        (["keep=0.5"], "a method and its settings"),
        ([""], "a method and its settings"),
        (["man 'keep=0.5"], "a method and its settings"),
        (["man options=3"], "a valid dictionary"),
        ([], "at least 1 item"),
        ([3], "a valid dictionary"),
    ],
)
def test_a_step_as_a_flag_that_is_none(steps, words):
    with pytest.raises(RecipeError) as caught:
        Recipe.from_flags(**{k: v for k, v in LEAST.items() if k != "keep"}, steps=steps)
    assert words in " ".join(str(caught.value).split())
