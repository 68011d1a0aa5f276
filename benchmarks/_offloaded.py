"""The systems that `offload.py` compares, each in a process of its own: one class, one interface.

A system feeds tokens and keeps their keys and values; its weights lie in files whose pages can be dropped from memory.

Symbols: B texts, S tokens of each.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

CONTEXT = 1024


def drop_pages(files: list[Path]) -> None:
    """Take files out of the page cache; what is dirty is written first."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


class Moekit:
    """moekit's engine on a store, experts in their 16 bits."""

    name, exact = "moekit", True

    def __init__(self, workdir: Path, limit_bytes: int | None, share: float, threads: int, texts: int):
        from moekit.serve.engine import Engine

        torch.set_num_threads(threads)
        self.engine = Engine(
            workdir / "store",
            memory=limit_bytes,
            context=CONTEXT,
            exact=self.exact,
            texts=texts,
            kept_tokens=texts * CONTEXT,
        )
        self.files = sorted((workdir / "store").iterdir())
        self.routes: list[tuple[int, tuple[int, ...]]] = []
        for layer in self.engine.layout.routed:
            experts = self.engine.model.get_submodule(layer.experts_path)
            experts.register_forward_pre_hook(lambda _m, args, i=layer.index: self._note(i, args[1]))

    def _note(self, layer: int, ids_TK: torch.Tensor) -> None:
        self.routes.append((layer, tuple(ids_TK.unique().tolist())))

    def forget(self) -> None:
        """Begin anew."""
        from moekit.families.resident import empty_cache

        self.past = empty_cache(self.engine.model)

    def feed(self, ids_BS: torch.Tensor) -> None:
        """Run tokens, a prompt in chunks."""
        from moekit.serve.engine import CHUNK_TOKENS

        kind = "decode" if ids_BS.shape[1] == 1 else "prefill"
        for part in ids_BS.split(CHUNK_TOKENS, dim=1):
            self.engine.forward(part, self.past, kind)

    def state(self) -> dict[str, Any]:
        """Counts so far."""
        counts = self.engine.cache.counts
        return {
            "hits": sum(counts.hits),
            "misses": sum(counts.misses),
            "read_bytes": counts.read_bytes,
            "stall_s": counts.stall_s,
            "calls": len(self.routes),
        }

    def facts(self) -> dict[str, Any]:
        """What the numbers hang on."""
        memory, store = self.engine.memory, self.engine.store
        return {
            "slots": self.engine.cache.slots,
            "needed": memory.budget - memory.experts,
            "expert_bytes": store.expert_bytes,
            "record_bytes": store.expert_bytes // sum(len(x.offsets) for x in store.layers.values()),
            "layers": len(store.layers),
            "top_k": self.engine.layout.routed[0].top_k,
            "bandwidth": bandwidth(store),
        }


class MoekitFast(Moekit):
    """The same numbers by moekit's own kernels, which sum in another order than transformers."""

    name, exact = "moekit --fast", False


def bandwidth(store: Any, readers: int = 4, total_bytes: int = 600 << 20) -> float:
    """Bytes a second of a store's records in random order, past the page cache, a few reads at a time."""
    import mmap

    generator = torch.Generator().manual_seed(0)
    keys = [(i, e) for i, layer in store.layers.items() for e in range(len(layer.offsets))]
    size = max(store.layers[i].of(e).record_bytes for i, e in keys)
    order = torch.randperm(len(keys), generator=generator)[: max(readers, total_bytes // size)].tolist()
    buffers = [torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8) for _ in range(readers)]
    drop_pages(sorted(store.path.glob("experts-*")))

    def some(reader: int) -> int:
        return sum(store.read(*keys[x], buffers[reader]).record_bytes for x in order[reader::readers])

    started = time.perf_counter()
    with ThreadPoolExecutor(readers) as pool:
        read = sum(pool.map(some, range(readers)))
    return read / (time.perf_counter() - started)


class LlamaCpp:
    """llama.cpp on the same weights in bfloat16, its file mapped."""

    name = "llama.cpp"

    def __init__(self, workdir: Path, limit_bytes: int | None, share: float, threads: int, texts: int):
        from _llama_cpp import Llama

        self.files = [workdir / "model.gguf"]
        self.llama = Llama(self.files[0], context=CONTEXT, threads=threads)

    def forget(self) -> None:
        """Begin anew."""
        self.llama.forget()

    def feed(self, ids_BS: torch.Tensor) -> None:
        """Run tokens of one text."""
        self.llama.feed(ids_BS[0].tolist())

    def state(self) -> dict[str, Any]:
        """Nothing is counted."""
        return {}

    facts = state


class Accelerate:
    """Stock transformers with accelerate: a share of the layers in memory, the others mapped from the disk."""

    name = "accelerate"

    def __init__(self, workdir: Path, limit_bytes: int | None, share: float, threads: int, texts: int):
        import accelerate
        from accelerate.utils import OffloadedWeightsLoader, set_module_tensor_to_device

        torch.set_num_threads(threads)
        folder = workdir / "offloaded"
        config = transformers.AutoConfig.from_pretrained(workdir / "model")
        with accelerate.init_empty_weights(include_buffers=False):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        count = config.num_hidden_layers
        held = round(share * count)
        weights = OffloadedWeightsLoader(save_folder=str(folder))
        on_disk = tuple(f"model.layers.{i}." for i in range(held, count))
        for name in weights:
            if not name.startswith(on_disk or ("-",)):
                set_module_tensor_to_device(model, name, "cpu", value=weights[name].clone())
        model.tie_weights()
        places = {f"model.layers.{i}": "cpu" if i < held else "disk" for i in range(count)}
        places |= {f"model.{name}": "cpu" for name, _ in model.model.named_children() if name != "layers"}
        places |= {name: "cpu" for name, _ in model.named_children() if name != "model"}
        if held < count:
            model = accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder))
        self.model, self.files = model.eval(), sorted(folder.iterdir())

    def forget(self) -> None:
        """Begin anew."""
        self.past = transformers.DynamicCache(config=self.model.config)

    @torch.inference_mode()
    def feed(self, ids_BS: torch.Tensor) -> None:
        """Run tokens."""
        self.model(input_ids=ids_BS, past_key_values=self.past, use_cache=True, logits_to_keep=1)

    def state(self) -> dict[str, Any]:
        """Nothing is counted."""
        return {}

    facts = state


def prepare_accelerate(workdir: Path) -> None:
    """Write the weights as accelerate maps them."""
    from accelerate.utils import offload_state_dict

    model = transformers.AutoModelForCausalLM.from_pretrained(workdir / "model", dtype=torch.bfloat16)
    partial = workdir / "offloaded.partial"
    offload_state_dict(str(partial), model.state_dict())
    partial.rename(workdir / "offloaded")


SYSTEMS = {x.name: x for x in (Moekit, MoekitFast, LlamaCpp, Accelerate)}


def run(part: dict[str, Any], workdir: Path) -> dict[str, Any]:
    """One row: times of single steps, and counts at the borders of its phases.

    Args:
        part: "system", "kind" ("decode" or "prefill"), "limit_bytes", "share", "threads", "batch", "steps" (of the
            phases cold, between and warm).
        workdir: with the model in every form.
    """
    # Before anything is mapped: pages that are mapped, or that another process brought in, count for no limit.
    drop_pages([x for x in (*workdir.glob("*.gguf"), *workdir.glob("*/*")) if x.is_file()])
    system = SYSTEMS[part["system"]](workdir, part["limit_bytes"], part["share"], part["threads"], part["batch"])
    ids = torch.load(workdir / "ids.pt")
    texts = ids[: part["batch"]]
    row: dict[str, Any] = {"facts": system.facts()}
    system.forget()
    if part["kind"] == "prefill":
        system.feed(texts[:, -32:])  # kernels are chosen, libraries are there
        system.forget()
        drop_pages(system.files)
        started, elsewhere = time.perf_counter(), _busy_elsewhere()
        system.feed(texts[:, : part["tokens"]])
        took = time.perf_counter() - started
        row |= {"prefill_s": took, "tokens": part["tokens"], "elsewhere": (_busy_elsewhere() - elsewhere) / took}
        return row | {"state": system.state()}
    drop_pages(system.files)
    system.feed(texts[:, :8])
    at = 8
    for phase, steps in part["steps"].items():
        before, elsewhere = system.state(), _busy_elsewhere()
        times = list(_steps(system, texts, at, steps))
        elsewhere = (_busy_elsewhere() - elsewhere) / sum(times)
        row[phase] = {"before": before, "times": times, "after": system.state(), "elsewhere": elsewhere}
        at += steps
    if isinstance(system, Moekit):
        row["belady"] = belady_hits(system.routes, system.engine.cache.slots, row["warm"])
    return row


def _busy_elsewhere() -> float:
    """Seconds of processors' time that other processes have had."""
    own, all_ = psutil.Process().cpu_times(), psutil.cpu_times()
    return all_.user + all_.nice + all_.system - own.user - own.system


def _steps(system: Any, texts: torch.Tensor, at: int, steps: int) -> Iterator[float]:
    for position in range(at, at + steps):
        started = time.perf_counter()
        system.feed(texts[:, position : position + 1])
        yield time.perf_counter() - started


def belady_hits(routes: list[tuple[int, tuple[int, ...]]], slots: int, phase: dict[str, Any]) -> float:
    """Share of a phase's experts that would be in memory if those needed last went, newcomers included."""
    uses = [(layer, expert) for layer, experts in routes for expert in experts]
    starts = [0]
    for _, experts in routes:
        starts.append(starts[-1] + len(experts))
    first, last = starts[phase["before"]["calls"]], starts[phase["after"]["calls"]]
    following, seen = [0] * len(uses), {}
    for i in range(len(uses) - 1, -1, -1):
        following[i] = seen.get(uses[i], len(uses) + i)
        seen[uses[i]] = i
    held: dict[tuple[int, int], int] = {}
    hits = 0
    for i, key in enumerate(uses):
        hits += key in held and first <= i < last
        held[key] = following[i]
        if len(held) > slots:
            del held[max(held, key=held.__getitem__)]
    return hits / max(1, last - first)
