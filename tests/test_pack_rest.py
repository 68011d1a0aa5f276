"""Matrices beside the experts in few bits: what is packed, what it says, and that nobody takes it for lossless."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import moekit
import zoo
from moekit.errors import OutputError
from moekit.families.model import Model
from moekit.serve.calibrate import quicken_linears
from moekit.serve.engine import Engine
from moekit.serve.packing import pack
from moekit.serve.rest import PackedLinear, rest_widths
from moekit.serve.store import MANIFEST, VERSION, ExpertStore

IDS = torch.randint(1024, (40,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    root, model = tmp_path_factory.mktemp("rest"), moekit.open("refmoe")
    return {bits: pack(model, root / str(bits), rest_bits=bits) for bits in (16, 8, 4)}


def test_fewer_bits_say_nearly_the_same(stores):
    engines = {bits: Engine(path, context=128) for bits, path in stores.items()}
    told = {bits: engine.logits(IDS).float().log_softmax(-1) for bits, engine in engines.items()}
    kl = {bits: float((told[16].exp() * (told[16] - told[bits])).sum(-1).mean()) for bits in (8, 4)}
    assert 0 < kl[8] < 0.01
    assert kl[8] < kl[4] < 0.2
    sizes = {bits: engine.store.rest_bytes for bits, engine in engines.items()}
    assert sizes[4] < sizes[8] < sizes[16]
    assert [engine.store.lossless for engine in engines.values()] == [True, False, False]
    for engine in engines.values():
        engine.close()


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_matrices_are_the_rounded_ones(stores, bits):
    packed, plain = Engine(stores[bits], context=128, exact=True), Engine(stores[16], context=128)
    found = {name: x for name, x in packed.model.named_modules() if isinstance(x, PackedLinear)}
    wanted = rest_widths(plain.model, plain.layout, bits)
    assert {x + ".weight" for x in found} == {target for target, _ in wanted.values()}
    for name, module in found.items():
        linear = plain.model.get_submodule(name)
        assert (module.weight - linear.weight).norm() < (0.01 if module.bits == 8 else 0.15) * linear.weight.norm()
        linear.weight = nn.Parameter(module.weight, requires_grad=False)
        assert module.bits == (8 if name == "lm_head" else bits)
    right, said = plain.logits(IDS).float(), packed.logits(IDS).float()
    assert (said - right).norm() < 0.02 * right.norm()
    assert quicken_linears(packed.model) >= 0
    for module in found.values():
        x = torch.randn(3, module.in_features, generator=torch.Generator().manual_seed(1)).bfloat16()
        right = nn.functional.linear(x.float(), module.weight.float())
        assert (module(x).float() - right).norm() < 0.01 * right.norm()
    packed.close()
    plain.close()


def test_an_embedding_that_is_the_output_too_stays(tmp_path):
    zoo.build("qwen3_moe", dtype=torch.bfloat16, tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    engine = Engine(pack(Model.open(tmp_path / "model"), tmp_path / "store", bits=8, rest_bits=4), context=64)
    assert isinstance(engine.model.lm_head, PackedLinear)
    assert engine.model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert len(list(engine.stream([1, 2, 3], 5))) == 5
    engine.close()


def test_impossible_bits(tmp_path):
    with pytest.raises(OutputError, match="rest_bits"):
        pack(moekit.open("refmoe"), tmp_path / "store", rest_bits=5)
    assert not list(tmp_path.iterdir())


def test_stores_without_packed_matrices_still_open(stores, tmp_path):
    (tmp_path / "old").mkdir()
    for file in stores[16].iterdir():
        (tmp_path / "old" / file.name).symlink_to(file)
    manifest = json.loads((stores[16] / MANIFEST).read_text())
    assert manifest.pop("version") == VERSION
    assert manifest.pop("rest_bits") == 16
    (tmp_path / "old" / MANIFEST).unlink()
    (tmp_path / "old" / MANIFEST).write_text(json.dumps({**manifest, "version": 2}))
    assert ExpertStore(tmp_path / "old").lossless
