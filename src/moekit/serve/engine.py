"""Engine: a model run from an expert store in a given amount of memory.

    engine = Engine("store/", memory="2GiB")
    for token in engine.stream(ids, max_new_tokens=64): ...

The amount is that of the whole process: Python and its libraries, the model without its experts, the cache of keys and
values, what a forward needs while it runs; experts get what is left. Reads go past the page cache.

With `device="cuda"` all of that is the GPU's memory, as far as PyTorch holds it (CUDA's own some hundred MB come on
top), and experts come from the disk through a few pinned pages of main memory.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from moekit.errors import DataError, RecipeError
from moekit.families.caches import ROOM_COLUMNS, cache_bytes, join, stretch
from moekit.families.detect import dtype_of
from moekit.families.family import family_of
from moekit.families.resident import check_filled, empty_cache, move, skeleton
from moekit.footprint import keep_few_products
from moekit.recipe import format_bytes, parse_bytes
from moekit.serve.cache import Counts, ExpertCache, residents_in, slot_bytes, slots_in
from moekit.serve.calibrate import Kernels, calibrate, quicken_linears
from moekit.serve.device import device_of, held, most_held, trim
from moekit.serve.experts import run_from_store
from moekit.serve.lossy import Losses, Lossy
from moekit.serve.policies import Policy, Sizes
from moekit.serve.prefetch import Prefetcher, chosen_policy, predictor_of
from moekit.serve.rest import put_packed, put_rest
from moekit.serve.routes import Routes
from moekit.serve.sampling import Sampling, choose
from moekit.serve.store import ExpertStore
from moekit.serve.telemetry import Telemetry
from moekit.serve.token import TokenRunner, token_runner
from moekit.view import MoEView

CHUNK_TOKENS = 256  # of a prompt that run together; each expert is read once a chunk
SLACK_BYTES = 48 << 20  # what allocators hold beyond what is in use


@dataclass
class Timing:
    """Where the time went.

    Attributes:
        prefill_s: reading the prompt.
        token_s: of each token that was written.
        stall_s: waiting for reads, in all of it.
    """

    prefill_s: float = 0.0
    token_s: list[float] = field(default_factory=list)
    stall_s: float = 0.0


@dataclass(frozen=True)
class Memory:
    """How the memory is divided, bytes.

    Attributes:
        budget: of the whole process.
        resident: Python, libraries, and the model without its experts.
        context: keys and values of all texts that are kept at once.
        work: what a forward needs while it runs.
        experts: what is left for experts.
        slots: experts that fit in it.
    """

    budget: int
    resident: int
    context: int
    work: int
    experts: int
    slots: int


class Engine:
    """Runs a packed model.

    Args:
        store: a folder that `moekit pack` made, or an open store.
        memory: of the whole process, or of the GPU, as "2GiB" or bytes; None: as much as all experts need.
        policy: name of a cache policy, "auto" for the one that does best on the trace, or one made for `Engine.sizes`.
        predictor: name of what tells the next layer's experts, which are then read ahead; "none".
        trace: a folder that `moekit trace --tokens` made, from which policy and predictor learn beforehand.
        context: tokens of prompt and answer together, at most.
        verify: compare each record's checksum when it is read.
        texts: that are kept at once, at most.
        kept_tokens: whose keys and values are kept at once, of all texts together; None: of one longest context.
        lossy: what may be left out to read less (`moekit.serve.lossy`); None: nothing.
        exact: keep transformers' numbers bit for bit; False: multiply the same numbers by faster kernels, which sum in
            another order (`moekit.serve.calibrate`). None: exact where the store is lossless.
        device: "cpu", or a GPU as "cuda".

    Raises:
        CheckpointError: the store is damaged.
        RecipeError: the memory does not hold even a few experts.
    """

    def __init__(
        self,
        store: str | Path | ExpertStore,
        *,
        memory: str | int | None = None,
        policy: str | Policy = "reuse",
        predictor: str = "none",
        trace: str | Path | None = None,
        context: int = 2048,
        verify: bool = True,
        texts: int = 1,
        kept_tokens: int | None = None,
        lossy: Lossy | None = None,
        exact: bool | None = None,
        device: str = "cpu",
    ):
        self.device, self._products = device_of(device), keep_few_products()
        self.store = store if isinstance(store, ExpertStore) else ExpertStore(store)
        self.layout, self.context = self.store.layout, context
        self.texts, self.kept_tokens = texts, max(context, kept_tokens or 0)
        self.model = skeleton(self.store.path, dtype_of(self.layout))
        packed: dict[str, dict[str, torch.Tensor]] = {}
        for index in (-1, *range(self.layout.num_layers)):
            packed |= put_rest(self.model, self.store.rest(index))
        move(self.model, self.device)
        self.model.tie_weights()
        put_packed(self.model, packed, self.device)
        check_filled(self.model, self.layout)
        self._family = family_of(self.layout.text_family)
        self._experts = run_from_store(self.model, self.layout, self._family)
        exact = self.store.lossless if exact is None else exact
        self.kernels = self._calibrate(exact)
        self.timing, self.telemetry = Timing(), Telemetry()
        budget = None if memory is None else parse_bytes(memory)
        routes = None if trace is None else Routes.of(trace)
        self.cache = self._cache(slot_bytes(self.store) * 8, "lru", verify)
        per_token, per_text, work = self._probe()
        told = predictor_of(predictor, self.model, self.layout, routes, lambda ids_1T: self.logits(ids_1T[0].tolist()))
        self.cache.close()
        self.timing, self.telemetry = Timing(), Telemetry()
        room = 0 if texts == 1 else texts * ROOM_COLUMNS
        self.memory = self._divide(budget, per_token * (self.kept_tokens + room) + per_text * texts, work)
        self.cache = self._cache(self.memory.experts, policy, verify, routes)
        self.prefetcher = None if told is None else Prefetcher(self.model, told[1], self.cache, told[0])
        self.losses = None if lossy is None else Losses(lossy, MoEView(self.model, self.layout))
        for experts in self._experts.values():
            experts._moekit_losses = self.losses
        self.tokens: TokenRunner | None = None
        if not exact and self.losses is None and self.prefetcher is None:
            parts = (self.model, self.layout, self._family, self.kernels, self._experts, self.cache)
            self.tokens = token_runner(*parts)
            self.forget()

    def sizes(self, slots: int) -> Sizes:
        """What a policy needs to know."""
        routed = self.layout.routed
        return Sizes(slots, len(routed), max(x.num_experts for x in routed), max(x.top_k for x in routed))

    def _calibrate(self, exact: bool) -> Kernels:
        if not self._family.by_contract or self.device.type != "cpu":
            return Kernels()
        if not exact:
            quicken_linears(self.model)
        widths = {form.bits for layer in self.store.layers.values() for form in layer.forms}
        return calibrate(self._experts.values(), widths, exact)

    def _cache(
        self, memory_bytes: int, policy: str | Policy, verify: bool, routes: Routes | None = None
    ) -> ExpertCache:
        sizes = self.sizes(residents_in(self.store, memory_bytes))
        made = chosen_policy(policy, sizes, routes) if isinstance(policy, str) else policy
        cache = ExpertCache(self.store, memory_bytes, made, verify, self.device)
        for index, experts in self._experts.items():
            experts._moekit_cache, experts._moekit_layer, experts._moekit_family = cache, index, self._family
        return cache

    def _probe(self) -> tuple[int, int, int]:
        """(bytes kept of a token, of a text whatever its length, bytes that a forward needs beside them), measured.

        In a thread of its own: what a thread keeps for its next products goes with it; a server computes in another.
        """
        with ThreadPoolExecutor(1) as thread:
            per_token, per_text = thread.submit(self._try_out).result()
        gc.collect()
        trim(self.device)
        work = most_held(self.device) - held(self.device) - per_token * self.kept_tokens
        return per_token, per_text, max(0, work) + SLACK_BYTES

    @torch.inference_mode()
    def _try_out(self) -> tuple[int, int]:
        """Run what needs the most memory; (bytes kept of a token, of a text whatever its length)."""
        dtype, size = dtype_of(self.layout), self.layout.hidden_size
        weight = torch.ones(size, size, dtype=dtype, device=self.device)
        for rows in range(1, self._products + 1):  # as many as are kept, and no more from now on
            torch.nn.functional.linear(torch.ones(rows, size, dtype=dtype, device=self.device), weight)
        sizes = []
        for length in (16, 16 + CHUNK_TOKENS):
            sizes.append(cache_bytes(self._read_first(length)))
        per_token = max(0, sizes[1] - sizes[0]) // CHUNK_TOKENS
        for rows in sorted({1, self.texts}):
            with suppress(Exception):  # a family whose caches cannot be stretched or joined: then less is known
                self._run_longest(rows)
        return per_token, max(0, sizes[0] - 16 * per_token)

    def _read_first(self, length: int) -> DynamicCache:
        """The cache of a text of so many tokens."""
        past = empty_cache(self.model)
        ids = torch.arange(length, device=self.device)[None] % self.layout.vocab_size
        self.model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
        return past

    def _run_longest(self, rows: int) -> None:
        """The largest forwards that will come: a chunk behind a long prompt, or a token of several long texts, the last
        of which has just joined the others."""
        start = min(CHUNK_TOKENS, max(1, self.context - CHUNK_TOKENS))
        ids = torch.arange(start, device=self.device)[None] % self.layout.vocab_size
        past = self._read_first(start)
        if rows == 1:
            stretch(past, 1, max(start, self.context - CHUNK_TOKENS))
            self.forward(ids, past, "prefill")
            return
        columns, last = max(2, self.kept_tokens // rows), self._read_first(start)
        stretch(past, rows - 1, columns)
        stretch(last, 1, columns - 1)
        past = join([past, last])
        self.forward(ids[:, :1].expand(rows, 1), past, "decode", [*[columns] * (rows - 1), columns - 1])

    def _divide(self, budget: int | None, context: int, work: int) -> Memory:
        gc.collect()
        trim(self.device)
        resident = held(self.device)
        needed = resident + context + work
        everything = self.store.expert_bytes + 2 * slot_bytes(self.store)
        total = needed + everything if budget is None else budget
        least = needed + 8 * slot_bytes(self.store)
        if total < least:
            raise RecipeError(
                "the model does not run in so little memory",
                where="memory",
                expected=f"at least {format_bytes(least)}: {format_bytes(resident)} for Python and the model without "
                f"its experts, {format_bytes(context)} for a context of {self.kept_tokens:,} tokens, "
                f"{format_bytes(work)} to work in",
                got=format_bytes(total),
                fix="give more memory, or a shorter context",
            )
        experts = min(total - needed, everything)
        return Memory(total, resident, context, work, experts, slots_in(self.store, experts))

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Logits [T, V] of a text, in chunks."""
        past = empty_cache(self.model)
        return torch.cat(
            [
                self.model(input_ids=part[None], past_key_values=past, use_cache=True).logits[0]
                for part in torch.as_tensor(ids, device=self.device).split(CHUNK_TOKENS)
            ]
        ).cpu()

    def stream(self, ids: Sequence[int], max_new_tokens: int = 256, sampling: Sampling | None = None) -> Iterator[int]:
        """Write on: token ids one by one, as they are chosen; ends before an end-of-text token.

        Args:
            ids: the prompt.
            max_new_tokens: at most so many.
            sampling: how tokens are chosen; None: the likeliest.

        Raises:
            DataError: an empty prompt, or one that leaves no room in the context.
            CheckpointError: an expert cannot be read.
        """
        if not len(ids) or len(ids) >= self.context:
            raise too_long(self.context, f"{len(ids):,}")
        settings = sampling or Sampling()
        generator = torch.Generator().manual_seed(settings.seed)
        past, ends = empty_cache(self.model), self.ends
        self.begin()
        self.timing = Timing()
        stalled, started = self.cache.counts.stall_s, time.perf_counter()
        for part in torch.as_tensor(ids).split(CHUNK_TOKENS):
            logits = self.forward(part[None], past, "prefill")[0]
        self.timing.prefill_s = time.perf_counter() - started
        self.telemetry.first.add(self.timing.prefill_s)
        for count in range(min(max_new_tokens, self.context - len(ids))):
            token = choose(logits, settings, generator)
            if token in ends:
                break
            yield token
            if count + 1 == max_new_tokens:
                break
            started = time.perf_counter()
            logits = self.forward(torch.tensor([[token]]), past, "decode")[0]
            self.timing.token_s.append(time.perf_counter() - started)
            self.telemetry.token.add(self.timing.token_s[-1])
            self.timing.stall_s = self.cache.counts.stall_s - stalled
        self.timing.stall_s = self.cache.counts.stall_s - stalled

    @torch.inference_mode()
    def forward(self, ids_BS: torch.Tensor, past: Any, kind: str, lengths: Sequence[int] | None = None) -> torch.Tensor:
        """Run tokens, and keep their keys and values.

        Args:
            ids_BS: of B texts, the next S tokens of each, on any device.
            past: cache that `moekit.families.resident.empty_cache` made, or `moekit.families.caches.join`.
            kind: "prefill" or "decode", for the telemetry.
            lengths: tokens of each text in `past`, where they differ; None: all alike, nothing is padded.

        Returns:
            Logits [B, V] behind the last of the tokens, on the CPU.

        Raises:
            CheckpointError: an expert cannot be read, or is damaged.
        """
        padded = {}
        if lengths is not None and min(lengths) < max(lengths):
            lengths_B1, steps = torch.tensor(lengths)[:, None], torch.arange(ids_BS.shape[1])
            columns = torch.arange(max(lengths) + len(steps))
            padded = {
                "attention_mask": (columns >= max(lengths) - lengths_B1).long().to(self.device),
                "position_ids": (lengths_B1 + steps).to(self.device),
            }
        counts, started = self.cache.counts, time.perf_counter()
        stalled, read = counts.stall_s, counts.read_bytes
        logits_BV = None
        if self.tokens is not None and ids_BS.numel() == 1:
            logits_BV = self.tokens.logits(int(ids_BS), past)
        if logits_BV is None:
            ids_BS = ids_BS.to(self.device)
            out = self.model(input_ids=ids_BS, past_key_values=past, use_cache=True, logits_to_keep=1, **padded)
            logits_BV = out.logits[:, -1].cpu()
        waited, read = counts.stall_s - stalled, counts.read_bytes - read
        self.telemetry.forward(kind, ids_BS.numel(), time.perf_counter() - started, waited, read)
        return logits_BV

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end a text."""
        found = self.model.generation_config.eos_token_id
        return frozenset([] if found is None else [found] if isinstance(found, int) else found)

    def begin(self) -> None:
        """Tell policy and predictor that a new text begins."""
        self.cache.begin()
        if self.prefetcher is not None:
            self.prefetcher.begin()

    def forget(self) -> None:
        """Begin telemetry and the cache's counts anew; what is in memory stays."""
        self.timing, self.telemetry = Timing(), Telemetry()
        self.cache.counts = Counts([0] * len(self._experts), [0] * len(self._experts))

    def close(self) -> None:
        """End the readers and close the files."""
        if self.losses is not None:
            self.losses.close()
        if self.prefetcher is not None:
            self.prefetcher.close()
        self.cache.close()
        self.store.close()


def too_long(context: int, got: str) -> DataError:
    """The error of a prompt that is empty or does not fit the context; got: its tokens."""
    return DataError(
        "a prompt of this length cannot be continued",
        expected=f"1 to {context - 1:,} tokens",
        got=got,
        fix="shorten it, or start with a larger --context",
    )
