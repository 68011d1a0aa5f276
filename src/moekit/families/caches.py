"""Caches of keys and values (and whatever else a family's layers keep) of several texts, put together and taken apart.

Texts of a batch end in the same column: shorter ones are padded on the left, and an attention mask hides the padding.
That is right for layers that attend; layers with a recurrent state keep one for each row, and need no padding at all.
A family whose layers keep something else fails or gives other numbers: `moekit.serve.batching` tries it out first.

Symbols: B rows, H heads, L columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

COLUMNS = {"keys": -2, "values": -2, "indexer_keys": 1}  # what has a column for each token, and in which dimension
LENGTH = "cumulative_length"  # tokens that a layer with a window has seen
ROOM = "_moekit_room"  # tensors with room for more columns, of which keys and values are the first ones
ROOM_COLUMNS = 16  # stock caches are copied for each token; a joined one for each so many


class RoomyLayer(DynamicLayer):
    """The stock layer with room for the next columns."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple:
        """Put columns behind the others; keys and values [B, H, L, ...] with them."""
        self.keys, self.values = self._put("keys", key_states), self._put("values", value_states)
        return self.keys, self.values

    def reserve(self, columns: int) -> None:
        """Have room for at least one more column; if there is none, for so many."""
        rooms = self.__dict__.setdefault(ROOM, {})
        for name in ("keys", "values"):
            old, room = getattr(self, name), rooms.get(name)
            length = old.shape[-2]
            if room is None or room.shape[-2] <= length or room.data_ptr() != old.data_ptr():
                room = rooms[name] = old.new_empty(*old.shape[:-2], length + columns, old.shape[-1])
                room[..., :length, :] = old

    def rooms(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values with the room behind them, after `reserve` [B, H, R, ...]."""
        return self.__dict__[ROOM]["keys"], self.__dict__[ROOM]["values"]

    def grow(self) -> None:
        """One more column has been written behind the others."""
        size = self.keys.shape[-2] + 1
        keys, values = self.rooms()
        self.keys, self.values = keys.narrow(-2, 0, size), values.narrow(-2, 0, size)

    def _put(self, name: str, new: torch.Tensor) -> torch.Tensor:
        old, rooms = getattr(self, name), self.__dict__.setdefault(ROOM, {})
        room, length = rooms.get(name), old.shape[-2]
        size = length + new.shape[-2]
        if room is None or room.shape[-2] < size:
            room = old.new_empty(*old.shape[:-2], size + ROOM_COLUMNS, old.shape[-1])
            room[..., :length, :] = old
            rooms[name] = room
        room[..., length:size, :] = new
        return room[..., :size, :]


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of everything that a cache holds."""
    held = [value for layer in cache.layers for name, value in vars(layer).items() if name != ROOM]
    return sum(x.nbytes for x in _tensors(held))


def join(caches: Sequence[DynamicCache]) -> DynamicCache:
    """One cache of several, whose rows follow each other; the given ones are used up.

    Args:
        caches: of texts of any lengths, [B_i, ...] each.

    Returns:
        [sum of B_i, ...], padded with zeros on the left to the longest.
    """
    first = caches[0]
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        for layer in layers:
            vars(layer).pop(ROOM, None)
        roomy, rooms = type(layers[0]) in (DynamicLayer, RoomyLayer) and _filled(layers[0].keys), {}
        for name in list(vars(layers[0])):  # one after the other: what there is of a name is freed with it
            values = [vars(layer)[name] for layer in layers]
            for layer in layers:
                vars(layer)[name] = None
            if name in COLUMNS and _filled(values[0]):
                length = max(x.shape[COLUMNS[name]] for x in values if _filled(x))
                rooms[name] = _padded(values, COLUMNS[name], length, ROOM_COLUMNS if roomy else 0)
                values = [rooms[name].narrow(COLUMNS[name], 0, length)]
            vars(layers[0])[name] = _combine(name, values)
        if roomy:
            layers[0].__class__ = RoomyLayer
            vars(layers[0])[ROOM] = rooms
    return first


def keep(cache: DynamicCache, rows: Sequence[int], columns: int) -> None:
    """Leave only some rows of a cache, and of padding only what the longest of them needs.

    Args:
        cache: [B, ...], changed in place.
        rows: that stay, in their new order.
        columns: of the longest of them.
    """
    index = torch.tensor(rows)
    for layer in cache.layers:
        vars(layer).pop(ROOM, None)
        for name, value in vars(layer).items():
            if name == LENGTH:
                setattr(layer, name, columns)
            elif name in COLUMNS and _filled(value):
                dim = COLUMNS[name]
                count = min(value.shape[dim], columns)
                setattr(layer, name, value.narrow(dim, value.shape[dim] - count, count)[index])
            else:
                setattr(layer, name, _changed(value, lambda x: x[index] if x.dim() else x))


def stretch(cache: DynamicCache, rows: int, columns: int) -> None:
    """Repeat what a cache of one text holds until it is as large as one of so many long texts; for measuring memory.

    Args:
        cache: [1, ...], changed in place.
        rows: of the new cache.
        columns: of each of them; layers with a window keep what fits in it.
    """
    for layer in cache.layers:
        size = min(columns, getattr(layer, "sliding_window", columns))
        for name, value in vars(layer).items():
            if name in COLUMNS and _filled(value):
                places = torch.arange(size) % value.shape[COLUMNS[name]]
                value = value.index_select(COLUMNS[name], places)
            if name == LENGTH:
                setattr(layer, name, columns)
            else:
                setattr(layer, name, _changed(value, lambda x: x.repeat_interleave(rows, 0) if x.dim() else x))


def _filled(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() > 0


def _combine(name: str, values: list[Any]) -> Any:
    first = values[0]
    if name == LENGTH:
        return max(values)
    if isinstance(first, dict):
        return {key: _combine(name, [x[key] for x in values]) for key in first}
    if len(values) == 1 or not _filled(first) or first.dim() == 0:
        return first
    return torch.cat(values)


def _padded(values: list[torch.Tensor], dim: int, length: int, room: int) -> torch.Tensor:
    """Rows of all values, zeros before shorter ones, and columns behind them that nothing is written into yet."""
    shape = list(values[0].shape)
    shape[0], shape[dim] = sum(len(x) for x in values), length + room
    whole, row = values[0].new_empty(shape), 0
    for x in values:
        rows, padding = whole[row : row + len(x)], length - x.shape[dim]
        rows.narrow(dim, 0, padding).zero_()
        rows.narrow(dim, padding, x.shape[dim]).copy_(x)
        row += len(x)
    return whole


def _changed(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, dict):
        return {key: _changed(x, change) for key, x in value.items()}
    return change(value) if _filled(value) else value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, dict):
        for x in value.values():
            yield from _tensors(x)
    elif isinstance(value, list | tuple):
        for x in value:
            yield from _tensors(x)
    elif isinstance(value, torch.Tensor):
        yield value
