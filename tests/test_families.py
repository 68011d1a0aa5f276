"""Every family of the zoo is understood, and docs/families.md says exactly what was proven.

MOEKIT_WRITE_DOCS=1 (in one process) writes the page; without it every family's line must stand there already.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import transformers

from family_page import DOCS, NO_CONTRACT, page, rows_of
from family_proofs import Recorder, Specimen, run
from family_rows import row
from moekit.checkpoint.reader import Checkpoint, read_config
from moekit.errors import ModelError
from moekit.families.detect import understand
from moekit.families.seam import reroute
from moekit.layout import Layout, Router
from moekit.view import MoEView
from zoo import MULTIMODAL, ZOO, build, inputs

WRITE = os.environ.get("MOEKIT_WRITE_DOCS") == "1"


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def proven() -> Iterator[dict[str, str]]:
    rows: dict[str, str] = {}
    yield rows
    if WRITE:
        DOCS.write_text(page([rows[name] for name in [*ZOO, *MULTIMODAL]]))


@pytest.mark.parametrize("name", [*ZOO, *MULTIMODAL])
def test_family(name: str, tmp_path: Path, proven: dict[str, str]) -> None:
    proven[name] = row(Specimen(name, tmp_path))
    assert WRITE or proven[name] in rows_of(DOCS.read_text())


@pytest.mark.skipif(WRITE, reason="the page is being written")
def test_the_page_is_its_rows_and_lists_every_family() -> None:
    text = DOCS.read_text()
    rows = rows_of(text)
    assert [line.split(" | ")[0].removeprefix("| ") for line in rows] == [*ZOO, *MULTIMODAL]
    assert text == page(rows, re.search(r"of transformers (\S+)", text).group(1))


# ---- routers against hand-written truth

RENORMED, SIGMOID = Router("softmax", renormalised=True), Router("sigmoid", renormalised=True, correction_bias=True)
IN_GROUPS = replace(SIGMOID, groups=2)
NAMED = {
    "mixtral": RENORMED,
    "olmoe": Router("softmax"),
    "qwen2_moe": Router("softmax"),
    "qwen3_moe": Router("softmax"),
    "qwen3_next": RENORMED,
    "deepseek_v2": Router("softmax", groups=2),
    "deepseek_v3": replace(IN_GROUPS, scaling=2.5),
    "gpt_oss": replace(RENORMED, order="top-k, score", logit_bias=True),
    "granitemoe": replace(RENORMED, order="top-k, score"),
    "phimoe": Router("sparsemixer"),
    "jamba": Router("softmax"),
    "glm4_moe": IN_GROUPS,
    "ernie4_5_moe": replace(RENORMED, correction_bias=True),
    "minimax_m2": SIGMOID,
    "hunyuan_v1_moe": RENORMED,
    "afmoe": SIGMOID,
    "axk1": replace(IN_GROUPS, scaling=2.5),
    "beam": IN_GROUPS,
    "cohere2_moe": replace(RENORMED, order="top-k, score"),
    "flint": replace(SIGMOID, correction_bias=False),
    "gemma4_text": replace(RENORMED, expert_scale=True),
    "inkling_text": Router("sigmoid with shared experts", correction_bias=True),
    "kolibri1": Router("sigmoid", order="top-k, score", correction_bias=True),
    "lfm2_moe": SIGMOID,
    "llama4_text": Router("sigmoid", order="top-k, score", weighs_input=True),
    "mistral4": replace(RENORMED, groups=2),
    "openai_privacy_filter": replace(RENORMED, order="top-k, score", logit_bias=True, scaling=0.5),
    "zaya": Router("softmax", correction_bias=True),
}
VARIANTS = [
    ("olmoe", {"norm_topk_prob": True}, {"renormalised": True}),
    ("qwen2_moe", {"norm_topk_prob": True}, {"renormalised": True}),
    ("qwen3_moe", {"norm_topk_prob": True}, {"renormalised": True}),
    ("qwen3_next", {"norm_topk_prob": False}, {"renormalised": False}),
    ("deepseek_v2", {"topk_method": "greedy"}, {"groups": 1}),
    ("deepseek_v2", {"routed_scaling_factor": 16.0}, {"scaling": 16.0}),
    ("deepseek_v2", {"norm_topk_prob": True}, {}),  # its code has no normalisation
    ("deepseek_v3", {"norm_topk_prob": False}, {"renormalised": False}),
    ("deepseek_v3", {"n_group": 1, "topk_group": 1}, {"groups": 1}),
    ("deepseek_v3", {"n_group": 4, "topk_group": 3}, {"groups": 4, "groups_kept": 3}),
    ("cohere2_moe", {"expert_selection_fn": "sigmoid", "norm_topk_prob": True}, {"score": "sigmoid"}),
    (
        "cohere2_moe",
        {"expert_selection_fn": "sigmoid", "norm_topk_prob": False},
        {"score": "sigmoid", "renormalised": False},
    ),
    ("lfm2_moe", {"use_expert_bias": False}, {"correction_bias": False}),
    ("axk1", {"norm_topk_prob": False}, {"renormalised": False}),
]


def layout_of(folder: Path, name: str, **changes: object) -> Layout:
    build(name, **changes).save_pretrained(folder)
    return understand(Checkpoint.open(folder)).layout


@pytest.mark.parametrize("name", NAMED)
def test_routers_are_described_as_their_code_works(name: str, tmp_path: Path) -> None:
    assert {x.router for x in layout_of(tmp_path, name).routed} == {NAMED[name]}


@pytest.mark.parametrize(("name", "changes", "expected"), VARIANTS)
def test_a_changed_setting_shows(name: str, changes: dict, expected: dict, tmp_path: Path) -> None:
    routers = {x.router for x in layout_of(tmp_path, name, **changes).routed}
    assert routers == {replace(NAMED[name], **expected)}


def test_layers_may_differ(tmp_path: Path) -> None:
    layout = layout_of(tmp_path / "a", "hunyuan_v1_moe", moe_topk=[1, 2, 3])
    assert [x.top_k for x in layout.routed] == [1, 2, 3]
    layout = layout_of(tmp_path / "b", "deepseek_v4")
    hashed, scored = layout.routed[0].router, layout.routed[1].router
    assert (hashed.score, hashed.order) == ("softplus-sqrt", "table, score")
    assert not hashed.follows_logits
    assert not hashed.correction_bias
    assert scored == replace(hashed, order="score, top-k", correction_bias=True)
    assert layout.routed[0].tables == ("model.layers.0.mlp.gate.tid2eid",)


def test_top_k_and_expert_count_keys(tmp_path: Path) -> None:
    assert {x.top_k for x in layout_of(tmp_path / "a", "olmoe", num_experts_per_tok=3).routed} == {3}
    layout = layout_of(tmp_path / "b", "qwen3_moe")
    assert set(layout.expert_count_keys) == {"num_experts", "num_local_experts"}
    layout = layout_of(tmp_path / "c", "dots3_note")  # its vision tower has as many experts
    assert all(key.startswith("text_config.") for key in layout.expert_count_keys)


def test_layouts_survive_json(tmp_path: Path) -> None:
    layout = layout_of(tmp_path, "deepseek_v4")
    again = Layout.from_dict(layout.to_dict())
    assert again.hash == layout.hash
    assert [asdict(x) | {"tensors": ()} for x in layout.layers] == [asdict(x) for x in again.layers]


@pytest.mark.parametrize(("name", "norm"), [("mixtral", "post_attention_layernorm"), ("flex_olmo", None)])
def test_the_residual_is_the_stream_before_the_block(name: str, norm: str | None, tmp_path: Path) -> None:
    specimen = Specimen(name, tmp_path)
    given: dict[int, torch.Tensor] = {}
    for number, layer in enumerate(specimen.stock.model.layers):
        module = getattr(layer, norm) if norm else layer.mlp
        module.register_forward_pre_hook(lambda _m, args, n=number: given.update({n: args[0].clone()}))
    view = MoEView(specimen.stock, specimen.layout)
    for length in range(5, 25):  # memory of freed tensors is used again
        seen = Recorder(False)
        with view.watch(seen):
            run(specimen.stock, inputs(name, length=length))
        for number, call in seen.calls.items():
            assert torch.equal(call.residual, given[number].flatten(0, 1))


# ---- what is refused


def test_dense_models_and_unknown_experts_are_told_apart(tmp_path: Path) -> None:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    dense = transformers.LlamaConfig(**small, vocab_size=32)
    transformers.LlamaForCausalLM(dense).save_pretrained(tmp_path / "dense")
    with pytest.raises(ModelError, match="dense"):
        understand(Checkpoint.open(tmp_path / "dense"))
    for name in NO_CONTRACT:
        transformers.AutoConfig.for_model(name, num_hidden_layers=2).save_pretrained(tmp_path / name)
        with pytest.raises(ModelError, match=f"'{name}' are not supported"):
            understand(Checkpoint(tmp_path / name, read_config(tmp_path / name), {}))


def test_configs_that_no_model_can_be_built_from_are_refused(tmp_path: Path) -> None:
    build("mixtral").save_pretrained(tmp_path)
    config = read_config(tmp_path) | {"hidden_act": "no such function"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"cannot build[\s\S]*no such function"):
        understand(Checkpoint.open(tmp_path))


def test_rerouted_tables_hold_no_banned_expert_and_no_expert_twice() -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.rand(50, 8, generator=generator).argsort(-1)[:, :3].int()
    banned = torch.tensor([True, False, True, True, False, False, True, False])
    new = reroute(table, banned)
    assert new.dtype == table.dtype
    assert not banned[new.long()].any()
    assert all(len(set(x)) == 3 for x in new.tolist())
    kept = ~banned[table.long()]
    assert torch.equal(new[kept], table[kept])
    assert torch.equal(reroute(table, torch.zeros(8, dtype=torch.bool)), table)
