"""What a layer's output loses when its router may choose from a subset of the experts only, for every subset.

    error(S) = sum over sampled tokens of |y(t) - y_S(t)|^2

y(t) is the routed sum of the layer, y_S(t) what it is when the router never chooses an expert outside S. Choice and
weights are the family's own router's, run again on the same input under a ban (`moekit.view.MoEView.ban`), so that
groups, biases and normalisation count as they will after pruning. No expert is run again for a subset: all experts run
once on the sampled tokens, and with F_j(t) their outputs, w_j the weights,

    |y - y_S|^2 = sum over i, j of (w - w_S)_i <F_i, F_j> (w - w_S)_j

Symbols: N sampled tokens, E experts, K chosen, D hidden, S subsets of the experts as bit masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from moekit.data import Batch
from moekit.errors import ModelError
from moekit.families.alone import each_output
from moekit.families.seam import Call, Observer
from moekit.layout import MoELayer
from moekit.plans.counts import subset_members, workable_subsets
from moekit.view import MoEView

MOST_EXPERTS = 8  # 2^8 subsets; with 16 the router would run 65,535 times
EVERY = 8  # about one token in so many is looked at


def count_subsets(layer: MoELayer) -> int:
    """2^E; 0 for a layer with too many experts to try all sets."""
    return 2**layer.num_experts if layer.num_experts <= MOST_EXPERTS else 0


def sampled(batch: Batch) -> torch.Tensor:
    """Numbers of the tokens that are looked at, among all positions of the batch, int64 [N].

    A token's own number, the following one and its position decide, so that it does not matter how text is cut into
    batches.
    """
    mixed = batch.ids * 0x9E3779B1 + batch.following * 0x85EBCA77 + batch.positions * 0xC2B2AE3D & 0xFFFFFFFF
    mixed = (mixed ^ mixed >> 15) * 0x2C1B3C6D & 0xFFFFFFFF
    return torch.where((mixed >> 12) % EVERY == 0, batch.mask, False).reshape(-1).nonzero()[:, 0]


class SubsetErrors(Observer):
    """Adds up the errors of one layer's subsets on one batch.

    Args:
        view: of the model that runs.
        layer: the layer.
        batch: what runs.
        errors: float64 [S], of the batch's domain; set 0 counts what there is to lose, |y|^2, and sets that the router
            cannot work with stay 0.
    """

    def __init__(self, view: MoEView, layer: MoELayer, batch: Batch, errors: torch.Tensor):
        self.view, self.layer, self.errors = view, layer, errors
        self._tokens = sampled(batch)
        self._asked: tuple[tuple, dict[str, Any]] = ((), {})

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Add up the calls that happen inside."""

        def note(_module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            self._asked = args, kwargs

        handle = self.view.router(self.layer.index).register_forward_pre_hook(note, with_kwargs=True)
        try:
            with self.view.watch(self, layers=[self.layer.index]):
                yield
        finally:
            handle.remove()
            self._asked = ((), {})

    def finished(self, call: Call, output: torch.Tensor) -> None:
        """Try every subset on the call."""
        tokens = self._tokens.to(call.hidden.device)
        if not len(tokens) or call.logits is None:
            return
        logits_NE = call.logits[tokens]
        outputs = each_output(self.view.experts(self.layer.index), self.layer, call.hidden[tokens], logits_NE)
        outputs_NED = outputs.transpose(0, 1).float()
        gram_NEE = outputs_NED @ outputs_NED.mT
        own_NE = self._shares(call.weights, call.ids)[tokens]
        again_NE = self._rerouted((), tokens)
        if not torch.allclose(own_NE, again_NE, rtol=1e-3, atol=1e-3 * float(own_NE.abs().max())):
            raise ModelError(
                "the router, run again on the same input, gives other weights: sets of experts cannot be compared",
                where=f"layer {self.layer.index}",
                fix="use a method that scores experts, as easy-ep; please report this family",
            )
        self.errors[0] += _squares(again_NE, gram_NEE)
        for subset in workable_subsets(self.layer):
            gone = subset_members(~subset, self.layer)
            self.errors[subset] += _squares(again_NE - self._rerouted(gone, tokens), gram_NEE)

    def _rerouted(self, gone: tuple[int, ...], tokens: torch.Tensor) -> torch.Tensor:
        """Each expert's share in the output [N, E] when some are banned."""
        args, kwargs = self._asked
        family = self.view.family
        with self.view.ban({self.layer.index: gone}):
            weights, ids = family.routing(self.view.router(self.layer.index).forward(*args, **kwargs))
        weights, ids = (x.reshape(-1, x.shape[-1]) for x in (weights, ids))
        return self._shares(weights, family.chosen(self.layer, ids, weights))[tokens]

    def _shares(self, weights_TK: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
        """What `each_output` is to be multiplied by [T, E], float32; id E (a slot that no expert fills) counts nothing.

        Where weights multiply inputs they are in the outputs already.
        """
        weights = weights_TK.float()
        shares = weights.new_zeros(len(weights), self.layer.num_experts + 1)
        source = (weights > 0).float() if self.layer.router.weighs_input else weights
        return shares.scatter_add_(1, ids_TK.long(), source)[:, :-1]


def _squares(shares_NE: torch.Tensor, gram_NEE: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of the squared norm of the outputs, weighted by shares; float64 scalar on the CPU."""
    return torch.einsum("ne,nef,nf->n", shares_NE, gram_NEE, shares_NE).clamp_min(0).double().sum().cpu()
