"""What rounding does to weights, and how alike experts are: from the weights alone, on a sample of them.

    eps_b^2   = sum |W - W'|^2 / sum |W|^2         W' is W read back from b bits; over the matrices of the sample
    likeness  = sum <W_i, W_j> / sum |W_i| |W_j|   i, j neighbours in the sample; below zero counts as zero

Experts that began as copies of one network have a likeness near 1, experts trained from random numbers near 0. Each
sampled matrix is read once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from moekit.apply.quantize import Rounded
from moekit.errors import PlanError
from moekit.families.matrices import Matrix, dense_matrices, expert_matrices
from moekit.families.model import Model
from moekit.planning.sizes import AnyQuantize
from moekit.plans import OUTER, UNQUANTISED, Quantize, QuantizeDense
from moekit.progress import Progress, silent

SAMPLED = 4  # experts of a layer, and layers for what every token uses: errors of rounding hardly differ between them

DenseKey = tuple[str, int, int, str, str]  # part, bits, group size, scheme, format


@dataclass(frozen=True)
class Weights:
    """What was found.

    Attributes:
        rounding: eps^2 of a layer's experts for each way of quantising them all alike.
        likeness: of a layer's experts, 0 to 1, by decoder layer index.
        dense: eps^2 of what every token uses, by part and way: the mean over layers.
        factors: matrices that an expert's output is linear in, one after the other: 3 for gated experts, 2 for others.
    """

    rounding: Mapping[Quantize, float]
    likeness: Mapping[int, float]
    dense: Mapping[DenseKey, float]
    factors: int = 3


def dense_keys(op: QuantizeDense) -> list[DenseKey]:
    """What `Weights.dense` calls the parts that an op quantises."""
    parts = [(part, bits) for part, bits in op.bits.items() if bits != UNQUANTISED]
    return [(part, bits, op.group_size, op.scheme, op.format) for part, bits in parts]


def look(model: Model, ops: Iterable[AnyQuantize], progress: Progress = silent) -> Weights:
    """Sample the weights of every layer.

    Args:
        model: where they lie.
        ops: ways of quantising that are to be judged.
        progress: told of "weights".

    Returns:
        What was found; without a layer's numbers where its weights are no plain matrices (quantised ones).
    """
    rounding: dict[Quantize, float] = {}
    likeness: dict[int, float] = {}
    found, layers = list(ops), model.layout.routed
    for number, layer in enumerate(layers):
        mine = {op for op in found if isinstance(op, Quantize) and op.layer == layer.index}
        try:
            matrices = expert_matrices(model.checkpoint, model.understanding, layer)
        except PlanError:
            matrices = []
        if matrices:
            experts = set(_evenly(layer.num_experts))
            alike, errors = _experts(model, [x for x in matrices if x.expert in experts], mine)
            likeness[layer.index] = alike
            rounding |= errors
        progress("weights", number + 1, len(layers))
    form = model.understanding.family.expert_form(model.understanding.model.get_submodule(layers[0].experts_path))
    dense = _dense(model, [op for op in found if isinstance(op, QuantizeDense)])
    return Weights(rounding, likeness, dense, 3 if form.gated else 2)


def _evenly(count: int) -> list[int]:
    return sorted({int(e) for e in np.linspace(0, count - 1, min(SAMPLED, count))})


def _experts(
    model: Model, matrices: Iterable[Matrix], ops: Collection[Quantize]
) -> tuple[float, dict[Quantize, float]]:
    """Likeness and errors of a layer's sampled experts."""
    errors, total = dict.fromkeys(ops, 0.0), 0.0
    products = norms = 0.0
    before: dict[tuple[str, int], torch.Tensor] = {}
    for matrix in matrices:
        weight = matrix.read(model.checkpoint)
        plain = weight.float()
        total += float(plain.square().sum())
        for op in ops:
            errors[op] += _lost(weight, Rounded(matrix, op, op.width(0), ""))
        place = matrix.key, matrix.start
        if place in before:
            products += float((plain * before[place]).sum())
            norms += float(plain.norm() * before[place].norm())
        before[place] = plain
    alike = min(1.0, max(0.0, products / (norms or 1.0)))
    return alike, {op: error / (total or 1.0) for op, error in errors.items()}


def _dense(model: Model, ops: Iterable[QuantizeDense]) -> dict[DenseKey, float]:
    """Errors of what every token uses, on some layers."""
    layers = [*_evenly(model.layout.num_layers), OUTER]
    errors: dict[DenseKey, list[float]] = {}
    for index in layers:
        for op in (op for op in ops if op.layer == index):
            matrices = dense_matrices(model.checkpoint, model.understanding, index, list(op.bits))
            for key in dense_keys(op):
                lost = total = 0.0
                for matrix in matrices[key[0]]:
                    weight = matrix.read(model.checkpoint)
                    lost += _lost(weight, Rounded(matrix, op, key[1], ""))
                    total += float(weight.float().square().sum())
                errors.setdefault(key, []).append(lost / (total or 1.0))
    return {key: float(np.mean(values)) for key, values in errors.items()}


def _lost(weight: torch.Tensor, rounded: Rounded) -> float:
    return float((rounded.read_back(weight).float() - weight.float()).square().sum())
