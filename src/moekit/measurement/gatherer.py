"""Gatherer: adds up every statistic that methods ask for, from what it is shown.

Symbols: T tokens of a batch, K chosen, E experts, D hidden, N domains.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from moekit.data import Batch
from moekit.errors import ModelError
from moekit.families.probe import log_scores
from moekit.families.seam import ExpertRows
from moekit.layout import MoELayer
from moekit.stats import (
    ALWAYS,
    FIELDS,
    GROUPS,
    POSITION_BUCKETS,
    RATIO_BINS,
    WORDS,
    LayerStats,
    position_bucket,
)
from moekit.subsets import count_subsets
from moekit.tally import Tally
from moekit.view import Call, MoEView, Observer

SHIFT_ROWS = 256
TIE = 1e-5  # of a logit: logits nearer to each other may have the same score, and either be chosen
TALLY_KEYS = 8 << 20  # distinct (domain, token id, expert) held in memory by all layers together


class Gatherer(Observer):
    """Adds up the statistics of every MoE layer that it is shown.

    Args:
        layers: MoE layers, in order.
        domains: number of domains.
        groups: which of `moekit.stats.ALL_GROUPS` to take ("subsets" by `gather` only).

    Attributes:
        batch: (number, Batch) that runs now; to be set before each forward.
        previous: chosen experts of the previous MoE layer by batch number, for transitions.
        margin: p_k - p_(k+1) of the call that finished last, real tokens only, with the group "routing".
    """

    def __init__(self, layers: Sequence[MoELayer], domains: int, groups: Sequence[str] = GROUPS):
        self.layers = {layer.index: layer for layer in layers}
        self.groups = frozenset(groups)
        self.wants_outputs = bool(self.groups & {"scores", "outputs"})
        self.wants_residual = "scores" in self.groups
        self.batch: tuple[int, Batch]
        self.previous: dict[int, torch.Tensor] = {}
        self.sums: dict[int, dict[str, torch.Tensor]] = {}
        self.words: dict[int, dict[str, Tally]] = {}
        self.empty_slots: dict[int, int] = {layer.index: 0 for layer in layers}
        self.margin: torch.Tensor | None = None
        self._announced: dict[int, torch.Tensor] = {}
        sizes = {"P": POSITION_BUCKETS, "B": RATIO_BINS}
        for i, layer in enumerate(layers):
            sizes |= {"D": layer.width, "E": layer.num_experts, "F": layers[i - 1].num_experts if i else 0}
            sizes["R"] = layer.top_k - 1
            sizes["S"] = count_subsets(layer)
            shapes = {
                name: [sizes[x] for x in axes]
                for name, (group, axes, _) in FIELDS.items()
                if group in self.groups or name in ALWAYS
            }
            self.sums[layer.index] = {
                name: torch.zeros(domains, *shape, dtype=torch.float32 if FIELDS[name][1] == "ED" else torch.float64)
                for name, shape in shapes.items()
                if 0 not in shape
            }
            memory_keys = TALLY_KEYS // (len(WORDS) * len(layers))
            self.words[layer.index] = {name: Tally(memory_keys) for name in WORDS if "vocabulary" in self.groups}

    def routed(self, call: Call) -> None:
        """Check what the experts are given against the batch and the router."""
        _, batch = self.batch
        tokens = batch.ids.numel()
        if call.ids.shape != (tokens, call.layer.top_k) or call.hidden.shape[0] != tokens:
            raise _mismatch(call.layer, f"{list(call.ids.shape)} choices for {tokens} tokens, top {call.layer.top_k}")
        announced = self._announced.pop(call.layer.index, None)
        if announced is not None and not torch.equal(announced.reshape(call.ids.shape), call.ids):
            raise _mismatch(call.layer, "the experts were given other ids than the router returned")
        self._real = batch.mask.reshape(-1)
        self._all_real = bool(self._real.all())
        if self.wants_outputs:
            self._norms = torch.zeros(call.ids.shape, dtype=torch.float32, device=call.ids.device)

    def expert(self, call: Call, rows: ExpertRows) -> None:
        """Take what needs an expert's output."""
        sums, domain = self.sums[call.layer.index], self.batch[1].domain
        norms = torch.linalg.vector_norm(rows.output, dim=-1, dtype=torch.float32)
        self._norms[rows.tokens, rows.ranks] = norms
        real = slice(None) if self._all_real else self._real.to(rows.tokens.device)[rows.tokens]
        output = rows.output[real]
        if not len(output):
            return
        if "peak" in sums:
            low, high = output.aminmax()
            peak = torch.maximum(-low, high).double().cpu()
            sums["peak"][domain, rows.expert] = torch.maximum(sums["peak"][domain, rows.expert], peak)
        if "output" in sums:
            sums["output"][domain, rows.expert] += output.sum(0, dtype=torch.float32).cpu()
            gates = call.weights[rows.tokens, rows.ranks][real].float()
            gates = torch.ones_like(gates) if call.layer.router.weighs_input else gates
            sums["gated_output"][domain, rows.expert] += (gates @ output.float()).cpu()

    def finished(self, call: Call, output: torch.Tensor) -> None:
        """Add the call to the sums."""
        number, batch = self.batch
        layer, domain = call.layer, batch.domain
        sums = {name: array[domain] for name, array in self.sums[layer.index].items()}
        keep = slice(None) if self._all_real else self._real.to(call.ids.device)
        ids = call.ids[keep].long()
        flat = ids.reshape(-1)

        def by_expert(values_TK: torch.Tensor) -> torch.Tensor:
            sums_E = torch.bincount(flat, weights=values_TK.reshape(-1).double(), minlength=layer.num_experts)
            return sums_E[: layer.num_experts].cpu()  # id E: a slot that no expert fills

        weights = call.weights[keep].float()
        self.empty_slots[layer.index] += int((flat == layer.num_experts).sum())
        self._by_sequence(layer, batch, sums, ids, weights)
        if call.residual is not None:  # asked for with the group "scores"
            norms = self._norms[keep]
            gated = norms if layer.router.weighs_input else weights * norms
            shift = _shift(call.residual, output.reshape(call.residual.shape))[keep]
            sums["norm"] += by_expert(norms)
            sums["norm_sq"] += by_expert(norms * norms)
            sums["gated_norm"] += by_expert(gated)
            sums["gated_norm_sq"] += by_expert(gated * gated)
            sums["easy_ep"] += by_expert(shift[:, None] * gated)
            routed = torch.linalg.vector_norm(output.reshape(len(call.ids), -1), dim=-1, dtype=torch.float32)[keep]
            sums["routed_norm_sq"] += routed.double().square().sum().cpu()
        if "routing" in self.groups and call.logits is not None:
            logits = call.logits[keep].float()
            self._routing(layer, number, batch, sums, logits, ids)
            if "weight_ratio" in sums:
                sums["weight_ratio"] += _ratios(weights.masked_fill(ids == layer.num_experts, 0.0)).cpu()
            if bool(logits.amin() <= (lowest := torch.finfo(call.logits.dtype).min)):  # a plan that runs live
                logits = logits.masked_fill(logits <= lowest, 0.0)
            sums["logit"] += logits.sum(0).double().cpu()
            sums["logit_gram"] += (logits.T @ logits).double().cpu()
        if "vocabulary" in self.groups:
            self._vocabulary(layer, batch, ids)

    def _by_sequence(
        self,
        layer: MoELayer,
        batch: Batch,
        sums: dict[str, torch.Tensor],
        ids: torch.Tensor,
        weights: torch.Tensor,
    ) -> None:
        """Counts and gate mass, which are sums over sequences of sums over their tokens."""
        rows, slots = len(batch.ids), layer.num_experts + 1  # the last for slots that no expert fills
        row_T = torch.arange(rows).repeat_interleave(batch.mask.sum(1)).to(ids.device)
        keys = (row_T[:, None] * slots + ids).reshape(-1)
        tokens_B = batch.mask.sum(1, keepdim=True).clamp_min(1)
        for name, mean, values in (("count", "sequence_share", None), ("gate_mass", "sequence_mass", weights)):
            weight = None if values is None else values.reshape(-1).double()
            found_BE = torch.bincount(keys, weight, rows * slots).view(rows, slots)[:, :-1].double().cpu()
            sums[name] += found_BE.sum(0)
            mean_BE = found_BE / tokens_B
            sums[mean] += mean_BE.sum(0)
            sums[f"{mean}_sq"] += mean_BE.square().sum(0)

    @contextlib.contextmanager
    def compared(self, view: MoEView, layers: Sequence[int]) -> Iterator[None]:
        """Refuse calls whose experts are not those that the router has just chosen; to be entered before `watch`."""

        def note(index: int, outputs: tuple) -> None:
            self._announced[index] = view.family.routing(outputs)[1]

        handles = [
            view.router(index).register_forward_hook(lambda _module, _args, outputs, i=index: note(i, outputs))
            for index in layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._announced.clear()

    def _routing(
        self,
        layer: MoELayer,
        number: int,
        batch: Batch,
        sums: dict[str, torch.Tensor],
        logits: torch.Tensor,
        ids: torch.Tensor,
    ) -> None:
        chosen = _one_hot(ids, layer.num_experts)
        sums["coactivation"] += (chosen.T @ chosen).double().cpu()
        before = self.previous.get(number)
        if before is not None and "transition" in sums:
            came = _one_hot(before.to(ids.device).long(), sums["transition"].shape[0])
            sums["transition"] += (came.T @ chosen).double().cpu()
        self.previous[number] = ids.to(torch.int16).cpu()
        entropy, self.margin = self._confidence(layer, logits, ids)
        bucket = torch.from_numpy(position_bucket(batch.positions[batch.mask].numpy()))
        sums["position_tokens"] += torch.bincount(bucket, minlength=POSITION_BUCKETS)
        for name, values in (("entropy", entropy), ("margin", self.margin)):
            sums[name] += torch.bincount(bucket, weights=values.double().cpu(), minlength=POSITION_BUCKETS)

    def _confidence(
        self, layer: MoELayer, logits: torch.Tensor, ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Entropy of the router's scores, nats, and the lowest chosen score less the highest other one; both [T].

        Raises:
            ModelError: the logits do not explain the choice, where nothing else decides.
        """
        empty = ids == layer.num_experts
        lowest = logits.gather(1, ids.masked_fill(empty, 0)).masked_fill(empty, torch.inf).amin(-1)
        other = nn.functional.pad(logits, (0, 1)).scatter_(1, ids, -torch.inf)[:, : layer.num_experts].amax(-1)
        near = TIE * lowest.abs().clamp_min(1.0)
        if layer.router.follows_logits and bool((other > lowest + near).any()):
            raise _mismatch(layer, "experts were chosen that the logits do not favour")
        lowest = lowest.where(lowest.isfinite(), other)  # no expert at all
        logits, lowest, other = (log_scores(layer.router.score, x) for x in (logits, lowest, other))
        total = logits.logsumexp(-1)
        logs = logits - total[:, None]
        entropy = -(logs.exp() * logs).sum(-1)
        return entropy, (lowest - total).exp() - (other - total).exp()

    def _vocabulary(self, layer: MoELayer, batch: Batch, ids: torch.Tensor) -> None:
        ids_TK = ids.cpu().numpy()
        for name, words in (("vocabulary", batch.ids), ("following", batch.following)):
            words_T = words.reshape(-1)[self._real].numpy()
            keys_TK = batch.domain << 48 | words_T[:, None] << 16 | ids_TK
            self.words[layer.index][name].add(keys_TK[words_T >= 0].reshape(-1))

    def take(self, index: int, tokens: int) -> LayerStats:
        """The finished sums of a layer; its memory is given up.

        Raises:
            ModelError: the counts (and empty slots) do not add up to tokens x top_k.
        """
        sums, words = self.sums.pop(index), self.words.pop(index)
        slots = tokens * self.layers[index].top_k
        if (filled := int(sums["count"].sum()) + self.empty_slots[index]) != slots:
            raise _mismatch(self.layers[index], f"{filled:,} choices for {tokens:,} tokens, expected {slots:,}")
        rows = {name: _unpacked(*tally.result()) for name, tally in words.items()}
        return LayerStats({name: x.numpy() for name, x in sums.items()}, **rows)


def _unpacked(keys: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[M, 4]: domain, token id, expert, count."""
    return np.stack([keys >> 48, keys >> 16 & 0xFFFFFFFF, keys & 0xFFFF, counts], 1)


def _shift(residual: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """max(0, 1 - cos(h, h + y)) for each token [T]; in blocks that stay in the processor's cache."""
    blocks = zip(residual.split(SHIFT_ROWS), output.split(SHIFT_ROWS), strict=True)
    cosines = [torch.cosine_similarity(h.float(), h.float() + y.float(), dim=-1) for h, y in blocks]
    return (1 - torch.cat(cosines)).clamp_min(0)


def _ratios(weights_TK: torch.Tensor) -> torch.Tensor:
    """Tokens [K - 1, bins] by the ratio of each further weight, largest first, to the largest; empty slots nowhere."""
    ordered_TK = weights_TK.double().sort(-1, descending=True).values
    ratio_TR = ordered_TK[:, 1:] / ordered_TK[:, :1]  # without any weight, not a number
    bins_TR = (ratio_TR * RATIO_BINS).nan_to_num(0.0).long().clamp_(0, RATIO_BINS - 1)
    out = torch.zeros(ratio_TR.shape[1], RATIO_BINS, dtype=torch.float64, device=weights_TK.device)
    return out.scatter_add_(1, bins_TR.T, (ordered_TK[:, 1:] > 0).double().T)


def _one_hot(ids_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Which experts each token chose [T, E]; id E (a slot that no expert fills) counts for none."""
    chosen = torch.zeros(len(ids_TK), num_experts + 1, device=ids_TK.device).scatter_(1, ids_TK, 1.0)
    return chosen[:, :num_experts]


def _mismatch(layer: MoELayer, what: str) -> ModelError:
    return ModelError(
        "what the router decided and what the experts were given do not agree; statistics would be wrong",
        where=f"layer {layer.index}",
        got=what,
        fix="please report this family",
    )
