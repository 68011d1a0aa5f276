"""Where statistics come from: model, data, settings, versions."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence

import torch

from moekit import __version__
from moekit.families.model import Model


def manifest_of(model: Model, data: dict, groups: Sequence[str], dtype: torch.dtype) -> dict:
    """Where statistics come from, as plain data; `data` is what `Dataset.describe` says."""
    return {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "layout": model.layout.to_dict(),
        "data": data,
        "groups": sorted(groups),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of what decides numbers."""
    return {
        "moekit": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    }
