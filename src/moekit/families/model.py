"""Model: a checkpoint that is understood and not loaded; what `moekit.open` gives."""

from __future__ import annotations

from contextlib import nullcontext, redirect_stderr
from functools import cached_property
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import psutil
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from moekit import refmoe
from moekit.checkpoint.hub import download, is_hub_id, remote_checkpoint
from moekit.checkpoint.reader import Checkpoint
from moekit.errors import ModelError, RecipeError
from moekit.families.detect import Understanding, dtype_of, understand
from moekit.families.loader import OUTER, Loader
from moekit.families.packings import OWN, PACKED
from moekit.families.stock import model_class
from moekit.layout import Layout
from moekit.markup import html_table

UNPACKER = "compressed_tensors"  # what stock transformers reads packed integers with


class Model:
    """An MoE checkpoint: its layout and its files. Nothing is loaded until something asks for weights.

    Args:
        name: what the user called it.
        checkpoint: its files (or, for a hub id, its headers).
        trust_remote_code: allow code that the checkpoint brings along.

    Raises:
        ModelError: dense, unsupported, or of a refused format.
        CheckpointError: files are missing or damaged.
    """

    def __init__(self, name: str, checkpoint: Checkpoint, trust_remote_code: bool = False):
        self.name, self.checkpoint, self.trust_remote_code = name, checkpoint, trust_remote_code
        self.understanding: Understanding = understand(checkpoint, trust_remote_code)

    @classmethod
    def open(cls, name: str | Path, *, trust_remote_code: bool = False, headers_only: bool = False) -> Model:
        """Open a local folder, a hub id, or `refmoe` (the small trained model that comes with moekit).

        Args:
            name: folder, hub id or "refmoe".
            trust_remote_code: allow code that the checkpoint brings along.
            headers_only: for a hub id, fetch config and safetensors headers instead of the weights.
        """
        if str(name) == "refmoe":
            return cls("refmoe", Checkpoint.open(refmoe.model_path()), trust_remote_code)
        path = Path(name)
        if not path.exists() and is_hub_id(str(name)):
            if headers_only:
                return cls(str(name), remote_checkpoint(str(name)), trust_remote_code)
            path = download(str(name))
        return cls(str(name), Checkpoint.open(path), trust_remote_code)

    @property
    def layout(self) -> Layout:
        """What the model is."""
        return self.understanding.layout

    @property
    def path(self) -> Path:
        """Its folder."""
        return self.checkpoint.path

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that name this model's weights (sampled)."""
        return self.checkpoint.fingerprint

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which it runs unless told otherwise."""
        return dtype_of(self.layout)

    def loader(self, dtype: torch.dtype | None = None, device: str = "cpu") -> Loader:
        """A weightless stock model with a way to fill and empty its layers one at a time."""
        check_device(device)
        return Loader(self.checkpoint, self.understanding, dtype, device, self.trust_remote_code)

    def fits(self, dtype: torch.dtype | None = None, device: str = "cpu") -> bool:
        """Whether stock transformers can load the whole model here, into half of the memory that is free."""
        check_device(device)
        at = torch.device(device)
        free = psutil.virtual_memory().available if at.type == "cpu" else torch.cuda.mem_get_info(at)[0]
        packed = self.layout.quantisation in PACKED and find_spec(UNPACKER) is not None
        params = sum(part.params for name, part in self.layout.parts.items() if name != "mtp")
        return (self.layout.quantisation is None or packed) and (dtype or self.dtype).itemsize * params < free / 2

    def load(self, dtype: torch.dtype | None = None, device: str = "cpu") -> nn.Module:
        """The whole model in memory, loaded by stock transformers, in eval mode.

        What is in moekit's own packed form, moekit loads into the stock model.

        Raises:
            ModelError: it is quantised in a way that stock transformers cannot run here.
        """
        check_device(device)
        if self.layout.quantisation == OWN:
            return self._unpacked(dtype, device)
        cls = model_class(self.understanding.config, self.trust_remote_code) or AutoModelForCausalLM
        packed = self.layout.quantisation in PACKED
        quiet = redirect_stderr(StringIO()) if packed else nullcontext()  # compressed-tensors draws bars of its own
        try:
            with quiet:
                model = cls.from_pretrained(
                    self.path,
                    dtype=self.dtype if packed else dtype or self.dtype,  # scales in another one give other numbers
                    trust_remote_code=self.trust_remote_code,
                )
                if packed:  # which it would do at the first forward
                    model.hf_quantizer.compressor.decompress_model(model)
        except (ValueError, ImportError, RuntimeError) as error:
            raise ModelError(
                "stock transformers cannot load this model here", where=self.path, got=str(error)[:500]
            ) from error
        model = model.to(dtype or self.dtype) if packed else model
        return model.to(device).eval()

    def _unpacked(self, dtype: torch.dtype | None, device: str) -> nn.Module:
        loader = self.loader(dtype, device)
        for index in (OUTER, *range(len(loader.layers))):
            loader.attach(index, loader.read(index))
        return loader.model

    def __repr__(self) -> str:
        layout = self.layout
        first = layout.layers[0]
        total = layout.total
        return (
            f"<Model {self.name}: {layout.family}, {len(layout.routed)} MoE layers x {first.num_experts} experts, "
            f"top-{first.top_k}, {total.params / 1e6:,.1f} M parameters, {total.bytes / 1e6:,.1f} MB>"
        )

    def _repr_html_(self) -> str:
        parts = [(name, x) for name, x in self.layout.parts.items() if x.bytes]
        rows = [(name, f"{x.params / 1e6:,.2f} M", f"{x.bytes / 1e6:,.1f} MB") for name, x in parts]
        return html_table(repr(self)[1:-1], ("part", "parameters", "size"), rows)


def check_device(name: str) -> None:
    """Refuse a device that torch does not know or that is not there.

    Raises:
        RecipeError: no such device.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RecipeError(
            f"there is no device {name!r}",
            where="device",
            expected="cpu, cuda or cuda:1",
            fix="leave it out for the cpu",
        ) from None
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise RecipeError(
            f"there is no device {name!r} here",
            where="device",
            expected=f"at most {count - 1}" if count else "a GPU, and a build of torch that can use it",
            got=f"{count} devices, torch {torch.__version__}",
            fix="run on the cpu (the default), or install torch for CUDA",
        )
