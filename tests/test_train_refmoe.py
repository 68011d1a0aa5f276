"""examples/train_refmoe: fast experts equal the stock ones, a resumed run is the same run, the corpus splits whole."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_refmoe"
MODULES = ("fast_experts", "markup", "prepare_corpus", "train", "train_tokenizer")


@pytest.fixture(scope="module")
def example():
    """The scripts as modules; gone from the import system again afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLE))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    for name in MODULES:
        del sys.modules[name]


def tiny_model(**changes) -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = {
        **{"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16},
        **{"num_key_value_heads": 1, "moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2},
        **{"norm_topk_prob": True, "tie_word_embeddings": True, "initializer_range": 0.2},
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**(config | changes)))


def test_fast_experts_equal_stock_eager(example):
    model = tiny_model()
    ids = torch.randint(96, (3, 50))
    losses, gradients = {}, {}
    for implementation in ("eager", "padded"):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        output = model(input_ids=ids, output_router_logits=True)
        loss = example.train.next_token_loss(output.logits, ids)
        (loss + example.train.load_balance(output.router_logits, 2)).backward()
        losses[implementation] = loss.item()
        gradients[implementation] = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    assert losses["padded"] == pytest.approx(losses["eager"], rel=1e-6)
    for name, gradient in gradients["eager"].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients["padded"][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_fast_experts_with_idle_and_crowded_experts(example):
    """Expert 3 gets every token (more than one padded block), experts 4 to 7 none: float64 against a plain loop."""
    torch.manual_seed(0)
    x, weights = torch.randn(70, 5).double(), torch.rand(70, 2).double()
    index = torch.stack((torch.full((70,), 3), torch.arange(70) % 3), dim=1)
    gate_up, down = torch.randn(8, 12, 5).double(), torch.randn(8, 5, 6).double()
    inputs = [tensor.requires_grad_() for tensor in (x, weights, gate_up, down)]
    fast = example.fast_experts.PaddedExperts.apply(x, index, weights, gate_up, down)
    plain = torch.stack([plain_token(x[t], index[t], weights[t], gate_up, down) for t in range(70)])
    torch.testing.assert_close(fast, plain)
    seed = torch.randn_like(plain)
    for a, b in zip(torch.autograd.grad(fast, inputs, seed), torch.autograd.grad(plain, inputs, seed), strict=True):
        torch.testing.assert_close(a, b)


def plain_token(x, index, weights, gate_up, down):
    halves = [(gate_up[expert] @ x).chunk(2) for expert in index]
    outputs = [down[expert] @ (torch.nn.functional.silu(g) * u) for expert, (g, u) in zip(index, halves, strict=True)]
    return (weights[:, None] * torch.stack(outputs)).sum(0)


def test_padded_rows_are_a_permutation_with_padding(example):
    index = torch.tensor([[0, 2], [2, 0], [2, 3]])
    rows, row_of_pair, token_of_row = example.fast_experts.sort_by_expert(index, 5)
    assert rows == [64, 0, 64, 64, 0]
    assert row_of_pair.tolist() == [[0, 64], [65, 1], [66, 128]]
    assert token_of_row[row_of_pair].tolist() == [[0, 0], [1, 1], [2, 2]]


def test_load_balance_is_one_when_balanced(example):
    balanced = torch.eye(4).repeat(5, 1)
    assert example.train.load_balance((balanced, balanced), top_k=1).item() == pytest.approx(1)
    collapsed = torch.tensor([[50.0, 0, 0, 0]]).repeat(5, 1)
    assert example.train.load_balance((collapsed,), top_k=1).item() == pytest.approx(4)


def test_learning_rate_rises_stays_and_falls(example):
    share = example.train.rate_share
    assert share(0, 0.0, warmup=4, decay=0.4) == 0.25
    assert share(100, 0.5, warmup=4, decay=0.4) == 1
    assert share(100, 0.8, warmup=4, decay=0.4) == pytest.approx(0.5)
    assert share(100, 1.0, warmup=4, decay=0.4) == 0.02


def tiny_trainer(example, tmp_path, **changes):
    options = {"steps": 6, "batch": 2, "sequence": 16, "out": tmp_path, **changes}
    args = example.train.arguments(["--quick", *(f"--{name}={value}" for name, value in options.items())])
    model = tiny_model()
    model.set_experts_implementation("padded")
    texts = {"rising": torch.arange(90), "falling": torch.arange(90).flip(0)}
    return example.train.Trainer(args, model, texts)


def test_resumed_run_is_the_same_run(example, tmp_path):
    whole = tiny_trainer(example, tmp_path)
    first = tiny_trainer(example, tmp_path)
    for _ in range(6):
        whole.train_step()
    for _ in range(3):
        first.train_step()
    second = tiny_trainer(example, tmp_path)
    first.save_state(tmp_path / "state.pt")
    second.load_state(tmp_path / "state.pt")
    for _ in range(3):
        second.train_step()
    assert second.progress == 1
    assert [row[2:] for row in second.log] == [row[2:] for row in whole.log]
    for a, b in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_resume_refuses_other_settings(example, tmp_path):
    other = tiny_trainer(example, tmp_path, batch=3)
    tiny_trainer(example, tmp_path).save_state(tmp_path / "state.pt")
    with pytest.raises(SystemExit, match="give the same options"):
        other.load_state(tmp_path / "state.pt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --corpus and --tokenizer"),
        (["--corpus", "nowhere", "--tokenizer", "nowhere"], "run prepare_corpus.py"),
        (["--quick", "--resume"], "is not there"),
        (["--quick", "--hidden", "100"], "multiple of 64"),
        (["--quick", "--top-k", "9"], "at most --experts"),
    ],
)
def test_wrong_options_are_told(example, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        example.train.arguments(["--out", str(tmp_path), *options])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_quick_run_learns_and_stock_transformers_loads_it(tmp_path):
    """The script itself, in a process of its own, as the README says."""
    command = [sys.executable, str(EXAMPLE / "train.py"), "--quick", "--out", str(tmp_path), "--threads", "1"]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    log = json.loads((tmp_path / "train_log.json").read_text("utf-8"))
    losses = [row[log["columns"].index("loss")] for row in log["log"]]
    assert sum(losses[-10:]) / 10 < losses[0] - 1.5
    assert set(log["heldout_perplexity"]) == {"c", "js", "json", "kjv", "math", "python"}
    assert all(perplexity < 3000 for perplexity in log["heldout_perplexity"].values())
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info.values())
    assert model.dtype == torch.bfloat16


def test_split_keeps_documents_whole_and_apart(example):
    corpus = example.prepare_corpus
    documents = [corpus.Document(f"d{i}", "".join(f"document {i} line {j}\n" for j in range(900))) for i in range(60)]
    train, heldout = corpus.split(documents)
    assert (train, heldout) == corpus.split(reversed(documents))
    seen, unseen = ({line.split()[1] for line in text.split("\n") if line} for text in (train, heldout))
    assert seen.isdisjoint(unseen)
    assert len(seen | unseen) == 60
    assert corpus.HELDOUT_BYTES <= len(heldout) < corpus.HELDOUT_BYTES + corpus.HELDOUT_DOCUMENT_BYTES
    assert all(line.count(" ") == 3 for line in (train + heldout).split("\n") if line)


def test_sqlite_files_are_put_together(example, tmp_path):
    source = tmp_path / "better-sqlite3-1/package/deps/sqlite3/sqlite3.c"
    source.parent.mkdir(parents=True)
    source.write_text(
        "head\n/****** Begin file a.h ****/\none\n/**** Begin file b.h ****/\ntwo\n/**** End of b.h ****/\n"
        "/**** Continuing where we left off in a.h ****/\nthree\n"
    )
    files = dict(example.prepare_corpus.sqlite(tmp_path))
    assert list(files) == ["a.h", "b.h"]
    assert files["a.h"].split() == ["one", "three"]


def test_python_documents_are_the_standard_library(example, tmp_path):
    documents = dict(example.prepare_corpus.python(tmp_path))
    assert "def dumps(" in documents["json/__init__.py"]
    assert not [name for name in documents if "test" in name or "packages" in name]


def test_markup_becomes_text(example):
    page = (
        "<head><title>no</title></head><ul class='docnav'><li>no<ul><li>no</ul></ul><p>One\n two</p>"
        "<pre>a  b</pre>&amp;<script>no</script>"
    )
    assert example.markup.html_to_text(page) == "One two\n\na  b\n&\n"
    manual = '.de X\nno \\$1\n..\n.TH no\n.SH "NAME"\nls \\- list \\fBfiles\\fP\n.B \\-a\n.\\" no\n\\(co all\n'
    assert example.markup.manpage_to_text(manual) == "NAME\nls - list files\n-a\n(c) all\n"


def test_tokenizer_is_trained_and_lossless(example, tmp_path):
    text = "The cat sat on the mat.\nÄ 123\n" * 200
    (tmp_path / "a.txt").write_text(text, "utf-8")
    tokenizer = example.train_tokenizer.train([tmp_path / "a.txt"], vocabulary=300)
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|pad|>"]) == [0, 1]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) < len(text) / 2
