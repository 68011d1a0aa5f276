"""MoEView: a live stock transformers model seen as layers, routers and experts; all that it does is undone on leaving.

view = MoEView(model, layout)
with view.watch(observer):      # see routing and, if wanted, every expert's output
    model(input_ids)
with view.ban({3: [0, 7]}):     # the router never chooses these; the family's code refills their slots
    model.generate(...)
with view.scale({3: {7: 0.0}}):     # their slots stay empty: what the experts add, and nothing else, is gone
    model(input_ids)
with view.replace({3: {7: vector}}):    # the expert's output is the vector, whatever its input; it is not run
    model(input_ids)
with view.edit("force", {3: {7: 1.0}}, Reach("generated")):     # every token that the model writes runs expert 7
    model.generate(...)
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from moekit.errors import ModelError, PlanError
from moekit.families.edits import RouterEdit, Where, prepared, run_router
from moekit.families.family import Change, Reroute, family_of
from moekit.families.seam import Call, Observer, RouterTap
from moekit.families.tokens import EVERYWHERE, Clock, Reach, Tokens
from moekit.layout import ExpertId, Layout, MoELayer


@dataclass
class _State:
    """What is collected while one layer's forward runs."""

    logits: torch.Tensor | None = None
    tap: RouterTap | None = None
    norm_inputs: dict[int, tuple[StorageWeakRef, torch.Tensor]] = field(default_factory=dict)


class MoEView:
    """Hooks on a live stock model.

    Args:
        model: a transformers model (weightless layers are fine as long as they do not run).
        layout: its layout.

    Raises:
        ModelError: the model has not the modules that the layout names, or its family cannot be run.
    """

    def __init__(self, model: nn.Module, layout: Layout):
        self.model, self.layout = model, layout
        self.family = family_of(layout.text_family)
        self.family.check_runs()
        self._states: dict[int, _State] = {layer.index: _State() for layer in layout.routed}
        self._edits: dict[int, list[RouterEdit]] = {}
        self._running = threading.local()  # streamed batches run their own parts of a forward in threads of their own
        for layer in layout.routed:
            for path in (layer.experts_path, layer.router_path):
                try:
                    model.get_submodule(path)
                except AttributeError:
                    raise ModelError(
                        "the live model is not the one of the layout",
                        expected=path,
                        got=type(model).__name__,
                        fix="load the same checkpoint",
                    ) from None

    def experts(self, layer: int) -> nn.Module:
        """The experts module of a layer."""
        return self.model.get_submodule(self.layout.by_index[layer].experts_path)

    def router(self, layer: int) -> nn.Module:
        """The router module of a layer."""
        return self.model.get_submodule(self.layout.by_index[layer].router_path)

    @contextmanager
    def watch(self, observer: Observer, layers: Collection[int] | None = None) -> Iterator[None]:
        """Show every MoE call (of the given layers) to `observer`."""
        with ExitStack() as stack:
            for layer in self.layout.routed:
                if layers is None or layer.index in layers:
                    stack.enter_context(self._tapped(layer))
                    if observer.wants_residual:
                        stack.enter_context(self._norms(layer))
                    stack.enter_context(self.family.watch_experts(self, layer, observer))
            yield

    @contextmanager
    def ban(self, banned: Mapping[int, Collection[int]]) -> Iterator[None]:
        """The routers never choose these experts (by decoder layer index); other experts take their slots.

        Raises:
            PlanError: a layer or expert that does not exist, or fewer than top_k experts left.
        """
        with self.edit("ban", {index: dict.fromkeys(experts, 1.0) for index, experts in banned.items()}):
            yield

    @contextmanager
    def _edited(self, layer: MoELayer, edit: RouterEdit) -> Iterator[None]:
        """Let a layer's router decide under an edit, along with those that are there."""
        with self._tapped(layer):
            edits, state = self._edits.setdefault(layer.index, []), self._states[layer.index]
            edits.append(edit)
            state.tap = prepared(layer, edits)
            try:
                yield
            finally:
                edits.remove(edit)
                state.tap = prepared(layer, edits)

    @contextmanager
    def edit(
        self,
        action: Literal["ban", "force", "bias"],
        strengths: Mapping[int, Mapping[int, float]],
        reach: Reach = EVERYWHERE,
    ) -> Iterator[None]:
        """Edit routers' raw logits before the family's own code chooses (see `moekit.families.edits`).

        Args:
            action: "ban", "force", or "bias".
            strengths: by decoder layer index and expert: what "bias" adds; for the others any number but 0.
            reach: the tokens that it is for.

        Raises:
            PlanError: a layer or expert that does not exist; with "ban", fewer than top_k experts left; with "force",
                more than top_k experts, or in more groups than the router chooses.
        """
        with ExitStack() as stack:
            where = stack.enter_context(self._reached(reach))
            for index, by_expert in strengths.items():
                if not by_expert:
                    continue
                check = {"ban": self._check_ban, "force": self._check_force, "bias": self._check_experts}[action]
                layer = check(index, by_expert)
                amounts_W = torch.zeros(layer.router_width)
                amounts_W[list(by_expert)] = torch.tensor(list(by_expert.values()), dtype=torch.float32)
                stack.enter_context(self._edited(layer, RouterEdit(action, amounts_W, where)))
            yield

    @contextmanager
    def rewrite(self, changes: Mapping[int, Callable[[torch.Tensor], torch.Tensor]]) -> Iterator[None]:
        """Let functions rewrite routers' raw logits before the family's own code chooses; gradients pass through.

        Args:
            changes: by decoder layer index, a function of logits [T, W] (W: rows of the router, E or more) that returns
                others of the same shape and dtype.

        Raises:
            PlanError: a layer that does not exist.
        """
        with ExitStack() as stack:
            for index, change in changes.items():
                edit = RouterEdit("rewrite", torch.empty(0), rewrite=change)
                stack.enter_context(self._edited(self._check_experts(index, [0]), edit))
            yield

    @contextmanager
    def swap(self, pairs: Mapping[int, Collection[tuple[int, int]]], reach: Reach = EVERYWHERE) -> Iterator[None]:
        """Run one expert of a pair wherever the router has chosen the other, and the other way round.

        Args:
            pairs: by decoder layer index; one after the other.
            reach: the tokens that it is for.

        Raises:
            PlanError: a layer or expert that does not exist.
        """
        with ExitStack() as stack:
            where = stack.enter_context(self._reached(reach))
            for index, swaps in pairs.items():
                layer = self._check_experts(index, [e for pair in swaps for e in pair])
                order_E = torch.arange(layer.num_experts)
                for a, b in swaps:
                    order_E[[a, b]] = order_E[[b, a]]
                stack.enter_context(self.family.permute_experts(self, layer, order_E, where))
            yield

    @contextmanager
    def at(self, tokens: Tokens) -> Iterator[None]:
        """Say which tokens the forwards inside are made of, where their arguments do not tell (streamed layers)."""
        before = getattr(self._running, "given", None)
        self._running.given = tokens
        try:
            yield
        finally:
            self._running.given = before

    @contextmanager
    def _reached(self, reach: Reach) -> Iterator[Where]:
        """The tokens of the running forward that are in reach; follows forwards as long as it is asked for."""
        if reach == EVERYWHERE:
            yield None
            return
        clock = Clock()
        last: tuple[Tokens, torch.Tensor] | None = None  # all layers of a forward ask for the same

        def tick(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._running.seen = clock.tick(args, kwargs)

        def where(count: int) -> torch.Tensor:
            nonlocal last
            tokens = getattr(self._running, "given", None) or getattr(self._running, "seen", None)
            if tokens is None or len(tokens.positions) != count:
                raise ModelError(
                    "it is not known which tokens these are, and an edit is for some of them only",
                    got=f"{count} tokens",
                    fix="call the model with input_ids, or say what runs with MoEView.at",
                )
            known = last
            if known is None or known[0] is not tokens:
                last = known = tokens, reach.mask(tokens)
            return known[1]

        handle = self.model.register_forward_pre_hook(tick, with_kwargs=True)
        try:
            yield where
        finally:
            handle.remove()

    @contextmanager
    def scale(
        self,
        factors: Mapping[int, Mapping[int, float]],
        *,
        renormalise: bool = False,
        reach: Reach = EVERYWHERE,
    ) -> Iterator[None]:
        """Multiply the weights of chosen experts; the choice stays, and a slot with factor 0 is not filled again.

        An observer sees the router's own weights where `watch` is entered before, and the scaled ones where after.

        Args:
            factors: by decoder layer index, the factor of each expert that has one.
            renormalise: the weights of a token's chosen experts keep their sum (where any is left).
            reach: the tokens that it is for.

        Raises:
            PlanError: a layer or expert that does not exist.
        """
        with ExitStack() as stack:
            where = stack.enter_context(self._reached(reach))
            for index, by_expert in factors.items():
                if not by_expert:
                    continue
                layer = self._check_experts(index, by_expert)
                factors_E = torch.ones(layer.num_experts)
                factors_E[list(by_expert)] = torch.tensor(list(by_expert.values()), dtype=torch.float32)
                stack.enter_context(self.family.scale_experts(self, layer, factors_E, renormalise, where))
            yield

    @contextmanager
    def replace(self, constants: Mapping[int, Mapping[int, torch.Tensor]]) -> Iterator[None]:
        """Let vectors stand for experts: a slot adds its weight times the vector, and the expert is not run.

        The router decides as ever, and an observer sees the vector as the expert's output. Where the weight multiplies
        an expert's input (Llama 4) and not its output, a slot adds the vector itself.

        Args:
            constants: by decoder layer index and expert, [D], of any dtype.

        Raises:
            PlanError: a layer or expert that does not exist, or a vector of another length.
        """
        with ExitStack() as stack:
            for index, by_expert in constants.items():
                if not by_expert:
                    continue
                layer = self._check_experts(index, by_expert)
                for expert, vector in by_expert.items():
                    if vector.shape != (layer.width,):
                        where = str(ExpertId(index, expert))
                        raise PlanError("a stand-in has not the width of the experts", where=where, got=vector.shape)
                undo = self.family.place_constants(self.experts(index), self.router(index), by_expert)
                stack.callback(undo)
            yield

    @contextmanager
    def adapt(self, changes: Mapping[int, Change]) -> Iterator[None]:
        """Change the weights of chosen experts, token by token; a slot whose weight becomes 0 is not run.

        An observer entered afterwards sees such a slot as empty (expert E).

        Args:
            changes: by decoder layer index, a function of (hidden_TD, ids_TK, weights_TK) that returns new weights_TK.

        Raises:
            PlanError: a layer that does not exist.
        """
        with ExitStack() as stack:
            for index, change in changes.items():
                stack.enter_context(self.family.adapt_experts(self, self._check_experts(index, [0]), change))
            yield

    @contextmanager
    def reroute(self, changes: Mapping[int, Reroute], reach: Reach = EVERYWHERE) -> Iterator[None]:
        """Change which experts run and what they weigh, token by token, after the router has decided.

        An observer entered afterwards sees what runs.

        Args:
            changes: by decoder layer index, a function of the call, its logits known, that returns new ids_TK (E for a
                slot that stays empty) and weights_TK.
            reach: the tokens that it is for.

        Raises:
            PlanError: a layer that does not exist.
        """

        def within(change: Reroute, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
            ids, weights = change(call)
            if where is None:
                return ids, weights
            mask_T1 = where(len(ids)).to(ids.device)[:, None]
            return ids.where(mask_T1, call.ids), weights.where(mask_T1, call.weights)

        with ExitStack() as stack:
            where = stack.enter_context(self._reached(reach))
            for index, change in changes.items():
                layer = self._check_experts(index, [0])
                stack.enter_context(self._tapped(layer))
                stack.enter_context(self.family.reroute_experts(self, layer, partial(within, change)))
            yield

    @property
    def running(self) -> Tokens | None:
        """The tokens that `at` says are running; None where nobody says."""
        return getattr(self._running, "given", None)

    def _check_experts(self, index: int, experts: Collection[int]) -> MoELayer:
        layer = self.layout.by_index.get(index)
        if layer is None or layer.mtp:
            raise PlanError(
                f"layer {index} is no MoE layer of this model",
                expected=f"one of {[x.index for x in self.layout.routed]}",
            )
        if min(experts) < 0 or max(experts) >= layer.num_experts:
            raise PlanError(
                f"layer {index} has no such expert", expected=f"0 to {layer.num_experts - 1}", got=sorted(experts)
            )
        return layer

    def _check_ban(self, index: int, experts: Collection[int]) -> MoELayer:
        layer = self._check_experts(index, experts)
        size = layer.num_experts // layer.router.groups
        left = Counter(e // size for e in range(layer.num_experts) if e not in experts)
        usable = sorted(left[group] for group in range(layer.router.groups))[: layer.router.groups_kept]
        if sum(usable) < layer.top_k:
            where = f" in any {layer.router.groups_kept} of its groups" if layer.router.groups > 1 else ""
            raise PlanError(
                f"layer {index} needs {layer.top_k} experts{where} for every token", got=f"{sum(usable)} left"
            )
        return layer

    def _check_force(self, index: int, experts: Collection[int]) -> MoELayer:
        layer = self._check_experts(index, experts)
        router = layer.router
        groups = {e // (layer.num_experts // router.groups) for e in experts}
        if len(experts) > layer.top_k or (router.groups > 1 and len(groups) > router.groups_kept):
            most = f"{layer.top_k} experts for every token"
            raise PlanError(
                f"layer {index} cannot be forced to choose so many experts",
                expected=most if router.groups == 1 else f"{most}, in {router.groups_kept} of {router.groups} groups",
                got=sorted(experts),
                fix="force fewer",
            )
        return layer

    @contextmanager
    def _tapped(self, layer: MoELayer) -> Iterator[None]:
        """Run the router's forward under a tap that notes and edits its logits (once, however many ask for it)."""
        router = self.router(layer.index)
        if "forward" in vars(router):
            yield
            return
        stock, state = router.forward, self._states[layer.index]
        state.tap = prepared(layer, self._edits.get(layer.index, ()))

        def forward(*args, **kwargs):
            if (tap := state.tap) is not None:
                tap.logits = None
                out = tap.run(router, stock, args, kwargs)
                logits = tap.logits
                if logits is not None and logits.dim() != 2:
                    logits = logits.reshape(-1, logits.shape[-1])
            else:
                edits = self._edits.get(layer.index, ())
                out, logits = run_router(self.model, layer, router, stock, args, kwargs, edits)
            if logits is None:
                raise ModelError(
                    "the router's logits were not seen", where=layer.router_path, fix="please report this family"
                )
            state.logits = logits if logits.shape[-1] == layer.num_experts else logits[:, : layer.num_experts]
            return out

        router.forward = forward
        try:
            yield
        finally:
            del router.forward
            state.logits = state.tap = None

    @contextmanager
    def _norms(self, layer: MoELayer) -> Iterator[None]:
        """Note which tensor each norm of the decoder layer was given, by the address of what it returned."""
        state = self._states[layer.index]
        root = self.model.get_submodule(layer.path)

        def note(_module: nn.Module, args: tuple, out: object) -> None:
            if (
                isinstance(out, torch.Tensor)
                and args
                and isinstance(args[0], torch.Tensor)
                and out.shape == args[0].shape
            ):
                state.norm_inputs[out.data_ptr()] = StorageWeakRef(out.untyped_storage()), args[0]

        norms = [x for x in root.modules() if "norm" in type(x).__name__.lower()]
        handles = [x.register_forward_hook(note) for x in norms]
        handles.append(root.register_forward_hook(lambda *_: state.norm_inputs.clear()))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            state.norm_inputs.clear()

    def call(
        self, layer: MoELayer, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, residual: bool
    ) -> Call:
        """Everything known of the call that is running now (for `Family.watch_experts`)."""
        state = self._states[layer.index]
        call = Call(layer, hidden, ids, weights, state.logits)
        if residual:
            # Post-norm families give the block the residual stream itself: then no norm made this tensor, though it
            # may lie where a norm's output, freed since, has lain.
            made_by, source = state.norm_inputs.get(hidden.data_ptr(), (None, hidden))
            source = hidden if made_by is None or made_by.expired() else source
            call.residual = source.reshape(-1, source.shape[-1])
        return call
