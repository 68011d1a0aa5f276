"""A model's routers, asked about hidden states; and what they are given as the model reads a trace's texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property

import numpy as np
import torch
from torch import nn

from moekit.errors import ModelError
from moekit.families.model import Model
from moekit.families.seam import RouterTap, rows_of
from moekit.layout import Layout
from moekit.serve.routes import Routes
from moekit.view import MoEView

LIKE = 0.9  # of random hidden states must be ranked alike; in 16 bits some are near a tie


class Routers:
    """The routers of a live model.

    Args:
        model: stock, with filled routers.
        layout: its layout.
    """

    def __init__(self, model: nn.Module, layout: Layout):
        self.view, self.layers = MoEView(model, layout), layout.routed
        self.experts = max(x.num_experts for x in self.layers)

    @torch.inference_mode()
    def scores(self, layer: int, hidden_TD: torch.Tensor) -> np.ndarray:
        """What a router thinks of its experts [T, E]: raw logits, those that it would choose above all others.

        Raises:
            ModelError: the router cannot be asked with hidden states alone.
        """
        moe = self.layers[layer]
        tap = RouterTap(moe.router_width)
        try:
            with tap:
                out = self.view.router(moe.index)(hidden_TD)
            weights_TK, ids_TK = self.view.family.routing(out)
        except TypeError as error:
            raise ModelError(
                "this family's routers need more than hidden states",
                where=moe.router_path,
                got=str(error)[:120],
                fix="choose another predictor",
            ) from None
        logits_TE = torch.full((len(ids_TK), self.experts), -torch.inf)
        if tap.logits is not None:
            logits_TE[:, : moe.num_experts] = tap.logits.reshape(len(ids_TK), -1)[:, : moe.num_experts].float()
        chosen = self.view.family.chosen(moe, ids_TK, weights_TK).long()
        marks_TE = torch.zeros(len(ids_TK), self.experts + 1).scatter_(1, chosen.clamp_max(self.experts), 1e6)
        return (logits_TE.clamp_min(-1e5) + marks_TE[:, :-1]).numpy()

    @cached_property
    def rows(self) -> list[torch.Tensor | None]:
        """By MoE layer, rows [E, D] whose products with hidden states rank the experts as the router does.

        Found by asking it about random hidden states; None where there are no such rows.
        """
        return [self._rows(number) for number in range(len(self.layers))]

    @torch.inference_mode()
    def _rows(self, number: int) -> torch.Tensor | None:
        moe = self.layers[number]
        place = rows_of(self.view.router(moe.index), moe.router_width)
        rows = None if place is None else place[0][place[1]]
        if rows is None or len(rows) != moe.num_experts:
            return None
        hidden_TD = torch.randn(32, rows.shape[1], generator=torch.Generator().manual_seed(0)).to(rows)
        try:
            _, ids_TK = self.view.family.routing(self.view.router(moe.index)(hidden_TD))
        except TypeError:
            return None
        mine_TK = (hidden_TD @ rows.T).topk(ids_TK.shape[1]).indices
        same = (mine_TK.sort().values == ids_TK.sort().values).all(1)
        return rows if same.float().mean() > LIKE else None

    @contextmanager
    def watched(self, given: dict[int, torch.Tensor], chosen: dict[int, torch.Tensor]) -> Iterator[None]:
        """Note what the routers are given [T, D], and choose [T, K], by MoE layer, while the model runs."""
        handles = []
        for number, moe in enumerate(self.layers):

            def note(_module: nn.Module, args: tuple, out: tuple, number: int = number) -> None:
                given[number] = args[0].reshape(-1, args[0].shape[-1])
                weights_TK, ids_TK = self.view.family.routing(out)
                chosen[number] = self.view.family.chosen(self.layers[number], ids_TK, weights_TK)

            handles.append(self.view.router(moe.index).register_forward_hook(note))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def recorded(model: Model, routes: Routes, texts: int | None = None) -> tuple[Routes, Routers]:
    """The same texts, read again by the model: with what its routers are given, and the choices of this very run.

    Args:
        model: from `moekit.open`; loaded as a whole.
        routes: of a trace.
        texts: at most so many, evenly spread; None: all.

    Returns:
        The routes with hidden states, and the routers.
    """
    if texts is not None and texts < len(routes.starts):
        routes = routes.texts(np.unique(np.linspace(0, len(routes.starts) - 1, texts).round().astype(int)))
    loaded = model.load(model.dtype)
    routers = Routers(loaded, model.layout)
    return record(routers, routes, lambda ids_1T: loaded(input_ids=ids_1T, use_cache=False)), routers


@torch.inference_mode()
def record(routers: Routers, routes: Routes, run: Callable[[torch.Tensor], object]) -> Routes:
    """The same texts as `run` reads them, with what the routers are given.

    Args:
        routers: of the model that `run` runs.
        routes: the texts.
        run: given the token ids of a text [1, T].
    """
    ids = np.full_like(routes.ids, routes.experts)
    parts: dict[int, list[torch.Tensor]] = {number: [] for number in range(routes.layers)}
    for start, end in zip(routes.starts, routes.ends, strict=True):
        given: dict[int, torch.Tensor] = {}
        chosen: dict[int, torch.Tensor] = {}
        with routers.watched(given, chosen):
            run(torch.as_tensor(routes.tokens[start:end].astype(np.int64))[None])
        for number in range(routes.layers):
            parts[number].append(given[number].clone())
            own = chosen[number].numpy()
            ids[start:end, number, : own.shape[1]] = np.minimum(own, routes.experts)
    hidden = {number: torch.cat(x) for number, x in parts.items()}
    return Routes(ids, routes.experts, routes.tokens, routes.starts, routes.domains, hidden)
