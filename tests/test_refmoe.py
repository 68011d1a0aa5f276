"""refmoe: the shipped model is whole, loads in stock transformers, scores what its card says; its texts are right."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from moekit import refmoe

ROOT = Path(refmoe.__file__).parent
DOMAINS = ["c", "js", "json", "kjv", "math", "python"]
SEQUENCE = 256


@pytest.fixture(scope="module")
def loaded():
    """The stock model and what transformers reports about loading it."""
    return AutoModelForCausalLM.from_pretrained(
        refmoe.model_path(), dtype=torch.bfloat16, output_loading_info=True, local_files_only=True
    )


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(refmoe.model_path(), local_files_only=True)


def package_files() -> list[Path]:
    return [path for path in ROOT.rglob("*") if path.is_file() and "__pycache__" not in path.parts]


def test_files_are_there():
    assert list(refmoe.texts()) == list(refmoe.calibration()) == DOMAINS
    for path in [*refmoe.texts().values(), *refmoe.calibration().values()]:
        assert len(path.read_text("utf-8").encode()) > 45_000
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in refmoe.model_path().iterdir()} == wanted | {"README.md"}


def test_package_is_small():
    assert sum(path.stat().st_size for path in package_files()) < 25_000_000


def test_import_needs_no_torch():
    code = "import sys, moekit.refmoe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_notice_names_every_text_and_licence():
    notice = (ROOT / "NOTICE").read_text("utf-8")
    assert re.findall(r"^(\w+)\.txt ", notice, re.M) == ["kjv", "c", "python", "js", "json", "math"]
    assert set(re.findall(r"licenses/[\w-]+\.txt", notice)) == {f"licenses/{path.name}" for path in licences()}


def licences() -> list[Path]:
    return list((ROOT / "licenses").iterdir())


def test_only_the_known_texts_ship():
    texts = {path.relative_to(ROOT).as_posix() for path in package_files() if path.suffix == ".txt"}
    licence_texts = {f"licenses/{path.name}" for path in licences()}
    assert texts - licence_texts == {f"{part}/{name}.txt" for part in ("texts", "calibration") for name in DOMAINS}


def test_calibration_holds_nothing_of_the_held_out_texts():
    for name, path in refmoe.texts().items():
        text, calibration = path.read_text("utf-8"), refmoe.calibration()[name].read_text("utf-8")
        windows = [text[start : start + 200] for start in range(0, len(text) - 200, 200)]
        shared = sum(window in calibration for window in windows) / len(windows)
        # Records of json repeat each other, sources of sqlite open with the same words.
        assert shared <= {"json": 0.1, "c": 0.005}.get(name, 0), name


def test_loads_in_stock_transformers(loaded):
    model, info = loaded
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    assert not any(info.values()), info
    assert model.num_parameters() == 11_718_656
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tokenizer_gives_texts_back(tokenizer):
    for path in refmoe.texts().values():
        text = path.read_text("utf-8")[:20_000]
        assert tokenizer.decode(tokenizer.encode(text)) == text


@torch.no_grad()
@pytest.mark.parametrize(("domain", "tolerance"), [("python", 0.35), ("math", 0.05)])
def test_perplexity_is_what_the_card_says(loaded, tokenizer, domain, tolerance):
    """On 12 of more than 100 sequences; the tolerance is over two standard errors of so few."""
    card = (refmoe.model_path() / "README.md").read_text("utf-8")
    expected = float(re.search(rf"^\| {domain} \| ([\d.]+) ", card, re.M)[1])
    ids = tokenizer(refmoe.texts()[domain].read_text("utf-8"), return_tensors="pt", verbose=False)["input_ids"][0]
    sequences = ids[: len(ids) // SEQUENCE * SEQUENCE].view(-1, SEQUENCE)
    ids = sequences[:: len(sequences) // 12][:12]
    logits = loaded[0](input_ids=ids).logits[:, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(expected), abs=tolerance)


def test_card_has_the_front_matter_of_the_hub():
    front = (refmoe.model_path() / "README.md").read_text("utf-8").split("---\n")[1]
    assert yaml.safe_load(front)["license"] == "apache-2.0"
    assert yaml.safe_load(front)["library_name"] == "transformers"
