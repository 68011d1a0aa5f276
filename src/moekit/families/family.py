"""What moekit needs to know of a family's code: the general answer, which the few true exceptions override.

An exception is one small file in this package with a subclass of `Family` and one line in `_EXCEPTIONS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from moekit.errors import ModelError
from moekit.families.edits import Where
from moekit.families.seam import IMPLEMENTATION, Call, Observer, rescaled
from moekit.families.stock import is_experts
from moekit.layout import MoELayer

if TYPE_CHECKING:
    from moekit.families.probe import Probed


# What `Family.adapt_experts` asks: (hidden_TD, ids_TK, weights_TK) -> new weights_TK.
Change = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# What `Family.reroute_experts` asks: a call, whose logits are known where the router is tapped -> (ids_TK, weights_TK).
Reroute = Callable[[Call], tuple[torch.Tensor, torch.Tensor]]

# What `Family.from_elsewhere` asks: experts -> each with a function (rows, name of a weight) -> their product.
Products = Callable[[Sequence[int]], Iterator[tuple[int, Callable[[torch.Tensor, str], torch.Tensor]]]]


FEW = 64  # chosen experts that are looked at one by one


class View(Protocol):
    """What a family needs of `moekit.view.MoEView`, which stands above it."""

    def experts(self, layer: int) -> nn.Module:
        """The experts module of a layer."""
        ...

    def router(self, layer: int) -> nn.Module:
        """The router module of a layer."""
        ...

    def call(
        self, layer: MoELayer, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, residual: bool
    ) -> Call:
        """Everything known of the call that is running now."""
        ...


@dataclass(frozen=True)
class ExpertForm:
    """How a layer's experts keep their parameters.

    Attributes:
        names: local names of the parameters with an expert axis.
        gated: the first projection holds gate and up.
        interleaved: their rows alternate, instead of gate first.
        transposed: weights are [in, out].
    """

    names: frozenset[str]
    gated: bool
    interleaved: bool
    transposed: bool


class Family:
    """The general family: experts by contract, a router that returns logits, weights and ids in some order.

    Attributes:
        cannot_run: why moekit cannot run the family's models, only inspect and copy them ("" when it can).
        cannot_drop: why its experts cannot be removed, though all else works ("" when they can).
        by_contract: experts are modules that are given the chosen ids, and run those only.
    """

    cannot_run = ""
    cannot_drop = ""
    by_contract = True

    def is_experts(self, module: nn.Module) -> bool:
        """Whether `module` holds stacked routed experts."""
        return is_experts(module)

    def check_runs(self) -> None:
        """ModelError when moekit cannot run the family's models."""
        if self.cannot_run:
            raise ModelError(
                "moekit can inspect this model, not run it",
                got=self.cannot_run,
                fix="see docs/families.md for what moekit can do with each family",
            )

    def expert_form(self, experts: nn.Module) -> ExpertForm:
        """How `experts` keeps its parameters."""
        names = frozenset(name for name, x in experts.named_parameters(recurse=False) if len(x) == experts.num_experts)
        return ExpertForm(names, experts.has_gate, not experts.is_concatenated, experts.is_transposed)

    def biased(self, experts: nn.Module) -> bool:
        """Whether the last step of `experts` is to add a bias of its own to each."""
        return bool("down_proj_bias" in self.expert_form(experts).names and not experts.has_post_expert_norm)

    def routing(self, outputs: tuple) -> tuple[torch.Tensor, torch.Tensor]:
        """Find (weights_TK, ids_TK) in what the router returned, by dtype and shape.

        Raises:
            TypeError: the outputs do not hold exactly one of each.
        """
        tensors = [x for x in outputs if isinstance(x, torch.Tensor)]
        ids = [x for x in tensors if not x.is_floating_point() and x.dim() == 2]
        weights = [x for x in tensors if x.is_floating_point() and ids and x.shape == ids[0].shape]
        if len(ids) != 1 or not weights:
            raise TypeError(f"router returned {[tuple(x.shape) for x in tensors]}")
        return weights[-1], ids[0]

    def sum_dtype(self, hidden: torch.dtype, weights: torch.dtype) -> torch.dtype:
        """The dtype in which transformers' eager experts of the family add up the outputs of a token's experts."""
        return hidden

    def refine(self, probed: Probed) -> Probed:
        """Correct what probing a router cannot tell."""
        return probed

    def as_loaded(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """The value that stock loading gives parameter or buffer `key` when the file holds `tensor`."""
        return tensor

    def chosen(self, layer: MoELayer, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """The experts that really run: `ids_TK`, with E where the slot stays empty."""
        return ids_TK

    def inner(self, experts: nn.Module, expert: int, hidden_ND: torch.Tensor) -> torch.Tensor:
        """What an expert's down projection is given for inputs of the expert [N, D]: [N, I]."""
        up = experts.gate_up_proj if experts.has_gate else experts.up_proj
        bias = (experts.gate_up_proj_bias if experts.has_gate else experts.up_proj_bias) if experts.has_bias else None
        weight = up[expert].T if experts.is_transposed else up[expert]
        mid = nn.functional.linear(hidden_ND, weight, None if bias is None else bias[expert])
        return experts._apply_gate(mid) if experts.has_gate else experts.act_fn(mid)

    def output(self, experts: nn.Module, expert: int, hidden_ND: torch.Tensor) -> torch.Tensor:
        """What an expert makes of inputs [N, D], unweighted: [N, D]."""
        ids_N1 = torch.full((len(hidden_ND), 1), expert, device=hidden_ND.device)
        return experts.forward(hidden_ND, ids_N1, torch.ones_like(hidden_ND[:, :1]))

    def from_elsewhere(self, experts: nn.Module, hidden: torch.Tensor, products: Products) -> torch.Tensor:
        """The forward of an experts module whose weights are not in it; only where it is not `by_contract`.

        Args:
            experts: the module.
            hidden: what it is given.
            products: gives the experts that are asked for, in any order.
        """
        raise TypeError("experts by contract are run by the registered function")

    @contextmanager
    def watch_experts(self, view: View, layer: MoELayer, observer: Observer) -> Iterator[None]:
        """Show the calls of one layer's experts to `observer`; with outputs only if it wants them."""
        experts = view.experts(layer.index)
        calls: list[Call] = []

        def before(_module: nn.Module, args: tuple) -> tuple | None:
            hidden, ids, weights = args[:3]
            chosen = self.chosen(layer, ids, weights)
            call = view.call(layer, hidden, chosen, weights, observer.wants_residual)
            calls.append(call)
            observer.routed(call)
            if not observer.wants_outputs:
                return None
            experts._moekit_watch = lambda rows: observer.expert(call, rows)
            return (hidden, chosen, weights, *args[3:])

        def after(_module: nn.Module, _args: tuple, output: torch.Tensor) -> None:
            observer.finished(calls.pop(), output)

        handles = [experts.register_forward_pre_hook(before), experts.register_forward_hook(after)]
        old = experts.config._experts_implementation
        if observer.wants_outputs:
            experts.config._experts_implementation = IMPLEMENTATION
        try:
            yield
        finally:
            experts.config._experts_implementation = old
            vars(experts).pop("_moekit_watch", None)
            for handle in handles:
                handle.remove()

    @contextmanager
    def scale_experts(
        self, view: View, layer: MoELayer, factors_E: torch.Tensor, renormalise: bool, where: Where = None
    ) -> Iterator[None]:
        """Multiply the weights that one layer's experts are given by a float32 factor for each expert."""

        table = torch.cat([factors_E, factors_E.new_ones(1)])  # id E: empty slot
        factors = {expert: x for expert, x in enumerate(factors_E.tolist()) if x != 1}
        untouched = frozenset(factors).isdisjoint

        def before(_module: nn.Module, args: tuple) -> tuple | None:
            hidden, ids, weights = args[:3]
            if ids.is_cpu and ids.numel() <= FEW:  # tokens that are written one by one
                rows = ids.tolist()
                if untouched(rows[0] if len(rows) == 1 else chain.from_iterable(rows)):
                    return None
                if where is None and not weights.requires_grad:
                    few = [
                        _rescaled(x, row, factors, renormalise) for x, row in zip(weights.tolist(), rows, strict=True)
                    ]
                    return (hidden, ids, weights.new_tensor(few), *args[3:])
            factors_TK = table.to(ids.device)[ids.long()]
            if where is not None:
                factors_TK = factors_TK.where(where(len(ids)).to(ids.device)[:, None], 1.0)
            return (hidden, ids, rescaled(weights, factors_TK, renormalise), *args[3:])

        handle = view.experts(layer.index).register_forward_pre_hook(before)
        try:
            yield
        finally:
            handle.remove()

    def place_constants(
        self, experts: nn.Module, router: nn.Module, constants: Mapping[int, torch.Tensor]
    ) -> Callable[[], None]:
        """Let vectors take the place of some experts' outputs, beside those that already do.

        A slot then adds its weight times the vector; the expert is not run. Observers see it as the expert's output.

        Args:
            experts: of one layer.
            router: of that layer.
            constants: [D] by expert.

        Returns:
            What takes them away again.
        """
        config, old = experts.config, experts.config._experts_implementation
        before = vars(experts).get("_moekit_constants", {})
        experts._moekit_constants = {**before, **constants}
        config._experts_implementation = IMPLEMENTATION

        def undo() -> None:
            experts._moekit_constants = before
            config._experts_implementation = old

        return undo

    @contextmanager
    def adapt_experts(self, view: View, layer: MoELayer, change: Change) -> Iterator[None]:
        """Change the weights that one layer's experts are given; a slot whose weight becomes 0 is not run.

        Args:
            view: of the model.
            layer: the layer.
            change: (hidden_TD, ids_TK, weights_TK) to new weights_TK.
        """

        def rerouted(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
            new = change(call.hidden, call.ids, call.weights)
            return call.ids.masked_fill((new == 0) & (call.weights != 0), layer.num_experts), new

        with self.reroute_experts(view, layer, rerouted):
            yield

    @contextmanager
    def reroute_experts(self, view: View, layer: MoELayer, change: Reroute) -> Iterator[None]:
        """Change which of one layer's experts run, and what they weigh; a slot with id E stays empty.

        Args:
            view: of the model.
            layer: the layer.
            change: what the router decided to new ids_TK and weights_TK, of the same shapes and dtypes.
        """

        def before(_module: nn.Module, args: tuple) -> tuple:
            hidden, ids, weights = args[:3]
            decided = view.call(layer, hidden, self.chosen(layer, ids, weights), weights, False)
            return (hidden, *change(decided), *args[3:])

        experts = view.experts(layer.index)
        old = experts.config._experts_implementation
        handle = experts.register_forward_pre_hook(before)
        experts.config._experts_implementation = IMPLEMENTATION
        try:
            yield
        finally:
            experts.config._experts_implementation = old
            handle.remove()

    @contextmanager
    def permute_experts(
        self, view: View, layer: MoELayer, order_E: torch.Tensor, where: Where = None
    ) -> Iterator[None]:
        """Run expert `order_E[e]` wherever one layer's router has chosen expert e."""

        def before(_module: nn.Module, args: tuple) -> tuple:
            hidden, ids, *rest = args
            order = torch.cat([order_E, order_E.new_tensor([layer.num_experts])]).to(ids.device, ids.dtype)
            ids_TK = order[ids.long()]
            if where is not None:
                ids_TK = ids_TK.where(where(len(ids)).to(ids.device)[:, None], ids)
            return (hidden, ids_TK, *rest)

        handle = view.experts(layer.index).register_forward_pre_hook(before)
        try:
            yield
        finally:
            handle.remove()


_EXCEPTIONS: dict[str, str] = {
    "diffusion_gemma_text": "diffusion_gemma:DiffusionGemma",
    "ernie4_5_vl_moe_text": "ernie4_5_vl:Ernie45VL",
    "inkling2_text": "wide_sums:Float32",
    "inkling_text": "inkling:Inkling",
    "llama4_text": "llama4:Llama4",
    "nemotron_h": "wide_sums:WeightsDtype",
    "openai_privacy_filter": "wide_sums:Float32",
    "phimoe": "phimoe:PhiMoE",
    "zaya": "zaya:Zaya",
}


def family_of(text_model_type: str) -> Family:
    """The family that answers for the language model type `text_model_type`."""
    entry = _EXCEPTIONS.get(text_model_type)
    if entry is None:
        return Family()
    module, name = entry.split(":")
    return getattr(importlib.import_module(f"moekit.families.{module}"), name)()


def _rescaled(weights: list[float], ids: list[int], factors: Mapping[int, float], renormalise: bool) -> list[float]:
    """`rescaled` for one token, without the calls that cost more than the sums."""
    out = [weight * factors.get(expert, 1.0) for weight, expert in zip(weights, ids, strict=True)]
    total = sum(out)
    if renormalise and total:
        out = [x * (sum(weights) / total) for x in out]
    return out
