"""Kernels for decoding: native ones give PyTorch's numbers on every instruction set; what is chosen when."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import moekit
import zoo
from moekit.families.stock import is_experts
from moekit.serve import calibrate as calibration
from moekit.serve import native as package
from moekit.serve.calibrate import Kernels, act_of, quicken_linears, row_of, sizes_of
from moekit.serve.engine import Engine
from moekit.serve.forms import packed_expert, unpacked
from moekit.serve.native import ISAS, native, weight_of
from moekit.serve.packing import pack

KERNELS = native()[0]
here = pytest.mark.skipif(KERNELS is None, reason=f"no native kernels: {native()[1]}")
isas = pytest.mark.parametrize("isa", range(KERNELS.isa + 1 if KERNELS else 1), ids=lambda x: ISAS[x])


def an_expert(sizes, bits, bias, seed):
    hidden, up, inner = sizes
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator).bfloat16()  # noqa: E731
    tensors = {"gate_up_proj": draw(up, hidden) / hidden**0.5, "down_proj": draw(hidden, inner) / inner**0.5}
    if bias:
        tensors |= {"gate_up_proj_bias": draw(up), "down_proj_bias": draw(hidden)}
    return packed_expert(tensors, bits, False)


def numbers(tensors, name, rows, bits):
    return (tensors[name] if bits == 16 else unpacked(tensors, name, rows)).double()


@here
@isas
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize(("sizes", "bias"), [((64, 128, 64), False), ((96, 80, 40), True), ((72, 2 * 36, 36), True)])
@pytest.mark.parametrize("threads", [1, 2])
def test_native_experts_are_exact_products_rounded(isa, bits, sizes, bias, threads):
    kernels = dataclasses.replace(KERNELS, isa=isa)
    hidden, up, _ = sizes
    counts = [1, 2, 5]  # rows of three experts: one, some, more than a tile
    packed = [an_expert(sizes, bits, bias, seed) for seed in range(3)]
    x = torch.randn(6, hidden, generator=torch.Generator().manual_seed(9)).bfloat16()
    tokens = [3, 0, 5, 1, 2, 3, 4, 5]
    out = torch.full((8, hidden), float("nan"))
    table = [y for group, tensors in packed for y in row_of(tensors, bits, group, True)]
    kernels.experts(table, [0, 1, 3, 8], tokens, x, sizes, True, 0, out, threads)
    at = 0
    for count, (_, tensors) in zip(counts, packed, strict=True):
        mid = x[tokens[at : at + count]].double() @ numbers(tensors, "gate_up_proj", up, bits).T
        mid = (mid + tensors["gate_up_proj_bias"].double() if bias else mid).chunk(2, -1)
        right = (nn.functional.silu(mid[0]) * mid[1]) @ numbers(tensors, "down_proj", hidden, bits).T
        right = right + tensors["down_proj_bias"].double() if bias else right
        found = out[at : at + count].double()
        assert (found - right).norm() < 0.01 * right.norm()
        assert torch.equal(found.bfloat16().double(), found)  # rounded as PyTorch rounds what it returns
        at += count
    weights = [0.5, 0.25, 1.0, 2.0, 1.0, 0.75, 0.125, 1.0]
    total = kernels.combine(out, tokens, weights, 6)
    right = torch.zeros(6, hidden).index_add_(0, torch.tensor(tokens), out * torch.tensor(weights)[:, None])
    assert torch.equal(total, right.bfloat16())


@here
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_row_does_not_depend_on_its_company(bits):
    sizes = (64, 96, 48)
    group, tensors = an_expert(sizes, bits, False, 0)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    together, alone = torch.empty(7, 64), torch.empty(1, 64)
    row = row_of(tensors, bits, group, True)
    KERNELS.experts(row, [0, 7], range(7), x, sizes, True, 0, together, 2)
    for i in range(7):
        KERNELS.experts(row, [0, 1], [i], x, sizes, True, 0, alone, 1)
        assert torch.equal(alone[0], together[i])


@here
@isas
@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("gated", [False, True])
def test_activations(isa, number, gated):
    kernels, inner = dataclasses.replace(KERNELS, isa=isa), 32
    up = 2 * inner if gated else inner
    x = (3 * torch.randn(1, up, generator=torch.Generator().manual_seed(0))).bfloat16()
    tensors = {"gate_up_proj": torch.eye(up).bfloat16(), "down_proj": torch.eye(up, inner).bfloat16()}
    out = torch.empty(1, up)
    kernels.experts(row_of(tensors, 16, 0, True), [0, 1], [0], x, (up, up, inner), gated, number, out, 1)
    f, gate = nn.functional, x[:, :inner].float()
    right = (f.silu(gate), f.gelu(gate, approximate="tanh"), f.gelu(gate), f.relu(gate), f.relu(gate) ** 2)[number]
    right = right * x[:, inner:].float() if gated else right
    assert (out[:, :inner] - right).abs().max() < 0.01 * right.abs().max()


@here
@isas
@pytest.mark.parametrize("rows", [1, 3, 9])
def test_native_matrices(isa, rows):
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(70, 100, generator=generator).bfloat16(), torch.randn(70, generator=generator).bfloat16()
    x = torch.randn(rows, 100, generator=generator).bfloat16()
    right = x.double() @ weight.double().T
    for b in (None, bias):
        found = dataclasses.replace(KERNELS, isa=isa).linear(x, weight_of(weight, b), 2).double()
        assert (found - right - (0 if b is None else b.double())).norm() < 0.005 * right.norm()


@pytest.mark.parametrize(
    ("family", "act"), [("qwen3_moe", 0), ("mixtral", 0), ("nemotron_h", 4), ("gpt_oss", None), ("jamba", 0)]
)
def test_activations_are_probed_not_believed(family, act):
    experts = next(x for x in zoo.build(family).modules() if "num_experts" in vars(x) and is_experts(x))
    assert act_of(experts, sizes_of(experts)) == act


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    root, model = tmp_path_factory.mktemp("kernels"), moekit.open("refmoe")
    return {bits: pack(model, root / str(bits), bits=bits) for bits in (16, 8, 4)}


def close(a, b, bound):
    return (a.float() - b.float()).norm() < bound * b.float().norm()


@here
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_an_engine_with_native_kernels_says_what_one_without_does(stores, bits, monkeypatch):
    monkeypatch.setattr(calibration, "_last", lambda *_: 32)  # native ones always
    monkeypatch.setattr(calibration, "_pays", lambda *_: True)
    calibration.measured.cache_clear()
    ids = torch.randint(1024, (12,), generator=torch.Generator().manual_seed(0)).tolist()
    fast, plain = Engine(stores[bits], exact=False), Engine(stores[bits], exact=True)
    for experts in plain._experts.values():
        experts._moekit_kernels = Kernels()
    assert fast.kernels.takes(bits) == 32
    assert close(fast.logits(ids), plain.logits(ids), 0.03)
    before = fast.logits(ids)
    assert torch.equal(fast.logits(ids), before)  # from memory now, in one call a layer
    fast.close()
    plain.close()
    calibration.measured.cache_clear()


def test_sixteen_bits_are_left_to_pytorch(stores):
    engine = Engine(stores[16])
    assert engine.kernels.takes(16) == 0
    assert not any("forward" in vars(x) for x in engine.model.modules() if type(x) is nn.Linear)
    engine.close()


def test_what_is_measured_is_what_is_chosen(monkeypatch):
    assert calibration._last({1: 1.0, 2: 1.0, 4: 9.0, 8: 1.0, 16: 1, 32: 1}, dict.fromkeys(calibration.ROWS, 2.0)) == 2
    assert calibration._last(dict.fromkeys(calibration.ROWS, 3.0), dict.fromkeys(calibration.ROWS, 2.0)) == 0


def test_linears_are_left_alone_without_kernels(monkeypatch):
    monkeypatch.setattr(calibration, "native", lambda: (None, "none"))
    model = nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16))
    assert quicken_linears(model) == 0
    assert "forward" not in vars(model[0])


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"MOEKIT_NATIVE": "0"}, "switched off"),
        ({"CC": "no-such-compiler"}, "no C compiler"),
        ({"CC": "false"}, "could not be made"),
    ],
)
def test_without_native_kernels_pytorch_computes(setting, reason, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    package.native.cache_clear()
    try:
        kernels, why = package.native()
        assert kernels is None
        assert reason in why
    finally:
        package.native.cache_clear()
    assert not list(tmp_path.glob("**/*.so"))


@here
def test_a_broken_library_is_not_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "moekit").mkdir()
    for kind in ("parallel", "serial"):
        name = KERNELS.file.name.replace("parallel", kind).replace("serial", kind)
        (tmp_path / "moekit" / name).write_bytes(b"no library")
    package.native.cache_clear()
    kernels, why = package.native()
    package.native.cache_clear()
    assert kernels is None
    assert "could not be made" in why
