"""Weights as whole numbers times scales: what a packed checkpoint holds, and live the numbers that are read back.

For each `gate_proj.weight` that is quantised the disk has a `weight_packed`, a `weight_scale` and a `weight_shape`, in
one of two forms: `pack-quantized` of compressed-tensors, which stock transformers reads with that package, and moekit's
own (docs/packed-format.md), where every matrix has a width of its own. All else of the model stays as it is.

Symbols: O output rows, I input columns, G groups of a row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial

import torch

from moekit.checkpoint.grid import Grid, quantised, read_back
from moekit.checkpoint.packing import WORD, dequantise_packed, pack
from moekit.checkpoint.reader import DTYPES, Checkpoint
from moekit.checkpoint.weights import all_finite
from moekit.checkpoint.writer import Make, OutTensor
from moekit.errors import CheckpointError, PlanError
from moekit.families.detect import Understanding
from moekit.families.loader import Loader
from moekit.families.matrices import WEIGHT, Matrix, dense_matrices, expert_matrices
from moekit.families.packable import unloadable
from moekit.families.packings import OWN, OWN_VERSION
from moekit.layout import Layout
from moekit.plans import UNQUANTISED, Plan, PlanTensors, Quantize, QuantizeDense

NOTE = "stock transformers needs the package compressed-tensors to load this model"
OWN_NOTE = "in moekit's own packed form: moekit reads it, stock transformers finds no weights in it"
ALL_FUSED = "compressed-tensors has no form for experts that are one tensor on disk"


def grid_of(op: Quantize | QuantizeDense, bits: int) -> Grid:
    """The levels that an op's numbers of a width lie on."""
    return Grid(bits, half=op.format == OWN)


class Rounded:
    """A plan's rounding of one matrix.

    Args:
        matrix: which.
        op: how.
        bits: its width.
        tensors: folder of the plan's numbers.
    """

    def __init__(self, matrix: Matrix, op: Quantize | QuantizeDense, bits: int, tensors: str):
        self.matrix, self.op, self.bits, self._tensors = matrix, op, bits, tensors
        self.grid = grid_of(op, bits)
        self.dtype = DTYPES[matrix.dtype]
        self.group_size = op.group_size if isinstance(op, Quantize) else op.size(matrix.columns)
        self.groups = matrix.columns // self.group_size if self.group_size > 0 else 1

    @property
    def carried(self) -> bool:
        """Whether the numbers lie in the plan."""
        return self.op.scheme == "gptq"

    def stored(self, suffix: str) -> torch.Tensor:
        """`_packed` or `_scale` from the plan."""
        return PlanTensors(self._tensors).read(self.op.layer, self.matrix.name + suffix)

    def codes(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of a weight [O, I] that the plan carries no numbers of.

        Raises:
            CheckpointError: it has entries that are no numbers.
        """
        check_finite(weight, self.matrix.source)
        return quantised(weight, self.grid, self.group_size, self.dtype, self.op.scheme == "fitted")

    def read_back(self, weight: torch.Tensor) -> torch.Tensor:
        """The numbers [O, I] that a reader of the packed form gets in the place of a weight."""
        if not self.carried:
            return read_back(*self.codes(weight), self.grid)
        shape = (self.matrix.rows, self.matrix.columns)
        return dequantise_packed(self.stored("_packed"), self.stored("_scale"), shape, self.grid, self.matrix.name)

    def out_tensors(self, name: str, read: Callable[[], torch.Tensor]) -> list[OutTensor]:
        """What takes the place of the weight on disk; reads nothing now.

        Args:
            name: of the weight in the output.
            read: gives the weight.
        """
        rows, columns = self.matrix.rows, self.matrix.columns
        shape = (rows, columns, self.bits) if self.op.format == OWN else (rows, columns)
        words = -(-columns * self.bits // WORD)
        both = _Once(lambda: self.codes(read()))
        packed = Make(partial(self.stored, "_packed") if self.carried else lambda: pack(both()[0], self.bits))
        scale = Make(partial(self.stored, "_scale") if self.carried else lambda: both(last=True)[1])
        return [
            OutTensor(name + "_packed", "I32", (rows, words), packed),
            OutTensor(name + "_scale", self.matrix.dtype, (rows, self.groups), scale),
            OutTensor(name + "_shape", "I64", (len(shape),), Make(partial(torch.tensor, shape))),
        ]


class _Once:
    """Computes for the first of two that ask, forgets with the last."""

    def __init__(self, compute: Callable[[], tuple[torch.Tensor, torch.Tensor]]):
        self._compute = compute
        self._result: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, last: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        result = self._compute() if self._result is None else self._result
        self._result = None if last else result
        return result


def check_finite(weight: torch.Tensor, name: str) -> None:
    """Refuse a weight that no rounding makes sense of.

    Raises:
        CheckpointError: it has entries that are no numbers.
    """
    if not all_finite(weight):
        raise CheckpointError(
            "this weight has entries that are no numbers",
            where=name,
            got="NaN or infinity in it",
            fix="repair the source",
        )


def check_packable(checkpoint: Checkpoint, understanding: Understanding, form: str) -> None:
    """Refuse a model whose experts cannot be written in a packed form, or not so that stock transformers loads them.

    Args:
        checkpoint: headers are enough.
        understanding: of it.
        form: "compressed-tensors" or "moekit".

    Raises:
        PlanError: with the reason.
    """
    matrices = [x for layer in understanding.layout.routed for x in expert_matrices(checkpoint, understanding, layer)]
    if form == OWN:
        return
    if fused := [x for x in matrices if x.fused]:
        raise PlanError(ALL_FUSED, where=fused[0].source, got="all experts in one", fix="use format: moekit")
    if reason := unloadable(understanding):
        raise PlanError(
            "stock transformers cannot load this model with experts packed as compressed-tensors",
            where=understanding.layout.family,
            got=reason,
            fix="use format: moekit, which moekit reads and runs",
        )


def roundings(checkpoint: Checkpoint, understanding: Understanding, plan: Plan, index: int) -> list[Rounded]:
    """What a plan rounds in a decoder layer (-1: in none): the experts that stay, and parts that every token uses.

    Raises:
        PlanError: weights in a form that cannot be quantised, or not as asked.
    """
    out = []
    if op := plan.quantised().get(index):
        layer = understanding.layout.by_index[index]
        kept = set(plan.kept(layer))
        for matrix in expert_matrices(checkpoint, understanding, layer):
            if matrix.fused and op.format != OWN:
                raise PlanError(ALL_FUSED, where=matrix.source, got="all experts in one", fix="use format: moekit")
            if matrix.expert in kept and (bits := op.width(matrix.expert)) != UNQUANTISED:
                out.append(Rounded(matrix, op, bits, plan.tensors))
    if dense := plan.quantised_dense().get(index):
        for part, matrices in dense_matrices(checkpoint, understanding, index, list(dense.bits)).items():
            if dense.bits[part] != UNQUANTISED:
                out += [Rounded(matrix, dense, dense.bits[part], plan.tensors) for matrix in matrices]
    return out


def quantised_parameters(
    loader: Loader, layout: Layout, plan: Plan, index: int, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What changes among a layer's parameters when it is quantised: they, as they are read back.

    Args:
        loader: of the model.
        layout: of the model.
        plan: quantising or not.
        index: decoder layer index; -1 for what is in no decoder layer.
        tensors: the layer's parameters by key.

    Raises:
        CheckpointError: a weight has entries that are no numbers.
    """
    out: dict[str, torch.Tensor] = {}
    for rounded in roundings(loader.checkpoint, loader.understanding, plan, index):
        key = rounded.matrix.key
        if key not in out:
            out[key] = tensors[key].clone()
        part = rounded.matrix.view(out[key])
        part.copy_(rounded.read_back(part))
    return out


def quantised_tensors(
    checkpoint: Checkpoint,
    understanding: Understanding,
    plan: Plan,
    readers: Callable[[int], Mapping[str, Callable[[], torch.Tensor]]],
    names: Mapping[str, str],
) -> dict[str, list[OutTensor]]:
    """What takes the place of each weight on disk, by its name; reads nothing.

    Args:
        checkpoint: the source.
        understanding: of it.
        plan: what to do.
        readers: by layer, what reads the disk tensors that the plan makes anew before it rounds them.
        names: new names of the tensors of single experts.

    Raises:
        PlanError: see `check_packable` and `roundings`.
    """
    if plan.quantised():
        check_packable(checkpoint, understanding, plan.packed_form or OWN)
    out: dict[str, list[OutTensor]] = {}
    for index in sorted(plan.quantised().keys() | plan.quantised_dense().keys()):
        made = readers(index)
        rounded = {x.matrix.name: x for x in roundings(checkpoint, understanding, plan, index)}
        fused = {x.matrix.source for x in rounded.values() if x.matrix.fused}
        matrices = [x.matrix for x in rounded.values() if x.matrix.source not in fused]
        if fused:
            layer = understanding.layout.by_index[index]
            kept = {e: i for i, e in enumerate(plan.kept(layer))}
            matrices += [
                x for x in expert_matrices(checkpoint, understanding, layer) if x.source in fused and x.expert in kept
            ]
        for x in matrices:
            read = partial(_read, checkpoint, x, made.get(x.source))
            name = names.get(x.source, x.source)
            if x.fused and x.expert is not None:
                name = f"{x.source}.{kept[x.expert]}{WEIGHT}"
            if x.name in rounded:
                new = rounded[x.name].out_tensors(name, read)
            else:
                new = [OutTensor(name, x.dtype, (x.rows, x.columns), Make(read))]
            out.setdefault(x.source, []).extend(new)
    return out


def _read(checkpoint: Checkpoint, matrix: Matrix, made: Callable[[], torch.Tensor] | None) -> torch.Tensor:
    return matrix.read(checkpoint) if made is None else matrix.part(made())


def quantisation_config(checkpoint: Checkpoint, understanding: Understanding, plan: Plan) -> dict:
    """The `quantization_config` of config.json for a plan that quantises."""
    if plan.packed_form == OWN:
        return {"quant_method": OWN, "version": OWN_VERSION}
    indices = sorted(plan.quantised().keys() | plan.quantised_dense().keys())
    rounded = [x for index in indices for x in roundings(checkpoint, understanding, plan, index)]
    groups: dict[tuple[bool, int, int], set[str]] = {}
    for x in rounded:
        # The experts' names are the disk's, all others those of the stock model's modules; experts come first, for
        # stock transformers takes the first group whose targets say "experts" for theirs.
        name = (x.matrix.name if x.matrix.expert is not None else x.matrix.key).removesuffix(WEIGHT)
        groups.setdefault((x.matrix.expert is None, x.bits, x.group_size), set()).add(name)
    general = {key: {_general(name) for name in names} for key, names in groups.items()}
    shared = [x for x in {y for names in general.values() for y in names} if sum(x in y for y in general.values()) > 1]
    config_groups = {}
    for number, (key, names) in enumerate(sorted(groups.items())):
        targets = sorted({re.escape(x) if _general(x) in shared else _general(x) for x in names})
        config_groups[f"group_{number}"] = {
            "targets": [f"re:{x}$" for x in targets],
            "weights": {
                "num_bits": key[1],
                "type": "int",
                "symmetric": True,
                "dynamic": False,
                "strategy": "group" if key[2] > 0 else "channel",
                "group_size": key[2] if key[2] > 0 else None,
            },
            "input_activations": None,
            "output_activations": None,
        }
    packed = {x.matrix.key for x in rounded}
    left = [f"re:{re.escape(layer.path)}\\..*" for layer in understanding.layout.layers if layer.mtp]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": config_groups,
        "ignore": [*([] if "lm_head.weight" in packed else ["lm_head"]), *left],
    }


def _general(name: str) -> str:
    """A pattern for the names of the same thing in all layers and experts."""
    return re.sub(r"\d+", r"\\d+", re.escape(name))
