"""Llama 4: no experts contract. The router's scores multiply the experts' INPUT, and every expert runs on every token.

Symbols: T tokens, K chosen, E experts, D hidden. The router returns (scores_TE, logits_TE), scores being zero where an
expert is not chosen; the experts get the T tokens E times over, [E * T, D], each copy times its score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from moekit.families.edits import Where
from moekit.families.family import ExpertForm, Family, Products, Reroute, View
from moekit.families.seam import Call, ExpertRows, Observer, rescaled
from moekit.layout import MoELayer

if TYPE_CHECKING:
    from moekit.families.probe import Probed


class Llama4(Family):
    """Dense execution, weighted inputs; an expert's observed output is f(g x), so g times its norm is never taken."""

    by_contract = False

    def is_experts(self, module: nn.Module) -> bool:
        """Known by their class: they carry no contract."""
        return type(module).__name__ == "Llama4TextExperts"

    def expert_form(self, experts: nn.Module) -> ExpertForm:
        """Gate before up, [in, out]."""
        return ExpertForm(frozenset({"gate_up_proj", "down_proj"}), gated=True, interleaved=False, transposed=True)

    def routing(self, outputs: tuple) -> tuple[torch.Tensor, torch.Tensor]:
        """The scores that are not zero."""
        scores_TE = outputs[0]
        weights_TK, ids_TK = scores_TE.topk(int((scores_TE > 0).sum(-1).max()), dim=-1)
        return weights_TK, ids_TK

    def refine(self, probed: Probed) -> Probed:
        """Say that weights go in, not out."""
        return replace(probed, router=replace(probed.router, weighs_input=True))

    def inner(self, experts: nn.Module, expert: int, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Gate times up; the inputs are weighted already."""
        gate, up = (hidden_ND @ experts.gate_up_proj[expert]).chunk(2, dim=-1)
        return up * experts.act_fn(gate)

    def output(self, experts: nn.Module, expert: int, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Of one expert: running the module would run all."""
        return self.inner(experts, expert, hidden_ND) @ experts.down_proj[expert]

    def from_elsewhere(self, experts: nn.Module, hidden: torch.Tensor, products: Products) -> torch.Tensor:
        """The experts' forward, of the rows that are not zero: the others' outputs are zero, without biases."""
        hidden_ETD = hidden.view(experts.num_experts, -1, hidden.shape[-1])
        out_ETD, used_ET = torch.zeros_like(hidden_ETD), (hidden_ETD != 0).any(-1)
        for expert, multiply in products(used_ET.any(1).nonzero()[:, 0].tolist()):
            rows_T = used_ET[expert]
            gate, up = multiply(hidden_ETD[expert, rows_T], "gate_up_proj").chunk(2, dim=-1)
            out_ETD[expert, rows_T] = multiply(up * experts.act_fn(gate), "down_proj")
        return out_ETD.view_as(hidden)

    @contextmanager
    def watch_experts(self, view: View, layer: MoELayer, observer: Observer) -> Iterator[None]:
        """Take ids and weights from the router, outputs from the dense run: nothing is computed twice."""
        calls: list[Call] = []

        def routed(_module: nn.Module, args: tuple, outputs: tuple) -> None:
            weights, ids = self.routing(outputs)
            calls.append(view.call(layer, args[0], ids, weights, observer.wants_residual))
            observer.routed(calls[-1])

        def after(_module: nn.Module, _args: tuple, output: torch.Tensor) -> None:
            call = calls.pop()
            output_ETD = output.view(layer.num_experts, len(call.ids), -1)
            for expert in call.ids.unique().tolist() if observer.wants_outputs else ():
                tokens, ranks = torch.where(call.ids == expert)
                observer.expert(call, ExpertRows(expert, tokens, ranks, output_ETD[expert, tokens]))
            observer.finished(call, output_ETD.sum(0))

        handles = [
            view.router(layer.index).register_forward_hook(routed),
            view.experts(layer.index).register_forward_hook(after),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def scale_experts(
        self, view: View, layer: MoELayer, factors_E: torch.Tensor, renormalise: bool, where: Where = None
    ) -> Iterator[None]:
        """Scale the router's scores, which the block multiplies the experts' input with."""

        def change(scores_TE: torch.Tensor) -> torch.Tensor:
            return rescaled(scores_TE, factors_E.to(scores_TE.device), renormalise)

        with self._rescored(view, layer, change, where):
            yield

    def place_constants(
        self, experts: nn.Module, router: nn.Module, constants: Mapping[int, torch.Tensor]
    ) -> Callable[[], None]:
        """A slot adds the vector itself: what weights an expert's input here does not scale its output."""
        chosen: list[torch.Tensor] = []

        def routed(_module: nn.Module, _args: tuple, outputs: tuple) -> None:
            chosen[:] = [outputs[0] > 0]

        def after(_module: nn.Module, _args: tuple, output: torch.Tensor) -> torch.Tensor:
            chosen_TE = chosen.pop()
            output_ETD = output.view(chosen_TE.shape[1], len(chosen_TE), -1).clone()
            for expert, vector in constants.items():
                output_ETD[expert] = chosen_TE[:, expert, None] * vector.to(output.device, output.dtype)
            return output_ETD.view_as(output)

        handles = [router.register_forward_hook(routed), experts.register_forward_hook(after)]

        def undo() -> None:
            for handle in handles:
                handle.remove()

        return undo

    @contextmanager
    def reroute_experts(self, view: View, layer: MoELayer, change: Reroute) -> Iterator[None]:
        """Change the router's scores. Nothing is saved: the stock code runs every expert on every token."""

        def routed(_module: nn.Module, args: tuple, outputs: tuple) -> tuple:
            scores_TE, *rest = outputs
            weights, ids = self.routing(outputs)
            hidden_TD = args[0].reshape(len(scores_TE), -1)
            ids, weights = change(view.call(layer, hidden_TD, ids, weights, False))
            wide = torch.nn.functional.pad(torch.zeros_like(scores_TE), (0, 1))  # the last: slots that stay empty
            return (wide.scatter_(1, ids, weights.to(wide.dtype))[:, :-1], *rest)

        handle = view.router(layer.index).register_forward_hook(routed)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def permute_experts(
        self, view: View, layer: MoELayer, order_E: torch.Tensor, where: Where = None
    ) -> Iterator[None]:
        """Give the score of expert e to expert `order_E[e]`."""
        with self._rescored(view, layer, lambda scores_TE: scores_TE[:, order_E.argsort()], where):
            yield

    @contextmanager
    def _rescored(
        self, view: View, layer: MoELayer, change: Callable[[torch.Tensor], torch.Tensor], where: Where
    ) -> Iterator[None]:
        """Change the router's scores."""

        def routed(_module: nn.Module, _args: tuple, outputs: tuple) -> tuple:
            scores_TE, *rest = outputs
            new_TE = change(scores_TE)
            if where is not None:
                new_TE = new_TE.where(where(len(scores_TE)).to(scores_TE.device)[:, None], scores_TE)
            return (new_TE, *rest)

        handle = view.router(layer.index).register_forward_hook(routed)
        try:
            yield
        finally:
            handle.remove()
