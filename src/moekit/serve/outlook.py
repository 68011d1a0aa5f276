"""What running a model in a given amount of memory will be like, before anything of it is loaded.

Sizes come from the config and the headers. Speeds are measured here, on matrices of the model's own sizes: reads of the
disk, products of one row with packed experts and with other matrices, and what PyTorch takes for a call. From these

    compute  =  rest / linear speed + k L r / expert speed + calls
    disk     =  (1 - hit) k L r / disk speed

k       experts of a token in each of L MoE layers; r bytes of one expert's record
rest    bytes of all other matrices that a token goes through
calls   what Python and PyTorch take beside arithmetic: for a decoder layer as long as CALLS[0] to CALLS[1] of
        PyTorch's shortest calls; 650 were measured for Qwen3-MoE

and a token takes at best max(compute, disk), all reads hidden behind arithmetic, at worst their sum. Which experts a
text asks for is not known beforehand, so `hit` is a range: at worst all experts are needed alike often (then it is the
share of them that fits), at best the e-th most used of a layer is needed in proportion to e ** -SKEW (a law of Zipf's),
and the most used ones stay. Texts lie between: see docs/verbs/plan-run.md for what was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from math import ceil
from pathlib import Path

import psutil
import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moekit.families.caches import cache_bytes
from moekit.families.detect import dtype_of
from moekit.families.family import family_of
from moekit.families.resident import empty_cache, experts_run_by, skeleton
from moekit.layout import Layout
from moekit.serve.cache import READERS
from moekit.serve.calibrate import few_rows_call, linear_call, sizes_of
from moekit.serve.engine import CHUNK_TOKENS, SLACK_BYTES
from moekit.serve.forms import GROUP_SIZE
from moekit.serve.machine import Disk, call_seconds, disk_speed, memory_free, quickest
from moekit.serve.store import PAGE_BYTES, ExpertStore

CALLS = (400, 1200)  # shortest calls of PyTorch: what a decoder layer takes for a token beside arithmetic
SKEW = 1.5  # at best; a cache that follows the text finds more than 1 would give: 83 to 89% with a quarter of 128
WORSE = 1.3  # of the time that reading weights takes, while other things run
BEYOND_CACHES = 96 << 20  # bytes of different experts that speeds are measured with
LEAST_SLOTS = READERS + 4
SMALL_READ = 512 << 10  # records below this are read at the speed of small reads
_NOTHING = "moekit_nothing"


@dataclass(frozen=True)
class Model:
    """Of a model, what its outlook depends on; bytes.

    Attributes:
        layers: decoder layers.
        chosen: experts of a token, in all layers together.
        experts: in all layers together.
        per_layer: experts of the largest layer.
        record: of an expert, by bits.
        rest: everything else.
        rest_read: of that, what a token goes through.
        context: keys and values of the context; None where the family's cache cannot be measured without weights.
        sizes: of an expert's matrices: D, rows of the first projection, columns of the second.
    """

    layers: int
    chosen: int
    experts: int
    per_layer: int
    record: dict[int, int]
    rest: int
    rest_read: int
    context: int | None
    sizes: tuple[int, int, int]


@dataclass(frozen=True)
class Speeds:
    """Of this machine; bytes a second.

    Attributes:
        disk: reads.
        expert: by bits, experts' matrices times one row.
        linear: other matrices times one row, by bits of the experts beside them.
        call_s: seconds of PyTorch's shortest call.
    """

    disk: Disk
    expert: dict[int, float]
    linear: dict[int, float]
    call_s: float


@dataclass(frozen=True)
class Outlook:
    """For one width of experts.

    Attributes:
        bits: of experts.
        fits: whether it runs at all.
        least: bytes of memory with which it would.
        all_experts: bytes of memory with which every expert stays in it.
        libraries, rest, context, work, cache: how the memory divides, bytes; `cache` is what experts get.
        held: share of experts that stay in memory.
        hit: (worst, best) share of needed experts that are in memory.
        tokens_s: (worst, best) tokens a second, one text; zeros where it does not fit.
        limit: what takes most of the time: "disk", "memory" (reading weights from it) or "calls" (Python and PyTorch).
        disk_bytes: (worst, best) read from disk a token.
    """

    bits: int
    fits: bool
    least: int
    all_experts: int
    libraries: int
    rest: int
    context: int
    work: int
    cache: int
    held: float
    hit: tuple[float, float]
    tokens_s: tuple[float, float]
    limit: str
    disk_bytes: tuple[float, float]


def describe(folder: Path, layout: Layout, context: int, store: ExpertStore | None, widths: Sequence[int]) -> Model:
    """Sizes of a model, from its config (and a store's manifest); no weight is read.

    Raises:
        ModelError: a config that transformers cannot build.
    """
    model = skeleton(folder, dtype_of(layout)).to("meta")
    experts = model.get_submodule(layout.routed[0].experts_path)
    shapes = [x.shape[1:] for name, x in experts.named_parameters(recurse=False) if len(x) == experts.num_experts]
    if store is None:
        record = {bits: record_bytes(shapes, bits, dtype_of(layout).itemsize) for bits in widths}
    else:
        record = {widths[0]: round(store.expert_bytes / sum(x.num_experts for x in layout.routed))}
    prefixes = tuple(x.experts_path + "." for x in layout.routed)
    rest = {name: x for name, x in model.named_parameters() if not name.startswith(prefixes)}
    embedding = 0 if layout.tied_embeddings else model.get_input_embeddings().weight.nbytes
    total = sum(x.nbytes for x in rest.values())
    per_token = _kept_per_token(model, layout)
    by_contract = family_of(layout.text_family).by_contract
    return Model(
        layers=layout.num_layers,
        chosen=sum(x.top_k for x in layout.routed),
        experts=sum(x.num_experts for x in layout.routed),
        per_layer=max(x.num_experts for x in layout.routed),
        record=record,
        rest=total,
        rest_read=total - embedding,
        context=None if per_token is None else per_token * context,
        sizes=sizes_of(experts) if by_contract else _sizes_by_shape(shapes),
    )


def record_bytes(shapes: Sequence[Sequence[int]], bits: int, itemsize: int = 2) -> int:
    """About what an expert with these parameters takes in a store."""
    total = 0.0
    for shape in shapes:
        count = torch.Size(shape).numel()
        if bits == 16 or len(shape) < 2:
            total += itemsize * count
        elif bits == 8:
            total += count + itemsize * shape[0]
        else:
            total += count / 2 + 2 * itemsize * count / GROUP_SIZE
    return ceil(total / PAGE_BYTES) * PAGE_BYTES


def _sizes_by_shape(shapes: Sequence[Sequence[int]]) -> tuple[int, int, int]:
    wide = [x for x in shapes if len(x) == 2]
    return wide[-1][1], wide[0][1], wide[-1][0]  # transposed, as Llama 4 has them


def _kept_per_token(model: nn.Module, layout: Layout) -> int | None:
    """Bytes that the model's cache keeps of a token, from a forward without numbers; None where that cannot be run."""
    with suppress(Exception), torch.inference_mode():  # any family's own code runs here, on tensors without storage
        experts_run_by(model, layout, _NOTHING)
        sizes = []
        for length in (16, 80):
            past = empty_cache(model)
            ids = torch.zeros(1, length, dtype=torch.long, device="meta")
            model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
            sizes.append(cache_bytes(past))
        return max(0, sizes[1] - sizes[0]) // 64
    return None


def _nothing(
    experts: nn.Module, hidden_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """Experts without numbers, for shapes alone."""
    return torch.empty_like(hidden_TD)


ALL_EXPERTS_FUNCTIONS.register(_NOTHING, _nothing)


@torch.inference_mode()
def measure(place: Path, sizes: tuple[int, int, int], widths: Sequence[int]) -> Speeds:
    """Speeds of this machine, for a store that lies, or would lie, at `place`."""
    hidden, up, inner = sizes
    expert, linear = {}, {}
    for bits in widths:
        expert[bits] = _speed(partial(few_rows_call, sizes, bits), record_bytes([(up, hidden), (hidden, inner)], bits))
        linear[bits] = _speed(partial(linear_call, hidden, bits < 16), 2 * hidden * hidden)
    return Speeds(disk_speed(place), expert, linear, call_seconds())


def _speed(make: Callable[[], Callable[[], object]], size: int) -> float:
    """Bytes a second of calls on different matrices in turn, so many that caches do not hold them."""
    calls = [make() for _ in range(min(64, max(2, BEYOND_CACHES // size)))]
    turn = cycle(calls)

    def some() -> None:
        for _ in range(len(calls)):
            next(turn)()

    return size * len(calls) / quickest(some)


def foresee(model: Model, speeds: Speeds, bits: int, memory: int) -> Outlook:
    """The outlook for one width of experts.

    Args:
        model: sizes.
        speeds: of this machine.
        bits: of experts.
        memory: bytes for the whole process.
    """
    record, libraries = model.record[bits], psutil.Process().memory_info().rss
    work = SLACK_BYTES + CHUNK_TOKENS * sum(model.sizes) * 16
    context = model.context or 0
    needed = libraries + model.rest + context + work
    cache = max(0, memory - needed)
    slots, fits = cache // record, cache >= LEAST_SLOTS * record
    held = min(1.0, slots / model.experts)
    hit = hit_range(held, model.per_layer)
    reads = tuple((1 - x) * model.chosen * record for x in hit)
    disk_speed_ = speeds.disk.large if record >= SMALL_READ else speeds.disk.small
    weights_s = model.rest_read / speeds.linear[bits] + model.chosen * record / speeds.expert[bits]
    calls_s = tuple(x * model.layers * speeds.call_s for x in CALLS)
    disk_s = tuple(x / disk_speed_ for x in reads)
    slow = WORSE * weights_s + calls_s[1] + disk_s[0]
    fast = max(weights_s + calls_s[0], disk_s[1])
    parts = {"disk": sum(disk_s) / 2, "memory": weights_s, "calls": sum(calls_s) / 2}
    return Outlook(
        bits=bits,
        fits=fits,
        least=needed + LEAST_SLOTS * record,
        all_experts=needed + (model.experts + 2) * record,
        libraries=libraries,
        rest=model.rest,
        context=context,
        work=work,
        cache=cache,
        held=held,
        hit=hit,
        tokens_s=(1 / slow, 1 / fast) if fits else (0.0, 0.0),
        limit=max(parts, key=lambda x: parts[x]),
        disk_bytes=(reads[0], reads[1]),
    )


def hit_range(held: float, experts: int) -> tuple[float, float]:
    """(worst, best) share of needed experts that are in memory, when this share of all experts is.

    Args:
        held: share of experts in memory.
        experts: of a layer.
    """
    harmonic = [0.0]
    for e in range(1, experts + 1):
        harmonic.append(harmonic[-1] + e**-SKEW)
    whole = int(held * experts)
    part = (held * experts - whole) * (whole + 1) ** -SKEW
    return held, min(1.0, (harmonic[whole] + part) / harmonic[experts])


def outlooks(
    place: Path,
    layout: Layout,
    memory: int | None,
    context: int,
    widths: Sequence[int],
    store: ExpertStore | None = None,
) -> tuple[list[Outlook], Model, Speeds]:
    """Outlooks by width, with what they rest on.

    Args:
        place: folder of the model, or of the store.
        layout: of the model.
        memory: bytes for the whole process; None: what is free.
        context: tokens of prompt and answer.
        widths: bits of experts; a store's own.
        store: where the model is packed already.
    """
    model = describe(place, layout, context, store, widths)
    speeds = measure(place if store is not None else Path.cwd(), model.sizes, widths)
    budget = memory_free() if memory is None else memory
    return [foresee(model, speeds, bits, budget) for bits in widths], model, speeds
