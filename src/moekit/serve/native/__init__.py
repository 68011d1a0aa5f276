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

ISAS = ("plain", "AVX2", "AVX-512")
ACTS = ("silu", "gelu_tanh", "gelu", "relu", "relu2")  # by the number that the C file knows them by
SOURCES = ("kernels.c", "block.h", "reads.h")
COMPILE_S = 120
_ADDRESS, _LONG, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int


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
        scratch = _scratch(4 * (starts[-1] - starts[0]) * (2 * hidden + up + 2 * inner) + 256)
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

    def linear(
        self, x_NI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, threads: int
    ) -> torch.Tensor:
        """Rows times a bfloat16 weight, summed in float32 [N, O]; all contiguous."""
        rows, (outputs, inputs) = len(x_NI), weight_OI.shape
        out = torch.empty(rows, outputs, dtype=torch.bfloat16)
        self.library.moekit_linear(
            weight_OI.data_ptr(),
            None if bias_O is None else bias_O.data_ptr(),
            outputs,
            inputs,
            x_NI.data_ptr(),
            rows,
            _scratch(4 * rows * (inputs + outputs)),
            out.data_ptr(),
            self.isa,
            threads if self.parallel else 1,
        )
        return out


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
    library.moekit_linear.argtypes = [*[_ADDRESS] * 2, *[_LONG] * 2, _ADDRESS, _LONG, *[_ADDRESS] * 2, *[_INT] * 2]
    for name in ("moekit_experts", "moekit_combine", "moekit_linear"):
        getattr(library, name).restype = None
    return Native(file, int(library.moekit_isa()), parallel, library)
