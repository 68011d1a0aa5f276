"""Expert stores: every family's numbers bit for bit, whatever stays in memory; damage is named, packing goes on."""

from __future__ import annotations

import os

import pytest
import torch
import transformers
from transformers import DynamicCache

import moekit
import zoo
from moekit.errors import CheckpointError, ModelError, OutputError, RecipeError
from moekit.families.model import Model
from moekit.families.resident import empty_cache, move
from moekit.serve import packing
from moekit.serve.cache import ExpertCache, slot_bytes
from moekit.serve.engine import CHUNK_TOKENS, Engine
from moekit.serve.experts import stored_experts
from moekit.serve.forms import packed_expert, product, unpacked
from moekit.serve.packing import pack
from moekit.serve.policies import POLICIES, Sizes, policy_named
from moekit.serve.sampling import Sampling, choose
from moekit.serve.store import MANIFEST, ExpertStore, checksum


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """refmoe packed with 16, 8 and 4 bits."""
    root, model = tmp_path_factory.mktemp("stores"), moekit.open("refmoe")
    return {bits: pack(model, root / str(bits), bits=bits) for bits in (16, 8, 4)}


@pytest.fixture(scope="module")
def ids():
    return torch.randint(moekit.open("refmoe").layout.vocab_size, (40,), generator=torch.Generator().manual_seed(0))


def eager(model, dtype):
    transformers.logging.set_verbosity_error()
    stock = model.load(dtype)
    stock.set_experts_implementation("eager")
    return stock


@torch.no_grad()
def logits_of(stock, ids, past=None):
    past = past or DynamicCache(config=stock.config.get_text_config())
    return stock(input_ids=ids[None], past_key_values=past, use_cache=True).logits[0]


@pytest.mark.parametrize("policy", sorted(POLICIES.keys() - {"belady", "static"}))
@pytest.mark.parametrize("spare", [5, 7, 20])
def test_what_stays_in_memory_changes_no_number(stores, ids, policy, spare):
    store = ExpertStore(stores[16])
    engine = Engine(store)
    whole = engine.logits(ids)
    assert engine.cache.counts.hit_rate == 0.0  # each expert is needed once
    engine.logits(ids)
    assert engine.cache.counts.hit_rate == 0.5
    small = ExpertCache(store, spare * slot_bytes(store), policy_named(policy, engine.sizes(spare)))
    for experts in engine._experts.values():
        experts._moekit_cache = small
    assert torch.equal(engine.logits(ids), whole)
    assert small.counts.read_bytes == sum(small.counts.misses) * slot_bytes(store)
    assert len(small._free) + len(small._resident) == small.slots == spare
    engine.close()
    small.close()


def test_a_long_prompt_reads_each_expert_once_a_chunk(stores, monkeypatch):
    """However few places there are: experts run one after the other, each on all of the chunk's tokens."""
    store, reads = ExpertStore(stores[16]), []
    engine = Engine(store)
    small = ExpertCache(store, 6 * slot_bytes(store), policy_named("lru", engine.sizes(6)))
    for experts in engine._experts.values():
        experts._moekit_cache = small
    stock = small.reads.start
    monkeypatch.setattr(small.reads, "start", lambda new: reads.extend(x[:2] for x in new) or stock(new))
    prompt = torch.randint(3, 4096, (600,), generator=torch.Generator().manual_seed(2))
    past = empty_cache(engine.model)
    for part in prompt.split(CHUNK_TOKENS):
        reads.clear()
        engine.forward(part[None], past, "prefill")
        assert len(reads) == len(set(reads)) > 180
    engine.close()
    small.close()


@pytest.mark.parametrize("bits", [8, 4])
def test_fewer_bits_are_close(stores, ids, bits):
    exact, rough = Engine(stores[16]), Engine(stores[bits])
    a, b = exact.logits(ids).float(), rough.logits(ids).float()
    error = (a - b).norm() / a.norm()
    assert 0 < error < {8: 0.03, 4: 0.25}[bits]
    assert rough.store.expert_bytes < exact.store.expert_bytes * {8: 0.6, 4: 0.35}[bits]
    exact.close()
    rough.close()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [1, 8, 9, 70])
def test_packed_products_are_those_of_unpacked_numbers(bits, transposed, rows):
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(96, 128, generator=generator), torch.randn(96, generator=generator)
    kept = weight.T if transposed else weight
    one = {"down_proj": kept.bfloat16(), "down_proj_bias": bias.bfloat16()}
    _, tensors = packed_expert(one, bits, transposed)
    x = torch.randn(rows, 128, generator=generator).bfloat16()
    numbers = unpacked(tensors, "down_proj", 96)
    assert (numbers.float() - weight).abs().max() < {8: 0.03, 4: 0.6}[bits]
    expected = x.float() @ numbers.float().T + bias.bfloat16().float()
    found = product(x, tensors, "down_proj", "down_proj_bias", transposed, 96).float()
    assert (found - expected).abs().max() < 0.03 * expected.abs().max()


def test_writing_on_is_what_stock_generates(stores, ids):
    engine = Engine(stores[16])
    stock = eager(moekit.open("refmoe"), torch.bfloat16)
    told = stock.generate(ids[None, :12], max_new_tokens=16, do_sample=False)[0, 12:].tolist()
    written = list(engine.stream(ids[:12].tolist(), 16))
    assert written == [x for x in told if x not in engine.ends]
    assert len(engine.timing.token_s) == len(written) - 1
    engine.close()


def test_a_seed_draws_the_same_and_top_p_leaves_out_the_unlikely():
    logits = torch.tensor([2.0, 1.0, 0.0, -9.0])

    def draw(sampling):
        generator = torch.Generator().manual_seed(3)
        return [choose(logits, sampling, generator) for _ in range(200)]

    assert draw(Sampling(1.0)) == draw(Sampling(1.0))
    assert set(draw(Sampling(1.0, top_p=0.5))) == {0}
    assert set(draw(Sampling(5.0))) >= {0, 1, 2}
    assert set(draw(Sampling())) == {0}


def test_an_interrupted_pack_goes_on(tmp_path, monkeypatch):
    model = moekit.open("refmoe")
    written, stock = [], packing._write_experts

    def interrupted(file, *rest):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(file.name)
        return stock(file, *rest)

    monkeypatch.setattr(packing, "_write_experts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack(model, tmp_path / "store")
    assert not (tmp_path / "store").exists()
    monkeypatch.setattr(packing, "_write_experts", lambda *args: written.append(args[0].name) or stock(*args))
    pack(model, tmp_path / "store")
    assert len(written) == len(set(written)) == len(model.layout.routed)
    assert [x.name for x in tmp_path.iterdir()] == ["store"]


def test_damage_is_named(tmp_path, stores):
    for name in os.listdir(stores[16]):
        (tmp_path / name).write_bytes((stores[16] / name).read_bytes())
    file = tmp_path / "experts-00002.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match="not whole"):
        ExpertStore(tmp_path)
    file.write_bytes(whole[:500] + bytes([whole[500] ^ 1]) + whole[501:])
    store = ExpertStore(tmp_path)
    cache = ExpertCache(store, 6 * slot_bytes(store), policy_named("lru", Sizes(6, 6, 32, 4)))
    with pytest.raises(CheckpointError, match="damaged"):
        list(cache.run(2, list(range(32))))
    assert len(cache._free) + len(cache._resident) == cache.slots
    assert [expert for expert, _ in cache.run(3, [4, 1, 7])]
    cache.close()
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(CheckpointError, match="manifest"):
        ExpertStore(tmp_path)
    with pytest.raises(CheckpointError, match="no expert store"):
        ExpertStore(tmp_path / "nowhere")


def test_checksums_see_flipped_bits_and_pages_that_changed_places():
    record = torch.randint(256, (8 * 4096,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    good = checksum(record)
    assert checksum(record.clone()) == good
    for at in (0, 5000, len(record) - 1):
        bad = record.clone()
        bad[at] ^= 16
        assert checksum(bad) != good
    moved = record.view(8, -1)[[0, 2, 1, 3, 4, 5, 6, 7]].flatten()
    zeroed = record.clone()
    zeroed[4096:8192] = 0
    assert len({good, checksum(moved), checksum(zeroed)}) == 3


def test_what_cannot_be_run_is_refused_before_packing(tmp_path):
    zoo.build("openai_privacy_filter").save_pretrained(tmp_path / "filter")
    with pytest.raises(ModelError, match="writes no text"):
        pack(Model.open(tmp_path / "filter"), tmp_path / "out")
    with pytest.raises(OutputError, match="cannot be packed so"):
        pack(moekit.open("refmoe"), tmp_path / "out", bits=5)
    assert [x.name for x in tmp_path.iterdir()] == ["filter"]


def test_too_little_memory_says_how_much_is_needed(stores):
    with pytest.raises(RecipeError, match=r"at least .* for Python and the model without its experts"):
        Engine(stores[16], memory="100MB")
    with pytest.raises(RecipeError, match="no cache policy 'lur'"):
        policy_named("lur", Sizes(5, 6, 32, 4))


@pytest.mark.parametrize("device", ["cuda:99", "meta", "abacus"])
def test_a_device_that_is_not_here_is_refused(stores, device):
    with pytest.raises(RecipeError, match="no such device"):
        Engine(stores[16], device=device)


def test_a_model_moves_all_that_is_not_empty():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 2, device="meta"))
    move(model, torch.device("meta"))
    assert all(x.is_meta for x in (*model.parameters(), *model.buffers()))
    assert not any(x.requires_grad for x in model[0].parameters())


def test_an_expert_that_a_token_has_twice_counts_twice(stores):
    """As tables of fixed experts may say."""
    engine = Engine(stores[16], context=64)
    experts = engine.model.get_submodule(engine.layout.routed[0].experts_path)
    x_TD = torch.randn(1, engine.layout.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids_TK, weights_TK = torch.tensor([[3, 5, 3, 7]]), torch.tensor([[0.4, 0.3, 0.2, 0.1]]).bfloat16()
    with torch.inference_mode():
        alone = stored_experts(experts, x_TD, ids_TK, weights_TK)
        beside = stored_experts(experts, x_TD.expand(2, -1), ids_TK.expand(2, -1), weights_TK.expand(2, -1))
        once = stored_experts(experts, x_TD, torch.tensor([[3, 5, 99, 7]]), weights_TK)
    assert torch.allclose(alone[0].float(), beside[0].float(), rtol=0.02, atol=1e-3)
    assert not torch.allclose(alone, once, rtol=0.02, atol=1e-3)
    engine.close()
