"""Attention weights of a live stock model, which only its eager attention computes.

Symbols: B sequences, H heads, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


def make_eager(model: nn.Module) -> None:
    """Let the model compute its attention in the plain way, so that there are weights to see, at T x T of memory."""
    model.set_attn_implementation("eager")


@contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """`make_eager` for as long as the context lasts."""
    old = model.config._attn_implementation
    make_eager(model)
    try:
        yield
    finally:
        model.set_attn_implementation(old)


@contextmanager
def watch_attention(layer: nn.Module, see: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Show `see` the attention weights [B, H, T, T] of a decoder layer; nothing where it has none (linear attention).

    Found by shape in what the layer's modules return, as stock attention modules return them second.
    """

    def look(_module: nn.Module, _args: tuple, output: object) -> None:
        for x in output if isinstance(output, tuple) else ():
            if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dim() == 4 and x.shape[-1] == x.shape[-2]:
                see(x)

    handles = [module.register_forward_hook(look) for module in layer.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
