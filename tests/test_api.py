"""The Python face: the example that stands in the package's own docstring and in the README, and its weight."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import moekit
from moekit import refmoe
from moekit.errors import DataError, ModelError
from moekit.evaluation import Evaluation
from moekit.stats import Stats

README = Path(__file__).parents[1] / "README.md"


def examples() -> list[str]:
    """Every piece of Python in docstring and README that opens a model."""
    docstring = [
        re.sub(r"^    ", "", block, flags=re.M) for block in re.findall(r"(?:^    .*\n+)+", moekit.__doc__, re.M)
    ]
    readme = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.S)
    return [x for x in docstring + readme if "moekit.open" in x]


@pytest.fixture
def texts(tmp_path, monkeypatch) -> Path:
    """A folder with `texts/` and `held-out/`, each with a page of Python."""
    text = refmoe.calibration()["python"].read_text()
    for number, name in enumerate(("texts", "held-out")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(text[6000 * number : 6000 * (number + 1)])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("number", range(len(examples())))
def test_example_runs(number, texts):
    names: dict = {}
    exec(examples()[number], names)
    assert isinstance(names["stats"], Stats)
    assert len(names["plan"].kept(names["m"].layout.routed[0])) == 16
    assert moekit.open(names["out"].path).layout.routed[0].num_experts == 16


def test_there_is_an_example():
    assert examples()


def test_evaluate_takes_models_folders_and_results(texts):
    m = moekit.open("refmoe")
    data = moekit.load_data(m, {"python": "held-out/"}, tokens=256, sequence_length=128)
    plan = moekit.plan("random", moekit.measure(m, data, groups=("scores",)), keep=1.0)
    out = moekit.bake(m, plan, "out")
    found = [moekit.evaluate(x, data=data) for x in (m, out, out.path, str(out.path))]
    assert all(isinstance(x, Evaluation) for x in found)
    assert len({x.domains["python"].perplexity for x in found}) == 1
    assert moekit.evaluate("out", data=data, against=m).domains["python"].kl == (0, 0, 0)


def test_text_is_tokenised_with_the_models_own_tokenizer(texts):
    m = moekit.open("refmoe")
    data = moekit.load_data(m, ["code=texts/", "held-out/"], tokens=200, sequence_length=100)
    assert data.domains == ("code", "held-out")
    assert data.tokens == {"code": 200, "held-out": 200}
    with pytest.raises(DataError, match="no such file"):
        moekit.load_data(m, {"x": "text"})


def test_mistakes_are_errors_of_moekit(tmp_path):
    with pytest.raises(ModelError, match="no such model folder"):
        moekit.open(tmp_path / "nothing")


def test_a_model_says_what_it_is():
    assert "qwen3_moe, 6 MoE layers x 32 experts, top-4" in repr(moekit.open("refmoe"))


def test_importing_moekit_is_light():
    code = "import sys, moekit; sys.exit(bool({'torch', 'numpy', 'transformers', 'pydantic'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_public_names_exist():
    assert all(callable(getattr(moekit, name)) for name in moekit.__all__)
