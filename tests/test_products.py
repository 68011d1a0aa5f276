"""Experts' products: float32 where the processor is faster at it, never in a model that is in float32 already."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zoo
from moekit.families import products
from moekit.families.products import WIDE_ROWS, Products
from moekit.families.seam import ExpertRows, observed_experts
from moekit.families.stock import find_experts

FAMILIES = ["qwen3_moe", "gpt_oss"]  # plain, and transposed with biases and an activation of its own


@pytest.fixture(params=[False, True], ids=["16-bit", "float32"])
def wide(request, monkeypatch) -> bool:
    """Whether this processor counts as faster in float32."""
    monkeypatch.setattr(products, "float32_is_faster", lambda dtype: request.param)
    return request.param


def call(family: str, dtype: torch.dtype) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A family's experts and a call in which experts get from a few to several hundred rows."""
    model = zoo.build(family, dtype=dtype)
    experts = model.get_submodule(find_experts(model)[0].path)
    generator = torch.Generator().manual_seed(0)
    chances = torch.tensor([0.002, 0.01, 0.05, 0.1, 0.2, 0.3, 0.6, 1.0]).expand(600, zoo.EXPERTS)
    ids_TK = chances.multinomial(zoo.TOP_K, generator=generator)
    weights_TK = torch.rand(600, zoo.TOP_K, generator=generator).to(dtype)
    return experts, (torch.randn(600, zoo.TINY["hidden_size"], generator=generator).to(dtype), ids_TK, weights_TK)


def eager(experts: nn.Module, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """transformers' own loop."""
    experts.config._experts_implementation = "eager"
    return experts(*args)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_float32_model_is_untouched(family, wide):
    experts, args = call(family, torch.float32)
    assert torch.equal(observed_experts(experts, *args), eager(experts, args))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_16_bit_models_come_as_near_to_exact_as_the_eager_loop(family, dtype, wide):
    experts, args = call(family, dtype)
    exact = eager(experts.float(), tuple(x.float() if x.is_floating_point() else x for x in args))
    experts.to(dtype)
    found = observed_experts(experts, *args)
    assert found.dtype == dtype
    error, stock_error = ((x.float() - exact).abs().mean() for x in (found, eager(experts, args)))
    assert error <= (0.5 if wide else 1.1) * stock_error


@torch.inference_mode()
def test_experts_with_many_rows_are_watched_in_float32(wide):
    experts, args = call("qwen3_moe", torch.bfloat16)
    seen: list[ExpertRows] = []
    experts._moekit_watch = seen.append
    observed_experts(experts, *args)
    counts = torch.bincount(args[1].reshape(-1), minlength=zoo.EXPERTS).tolist()
    assert min(counts) < WIDE_ROWS < max(counts)
    assert [len(x.tokens) for x in seen] == [len(x.output) for x in seen] == counts
    for rows in seen:
        many = wide and len(rows.tokens) >= WIDE_ROWS
        assert rows.output.dtype == (torch.float32 if many else torch.bfloat16)


def test_rows_are_padded_with_zeros_to_few_different_numbers(wide):
    hidden = torch.ones(200, 4, dtype=torch.bfloat16)
    for count in (1, 8, 31, 33):
        rows = Products(hidden, 1).rows(torch.arange(count))
        assert len(rows) % (8 if wide else 32) == 0
        assert rows.sum(1).tolist() == [4.0] * count + [0.0] * (len(rows) - count)
    assert len(Products(hidden.float(), 1).rows(torch.arange(33))) == 33


def test_it_is_found_by_trying():
    assert products.float32_is_faster(torch.bfloat16) is products.float32_is_faster(torch.bfloat16)
