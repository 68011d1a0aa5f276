"""A token in one call: the stock code's numbers, for models whose decoder is plain, and for no others."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers

import moekit
import zoo
from moekit.families.model import Model
from moekit.families.resident import empty_cache
from moekit.serve import token
from moekit.serve.engine import Engine
from moekit.serve.lossy import Lossy
from moekit.serve.native import ISAS, native
from moekit.serve.packing import pack

KERNELS = native()[0]
pytestmark = pytest.mark.skipif(KERNELS is None, reason=f"no native kernels: {native()[1]}")
PLAIN = {
    "qwen2_moe": {},
    "qwen3_moe": {"mlp_only_layers": [1]},
    "olmoe": {},
    "ernie4_5_moe": {},
    "mixtral": {"sliding_window": None},
    "minimax_m2": {},
    "hy_v3": {},
}
OTHERS = {
    "mixtral": {"sliding_window": 8},
    "granitemoe": {"residual_multiplier": 0.5},
    "gpt_oss": {},
    "deepseek_v3": {},
    "qwen3_next": {},
    "flex_olmo": {},
}
IDS = torch.randint(zoo.VOCAB, (20,), generator=torch.Generator().manual_seed(0))


def engine_of(folder, family, settings, **options):
    zoo.build(family, dtype=torch.bfloat16, **settings).save_pretrained(folder / "model")
    return Engine(pack(Model.open(folder / "model"), folder / "store"), context=64, **{"exact": False, **options})


def logits_of(engine, ids, prompt, stock=()):
    """After each token from the prompt's end on; those with numbers in `stock` by the stock code."""
    past, runner = empty_cache(engine.model), engine.tokens
    out = [engine.forward(ids[None, :prompt], past, "prefill")]
    for number, one in enumerate(ids[prompt:]):
        engine.tokens = None if number in stock else runner
        out.append(engine.forward(one.reshape(1, 1), past, "decode"))
    engine.tokens = runner
    return torch.cat(out).float()


def close(a, b, bound=0.03):
    return ((a - b).norm(dim=-1) < bound * b.norm(dim=-1)).float().mean() > 0.8  # a choice of experts may flip


@pytest.mark.parametrize("family", PLAIN)
def test_plain_models_say_what_the_stock_code_does(family, tmp_path):
    engine = engine_of(tmp_path, family, PLAIN[family])
    assert engine.tokens is not None
    right = logits_of(engine, IDS, 6, stock=range(99))
    assert close(logits_of(engine, IDS, 6), right)
    assert close(logits_of(engine, IDS, 6, stock=range(0, 99, 2)), right)  # both read what the other has kept
    engine.close()


@pytest.mark.parametrize("family", OTHERS)
def test_other_models_are_left_to_the_stock_code(family, tmp_path):
    engine = engine_of(tmp_path, family, OTHERS[family])
    assert engine.tokens is None
    engine.close()


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "gpt_oss", "deepseek_v3", "nemotron_h", "granitemoe"])
def test_single_tokens_are_exact_where_nothing_is_rounded(family, tmp_path):
    engine = engine_of(tmp_path, family, {}, exact=None)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    stock.set_experts_implementation("eager")
    mine, right = empty_cache(engine.model), empty_cache(stock)
    with torch.inference_mode():
        for part in (IDS[:8], *IDS[8:].split(1)):
            logits = stock(input_ids=part[None], past_key_values=right, use_cache=True).logits[:, -1]
            assert torch.equal(engine.forward(part[None], mine, "decode"), logits)
    engine.close()


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    root, model = tmp_path_factory.mktemp("tokens"), moekit.open("refmoe")
    return {bits: pack(model, root / str(bits), bits=bits) for bits in (16, 8, 4)}


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("isa", range(KERNELS.isa + 1 if KERNELS else 1), ids=lambda x: ISAS[x])
def test_every_width_and_instruction_set(stores, bits, isa):
    engine = Engine(stores[bits], context=128, exact=False)
    assert engine.tokens is not None
    right = logits_of(engine, IDS, 6, stock=range(99))
    engine.tokens._native = dataclasses.replace(KERNELS, isa=isa)
    for threads in (1, 3):
        engine.tokens._threads = threads
        assert close(logits_of(engine, IDS, 6), right)
    engine.close()


def test_experts_are_counted_and_read_once(stores):
    engine = Engine(stores[4], context=128)
    engine.forget()
    layers, k = len(engine.layout.routed), engine.layout.routed[0].top_k
    list(engine.stream([5], 41))
    counts = engine.cache.counts
    assert sum(counts.hits) + sum(counts.misses) == 41 * layers * k
    before = counts.read_bytes
    list(engine.stream([5], 41))
    assert counts.read_bytes == before
    assert engine.telemetry.tokens["decode"] == 80
    engine.close()


def test_fewer_threads_only_where_they_are_clearly_faster(stores, monkeypatch):
    engine = Engine(stores[4], context=128)
    took = {4: 1.0, 2: 0.8, 1: 0.5}
    monkeypatch.setattr(token, "quickest", lambda call: took[call.args[-1]])
    engine.tokens._threads = 4
    assert engine.tokens.try_threads() == 1
    took[1] = 0.75
    engine.tokens._threads = 4
    assert engine.tokens.try_threads() == 4
    engine.close()


def test_hooks_and_replaced_functions_are_seen(stores):
    engine = Engine(stores[4], context=128)
    past = empty_cache(engine.model)
    engine.forward(IDS[None, :4] % 128, past, "prefill")
    router = engine.model.get_submodule(engine.layout.routed[0].router_path)
    seen = []
    handle = router.register_forward_hook(lambda *_: seen.append(1))
    engine.forward(IDS[None, 4:5] % 128, past, "decode")
    assert seen == [1]
    handle.remove()
    assert engine.tokens.takes()
    router.forward = router.forward
    assert not engine.tokens.takes()
    engine.close()


def test_where_it_is_not_tried(stores):
    options = ({"exact": True}, {"lossy": Lossy(adaptive_k=0.9)}, {"predictor": "gate", "memory": "8GiB"})
    for option in options:
        engine = Engine(stores[4], context=128, **option)
        assert engine.tokens is None
        engine.close()
    with_all = Engine(stores[4], context=128)
    needed = with_all.memory.budget
    with_all.close()
    few = Engine(stores[4], context=128, memory=needed - with_all.store.expert_bytes // 2)
    assert few.tokens is None
    few.close()
