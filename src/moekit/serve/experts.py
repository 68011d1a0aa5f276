"""Experts that lie in a store, run by the contract of transformers 5: the family's own code routes, attends and adds.

The numbers are those of transformers' eager experts, bit for bit, where experts are kept in 16 bits: each expert's rows
are multiplied as it does, in one call each, and added in its order, whatever order they arrived in.

Symbols: T tokens, K chosen, E experts, D hidden, N rows of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moekit.families.family import Family
from moekit.families.resident import experts_run_by
from moekit.layout import Layout
from moekit.serve.cache import ExpertCache
from moekit.serve.calibrate import Kernels, row_of, sizes_of
from moekit.serve.forms import Held, product
from moekit.serve.lossy import Losses
from moekit.serve.store import Form

IMPLEMENTATION = "moekit_stored"
MOST_TOKENS = 64  # of a step that native kernels are asked about


def stored_experts(
    experts: nn.Module, hidden_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """Routed experts by the contract of transformers 5, their weights taken from `experts._moekit_cache`.

    Args:
        experts: a module with the contract, whose own expert parameters are empty.
        hidden_TD: inputs.
        ids_TK: chosen experts; ids >= E are skipped.
        weights_TK: their weights.

    Returns:
        The weighted sum of the outputs [T, D], in the dtype of `hidden_TD`.
    """
    cache: ExpertCache = experts._moekit_cache
    losses: Losses | None = vars(experts).get("_moekit_losses")
    if losses is not None:
        ids_TK, weights_TK = losses.change(experts._moekit_layer, cache, hidden_TD, ids_TK, weights_TK)
    kernels: Kernels | None = vars(experts).get("_moekit_kernels")
    if kernels is not None and len(hidden_TD) <= MOST_TOKENS:
        few = _few(experts, cache, kernels, hidden_TD, ids_TK, weights_TK)
        if few is not None:
            return few
    family: Family = experts._moekit_family
    dtype = family.sum_dtype(hidden_TD.dtype, weights_TK.dtype)
    chosen = ids_TK[0].tolist() if len(hidden_TD) == 1 else []
    rank_of = {expert: rank for rank, expert in enumerate(chosen) if expert < experts.num_experts}
    if chosen and len(rank_of) == sum(x < experts.num_experts for x in chosen):  # none twice (tables may have it)
        of_one = {}
        for expert, tensors in cache.run(experts._moekit_layer, sorted(rank_of)):
            of_one[expert] = _output(experts, tensors, hidden_TD) * weights_TK[:, rank_of[expert], None]
        total = torch.zeros_like(hidden_TD, dtype=dtype)
        for expert in sorted(of_one):
            total += of_one[expert].to(dtype)
        return total.to(hidden_TD.dtype)
    flat = ids_TK.t().reshape(-1).long()  # slot-major, as transformers' eager loop visits the pairs
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=experts.num_experts).tolist()[: experts.num_experts]
    all_tokens, all_ranks = order % len(hidden_TD), order // len(hidden_TD)
    starts, start = {}, 0
    for expert, count in enumerate(counts):
        if count:
            starts[expert] = start
            start += count
    made: dict[int, torch.Tensor] = {}
    for expert, tensors in cache.run(experts._moekit_layer, list(starts), [x for x in counts if x]):
        rows = slice(starts[expert], starts[expert] + counts[expert])
        tokens, ranks = all_tokens[rows], all_ranks[rows]
        made[expert] = _output(experts, tensors, hidden_TD[tokens]) * weights_TK[tokens, ranks, None]
    total = torch.zeros_like(hidden_TD, dtype=dtype)
    for expert in starts:
        rows = slice(starts[expert], starts[expert] + counts[expert])
        total.index_add_(0, all_tokens[rows], made[expert].to(total.dtype))
    return total.to(hidden_TD.dtype)


def _output(experts: nn.Module, tensors: dict[str, torch.Tensor], x_ND: torch.Tensor) -> torch.Tensor:
    """What an expert makes of its rows [N, D], unweighted."""
    axis, up_name = 2 if experts.is_transposed else 1, "gate_up_proj" if experts.has_gate else "up_proj"
    up_rows = getattr(experts, up_name).shape[axis]
    mid = product(x_ND, tensors, up_name, up_name + "_bias", experts.is_transposed, up_rows)
    mid = experts._apply_gate(mid) if experts.has_gate else experts.act_fn(mid)
    out = product(mid, tensors, "down_proj", "down_proj_bias", experts.is_transposed, experts.down_proj.shape[axis])
    return experts.post_expert_norm(out) if experts.has_post_expert_norm else out


def _few(
    experts: nn.Module,
    cache: ExpertCache,
    kernels: Kernels,
    hidden_TD: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
) -> torch.Tensor | None:
    """The weighted sum by native kernels; None where they do not pay, or cannot be used."""
    native, stored, layer = kernels.native, cache.store.layers[experts._moekit_layer], experts._moekit_layer
    most = min((kernels.takes(form.bits) for form in stored.forms), default=0)
    if native is None or not most or hidden_TD.dtype != torch.bfloat16 or hidden_TD.device.type != "cpu":
        return None
    chosen = enumerate(zip(ids_TK.tolist(), weights_TK.tolist(), strict=True))
    rows = [(e, token, w) for token, (ids, weights) in chosen for e, w in zip(ids, weights, strict=True)]
    rows = sorted(x for x in rows if x[0] < experts.num_experts)
    ends: dict[int, int] = {}
    for end, (expert, _, _) in enumerate(rows, 1):
        ends[expert] = end
    if len(rows) > most * len(ends):
        return None
    needed, ranges, start = list(ends), {}, 0
    for expert, end in ends.items():
        ranges[expert] = (start, end)
        start = end
    tokens, x_TD = [token for _, token, _ in rows], hidden_TD.contiguous()
    out_PD = torch.empty(len(rows), x_TD.shape[1])
    sizes = sizes_of(experts)

    def run(table: list[int], starts: list[int]) -> None:
        native.experts(table, starts, tokens, x_TD, sizes, experts.has_gate, kernels.act, out_PD, kernels.threads)

    at_once = all(cache.holds(layer, expert) for expert in needed)
    tables: dict[int, list[int]] = {}
    for expert, held in cache.run(layer, needed, [end - start for start, end in ranges.values()]):
        row = _row(held, stored.of(expert), experts.has_gate)
        if at_once:
            tables[expert] = row
        else:
            run(row, list(ranges[expert]))
    if at_once:
        run([x for expert in needed for x in tables[expert]], [0, *ends.values()])
    return native.combine(out_PD, tokens, [w for _, _, w in rows], len(x_TD))


def _row(tensors: dict[str, torch.Tensor], form: Form, gated: bool) -> list[int]:
    """What native kernels need to know of an expert, found once for as long as it lies where it does."""
    if not isinstance(tensors, Held):
        return row_of(tensors, form.bits, form.group_size, gated)
    if tensors.row is None:
        tensors.row = row_of(tensors, form.bits, form.group_size, gated)
    return tensors.row


def run_from_store(model: nn.Module, layout: Layout, family: Family) -> dict[int, nn.Module]:
    """Let every routed experts module of a model take its weights from its `_moekit_cache`, by decoder layer index."""
    if family.by_contract:
        return experts_run_by(model, layout, IMPLEMENTATION)
    found = {layer.index: model.get_submodule(layer.experts_path) for layer in layout.routed}
    for experts in found.values():
        experts.forward = partial(family.from_elsewhere, experts, products=partial(_products, experts))
    return found


def _products(
    experts: nn.Module, needed: Sequence[int]
) -> Iterator[tuple[int, Callable[[torch.Tensor, str], torch.Tensor]]]:
    for expert, tensors in experts._moekit_cache.run(experts._moekit_layer, needed):

        def multiply(x_NI: torch.Tensor, name: str, held: dict[str, torch.Tensor] = tensors) -> torch.Tensor:
            return product(x_NI, held, name, name + "_bias", True, getattr(experts, name).shape[2])

        yield expert, multiply


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, stored_experts)
