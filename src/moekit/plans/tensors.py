"""Numbers that a plan carries: new weights that were computed from text, a file a layer, beside the plan's JSON."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from moekit.errors import PlanError

if TYPE_CHECKING:
    import torch

MANIFEST = "tensors.json"


class PlanTensors:
    """A folder of safetensors files, one a layer, each complete from the moment that it has its name.

    What was written stays: a pass that was interrupted asks `has` and goes on with the next layer.

    Args:
        folder: where the files lie; made when the first is written.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def _file(self, layer: int) -> Path:
        return self.folder / ("outer.safetensors" if layer < 0 else f"layer-{layer:05d}.safetensors")

    def _sums(self) -> dict[str, str]:
        try:
            return json.loads((self.folder / MANIFEST).read_text())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise PlanError("the plan's tensors are damaged", where=self.folder / MANIFEST, got=str(error)) from None

    def has(self, layer: int) -> bool:
        """Whether the tensors of a layer (-1: those of no decoder layer) are written."""
        return self._file(layer).is_file() and self._file(layer).name in self._sums()

    def write(self, layer: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep the tensors of one layer, in place of those that lie there.

        Args:
            layer: decoder layer index; -1 for what is in no decoder layer.
            tensors: by name, of any dtype and shape.
        """
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        file = self._file(layer)
        partial = file.with_name(file.name + ".partial")
        save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, partial)
        with partial.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        os.replace(partial, file)
        manifest = self.folder / (MANIFEST + ".partial")
        manifest.write_text(json.dumps(self._sums() | {file.name: digest}, indent=1))
        os.replace(manifest, self.folder / MANIFEST)

    def names(self, layer: int) -> tuple[str, ...]:
        """Names of the tensors of a layer, sorted.

        Raises:
            PlanError: the file is missing or damaged.
        """
        with self._open(layer) as file:
            return tuple(sorted(file.keys()))

    def read(self, layer: int, name: str) -> torch.Tensor:
        """One tensor.

        Raises:
            PlanError: the file is missing or damaged, or has no such tensor.
        """
        with self._open(layer) as file:
            if name not in set(file.keys()):
                raise PlanError("the plan's tensors lack one", where=f"{self._file(layer)}: {name}")
            return file.get_tensor(name)

    def _open(self, layer: int):  # type: ignore[no-untyped-def]
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self._file(layer), "pt")
        except (OSError, SafetensorError) as error:
            raise PlanError(
                "the numbers that this plan carries are missing or damaged",
                where=self._file(layer),
                got=str(error)[:200],
                fix="keep the folder of tensors beside the plan, or make the plan again",
            ) from None

    @property
    def digest(self) -> str:
        """What the files held when they were written, in 16 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self._sums(), sort_keys=True).encode()).hexdigest()[:16]
