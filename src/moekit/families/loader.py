"""One decoder layer at a time: from tensors on disk to the stock model's parameters, and back to nothing.

Experts that a family's converter merely stacks (nearly all) are read from the file straight into their slice of the
fused parameter: no copy, no second buffer. Everything else goes through transformers' own converters.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import nn

from moekit.checkpoint.packing import dequantise_packed
from moekit.checkpoint.reader import DTYPES, Checkpoint
from moekit.checkpoint.weights import dequantise_fp8, dequantise_mxfp4
from moekit.errors import CheckpointError, ModelError
from moekit.families.constants import is_constant
from moekit.families.detect import Understanding, dtype_of
from moekit.families.factors import read_back
from moekit.families.family import ExpertForm
from moekit.families.names import COMPANIONS, FACTORED_SUFFIX, FACTORS, PACKED_SUFFIX, SCALES, Placement, convert
from moekit.families.packings import packing_of
from moekit.families.seam import IMPLEMENTATION
from moekit.families.stock import build
from moekit.footprint import trim
from moekit.plans.factoring import RIGHT

OUTER = -1  # the index of everything that is not in a decoder layer


class Loader:
    """Fills and empties the decoder layers of a weightless stock model.

    Args:
        checkpoint: where the weights lie.
        understanding: what `moekit.families.detect.understand` said of it.
        dtype: in which the model runs; None for its own.
        device: where the parameters go.

    Attributes:
        model: the stock model; only what was loaded last has real parameters.
        layers: its decoder layers.
        edit: called with (layer index, parameters) on what `read` gives, to change it on its way; None for nothing.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        understanding: Understanding,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
        trust_remote_code: bool = False,
    ):
        understanding.family.check_runs()
        self.checkpoint, self.understanding, self.device = checkpoint, understanding, torch.device(device)
        self.dtype = dtype or dtype_of(understanding.layout)
        if not self.dtype.is_floating_point or self.dtype.itemsize < 2:
            raise ModelError(
                "the model cannot run in this dtype", got=self.dtype, expected="bfloat16, float16 or float32"
            )
        self.model = build(understanding.config, self.dtype, buffers=True, trust_remote_code=trust_remote_code)
        self.model.requires_grad_(False)
        for module in self.model.modules() if self.device.type != "cpu" else ():
            module._buffers |= {
                name: x.to(self.device) for name, x in module._buffers.items() if x is not None and not x.is_meta
            }
        for at in understanding.experts:  # the same numbers as transformers' eager loop, faster
            if hasattr(experts := self.model.get_submodule(at.path), "_apply_gate"):
                experts.config._experts_implementation = IMPLEMENTATION
        self.layers_path = understanding.experts[0].layers_path
        self.layers = self.model.get_submodule(self.layers_path)
        self._family = understanding.family
        self._block = _fp8_block(checkpoint.config)
        self._packing = packing_of(understanding.config)
        self._plan = [
            (re.compile(pattern.replace("*", ".*")), dtype)
            for pattern, dtype in self.model._get_dtype_plan(self.dtype).items()
        ]
        self._meta = {
            key: tensor
            for key, tensor in (*self.model.named_parameters(), *self.model.named_buffers())
            if tensor.is_meta
        }
        self._groups: dict[int, dict[str, list[Placement]]] = defaultdict(lambda: defaultdict(list))
        for placement in understanding.placed.values():
            self._groups[self._layer_of(placement.key)][placement.key].append(placement)
        self._constants = {
            layer.index: {x.expert: x.name for x in layer.tensors if x.expert is not None and is_constant(x.name)}
            for layer in understanding.layout.routed
        }
        self._take_away: dict[int, Callable[[], None]] = {}  # undoes what `attach` did for constants
        self._spare: dict[tuple, list[torch.Tensor]] = defaultdict(list)
        self.edit: Callable[[int, dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None
        self._tied = dict(getattr(self.model, "all_tied_weights_keys", {}))

    def _layer_of(self, key: str) -> int:
        if not key.startswith(self.layers_path + "."):
            return OUTER
        head = key.removeprefix(self.layers_path + ".").partition(".")[0]
        return int(head) if head.isdigit() else OUTER

    def placements(self, index: int) -> dict[str, list[Placement]]:
        """The disk tensors of one decoder layer (or of `OUTER`) by the parameter that they go to."""
        return self._groups[index]

    def expert_form(self, experts_path: str) -> ExpertForm:
        """How the experts module at a path keeps its parameters."""
        return self._family.expert_form(self.model.get_submodule(experts_path))

    def differentiable(self) -> None:
        """Let experts run by transformers' own loop from now on, which gradients pass through; ours writes in place."""
        for at in self.understanding.experts:
            if hasattr(experts := self.model.get_submodule(at.path), "_apply_gate"):
                experts.config._experts_implementation = "eager"

    def on_disk(self, name: str) -> torch.dtype:
        """The dtype of a tensor on disk."""
        return DTYPES[self.checkpoint.info(name).dtype]

    def layer_bytes(self, index: int) -> int:
        """Bytes on disk of one decoder layer (or of `OUTER`)."""
        return sum(self.checkpoint.tensors[x.name].bytes for group in self._groups[index].values() for x in group)

    def read(self, index: int) -> dict[str, torch.Tensor]:
        """Read one layer's parameters (or `OUTER`'s) into memory, without touching the model; may run in a thread.

        Raises:
            CheckpointError: a file cannot be read, or a tensor has not the shape that the model expects.
        """
        out: dict[str, torch.Tensor] = {}
        for key, group in self._groups[index].items():
            if index == OUTER and re.search(r"vision|visual|audio", key):
                continue  # text needs no towers
            out |= self._read_parameter(key, group)
        out |= {name: self.checkpoint.read(name) for name in self._constants.get(index, {}).values()}
        return self.edit(index, out) if self.edit else out

    def _read_parameter(self, key: str, group: list[Placement]) -> dict[str, torch.Tensor]:
        weights = [x for x in group if x.suffix not in COMPANIONS]
        scales = {x.weight: x.name for x in group if x.suffix in SCALES}
        target, converter = self._meta.get(key), weights[0].converter
        if target is not None and all(x.expert is not None and x.stacks for x in weights):
            return {key: self._stack(key, weights, scales, target)}
        tensors = {x.name: self._numbers(x, scales) for x in weights}
        made = (
            {key: tensors[weights[0].name]} if converter is None else convert(converter, weights, tensors, self.model)
        )
        return {name: self._family.as_loaded(name, self._fit(name, tensor)) for name, tensor in made.items()}

    def _numbers(self, placement: Placement, scales: dict[str, str]) -> torch.Tensor:
        """A tensor read from disk; a quantised one times its scales, in the dtype of the model; factors multiplied."""
        if placement.suffix == FACTORED_SUFFIX:
            names = (placement.weight.removesuffix(".weight") + x for x in (FACTORED_SUFFIX, *FACTORS))
            parts = {x: self.checkpoint.read(x) for x in names if x in self.checkpoint.tensors}
            parts = {name.removeprefix(placement.weight): part for name, part in parts.items()}
            return read_back(parts, placement.weight).to(self.dtype)
        tensor = self.checkpoint.read(placement.name)
        if placement.weight not in scales:
            return tensor
        scale = self.checkpoint.read(scales[placement.weight])
        if placement.suffix == "_blocks":
            return dequantise_mxfp4(tensor, scale, self.dtype)
        if placement.suffix == PACKED_SUFFIX and self._packing:
            said = self._said(placement)
            grid = self._packing.grid((placement.weight, placement.key), said)
            return dequantise_packed(tensor, scale, said[:2], grid, placement.name).to(self.dtype)
        return dequantise_fp8(tensor, scale, self._block, self.dtype, placement.name)

    def _said(self, placement: Placement) -> tuple[int, ...]:
        """What lies beside a packed weight: its rows, its columns and, in the own form, its bits."""
        return tuple(self.checkpoint.read(placement.weight + "_shape").tolist())

    def _shape(self, placement: Placement) -> tuple[int, ...]:
        """The shape of a weight, packed, factored or plain."""
        shape = self.checkpoint.info(placement.name).shape
        if placement.suffix == FACTORED_SUFFIX:
            return (shape[0], *self.checkpoint.info(placement.weight + RIGHT).shape[1:])
        return self._said(placement)[:2] if placement.suffix == PACKED_SUFFIX else shape

    def _stack(self, key: str, group: list[Placement], scales: dict[str, str], target: torch.Tensor) -> torch.Tensor:
        """A fused parameter made of one tensor (or two, laid one under the other) an expert."""
        dtype = self._dtype(key, target)
        out = self._take(target.shape, dtype)
        sources = group[0].sources or [""]
        turned = group[0].converter is None and self._transposed(key)  # packed by moekit: rows are outputs
        widths = {x.pattern: self.checkpoint.info(x.name).shape[0] for x in group}
        constants = self._constants_of(key)
        if len(group) != (target.shape[0] - len(constants)) * len(sources) or (
            len(sources) > 1 and sum(widths.values()) != target.shape[1]
        ):
            raise CheckpointError(
                "experts on disk do not fill the model's parameter",
                where=key,
                expected=list(target.shape),
                got=f"{len(group)} tensors",
            )
        for expert in constants:
            out[expert].zero_()
        starts, position = {}, 0
        for pattern in sources:
            starts[pattern] = position
            position += widths[pattern]
        for placement in group:
            info = self.checkpoint.info(placement.name)
            part = out[placement.expert]
            if len(sources) > 1:
                part = part[starts[placement.pattern] : starts[placement.pattern] + widths[placement.pattern]]
            part = part.T if turned else part
            if part.shape != (shape := self._shape(placement)):
                raise _shape_error(placement.name, part.shape, shape)
            if dtype == DTYPES[info.dtype] and part.is_contiguous() and not placement.suffix:
                self.checkpoint.read_into(info, part)
            else:
                part.copy_(self._numbers(placement, scales))
        return out

    def _constants_of(self, key: str) -> dict[int, str]:
        """The experts that a parameter has no weights of, for constants stand for them."""
        layer = self.understanding.layout.by_index.get(self._layer_of(key))
        ours = layer is not None and key.startswith(layer.experts_path + ".")
        return self._constants.get(layer.index, {}) if layer and ours else {}

    def _transposed(self, key: str) -> bool:
        return self.expert_form(key.rpartition(".")[0]).transposed

    def _fit(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        target = self._meta.get(key)
        if target is None:
            return tensor
        if tensor.shape != target.shape:
            raise _shape_error(key, target.shape, tensor.shape)
        return tensor.to(self._dtype(key, target)).contiguous()

    def _dtype(self, key: str, target: torch.Tensor) -> torch.dtype:
        return next((dtype for pattern, dtype in self._plan if pattern.search(key)), target.dtype)

    def _take(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        spare = self._spare[(tuple(shape), dtype)]
        return spare.pop() if spare else torch.empty(shape, dtype=dtype)

    def attach(self, index: int, tensors: dict[str, torch.Tensor]) -> None:
        """Put what `read` returned into the model.

        Raises:
            CheckpointError: a parameter of this layer stays empty.
        """
        for key, tensor in tensors.items():
            if not is_constant(key):
                self._set(key, tensor.to(self.device, non_blocking=True))
        if index == OUTER:
            self.model.tie_weights()
            return
        names = self._constants.get(index, {})
        if vectors := {expert: tensors[name].to(self.device) for expert, name in names.items() if name in tensors}:
            layer = self.understanding.layout.by_index[index]
            experts, router = (self.model.get_submodule(x) for x in (layer.experts_path, layer.router_path))
            self._take_away[index] = self._family.place_constants(experts, router, vectors)
        empty = [
            key
            for key in self._names(index)
            if self.model.get_submodule(key.rpartition(".")[0])
            ._parameters.get(key.rpartition(".")[2], _NOTHING)
            .is_meta
        ]
        if empty:
            raise CheckpointError(
                "a parameter is not on disk",
                where=f"{self.checkpoint.path}: {empty[0]}",
                fix="the checkpoint is incomplete",
            )

    def detach(self, index: int, tensors: dict[str, torch.Tensor]) -> None:
        """Empty the layer again; the CPU memory of its experts is used for a later layer."""
        self._take_away.pop(index, lambda: None)()
        for key, tensor in tensors.items():
            if key in self._meta:
                self._set(key, self._meta[key])
                if tensor.dim() == 3 and tensor.device.type == "cpu":
                    self._spare[(tuple(tensor.shape), tensor.dtype)].append(tensor)
        if index == OUTER:
            self.model.tie_weights()  # else a tied head would keep the embedding
        trim()  # else statistics, which outlive a layer, would keep the heap growing from layer to layer

    def _names(self, index: int) -> list[str]:
        prefix = f"{self.layers_path}.{index}."
        return [key for key in self._meta if key.startswith(prefix)]

    def _set(self, key: str, tensor: torch.Tensor) -> None:
        path, _, name = key.rpartition(".")
        module = self.model.get_submodule(path)
        if name in module._parameters:
            module._parameters[name] = (
                nn.Parameter(tensor, requires_grad=False) if not isinstance(tensor, nn.Parameter) else tensor
            )
        else:
            module._buffers[name] = tensor


_NOTHING = torch.empty(0)


def _shape_error(name: str, expected: Iterable[int], got: Iterable[int]) -> CheckpointError:
    return CheckpointError(
        "a tensor has not the shape that config.json asks for",
        where=name,
        expected=list(expected),
        got=list(got),
        fix="config.json and weights belong to different models",
    )


def _fp8_block(config: dict) -> tuple[int, int]:
    settings = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config") or {}
    rows, columns = settings.get("weight_block_size") or (128, 128)
    return rows, columns
