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
from moekit.serve.forms import product
from moekit.serve.lossy import Losses

IMPLEMENTATION = "moekit_stored"


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
    up_name = "gate_up_proj" if experts.has_gate else "up_proj"
    outputs = experts.down_proj.shape[2 if experts.is_transposed else 1]
    up_rows = getattr(experts, up_name).shape[2 if experts.is_transposed else 1]
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
    for expert, tensors in cache.run(experts._moekit_layer, list(starts)):
        rows = slice(starts[expert], starts[expert] + counts[expert])
        tokens, ranks = all_tokens[rows], all_ranks[rows]
        x = hidden_TD[tokens]
        mid = product(x, tensors, up_name, up_name + "_bias", experts.is_transposed, up_rows)
        mid = experts._apply_gate(mid) if experts.has_gate else experts.act_fn(mid)
        out = product(mid, tensors, "down_proj", "down_proj_bias", experts.is_transposed, outputs)
        if experts.has_post_expert_norm:
            out = experts.post_expert_norm(out)
        made[expert] = out * weights_TK[tokens, ranks, None]
    family: Family = experts._moekit_family
    total = torch.zeros_like(hidden_TD, dtype=family.sum_dtype(hidden_TD.dtype, weights_TK.dtype))
    for expert in starts:
        rows = slice(starts[expert], starts[expert] + counts[expert])
        total.index_add_(0, all_tokens[rows], made[expert].to(total.dtype))
    return total.to(hidden_TD.dtype)


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
