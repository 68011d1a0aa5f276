"""A token of one text through a whole decoder in one call of the native kernels, where all experts fit in memory.

Most of a token's time in PyTorch goes by between the products: for models whose decoder is plain
(`moekit.families.plain`) the call skips all of that. Numbers are those of the stock code up to the order of sums. That
is tried out: each layer is given what the stock layer was given for a few tokens, and must return the same within
`DIFFERENCE`; a model for which it does not is run by the stock code, as are prompts, several texts at once, and a
model on which somebody has put hooks.

Symbols: L decoder layers, E experts, K chosen, D hidden, V vocabulary, R rotated numbers of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import nn
from transformers import PreTrainedModel

from moekit.families.family import Family
from moekit.families.plain import Mlp, Plain, norm_of, plain_parts, roomy
from moekit.families.resident import empty_cache
from moekit.layout import Layout
from moekit.serve.cache import ExpertCache
from moekit.serve.calibrate import Kernels, act_like, row_of, sizes_of
from moekit.serve.machine import quickest
from moekit.serve.native import LayerParts, ModelParts, Native, Step
from moekit.serve.rest import weight_in

DIFFERENCE = 0.03  # of what a layer adds, between its norm and that of the stock layer; rounding alone makes 0.005
TRIED_TOKENS = 4
SAME_TOKENS = 2  # of them, at least, in every layer: a router whose scores are nearly alike may choose another expert
FEWER = 0.7  # of the time with more threads that fewer ones may take to be chosen: measuring is noisy
PLACES = 64  # whose angles are asked for at once
COLUMNS = 16  # that a cache of keys and values grows by
ROUTED_SCORES = ("softmax", "sigmoid")


class TokenRunner:
    """Runs single tokens.

    Args:
        model: whose rest is filled.
        plain: its parts.
        layout: of the model.
        kernels: what runs its experts.
        experts: its experts modules by decoder layer index.
        cache: that has room for all experts.

    Raises:
        ValueError: something that the kernels do not know.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plain: Plain,
        layout: Layout,
        kernels: Kernels,
        experts: Mapping[int, nn.Module],
        cache: ExpertCache,
    ):
        if kernels.native is None:
            raise ValueError("no native kernels")
        self.cache, self._plain, self._model, self._layout = cache, plain, model, layout
        self._native: Native = kernels.native
        self._threads, self._gated = kernels.threads, bool(next(iter(experts.values())).has_gate)
        self._kept: list[torch.Tensor] = []  # what structures point to
        self._states = [vars(x) for x in model.modules()]
        self._hooks = [y for x in self._states for y in (x["_forward_hooks"], x["_forward_pre_hooks"])]
        self._as_tried = self._changes()
        self._routed = {i: number for number, i in enumerate(sorted(experts))}
        count, (hidden, _, inner) = len(plain.layers), sizes_of(next(iter(experts.values())))
        most = max(x.num_experts for x in experts.values())
        self._table = torch.zeros(count, most, 8, dtype=torch.int64)
        self._top_k = layout.routed[0].top_k
        self._chosen = torch.zeros(count, self._top_k, dtype=torch.int32)
        self._weights = torch.zeros(count, self._top_k)
        self._hidden = torch.zeros(hidden)
        self._logits = torch.zeros(1, layout.vocab_size, dtype=torch.bfloat16)
        self._bound: tuple[Any, Any] | None = None  # the cache that structures point to, and its first keys
        self._angles: tuple[int, torch.Tensor, torch.Tensor] | None = None
        self._layers = (LayerParts * count)()
        self._shared_inner = 0
        shared_act = 0
        for index, part in enumerate(plain.layers):
            if part.mlp is not None:
                shared_act = self._put_mlp(self._layers[index], part.mlp, part.mlp_gate)
        for index in range(count):
            self._put_layer(index)
        self._parts = self._whole(hidden, inner, most, kernels.act, shared_act)
        self._step = Step(
            chosen=self._chosen.data_ptr(),
            weights=self._weights.data_ptr(),
            hidden=self._hidden.data_ptr(),
            logits=self._logits.data_ptr(),
        )

    def _whole(self, hidden: int, inner: int, experts: int, act: int, shared_act: int) -> ModelParts:
        plain, router = self._plain, self._layout.routed[0].router
        alike = {(x.router, x.top_k, x.num_experts, x.inner_size) for x in self._layout.routed}
        softmax_later = router.order == "top-k, score" and router.score == "softmax"  # the same, if renormalised
        known = router.score in ROUTED_SCORES and (router.order == "score, top-k" or softmax_later)
        if len(alike) > 1 or not known or router.groups > 1 or router.weighs_input or router.expert_scale:
            raise ValueError("a router that kernels do not know")
        if self._top_k > 64 or (
            inner % 64 and 4 in {y.bits for x in self.cache.store.layers.values() for y in x.forms}
        ):
            raise ValueError("sizes that kernels do not know")
        norms = [y for x in plain.layers for y in x.norms] + [plain.norm]
        heads = [y for x in plain.layers for y in x.head_norms or ()]
        kinds = {norm_of(x)[0] for x in [*norms, *heads]}
        eps, head_eps = {norm_of(x)[1] for x in norms}, {norm_of(x)[1] for x in heads} or {0.0}
        if len(kinds | eps) > 2 or len(kinds) > 1 or len(eps) > 1 or len(head_eps) > 1:
            raise ValueError("norms of several kinds")
        cos, _ = self._rotations(0)
        shape = plain.heads * plain.head
        return ModelParts(
            hidden=hidden,
            heads=plain.heads,
            kv_heads=plain.kv_heads,
            head=plain.head,
            rotary=cos.shape[-1],
            interleaved=0,
            norm_kind=kinds.pop(),
            experts=experts,
            top_k=self._top_k,
            inner=inner,
            gated=self._gated,
            act=act,
            shared_act=shared_act,
            score=ROUTED_SCORES.index(router.score),
            renormalised=router.renormalised or softmax_later,
            round_weights=plain.round_weights,
            eps=eps.pop(),
            head_eps=head_eps.pop(),
            scaling=plain.scaling,
            weight_scaling=router.scaling,
            norm=self._numbers(norm_of(plain.norm)[2]),
            output=weight_in(plain.output),
            widest=max(hidden, shape, inner, self._shared_inner),
        )

    def _put_mlp(self, to: LayerParts, mlp: Mlp, gate: nn.Module | None) -> int:
        to.gate, to.up, to.down = (weight_in(x) for x in (mlp.gate, mlp.up, mlp.down))
        if gate is not None:
            to.shared_gate = weight_in(gate)
        self._shared_inner = max(self._shared_inner, to.down.inputs)
        act = act_like(mlp.act)
        if act is None:
            raise ValueError("an activation that kernels do not know")
        return act

    def _put_layer(self, index: int) -> None:
        part, to = self._plain.layers[index], self._layers[index]
        to.norm1, to.norm2 = (self._numbers(norm_of(x)[2]) for x in part.norms)
        to.q, to.k, to.v, to.o = (weight_in(x) for x in part.qkvo)
        if part.head_norms is not None:
            weights = [norm_of(x)[2] for x in part.head_norms]
            to.q_norm, to.k_norm = (self._numbers(x) for x in weights)
            to.q_width, to.k_width = (len(x) for x in weights)
        if part.router is not None:
            weight, bias = part.router
            if weight.dtype not in (torch.bfloat16, torch.float32) or (bias is not None and weight.itemsize == 4):
                raise ValueError("a router of another dtype")
            to.router = weight_in(nn.Module(), weight, bias)
            to.table = self._table[index].data_ptr()
        if part.correction is not None:
            to.correction = self._numbers(part.correction)

    def _numbers(self, x: torch.Tensor) -> int:
        self._kept.append(x.detach().float().contiguous())
        return self._kept[-1].data_ptr()

    def _rotations(self, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of a place [R]."""
        first = place // PLACES * PLACES
        if self._angles is None or self._angles[0] != first:
            x = torch.zeros(1, 1, self._layout.hidden_size, dtype=torch.bfloat16)
            cos, sin = self._plain.rotate(x, torch.arange(first, first + PLACES)[None])
            self._angles = first, cos[0].float().contiguous(), sin[0].float().contiguous()
        return self._angles[1][place - first], self._angles[2][place - first]

    def takes(self) -> bool:
        """Whether the model is as it was tried: nobody watches or changes what passes through its modules."""
        return self._as_tried == self._changes()

    def _changes(self) -> tuple[int, list]:
        """Hooks on modules, and functions in place of their own."""
        return sum(map(len, self._hooks)), [x.get("forward") for x in self._states]

    @torch.inference_mode()
    def logits(self, token: int, past: Any) -> torch.Tensor | None:
        """Logits [1, V] after a token, whose keys and values are kept; None where the stock code must run it."""
        if not self.takes():
            return None
        layers = self._bound_to(past)
        if layers is None:
            return None
        self._hidden.copy_(self._plain.embed(torch.tensor([token]))[0])
        self._run(layers, 0, len(layers), True)
        return self._logits.float()

    def _bound_to(self, past: Any) -> list | None:
        """The layers of a cache, which the structures point to now; None where it is of another kind."""
        if self._bound is not None:
            there, first = self._bound
            if there() is past and first() is past.layers[0].keys and self._has_room(past.layers[0]):
                return past.layers
        self._bound = None
        layers = roomy(past, COLUMNS)
        if layers is None or len(layers) != len(self._layers):
            return None
        for to, layer in zip(self._layers, layers, strict=True):
            keys, values = layer.rooms()
            to.keys, to.values, to.room = keys.data_ptr(), values.data_ptr(), keys.shape[-2]
        self._bound = ref(past), ref(layers[0].keys)
        return layers

    def _has_room(self, layer: Any) -> bool:
        return layer.keys.shape[-2] < self._layers[0].room

    def _run(self, layers: list, begin: int, end: int, finish: bool) -> None:
        step, length = self._step, layers[begin].keys.shape[-2]
        cos, sin = self._rotations(length)
        step.past, step.cos, step.sin = length, cos.data_ptr(), sin.data_ptr()
        step.begin, step.end, step.waiting, step.finish = begin, end, 0, finish
        while (at := self._native.token(self._parts, self._layers, step, self._shared_inner, self._threads)) < end:
            self._fetch(at)
            step.begin, step.waiting = at, 1
        for layer in layers[begin:end]:
            layer.grow()
        if self._bound is not None:
            self._bound = self._bound[0], ref(layers[0].keys)
        counts = self.cache.counts.hits
        for index, number in self._routed.items():
            if begin <= index < end:
                counts[number] += self._top_k

    def _fetch(self, index: int) -> None:
        """Have a layer's chosen experts in memory; they stay, since all do."""
        table = self._table[index]
        needed = [x for x in self._chosen[index].tolist() if not table[x, 2]]
        number, stored = self._routed[index], self.cache.store.layers[index]
        for expert, held in self.cache.run(index, needed):
            form = stored.of(expert)
            table[expert] = torch.tensor(row_of(held, form.bits, form.group_size, self._gated))
        self.cache.counts.hits[number] -= len(needed)

    @torch.inference_mode()
    def same(self) -> bool:
        """Whether each layer does what the stock one does, and the last matrix too."""
        for interleaved in (0, 1):  # pairs that positions turn: halves of a head, or neighbours
            self._parts.interleaved = interleaved
            apart_PL = self.differences()
            if len(apart_PL) and ((apart_PL < DIFFERENCE).sum(0) >= SAME_TOKENS).all():
                return True
        return False

    @torch.inference_mode()
    def try_threads(self) -> int:
        """Take fewer threads where more get in each other's way (fewer cores than were announced); how many."""
        past = empty_cache(self._model)
        self._model(input_ids=torch.zeros(1, 2, dtype=torch.long), past_key_values=past, use_cache=True)
        layers = self._bound_to(past)
        if layers is None:
            return self._threads
        self._run(layers, 0, len(layers), True)  # its experts are in memory now
        self._bound_to(past)
        self._step.past, self._step.begin, self._step.waiting = layers[0].keys.shape[-2], 0, 0
        best = float("inf")
        for threads in sorted({max(1, self._threads >> shift) for shift in range(8)}, reverse=True):
            call = partial(self._native.token, self._parts, self._layers, self._step, self._shared_inner, threads)
            took = quickest(call)
            if took < FEWER * best:
                best, self._threads = took, threads
        return self._threads

    @torch.inference_mode()
    def differences(self) -> torch.Tensor:
        """For a few tokens P, how far what each layer adds is from what the stock one adds, and the logits [P, L + 1].

        Distances are relative to the stock layer's; none [0] where the cache or the embedding is of another kind.
        """
        ids = torch.randint(self._layout.vocab_size, (2 + TRIED_TOKENS,), generator=torch.Generator().manual_seed(0))
        stock, mine = empty_cache(self._model), empty_cache(self._model)
        for past in (stock, mine):
            self._model(input_ids=ids[None, :2], past_key_values=past, use_cache=True, logits_to_keep=1)
        apart = []
        for token in ids[2:]:
            seen, right = self._seen(token, stock)
            layers = self._bound_to(mine)
            if layers is None or not torch.equal(self._plain.embed(token[None])[0].float(), seen[0][0]):
                return torch.empty(0)
            row = []
            for index, (before, after) in enumerate(seen):
                self._hidden.copy_(before)
                self._run(layers, index, index + 1, index + 1 == len(layers))
                row.append(float((self._hidden - after).norm() / (after - before).norm()))
            apart.append([*row, float((self._logits[0].float() - right).norm() / right.norm())])
        return torch.tensor(apart)

    def _seen(self, token: torch.Tensor, past: Any) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
        """What each stock layer is given and returns for a token [D], and the logits [V]."""
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []

        def note(_: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
            pair = (args[0] if args else kwargs["hidden_states"], out[0] if isinstance(out, tuple) else out)
            seen.append((pair[0].reshape(-1).float(), pair[1].reshape(-1).float()))

        with ExitStack() as stack:
            for part in self._plain.layers:
                stack.callback(part.module.register_forward_hook(note, with_kwargs=True).remove)
            out = self._model(input_ids=token[None, None], past_key_values=past, use_cache=True)
        return seen, out.logits[0, -1].float()


def token_runner(
    model: PreTrainedModel,
    layout: Layout,
    family: Family,
    kernels: Kernels,
    experts: Mapping[int, nn.Module],
    cache: ExpertCache,
) -> TokenRunner | None:
    """What runs single tokens of a model in one call; None where the stock code does."""
    if kernels.native is None or not kernels.rows or not cache.holds_all:
        return None
    plain = plain_parts(model, layout, family)
    if plain is None:
        return None
    with suppress(ValueError, IndexError):
        runner = TokenRunner(model, plain, layout, kernels, experts, cache)
        if runner.same():
            runner.try_threads()
            return runner
    return None
