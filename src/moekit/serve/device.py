"""The device that an engine runs on, and how much of its memory this process holds, now and at most."""

from __future__ import annotations

from contextlib import suppress

import torch

from moekit import footprint
from moekit.errors import RecipeError


def device_of(name: str) -> torch.device:
    """The device of this name.

    Raises:
        RecipeError: there is none here, or experts cannot lie there.
    """
    with suppress(RuntimeError):
        device = torch.device(name)
        if device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < torch.cuda.device_count()):
            return device
    raise RecipeError(
        "there is no such device here to run on",
        where="device",
        expected="cpu" + "".join(f", cuda:{i}" for i in range(torch.cuda.device_count())),
        got=name,
    )


def held(device: torch.device) -> int:
    """Bytes that are held: of the whole process, or by PyTorch on a GPU."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else footprint.rss()


def most_held(device: torch.device) -> int:
    """Bytes that were held at most, since the process began."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else footprint.peak_rss()


def trim(device: torch.device) -> None:
    """Give back what allocators hold and nobody uses."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    footprint.trim()
