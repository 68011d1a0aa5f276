"""The way back: parameters of the stock model to tensors under the checkpoint's own names and shapes."""

from __future__ import annotations

import torch

from moekit.errors import PlanError
from moekit.families.loader import Loader
from moekit.families.names import Placement, convert


def to_disk(loader: Loader, layer: int, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The disk tensors that hold changed parameters of one decoder layer.

    A converter only moves numbers, so it is inverted by converting addresses: every number of the disk tensors is given
    its own, and where the addresses arrive is where the parameter's numbers came from.

    Args:
        loader: that read the layer.
        layer: decoder layer index.
        parameters: by key of the stock model.

    Returns:
        Tensors by disk name, in their disk dtype and shape.

    Raises:
        PlanError: the parameters are quantised on disk.
    """
    out: dict[str, torch.Tensor] = {}
    for placements in loader.placements(layer).values():
        keys = {key for placement in placements for key in placement.keys}
        if not keys & parameters.keys():
            continue
        if any(x.suffix for x in placements) or not all(loader.on_disk(x.name).is_floating_point for x in placements):
            raise PlanError(
                "quantised experts cannot be merged",
                where=placements[0].name,
                fix="start from the unquantised checkpoint, and quantise the result",
            )
        if placements[0].converter is None:
            flat = {placements[0].name: parameters[placements[0].key]}
        else:
            flat = _scattered(loader, placements, parameters)
        out |= {
            x.name: flat[x.name].reshape(loader.checkpoint.info(x.name).shape).to(loader.on_disk(x.name))
            for x in placements
        }
    return out


def _scattered(
    loader: Loader, placements: list[Placement], parameters: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    shapes = {x.name: torch.Size(loader.checkpoint.info(x.name).shape) for x in placements}
    sizes = [shape.numel() for shape in shapes.values()]
    total = sum(sizes)
    every = torch.arange(total, dtype=torch.int32 if total < 1 << 31 else torch.int64)  # a layer has many numbers
    addresses = {name: x.view(shapes[name]) for name, x in zip(shapes, every.split(sizes), strict=True)}
    arrived = convert(placements[0].converter, placements, addresses, loader.model)
    first = next(iter(parameters.values()))
    flat = torch.empty(total, dtype=first.dtype)
    for key, where in arrived.items():
        flat[where.reshape(-1)] = parameters[key].reshape(-1)
    return dict(zip(shapes, flat.split(sizes), strict=True))
