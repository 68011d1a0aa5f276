"""Kernels in C for decoding: the experts of a layer in one call, on numbers packed as a store has them.

The C file is compiled once for each machine, with the C compiler that stands there (`$CC` or `cc`), into the user's
cache, when it is first needed; docs/adr/0010-native-kernels.md says why. What the CPU has is asked when it runs, so a
cache that several machines share is safe. Without a compiler, or with `MOEKIT_NATIVE=0`, PyTorch computes.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

ISAS = ("plain", "AVX2", "AVX-512", "AVX-512 BF16")
ACTS = ("silu", "gelu_tanh", "gelu", "relu", "relu2")  # by the number that the C file knows them by
SOURCES = ("kernels.c", "block.h", "token.h", "reads.h")
COMPILE_S = 120
_ADDRESS, _LONG, _INT, _DOUBLE = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_double


class Weight(ctypes.Structure):
    """One matrix as kernels know it; the tensors that it points to must stay where they are. `outputs` 0: none."""

    _fields_ = (
        *((name, _ADDRESS) for name in ("q", "scale", "bias")),
        *((name, ctypes.c_int64) for name in ("bits", "group", "outputs", "inputs")),
    )


class LayerParts(ctypes.Structure):
    """One decoder layer, as token.h describes it."""

    _fields_ = (
        *((name, _ADDRESS) for name in ("norm1", "norm2")),
        *((name, Weight) for name in "qkvo"),
        *((name, _ADDRESS) for name in ("q_norm", "k_norm")),
        *((name, ctypes.c_int64) for name in ("q_width", "k_width")),
        ("router", Weight),
        *((name, _ADDRESS) for name in ("correction", "table")),
        *((name, Weight) for name in ("gate", "up", "down", "shared_gate")),
        *((name, _ADDRESS) for name in ("keys", "values")),
        ("room", ctypes.c_int64),
    )


_WHOLE = [
    "hidden",
    "heads",
    "kv_heads",
    "head",
    "rotary",
    "interleaved",
    "norm_kind",
    "experts",
    "top_k",
    "inner",
    "gated",
    "act",
    "shared_act",
    "score",
    "renormalised",
    "round_weights",
]


class ModelParts(ctypes.Structure):
    """What the layers of a decoder have in common, as token.h describes it."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _WHOLE),
        *((name, _DOUBLE) for name in ("eps", "head_eps", "scaling", "weight_scaling")),
        ("norm", _ADDRESS),
        ("output", Weight),
        ("widest", ctypes.c_int64),
    )


class Step(ctypes.Structure):
    """What one token needs, as token.h describes it."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("past", "begin", "end", "waiting", "finish")),
        *((name, _ADDRESS) for name in ("cos", "sin", "hidden", "chosen", "weights", "logits")),
    )


@dataclass(frozen=True)
class Native:
    """The compiled kernels.

    Attributes:
        file: the library.
        isa: instruction set in use, an index of `ISAS`.
        parallel: whether it was compiled with OpenMP.
        library: its functions.
    """

    file: Path
    isa: int
    parallel: bool
    library: ctypes.CDLL

    def experts(
        self,
        table: Sequence[int],
        starts: Sequence[int],
        tokens: Sequence[int],
        x_TD: torch.Tensor,
        sizes: tuple[int, int, int],
        gated: bool,
        act: int,
        out_PD: torch.Tensor,
        threads: int,
    ) -> None:
        """Outputs of experts, unweighted, for pairs of an expert and a token.

        Args:
            table: for each expert bits, columns that share a scale, and addresses: numbers, scales and bias (0: none)
                of the first projection, then of the second.
            starts: where each expert's pairs begin, and the end of the last one's.
            tokens: row of `x_TD` of each pair.
            x_TD: inputs, bfloat16, contiguous.
            sizes: D, rows of the first projection, columns of the second.
            gated: the first half of the first projection's rows gates the second.
            act: index of `ACTS`.
            out_PD: float32; rows `starts[0]` to `starts[-1]` are written.
            threads: to compute with.
        """
        hidden, up, inner = sizes
        scratch = _scratch((starts[-1] - starts[0]) * (6 * (hidden + inner) + 4 * up) + 256)
        self.library.moekit_experts(
            _address(table, "q"),
            _address(starts, "i"),
            len(starts) - 1,
            x_TD.data_ptr(),
            _address(tokens, "i"),
            hidden,
            up,
            inner,
            gated,
            act,
            scratch,
            out_PD.data_ptr(),
            self.isa,
            threads if self.parallel else 1,
        )

    def combine(self, out_PD: torch.Tensor, tokens: Sequence[int], weights: Sequence[float], rows: int) -> torch.Tensor:
        """Weighted sums of the pairs' outputs by token, in the order of pairs [rows, D], bfloat16."""
        width = out_PD.shape[1]
        total = torch.empty(rows, width, dtype=torch.bfloat16)
        self.library.moekit_combine(
            out_PD.data_ptr(),
            _address(tokens, "i"),
            _address(weights, "f"),
            len(tokens),
            rows,
            width,
            _scratch(4 * rows * width),
            total.data_ptr(),
        )
        return total

    def linear(self, x_NI: torch.Tensor, weight: Weight, threads: int) -> torch.Tensor:
        """Rows of bfloat16 numbers, contiguous, times a weight, summed in float32 [N, O], rounded to bfloat16."""
        rows = len(x_NI)
        out = torch.empty(rows, weight.outputs, dtype=torch.bfloat16)
        self.library.moekit_linear(
            ctypes.byref(weight),
            x_NI.data_ptr(),
            rows,
            _scratch(4 * rows * (weight.inputs + weight.outputs)),
            out.data_ptr(),
            self.isa,
            threads if self.parallel else 1,
        )
        return out

    def token(self, model: ModelParts, layers: ctypes.Array, step: Step, shared_inner: int, threads: int) -> int:
        """Run a token through layers `step.begin` to `step.end`.

        Args:
            model: what layers have in common.
            layers: of `LayerParts`.
            step: the token; its hidden state, choices and logits are written.
            shared_inner: inner width of the widest shared expert or dense layer.
            threads: to compute with.

        Returns:
            `step.end`; or the layer that waits for chosen experts whose rows of the table are empty. It goes on from
            there with `waiting` set.
        """
        threads = threads if self.parallel else 1
        place = ctypes.byref(model)
        scratch = _scratch(self.library.moekit_token_scratch(place, shared_inner, step.past, threads))
        step_at = ctypes.byref(step)
        return self.library.moekit_token(place, layers, step_at, shared_inner, scratch, self.isa, threads)


def weight_of(tensor_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> Weight:
    """A matrix [O, I] of bfloat16 or float32 numbers, contiguous, and its bias (bfloat16)."""
    bits, (outputs, inputs) = 8 * tensor_OI.itemsize, tensor_OI.shape
    return Weight(tensor_OI.data_ptr(), None, None if bias_O is None else bias_O.data_ptr(), bits, 0, outputs, inputs)


def _address(numbers: Sequence[float], code: str) -> ctypes.Array:
    kinds: dict[str, Any] = {"q": ctypes.c_int64, "i": ctypes.c_int32, "f": ctypes.c_float}
    return (kinds[code] * len(numbers)).from_buffer(array(code, numbers))


_work: list[torch.Tensor] = [torch.empty(0, dtype=torch.uint8)]


def _scratch(size: int) -> int:
    if _work[0].numel() < size:
        _work[0] = torch.empty(size, dtype=torch.uint8)
    return _work[0].data_ptr()


@lru_cache
def native() -> tuple[Native | None, str]:
    """(The kernels, compiled where that was not yet done; why there are none, or "")."""
    if os.environ.get("MOEKIT_NATIVE", "1") == "0":
        return None, "switched off by MOEKIT_NATIVE=0"
    compiler = shutil.which(os.environ.get("CC") or "cc")
    key = hashlib.sha256(b"".join((Path(__file__).parent / name).read_bytes() for name in SOURCES))
    name = f"kernels-{platform.system()}-{platform.machine()}-{key.hexdigest()[:16]}".lower()
    reasons = []
    for parallel in (True, False):
        file = cache_folder() / f"{name}-{'parallel' if parallel else 'serial'}.so"
        try:
            if not file.is_file():
                if compiler is None:
                    return None, "there is no C compiler (cc) to make them with"
                _compile(compiler, file, parallel)
            return _load(file, parallel), ""
        except (OSError, subprocess.SubprocessError) as error:
            reasons.append(str(error))
    return None, f"they could not be made: {reasons[-1]}"


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moekit"


def _compile(compiler: str, file: Path, parallel: bool) -> None:
    """Compile and link; OpenMP's functions are left to the library that torch has loaded already.

    Raises:
        OSError: no place to write to.
        subprocess.SubprocessError: the compiler failed.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix="making-") as folder:
        made, linked = f"{folder}/kernels.o", f"{folder}/kernels.so"
        flags = ["-O3", "-fPIC", "-Wno-psabi", *(["-fopenmp"] if parallel else [])]
        source = str(Path(__file__).parent / SOURCES[0])
        for command in (
            [compiler, *flags, "-c", source, "-o", made],
            [compiler, "-shared", made, "-lm", "-o", linked],
        ):
            subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_S)
        os.replace(linked, file)


def _load(file: Path, parallel: bool) -> Native:
    """OSError when it does not load."""
    library = ctypes.CDLL(str(file), mode=os.RTLD_NOW)
    library.moekit_isa.restype = _INT
    shapes = [*[_LONG] * 3, *[_INT] * 2]
    library.moekit_experts.argtypes = [*[_ADDRESS] * 2, _INT, *[_ADDRESS] * 2, *shapes, *[_ADDRESS] * 2, *[_INT] * 2]
    library.moekit_combine.argtypes = [_ADDRESS, _ADDRESS, _ADDRESS, *[_LONG] * 3, _ADDRESS, _ADDRESS]
    library.moekit_linear.argtypes = [*[_ADDRESS] * 2, _LONG, *[_ADDRESS] * 2, *[_INT] * 2]
    library.moekit_token_scratch.argtypes = [_ADDRESS, _LONG, _LONG, _INT]
    library.moekit_token.argtypes = [*[_ADDRESS] * 3, _LONG, _ADDRESS, _INT, _INT]
    for name in ("moekit_experts", "moekit_combine", "moekit_linear"):
        getattr(library, name).restype = None
    library.moekit_token_scratch.restype = library.moekit_token.restype = _LONG
    return Native(file, int(library.moekit_isa()), parallel, library)
