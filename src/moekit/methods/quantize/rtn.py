"""Round to nearest: every weight becomes the nearest of 2^b evenly spaced numbers; no text is needed to decide.

    s = max |W| / (2^(b-1) - 1)   for a group of columns of one row
    q = round(W / s)

The weights are rounded when the model is written (`moekit.apply.quantize`).
"""

from __future__ import annotations

from moekit.layout import MoELayer
from moekit.methods._registry import method
from moekit.plans import Quantize


@method("rtn-int8", kind="quantize", summary="keeps experts' weights in 8 bits, rounded to nearest")
def int8(layer: MoELayer, size: int, *, group_size: int = 128) -> Quantize:
    """8 bits for all experts of a layer."""
    return Quantize(layer=layer.index, bits=8, group_size=size)


@method("rtn-int4", kind="quantize", summary="keeps experts' weights in 4 bits, rounded to nearest")
def int4(layer: MoELayer, size: int, *, group_size: int = 128) -> Quantize:
    """4 bits for all experts of a layer."""
    return Quantize(layer=layer.index, bits=4, group_size=size)
