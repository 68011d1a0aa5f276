"""Round to nearest: every weight becomes the nearest of 2^b evenly spaced numbers; no text is needed to decide.

    s = max |W| / (2^(b-1) - 1)   for a group of columns of one row; with `fitted`, the s of least squared error
    q = round(W / s)

The weights are rounded when the model is written (`moekit.apply.quantize`). Levels as compressed-tensors has them; in
moekit's own form they lie half a step further out (docs/packed-format.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from moekit.layout import MoELayer
from moekit.methods._registry import method
from moekit.plans import Quantize


def _way(bits: Any) -> Callable[..., Quantize]:
    def way(
        layer: MoELayer,
        size: int,
        *,
        fitted: bool = False,
        group_size: int = 128,
        format: Literal["compressed-tensors", "moekit"] = "compressed-tensors",
        attention_bits: int = 16,
        shared_bits: int = 16,
        dense_bits: int = 16,
        embedding_bits: int = 16,
        head_bits: int = 16,
    ) -> Quantize:
        """The same bits for all experts of a layer."""
        scheme: Any = "fitted" if fitted else "rtn"
        return Quantize(layer=layer.index, bits=bits, group_size=size, scheme=scheme, format=format)

    return way


int8 = method("rtn-int8", kind="quantize", summary="keeps experts' weights in 8 bits, rounded to nearest")(_way(8))
int4 = method("rtn-int4", kind="quantize", summary="keeps experts' weights in 4 bits, rounded to nearest")(_way(4))
int3 = method("rtn-int3", kind="quantize", summary="keeps experts' weights in 3 bits, rounded to nearest")(_way(3))
int2 = method("rtn-int2", kind="quantize", summary="keeps experts' weights in 2 bits, rounded to nearest")(_way(2))
