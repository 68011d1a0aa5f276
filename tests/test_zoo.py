"""The zoo is what it says: complete, alive, repeatable, and what stock transformers saves and loads."""

import re
from pathlib import Path

import pytest
import torch
import transformers

from zoo import EXCUSED, MULTIMODAL, TOP_K, ZOO, build, inputs, save
from zoo_probe import Watch, expert_tensors, experts_of

ALL = [*ZOO, *MULTIMODAL]


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def test_every_experts_class_with_the_contract_is_run_or_excused() -> None:
    sources = Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
    contract = re.compile(r"^@use_experts_implementation.*\nclass (\w+)", re.MULTILINE)
    classes = {name for source in sources for name in contract.findall(source.read_text())}
    run = {type(experts).__name__ for model_type in ZOO for experts in experts_of(build(model_type)).values()}
    assert classes == (run - {"Llama4TextExperts"}) | EXCUSED.keys()


@pytest.mark.parametrize("model_type", ALL)
@torch.no_grad()
def test_routing_and_logits_differ_from_token_to_token(model_type: str) -> None:
    model = build(model_type)
    watch = Watch().attach(model)
    logits = model(**inputs(model_type)).logits
    assert logits.isfinite().all()
    assert logits.flatten(0, 1).std(dim=0).mean() > 0.1
    assert len(watch.calls) >= 2
    for _, args in watch.calls:
        if not model_type.startswith("llama4"):
            states, chosen, weights = args
            assert len(states) == len(chosen) == 24
            assert chosen.shape == weights.shape
            assert len(chosen.sort(dim=-1).values.unique(dim=0)) >= 4


@pytest.mark.parametrize("model_type", ALL)
@torch.no_grad()
def test_the_same_seed_builds_what_saving_and_loading_gives_back(model_type: str, tmp_path: Path) -> None:
    model = build(model_type)
    loaded = type(model).from_pretrained(save(model_type, tmp_path)).eval()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    batch = inputs(model_type)
    assert torch.equal(model(**batch).logits, loaded(**batch).logits)
    other = build(model_type, seed=1)
    assert not torch.equal(model(**batch).logits, other(**batch).logits)


def test_changes_reach_the_text_config() -> None:
    assert build("olmoe", num_experts_per_tok=3).config.num_experts_per_tok == TOP_K + 1
    assert build("llama4", num_experts_per_tok=3).config.text_config.num_experts_per_tok == TOP_K + 1


@torch.no_grad()
def test_a_model_with_fewer_experts_runs() -> None:
    assert build("deepseek_v4", n_routed_experts=4)(**inputs("deepseek_v4")).logits.isfinite().all()


def test_loading_in_bf16_keeps_in_fp32_what_the_family_keeps() -> None:
    state = build("deepseek_v3", dtype=torch.bfloat16).state_dict()
    assert state["model.layers.1.mlp.experts.down_proj"].dtype == torch.bfloat16
    assert state["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32


def test_tensors_of_experts_are_found_by_growing_the_model() -> None:
    layer = "model.layers.1.mlp"
    found = {name: axis for name, axis in expert_tensors("exaone_moe").items() if name.startswith(layer)}
    one_each = {f"{layer}.experts.{e}.{p}_proj.weight": None for e in range(8) for p in ("gate", "up", "down")}
    assert found == one_each | {f"{layer}.gate.weight": 0, f"{layer}.e_score_correction_bias": 0}
    assert set(expert_tensors("gpt_oss").values()) == {0}
