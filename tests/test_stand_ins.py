"""Constant vectors in the place of experts (MoNE): live, on disk, and what is decided."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

import zoo
from moekit.errors import PlanError
from moekit.families.model import Model
from moekit.families.seam import Call, ExpertRows, Observer
from moekit.view import MoEView

FAMILIES = ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "llama4_text"]
OTHERS = ["zaya", "deepseek_v4", "nemotron_h"]


class Notes(Observer):
    """What every MoE call was, and each expert's outputs in it."""

    wants_outputs = True

    def __init__(self) -> None:
        self.calls: dict[int, Call] = {}
        self.outputs: dict[int, dict[int, ExpertRows]] = defaultdict(dict)
        self.results: dict[int, torch.Tensor] = {}

    def routed(self, call: Call) -> None:
        self.calls[call.layer.index] = call

    def expert(self, call: Call, rows: ExpertRows) -> None:
        self.outputs[call.layer.index][rows.expert] = ExpertRows(
            rows.expert, rows.tokens, rows.ranks, rows.output.clone()
        )

    def finished(self, call: Call, output: torch.Tensor) -> None:
        self.results[call.layer.index] = output.reshape(len(call.ids), -1).clone()


@torch.inference_mode()
def run(view: MoEView) -> torch.Tensor:
    return view.model(**zoo.inputs(view.layout.family), use_cache=False).logits


def seen(view: MoEView) -> tuple[torch.Tensor, Notes]:
    notes = Notes()
    with view.watch(notes):
        return run(view), notes


def vectors(model: Model, experts: tuple[int, ...], seed: int = 0) -> dict[int, dict[int, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        layer.index: {e: torch.randn(layer.width, generator=generator) for e in experts}
        for layer in model.layout.routed
    }


@pytest.mark.parametrize("family", FAMILIES + OTHERS)
def test_a_slot_adds_its_weight_times_the_vector_and_nothing_else_changes(opened, family):
    model = opened(family)
    view = MoEView(model.load(torch.float32), model.layout)
    before, plain = seen(view)
    first = model.layout.routed[0]
    experts = tuple(plain.outputs[first.index])[:2]
    given = {first.index: vectors(model, experts)[first.index]}
    with view.replace(given):
        logits, notes = seen(view)
        unwatched = run(view)
    call, old = notes.calls[first.index], plain.results[first.index]
    assert torch.equal(call.ids, plain.calls[first.index].ids)
    expected = old.clone()
    for expert in experts:
        rows = plain.outputs[first.index][expert]
        weights = call.weights[rows.tokens, rows.ranks, None]
        gates = torch.ones_like(weights) if first.router.weighs_input else weights
        new = gates * given[first.index][expert]
        lost = rows.output if first.router.weighs_input else weights * rows.output
        expected.index_add_(0, rows.tokens, new - lost)
        shown = notes.outputs[first.index][expert].output
        assert torch.allclose(shown, given[first.index][expert].expand_as(shown))
    assert torch.allclose(notes.results[first.index], expected, atol=1e-4)
    assert not torch.allclose(logits, before, atol=1e-3)
    assert torch.allclose(unwatched, logits, atol=1e-5)
    assert torch.equal(seen(view)[0], before)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_expert_that_no_token_chooses_may_be_anything(opened, family):
    model = opened(family)
    view = MoEView(model.load(torch.float32), model.layout)
    before, plain = seen(view)
    unused = {
        index: {e: torch.full((layer.width,), 1e6) for e in set(range(layer.num_experts)) - set(plain.outputs[index])}
        for index, layer in model.layout.by_index.items()
    }
    gone = {index: set(range(8)) - {0, 1} for index in unused} if family == "mixtral" else {}
    with view.replace(unused):
        assert torch.equal(seen(view)[0], before)
    if gone:  # every expert that is banned is one that no token chooses
        with view.ban(gone):
            banned = run(view)
            with view.replace({i: {e: torch.full((64,), 1e6) for e in experts} for i, experts in gone.items()}):
                assert torch.allclose(run(view), banned, atol=1e-5)


def test_vectors_may_be_laid_over_vectors(opened):
    model = opened("mixtral")
    view = MoEView(model.load(torch.float32), model.layout)
    both = vectors(model, (0, 5))
    with view.replace(both):
        together = run(view)
    with (
        view.replace({i: {0: x[0]} for i, x in both.items()}),
        view.replace({i: {5: x[5]} for i, x in both.items()}),
    ):
        assert torch.equal(run(view), together)


def test_impossible_vectors_are_refused(opened):
    model = opened("mixtral")
    view = MoEView(model.load(torch.float32), model.layout)
    for wrong, message in (
        ({0: {8: torch.zeros(64)}}, "no such expert"),
        ({9: {0: torch.zeros(64)}}, "no MoE layer"),
        ({0: {0: torch.zeros(63)}}, "width"),
    ):
        with pytest.raises(PlanError, match=message), view.replace(wrong):
            pass
