"""Proof that a family's router can be steered: what is forced is used by every token, what is scoped stays in scope."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from family_proofs import Recorder, Specimen, experts_of, run
from moekit.families.tokens import Reach
from moekit.view import MoEView

BOTH_WAYS = ("openai_privacy_filter",)  # its tokens see those behind them
AFTER = 6  # the place from which a scoped edit acts


def used(specimen: Specimen, view: MoEView) -> tuple[dict[int, Tensor], Tensor]:
    """(ids [B, S, K] by layer, logits) of the specimen's batch under what is in force."""
    seen = Recorder(False)
    with view.watch(seen):
        logits = run(specimen.stock, specimen.batch)
    rows, columns = specimen.batch["input_ids"].shape
    return {index: call.ids.reshape(rows, columns, -1) for index, call in seen.calls.items()}, logits


def steers(specimen: Specimen) -> str:
    """Force, ban from a place on, bias and swap do what they say, where they should, and leave no trace."""
    layout = specimen.layout
    if layout.cannot_run:
        return "refused"
    view = MoEView(specimen.stock, layout)
    plain, logits = used(specimen, view)
    last = {layer.index: layer.num_experts - 1 for layer in layout.routed}
    one = {index: {expert: 1.0} for index, expert in last.items()}

    with view.edit("force", one):
        ids, forced = used(specimen, view)
    assert all((ids[index] == expert).any(-1).all() for index, expert in last.items())
    assert forced.isfinite().all()

    most = {
        index: int(x.flatten().bincount()[: layout.by_index[index].num_experts].argmax()) for index, x in plain.items()
    }
    with view.edit("ban", {index: {expert: 1.0} for index, expert in most.items()}, Reach("span", AFTER)):
        ids, late = used(specimen, view)
    assert not any((ids[index][:, AFTER:] == expert).any() for index, expert in most.items())
    first = layout.routed[0].index
    assert torch.equal(ids[first][:, :AFTER], plain[first][:, :AFTER])
    if specimen.name not in BOTH_WAYS:
        assert torch.allclose(late[:, :AFTER], logits[:, :AFTER], atol=1e-5)
    assert any((plain[index][:, AFTER:] == expert).any() for index, expert in most.items())

    with view.edit("bias", {index: {expert: 0.0} for index, expert in last.items()}):
        assert torch.equal(run(specimen.stock, specimen.batch), specimen.logits)
    if not any(layer.tables for layer in layout.routed):
        with view.edit("bias", {index: {expert: 100.0} for index, expert in last.items()}, Reach("prompt")):
            ids, _ = used(specimen, view)
        count = {index: int((x == last[index]).sum()) for index, x in ids.items()}
        assert all(count[index] >= int((x == last[index]).sum()) for index, x in plain.items())
        assert sum(count.values()) > sum(int((x == last[index]).sum()) for index, x in plain.items())

    swaps = {layer.index: [(0, 1), (1, 2)] for layer in layout.routed}
    back = {layer.index: [(1, 2), (0, 1)] for layer in layout.routed}
    with view.swap(swaps):
        moved = run(specimen.stock, specimen.batch)
        with view.swap(back):
            assert torch.allclose(run(specimen.stock, specimen.batch), specimen.logits, atol=1e-5)
    assert (moved - specimen.logits).abs().max() > 1e-3
    with renumbered(specimen):
        assert torch.allclose(run(specimen.stock, specimen.batch), moved, atol=1e-5)

    with view.edit("force", one, Reach("generated")), view.scale({i: {0: 0.0} for i in last}, reach=Reach(tag=1)):
        assert torch.equal(run(specimen.stock, specimen.batch), specimen.logits)
    assert torch.equal(run(specimen.stock, specimen.batch), specimen.logits)
    return "yes"


@contextlib.contextmanager
def renumbered(specimen: Specimen) -> Iterator[None]:
    """The experts' own parameters in the order that the swaps (0, 1), (1, 2) ask for."""

    def move(*order: int) -> None:
        for experts in (x for path, x in experts_of(specimen.stock).items() if "vision" not in path):
            for parameter in experts.parameters(recurse=False):
                index = torch.arange(len(parameter))
                index[:3] = torch.tensor(order)
                parameter.data = parameter.data[index]

    move(1, 2, 0)
    try:
        yield
    finally:
        move(2, 0, 1)
