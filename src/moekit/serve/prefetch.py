"""Reading ahead in the engine: hooks tell a predictor what runs, and the cache asks it for the next layer's experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from moekit.errors import DataError, ModelError
from moekit.layout import Layout
from moekit.serve.cache import ExpertCache
from moekit.serve.policies import Policy, Sizes, policy_named
from moekit.serve.predictors.base import Predictor, Seen, predictor_named, top
from moekit.serve.predictors.routers import Routers, record
from moekit.serve.routes import Routes
from moekit.serve.simulate import best_policy

TRAINING_TOKENS = 4096  # that the engine reads to train a predictor on what routers are given
AUTO = "auto"


def chosen_policy(name: str, sizes: Sizes, trace: Routes | None) -> Policy:
    """A policy by its name; "auto": the one that does best on the trace.

    Raises:
        DataError: the trace is of a model of another shape.
        RecipeError: no such policy, or it needs a trace.
    """
    if trace is not None and (trace.layers, trace.experts, trace.top_k) != (sizes.layers, sizes.experts, sizes.top_k):
        raise DataError(
            "the trace is of another model",
            expected=f"{sizes.layers} MoE layers of {sizes.experts} experts, top-{sizes.top_k}",
            got=f"{trace.layers} of {trace.experts}, top-{trace.top_k}",
            fix="record a trace of this model",
        )
    if name == AUTO:
        name = "reuse" if trace is None else best_policy(trace, sizes.slots)
    return policy_named(name, sizes, trace)


def predictor_of(
    name: str, model: nn.Module, layout: Layout, trace: Routes | None, run: Callable[[torch.Tensor], object]
) -> tuple[Predictor, Routers] | None:
    """A predictor for a model that runs, trained where it must be; None for "none".

    Args:
        name: one of `PREDICTORS`, or "none".
        model: stock, with filled routers.
        layout: its layout.
        trace: routes of texts like those that will be run.
        run: runs the model on token ids [1, T].

    Raises:
        RecipeError: no such predictor, or it needs a trace.
        ModelError: the family's experts are not run by the contract of transformers.
    """
    if name == "none":
        return None
    if any(layer.num_experts != layout.routed[0].num_experts for layer in layout.routed):
        raise ModelError("reading ahead is for models whose layers have equally many experts", where="predictor")
    routers = Routers(model, layout)
    if name == "pregate" and trace is not None:
        trace = record(routers, trace.spread(TRAINING_TOKENS), run)
    return predictor_named(name, trace, routers), routers


class Prefetcher:
    """Connects a model that runs, a predictor, and a cache.

    Args:
        model: stock, run by an engine.
        routers: of it.
        cache: whose `predict` is set.
        predictor: tells the next layer's experts.
    """

    def __init__(self, model: nn.Module, routers: Routers, cache: ExpertCache, predictor: Predictor):
        self.predictor, self.routers = predictor, routers
        self._numbers = {layer.index: number for number, layer in enumerate(routers.layers)}
        self._counts = np.zeros((1, len(routers.layers), routers.experts), np.float32)
        self._hidden: dict[int, torch.Tensor] = {}
        self._chosen: dict[int, torch.Tensor] = {}
        self._last = np.full(2, -1, np.int64)
        self._tokens = np.zeros((0, 3), np.int64)
        self._watch = routers.watched(self._hidden, self._chosen)
        self._watch.__enter__()
        self._handle = model.register_forward_pre_hook(self._forward_begins, with_kwargs=True)
        self._cache = cache
        cache.predict = self.predict

    def begin(self) -> None:
        """A new text begins."""
        self._counts[:] = 0
        self._chosen.clear()
        self._last[:] = -1

    def predict(self, index: int) -> Sequence[int]:
        """The next MoE layer's experts after decoder layer `index`, likeliest first."""
        layer = self._numbers[index] + 1
        if layer < self.predictor.first or layer - 1 not in self._chosen:
            return []
        hidden = {n: x for n, x in self._hidden.items() if n < layer}
        ids = {} if self.predictor.watches_hidden else {n: x.numpy() for n, x in self._chosen.items() if n < layer}
        with torch.inference_mode():
            scores_TE = self.predictor.scores(layer, Seen(self._tokens, self._counts, ids, hidden))
        count = self.routers.layers[layer].top_k + 1
        if len(scores_TE) == 1:
            likeliest = scores_TE[0].argpartition(-count)[-count:]
            order = likeliest[scores_TE[0][likeliest].argsort()[::-1]]
            return [x for x in order.tolist() if x < self.routers.layers[layer].num_experts]
        order, votes = np.unique(top(scores_TE, count), return_counts=True)
        total = scores_TE.sum(0)
        known = self.routers.layers[layer].num_experts
        return [int(x) for x in order[np.lexsort((-total[order], -votes))] if x < known]

    def close(self) -> None:
        """Take the hooks away."""
        self._cache.predict = None
        self._handle.remove()
        self._watch.__exit__(None, None, None)

    def _forward_begins(self, _module: nn.Module, _args: tuple, kwargs: dict[str, Any]) -> None:
        experts = self._counts.shape[2]
        for number, ids_TK in self._chosen.items():
            flat = ids_TK.reshape(-1).long().numpy()
            self._counts[0, number] += np.bincount(flat[flat < experts], minlength=experts)
        self._chosen.clear()
        self._hidden.clear()
        ids_BS = kwargs["input_ids"].cpu().numpy()
        width = ids_BS.shape[1]
        if len(ids_BS) == 1:
            line = np.concatenate([self._last, ids_BS[0]])
            self._last = line[-2:].astype(np.int64)
            self._tokens = np.stack([line[2:], line[1:-1], line[:-2]], 1)
        else:  # several texts at once: what came before each is not followed
            self._tokens = np.full((ids_BS.size, 3), -1, np.int64)
            self._tokens[:, 0] = ids_BS.reshape(-1)
            self._last = np.full(2, -1, np.int64)
        assert len(self._tokens) == len(ids_BS) * width
