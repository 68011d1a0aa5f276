"""Pathways: the scores that routers give all experts at one token, read and put in the place of a router's own.

A pathway is a vector over the experts of each layer, in the space of the router's score: softmax probabilities, or
sigmoids. It is put in as logits that have these scores; groups, top-k and normalisation stay the family's own code.
Where the score is neither, a pathway is made of raw logits.

Symbols: N tokens, T tokens of a forward, E experts, W rows of the router (E or more), D hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from moekit.errors import ModelError
from moekit.families.resident import empty_cache
from moekit.families.seam import Call, Observer
from moekit.layout import MoELayer
from moekit.view import MoEView

LEAST = 1e-10  # a score is at least this
Pathway = dict[int, torch.Tensor]  # by decoder layer index, scores [E], or [N, E] for several tokens
# Which tokens of a forward, by the number of its tokens, have pathways put in: their indices [N]; None: none of them.
Places = Callable[[int], torch.Tensor | None]


def scores_of(layer: MoELayer, logits_NE: torch.Tensor) -> torch.Tensor:
    """Scores of raw logits."""
    if layer.router.score == "softmax":
        return logits_NE.float().softmax(-1)
    return logits_NE.float().sigmoid() if layer.router.score.startswith("sigmoid") else logits_NE.float()


def logits_of(layer: MoELayer, scores_NE: torch.Tensor) -> torch.Tensor:
    """Raw logits that have these scores (softmax: scores that sum to one have them after normalising)."""
    if layer.router.score == "softmax":
        return scores_NE.clamp_min(LEAST).log()
    if layer.router.score.startswith("sigmoid"):
        return scores_NE.clamp(LEAST, 1 - 1e-6).logit()
    return scores_NE


@contextmanager
def overriding(view: MoEView, pathways: Mapping[int, torch.Tensor], places: Places) -> Iterator[None]:
    """Routers decide by given scores at some tokens, by their own elsewhere. Gradients reach the scores.

    Args:
        view: of the model.
        pathways: by decoder layer index, [N, E].
        places: the N tokens of the running forward.

    Raises:
        PlanError: a layer that does not exist.
    """

    def change(layer: MoELayer, scores_NE: torch.Tensor, logits_TW: torch.Tensor) -> torch.Tensor:
        index = places(len(logits_TW))
        if index is None:
            return logits_TW
        index = index.to(logits_TW.device)
        own_NW = logits_TW[index]
        new_NE = logits_of(layer, scores_NE.to(own_NW.device))
        if layer.router.score == "softmax":  # what else the router scores keeps its share
            own_NE = own_NW[:, : layer.num_experts].float()
            new_NE = new_NE.log_softmax(-1) + own_NE.logsumexp(-1, keepdim=True)
        new_NW = torch.cat([new_NE.to(own_NW.dtype), own_NW[:, layer.num_experts :]], -1)
        return logits_TW.index_put((index,), new_NW)

    def of(layer: MoELayer) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda logits_TW: change(layer, pathways[layer.index], logits_TW)

    with view.rewrite({index: of(view.layout.by_index[index]) for index in pathways}):
        yield


class _LastTokens(Observer):
    def __init__(self, columns: int):
        self.columns = columns
        self.found: Pathway = {}

    def routed(self, call: Call) -> None:
        assert call.logits is not None, "the router is tapped"
        self.found[call.layer.index] = scores_of(call.layer, call.logits[self.columns - 1 :: self.columns]).cpu()


@torch.no_grad()
def read(model: nn.Module, view: MoEView, prompt: Sequence[int]) -> tuple[Pathway, torch.Tensor]:
    """A prompt's pathway at its last token, and its embedding.

    Args:
        model: that the view is of.
        view: nothing is changed in it.
        prompt: token ids.

    Returns:
        ([E] by layer, [D]: the mean over the prompt's tokens of what the output head is given), float32, on the CPU.

    Raises:
        ModelError: the model has no output head, so it writes no text.
    """
    seen, hidden = _LastTokens(len(prompt)), []
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError("this model writes no text", expected="an output head", got=type(model).__name__)
    handle = head.register_forward_pre_hook(lambda _module, args: hidden.append(args[0]))
    try:
        with view.watch(seen):
            model(input_ids=torch.tensor([list(prompt)], device=_device(model)), use_cache=False)
    finally:
        handle.remove()
    return {index: x[0] for index, x in seen.found.items()}, hidden[0][0].float().mean(0).cpu()


class Answers:
    """Prompts and the answers to them; how little a model gives the answers under pathways at the prompts' last tokens.

    What stands before those tokens is run once: no pathway changes it.

    Args:
        model: that the view is of.
        view: nothing else is changed in it.
        prompts: N of them, token ids.
        answers: what follows each.
    """

    def __init__(
        self, model: nn.Module, view: MoEView, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
    ):
        self._model, self._view, device = model, view, _device(model)
        before, behind = max(map(len, prompts)), max(map(len, answers))
        rows = list(zip(prompts, answers, strict=True))
        ids = torch.tensor([[0] * (before - len(p)) + [*p, *a] + [0] * (behind - len(a)) for p, a in rows])
        real = torch.tensor([[0] * (before - len(p)) + [1] * (len(p) + behind) for p, _ in rows])
        self._ids, self._count = ids.to(device), len(rows)
        self._padding = {}
        if any(len(p) < before for p in prompts):
            places = (real.cumsum(-1) - 1).clamp_min(0)
            self._padding = {"attention_mask": real.to(device), "position_ids": places.to(device)}
        self._counted = torch.tensor([[1.0] * len(a) + [0.0] * (behind - len(a)) for _, a in rows], device=device)
        self._last = before - 1
        self._run = self._last if min(map(len, prompts)) > 1 else 0  # no row may be all padding
        if self._run:
            self._cache = empty_cache(model)
            with torch.no_grad():
                model(
                    input_ids=self._ids[:, : self._run],
                    past_key_values=self._cache,
                    use_cache=True,
                    logits_to_keep=1,
                    **{name: x[:, : self._run] for name, x in self._padding.items()},
                )

    def losses(self, pathways: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """Mean negative log-likelihood of each answer's tokens [N], nats, float32; gradients reach the pathways.

        Args:
            pathways: by decoder layer index, [N, E].
        """
        ids, padding = self._ids[:, self._run :], dict(self._padding)
        if self._run:
            cache = {"past_key_values": copy.deepcopy(self._cache), "use_cache": True}
            if padding:
                padding["position_ids"] = padding["position_ids"][:, self._run :]
        else:
            cache = {"use_cache": False}
        first = self._last - self._run
        places = torch.arange(self._count) * ids.shape[1] + first
        with overriding(self._view, pathways, lambda _count: places):
            logits = self._model(input_ids=ids, **cache, **padding).logits
        told = logits[:, first:-1].float().log_softmax(-1)
        nll = -told.gather(-1, ids[:, first + 1 :, None])[..., 0]
        return (nll * self._counted).sum(-1) / self._counted.sum(-1)


def _device(model: nn.Module) -> torch.device:
    return model.get_input_embeddings().weight.device
