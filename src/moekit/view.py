"""MoEView: a live stock transformers model seen as layers, routers and experts; all that it does is undone on leaving.

view = MoEView(model, layout)
with view.watch(observer):      # see routing and, if wanted, every expert's output
    model(input_ids)
with view.ban({3: [0, 7]}):     # the router never chooses these; the family's code refills their slots
    model.generate(...)
with view.scale({3: {7: 0.0}}):     # their slots stay empty: what the experts add, and nothing else, is gone
    model(input_ids)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from moekit.errors import ModelError, PlanError
from moekit.families.family import family_of
from moekit.families.seam import Call, Observer, RouterTap, reroute
from moekit.layout import Layout, MoELayer


@dataclass
class _State:
    """What is collected while one layer's forward runs."""

    logits: torch.Tensor | None = None
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
        self._bans: dict[int, list[torch.Tensor]] = {}
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
        with ExitStack() as stack:
            for index, experts in banned.items():
                if not experts:
                    continue
                layer = self._check_ban(index, experts)
                mask = torch.zeros(layer.router_width, dtype=torch.bool)
                mask[list(experts)] = True
                masks = self._bans.setdefault(index, [])
                masks.append(mask)
                stack.callback(_remove, masks, mask)
                stack.enter_context(self._tapped(layer))
            yield

    @contextmanager
    def scale(self, factors: Mapping[int, Mapping[int, float]], *, renormalise: bool = False) -> Iterator[None]:
        """Multiply the weights of chosen experts; the choice stays, and a slot with factor 0 is not filled again.

        An observer sees the router's own weights where `watch` is entered before, and the scaled ones where after.

        Args:
            factors: by decoder layer index, the factor of each expert that has one.
            renormalise: the weights of a token's chosen experts keep their sum (where any is left).

        Raises:
            PlanError: a layer or expert that does not exist.
        """
        with ExitStack() as stack:
            for index, by_expert in factors.items():
                if not by_expert:
                    continue
                layer = self._check_experts(index, by_expert)
                factors_E = torch.ones(layer.num_experts)
                factors_E[list(by_expert)] = torch.tensor(list(by_expert.values()), dtype=torch.float32)
                stack.enter_context(self.family.scale_experts(self, layer, factors_E, renormalise))
            yield

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

    @contextmanager
    def _tapped(self, layer: MoELayer) -> Iterator[None]:
        """Run the router's forward under a tap that notes and edits its logits (once, however many ask for it)."""
        router = self.router(layer.index)
        if "forward" in vars(router):
            yield
            return
        stock, state = router.forward, self._states[layer.index]

        def forward(*args, **kwargs):
            masks = self._bans.get(layer.index)
            mask = torch.stack(masks).any(0) if masks else None
            tap = RouterTap(layer.router_width, None if mask is None else partial(_banned, mask=mask))
            with ExitStack() as stack:
                if mask is not None:
                    for key in layer.correction_biases:
                        old, new = stack.enter_context(self._biased(key, mask[: layer.num_experts]))
                        args = tuple(new if x is old else x for x in args)
                        kwargs = {name: new if x is old else x for name, x in kwargs.items()}
                    for key in layer.tables:
                        stack.enter_context(self._rerouted(key, mask[: layer.num_experts]))
                with tap:
                    out = stock(*args, **kwargs)
            if tap.logits is None:
                raise ModelError(
                    "the router's logits were not seen", where=layer.router_path, fix="please report this family"
                )
            state.logits = tap.logits.reshape(-1, tap.logits.shape[-1])[:, : layer.num_experts]
            return out

        router.forward = forward
        try:
            yield
        finally:
            del router.forward
            state.logits = None

    @contextmanager
    def _biased(self, key: str, mask: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Give the masked experts a correction bias of (nearly) minus infinity: +2 would beat any logit's score."""
        old = self._tensor(key)
        new = old.detach().clone()
        new.view(-1)[: len(mask)].masked_fill_(mask.to(new.device), torch.finfo(new.dtype).min)
        with self._swapped(key, new):
            yield old, self._tensor(key)

    @contextmanager
    def _rerouted(self, key: str, mask: torch.Tensor) -> Iterator[None]:
        """Give the tokens of masked experts to others in a table from token ids to experts."""
        with self._swapped(key, reroute(self._tensor(key), mask)):
            yield

    def _tensor(self, key: str) -> torch.Tensor:
        path, _, name = key.rpartition(".")
        return getattr(self.model.get_submodule(path), name)

    @contextmanager
    def _swapped(self, key: str, new: torch.Tensor) -> Iterator[None]:
        """Put another tensor in the place of a parameter or buffer."""
        path, _, name = key.rpartition(".")
        module = self.model.get_submodule(path)
        store = module._parameters if name in module._parameters else module._buffers
        old = store[name]
        store[name] = nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
        try:
            yield
        finally:
            store[name] = old

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


def _banned(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return logits.masked_fill(mask.to(logits.device), torch.finfo(logits.dtype).min)


def _remove(masks: list[torch.Tensor], mask: torch.Tensor) -> None:
    masks[:] = [x for x in masks if x is not mask]
