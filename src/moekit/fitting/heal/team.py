"""One process, or several under torchrun: who they are, how they add up, how a model is laid over them.

    torchrun --nproc-per-node 8 -m moekit compress recipe.yaml --device cuda

The first process carries out the recipe; the others wait until it has a model to tune, tune it with it, and wait
again. What does not learn is sharded by layers with PyTorch's FSDP2 (`fully_shard`) and gathered a layer at a time;
what learns (router rows: little) is whole in every process, its gradients are summed. All need the same file system.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from moekit.families.loader import OUTER, Loader

PATIENCE = timedelta(days=7)  # measuring a large model may take long, and the others wait meanwhile


@dataclass(frozen=True)
class Team:
    """The processes that tune together.

    Attributes:
        rank: number of this one.
        size: of them.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> Team:
        """Those that have been gathered; else this one alone."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def device(self, name: str) -> str:
        """This process's own device of a kind: each takes a GPU of its own."""
        local = int(os.environ.get("LOCAL_RANK", "0"))
        return f"cuda:{local}" if name == "cuda" and self.size > 1 else name

    def add(self, tensors: list[torch.Tensor]) -> None:
        """Sum tensors over all processes, in place."""
        if self.size > 1:
            for x in tensors:
                dist.all_reduce(x)

    def share(self, items: list[int], at_once: int) -> list[list[int]]:
        """This process's part of some numbers, in lists of at most `at_once`; all get as many lists, some empty."""
        mine = items[self.rank :: self.size]
        most = -(-len(items) // self.size)
        return [mine[i : i + at_once] for i in range(0, max(1, most), at_once)]

    def load(self, loader: Loader, learning: frozenset[str]) -> None:
        """Put all of a model's weights in: whole if alone, else with every decoder layer sharded over the processes.

        Args:
            loader: of the model.
            learning: keys of the parameters that stay whole.
        """
        loader.attach(OUTER, loader.read(OUTER))
        if self.size > 1:
            self._shard(loader, learning)
        for index in range(len(loader.layers)):
            tensors = loader.read(index)
            if self.size > 1:
                tensors = self._placed(loader, index, tensors, learning)
            loader.attach(index, tensors)

    def _shard(self, loader: Loader, learning: frozenset[str]) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(loader.device.type, (self.size,))
        whole = {loader.model.get_parameter(key) for key in learning}
        for layer in loader.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
        inside = {x for layer in loader.layers for x in layer.parameters()}
        outside = {x for x in loader.model.parameters() if x not in inside}
        fully_shard(loader.model, mesh=mesh, ignored_params=whole | outside)

    def _placed(
        self, loader: Loader, index: int, tensors: dict[str, torch.Tensor], learning: frozenset[str]
    ) -> dict[str, torch.Tensor]:
        """Give each sharded parameter of a layer its shard; returns what is kept whole."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        layer, prefix = loader.layers[index], f"{loader.layers_path}.{index}."
        places, shards, rest = dict(layer.named_parameters()), {}, {}
        for key, x in tensors.items():
            place = places.get(key.removeprefix(prefix))
            if isinstance(place, DTensor):
                made = distribute_tensor(x.to(loader.device), place.device_mesh, place.placements, src_data_rank=None)
                shards[key.removeprefix(prefix)] = torch.nn.Parameter(made, requires_grad=False)
            else:
                rest[key] = x
        layer.load_state_dict(shards, strict=False, assign=True)
        return rest

    def call(self, function: Callable[..., Any], order: Any) -> Any:
        """Let all processes run function(order); what this one's returned. To be called by the first."""
        if self.size > 1:
            _Work.busy = True
            dist.broadcast_object_list([(function, order)], src=0)
        found = function(order)
        _Work.busy = False
        return found


class _Work:
    """Whether the first process is in the middle of something that the others take part in."""

    busy = False


@contextmanager
def gathered(device: str = "cpu") -> Iterator[bool]:
    """Under torchrun, gather the processes: yields True in the first (and without torchrun).

    In the others it returns control, with False, when the first has left.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield True
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", timeout=PATIENCE)
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if dist.get_rank() > 0:
        while True:
            box: list[Any] = [None]
            dist.broadcast_object_list(box, src=0)
            if box[0] is None:
                break
            function, order = box[0]
            function(order)
        dist.destroy_process_group()
        yield False
        return
    try:
        yield True
    finally:
        if not _Work.busy:  # else the others wait inside the work, and torchrun ends them
            dist.broadcast_object_list([None], src=0)
            dist.destroy_process_group()
