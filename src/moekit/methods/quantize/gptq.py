"""GPTQ for experts: each projection of each expert is rounded with the second moments of the inputs that reach it.

The formula is in `_gptq`, the passes over text are in `moekit.fitting.quantize`. An expert's H is that of the tokens
routed to it; gate and up projection share one, the down projection's inputs are those that the rounded gate and up
projections make. Layers are rounded in order, and a layer sees what the rounded ones before it pass on (`sequential`).

Paper: E. Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv
2210.17323.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from moekit.layout import MoELayer
from moekit.methods._registry import method
from moekit.plans import Quantize

PAPER = "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, arXiv 2210.17323"


def _way(bits: Any) -> Callable[..., Quantize]:
    def way(
        layer: MoELayer,
        size: int,
        *,
        sequential: bool = True,
        damping: float = 0.01,
        group_size: int = 128,
        format: Literal["compressed-tensors", "moekit"] = "compressed-tensors",
        attention_bits: int = 16,
        shared_bits: int = 16,
        dense_bits: int = 16,
        embedding_bits: int = 16,
        head_bits: int = 16,
    ) -> Quantize:
        """The same bits for all experts of a layer; before the passes, rounded to nearest."""
        return Quantize(layer=layer.index, bits=bits, group_size=size, scheme="fitted", format=format)

    return way


def _declared(bits: int) -> Any:
    summary = f"keeps experts' weights in {bits} bits, later columns making up for the errors of earlier ones"
    return method(f"gptq-int{bits}", kind="quantize", summary=summary, paper=PAPER)(_way(bits))


int4, int3, int2 = _declared(4), _declared(3), _declared(2)
