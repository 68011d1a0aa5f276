"""llama.cpp by token ids, through the low-level interface of llama-cpp-python (an optional package of benchmarks).

    pip install llama-cpp-python    # compiles llama.cpp: a C++ compiler, some minutes

It must be compiled for the CPU that it runs on (the default), or ratios flatter moekit.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def installed() -> bool:
    """Whether llama-cpp-python is there."""
    return importlib.util.find_spec("llama_cpp") is not None


class Llama:
    """One sequence of a model.

    Args:
        path: a GGUF.
        context: tokens, at most.
        threads: that compute.
        mmap: map the file instead of reading it whole.
    """

    def __init__(self, path: str | Path, context: int = 2048, threads: int = 1, mmap: bool = True):
        import llama_cpp

        self.api = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.use_mmap, settings.n_gpu_layers = mmap, 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = context
        params.n_ubatch = min(512, context)
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def feed(self, ids: Sequence[int]) -> np.ndarray:
        """Logits [V] after these tokens, which follow those fed before."""
        tokens = (self.api.llama_token * len(ids))(*ids)
        if code := self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError(f"llama_decode: {code}")
        logits = self.api.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(logits, (self.vocabulary,))

    def forget(self) -> None:
        """Begin anew."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def close(self) -> None:
        """Give the memory back."""
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)
