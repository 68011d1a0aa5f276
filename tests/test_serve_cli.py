"""pack and run on the command line: what they say and what they write."""

from __future__ import annotations

import pytest
import torch

import moekit
from moekit.cli import main
from moekit.plans import Plan, Steer


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "store"
    assert main(["pack", "refmoe", "--out", str(path)]) == 0
    return path


def test_what_is_written_is_what_stock_writes(store, capsys):
    assert main(["run", str(store), "--prompt", "import os", "--max-tokens", "12", "--stats"]) == 0
    shown = capsys.readouterr().out
    from moekit.data import load_tokenizer

    tokenizer = load_tokenizer(store)
    stock = moekit.open("refmoe").load(torch.bfloat16)
    stock.set_experts_implementation("eager")
    ids = tokenizer("import os", return_tensors="pt").input_ids
    out = stock.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert shown.startswith(tokenizer.decode(out, skip_special_tokens=True))
    assert "tokens/s" in shown
    assert "of experts found in memory" in shown


def test_a_plan_steers_what_is_written(store, tmp_path, capsys):
    model = moekit.open("refmoe")
    bans = [Steer(layer=x.index, expert=e, action="ban") for x in model.layout.routed for e in range(0, 28)]
    plan = Plan(layout_hash=model.layout.hash, ops=bans).save(tmp_path / "plan.json")
    texts = []
    for extra in ([], ["--steer", str(plan)]):
        assert main(["run", str(store), "--prompt", "import os", "--max-tokens", "12", *extra]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] != texts[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to answer"),
        (["--prompt", "x", "--chat"], "nothing to answer"),
        (["--chat"], "no chat template"),
        (["--prompt", "x", "--memory", "100MB"], "so little memory"),
        (["--prompt", "x", "--policy", "lfo"], "no cache policy"),
        (["--prompt", "", "--steer", "nowhere.json"], "no such plan"),
    ],
)
def test_mistakes_are_told(store, capsys, arguments, message):
    assert main(["run", str(store), *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
