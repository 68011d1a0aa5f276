"""How a checkpoint's weights are packed as whole numbers, from its config: compressed-tensors, or moekit's own form.

Stock transformers reads `pack-quantized` of compressed-tensors: symmetric codes on the grid `whole`, one width for all
experts of a model. The own form (docs/packed-format.md) has a width for each matrix, beside its shape, and the grid
`half`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from moekit.checkpoint.grid import Grid
from moekit.errors import ModelError

OWN, OWN_VERSION = "moekit", 1
MIXED = "int-mixed"
WIDTHS = range(2, 9)  # bits that `pack-quantized` has more than one level on either side for
PACKED = frozenset({MIXED, *(f"int{bits}" for bits in WIDTHS)})  # forms that stock transformers loads


def in_own_form(folder: Path) -> bool:
    """Whether a folder's weights are in moekit's own form, whose files have names of their own for that reason: stock
    transformers finds no weights there.
    """
    return any(folder.glob(f"{OWN}*.safetensors"))


@dataclass(frozen=True)
class Packing:
    """How packed weights are to be read.

    Attributes:
        name: OWN or a member of `PACKED`.
        groups: patterns of module names with the bits of each, first match counts; none in the own form.
    """

    name: str
    groups: tuple[tuple[tuple[str, ...], int], ...] = ()

    @property
    def bits(self) -> int:
        """Bits of every packed weight; 0 where they differ."""
        widths = {bits for _, bits in self.groups}
        return widths.pop() if len(widths) == 1 else 0

    def grid(self, names: tuple[str, ...], shape: tuple[int, ...]) -> Grid:
        """The grid of a packed weight.

        Args:
            names: its name on disk, and others by which groups may know it.
            shape: what `_shape` beside it says: rows, columns and, in the own form, bits.

        Raises:
            ModelError: no group of the config tells its bits, or they are none that there are.
        """
        if self.name == OWN:
            if len(shape) == 3 and 1 <= shape[2] <= 8:
                return Grid(shape[2], half=True)
            raise ModelError(
                "a packed weight does not say its bits", where=names[0], expected="1 to 8", got=list(shape)
            )
        modules = [x.removesuffix(".weight") for x in names]
        for targets, bits in self.groups:
            if self.bits or any(_matches(target, module) for target in targets for module in modules):
                return Grid(bits, half=False)
        raise ModelError(
            "no config group says how many bits this weight has",
            where=names[0],
            got=[list(targets) for targets, _ in self.groups],
            fix="check quantization_config in config.json",
        )


def _matches(target: str, module: str) -> bool:
    """compressed-tensors' rule, for names: a pattern after `re:`, the name itself, or a class, which all are."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target in (module, "Linear")


def quantisation_settings(config: PretrainedConfig) -> dict:
    """`quantization_config` of a config as a dict; empty when there is none."""
    settings = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    return settings if isinstance(settings, dict) else settings.to_dict() if settings else {}


def packing_of(config: PretrainedConfig) -> Packing | None:
    """How the weights of a checkpoint are packed; None where they are not.

    Raises:
        ModelError: a form of compressed-tensors, or a version of the own form, that cannot be read.
    """
    settings = quantisation_settings(config)
    method = str(settings.get("quant_method", "")).rsplit(".", 1)[-1].lower()
    if method == OWN:
        if settings.get("version") != OWN_VERSION:
            raise ModelError(
                "packed by another version of moekit",
                where="quantization_config.version",
                expected=OWN_VERSION,
                got=settings.get("version"),
                fix="upgrade moekit",
            )
        return Packing(OWN)
    return _compressed(settings) if method in ("compressed-tensors", "compressed_tensors") else None


def _compressed(settings: dict) -> Packing:
    groups = [x for x in (settings.get("config_groups") or {}).values() if isinstance(x, dict)]
    read: list[tuple[tuple[str, ...], int]] = []
    for group in groups:
        weights = group.get("weights") or {}
        bits, form = weights.get("num_bits"), group.get("format") or settings.get("format")
        plain = weights.get("type", "int") == "int" and weights.get("symmetric") and not weights.get("actorder")
        plain = plain and weights.get("strategy") in ("group", "channel") and not group.get("input_activations")
        if not plain or form != "pack-quantized" or type(bits) is not int or bits not in WIDTHS:
            break
        read.append((tuple(group.get("targets") or ()), bits))
    if not groups or len(read) < len(groups) or settings.get("format") not in ("pack-quantized", "mixed-precision"):
        weights = groups[len(read) if len(read) < len(groups) else 0].get("weights") if groups else {}
        raise ModelError(
            "this form of compressed-tensors is not supported",
            where="quantization_config",
            expected="pack-quantized: config groups of symmetric integers of 2 to 8 bits by group or channel",
            got=f"format {settings.get('format')}, {len(groups)} config groups, one with weights {weights}"[:400],
            fix="use the unquantised checkpoint and quantise the result",
        )
    widths = {bits for _, bits in read}
    return Packing(f"int{read[0][1]}" if len(widths) == 1 else MIXED, tuple(read))
