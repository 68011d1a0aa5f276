"""Whether this machine can run models from a store: versions, CPU, kernels, memory, disk, and a real expert."""

from __future__ import annotations

import importlib.metadata
import mmap
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from moekit.errors import UserError
from moekit.families.model import Model
from moekit.layout import Layout
from moekit.recipe import format_bytes
from moekit.serve.cache import slot_bytes
from moekit.serve.engine import Engine
from moekit.serve.machine import cpu_features, disk_speed, memory_limit, memory_speed, processor
from moekit.serve.native import ISAS, native
from moekit.serve.packing import check_packable, pack
from moekit.serve.store import MANIFEST, ExpertStore

GOOD, NOTE, BROKEN = "good", "note", "broken"
CLOSE = {16: 0.01, 8: 0.05, 4: 0.3}  # relative distance of logits from the stock model's, at most
LITTLE_BYTES = 1 << 30
SLOW_DISK = 200e6


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        state: "good", "note" (works, worth knowing) or "broken" (something that is needed does not work).
        says: in words.
    """

    name: str
    state: str
    says: str


def checkup(place: str = "") -> Iterator[Check]:
    """Look at everything, one finding after the other.

    Args:
        place: a store or a model to look at as well, "" for none; the disk is measured where it lies.
    """
    folder = Path(place) if place and Path(place).is_dir() else Path.cwd()
    yield from versions()
    yield from extras()
    for name, look in (
        ("cpu", _cpu),
        ("kernels", _kernels),
        ("memory", _memory),
        ("disk", lambda: _disk(folder)),
        ("cuda", _cuda),
        ("expert", _expert),
        *([(place, lambda: _place(place))] if place else []),
    ):
        yield _guarded(name, look)


def _guarded(name: str, look: Callable[[], Check]) -> Check:
    try:
        return look()
    except UserError as error:
        return Check(name, BROKEN, str(error))
    except Exception as error:
        return Check(name, BROKEN, f"{type(error).__name__}: {error}")


def _requirements() -> list[tuple[Requirement, str]]:
    """(requirement, its extra or "") of the installed package."""
    out = []
    for text in importlib.metadata.requires("moekit") or []:
        wanted = Requirement(text)
        extra = str(wanted.marker).rpartition("extra == ")[2].strip("\"'") if wanted.marker else ""
        out.append((wanted, extra))
    return out


def versions() -> Iterator[Check]:
    """Python, and the packages that are needed."""
    yield Check("python", GOOD, platform.python_version())
    for wanted, extra in _requirements():
        if not extra:
            yield _version(wanted)


def _version(wanted: Requirement) -> Check:
    try:
        found = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        return Check(wanted.name, BROKEN, f'not installed: pip install "{wanted.name}{wanted.specifier}"')
    if wanted.specifier.contains(Version(found), prereleases=True):
        return Check(wanted.name, GOOD, found)
    fix = f'pip install "{wanted.name}{wanted.specifier}"'
    return Check(wanted.name, BROKEN, f"{found}, but {wanted.specifier} is needed: {fix}")


def extras() -> Iterator[Check]:
    """Optional parts, whole or not."""
    by_extra: dict[str, list[bool]] = {}
    for wanted, extra in _requirements():
        if extra and extra != "dev":
            by_extra.setdefault(extra, []).append(_version(wanted).state == GOOD)
    there = [x for x, found in by_extra.items() if all(found)]
    absent = [x for x, found in by_extra.items() if not all(found)]
    says = f"installed: {', '.join(there) or 'none'}"
    yield Check("extras", GOOD, says + (f"; absent: {', '.join(absent)}" if absent else ""))


def _cpu() -> Check:
    cores, threads = psutil.cpu_count(logical=False) or os.cpu_count() or 1, torch.get_num_threads()
    says = f"{processor()}, {cores} cores, {threads} threads in use; {', '.join(cpu_features()) or 'features unknown'}"
    if threads > cores:
        return Check("cpu", NOTE, f"{says}. More threads than cores slow decoding: set OMP_NUM_THREADS={cores}")
    return Check("cpu", GOOD, says)


def _kernels() -> Check:
    kernels, why = native()
    torch_has = f"PyTorch's are those for {torch.backends.cpu.get_cpu_capability()}"
    if kernels is None:
        return Check("kernels", NOTE, f"no native ones: {why}. {torch_has}, packed experts are slower with them")
    threads = "several threads" if kernels.parallel else "one thread (the compiler has no OpenMP that torch has)"
    return Check("kernels", GOOD, f"native ones for {ISAS[kernels.isa]}, {threads}; {torch_has}")


def _memory() -> Check:
    memory, limit = psutil.virtual_memory(), memory_limit()
    says = (
        f"{format_bytes(memory.total)}, {format_bytes(memory.available)} free, read at {memory_speed() / 1e9:.1f} GB/s"
    )
    says += "; no control group limits it" if limit is None else f"; its control group allows {format_bytes(limit)}"
    free = memory.available if limit is None else min(limit, memory.available)
    return Check("memory", GOOD if free > LITTLE_BYTES else NOTE, says)


def _disk(folder: Path) -> Check:
    disk = disk_speed(folder)
    says = f"{folder}: {disk.large / 1e9:.2f} GB/s in reads of 1 MiB, {disk.small / 1e9:.2f} GB/s of 64 KiB"
    if not disk.direct:
        return Check("disk", NOTE, f"{says}; no direct reads here: speeds may be those of the page cache, and what is "
                     "read counts against a memory limit")  # fmt: skip
    return Check("disk", GOOD if disk.large > SLOW_DISK else NOTE, f"{says}, past the page cache")


def _cuda() -> Check:
    if not torch.cuda.is_available():
        return Check("cuda", GOOD, "none; moekit runs on the CPU")
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return Check("cuda", GOOD, ", ".join(f"{x.name} ({format_bytes(x.total_memory)})" for x in names))


@torch.inference_mode()
def _expert() -> Check:
    """Pack refmoe, run it from the store, and compare with the stock model's eager experts."""
    model = Model.open("refmoe")
    ids = torch.randint(model.layout.vocab_size, (24,), generator=torch.Generator().manual_seed(0))
    stock = model.load(torch.bfloat16)
    stock.set_experts_implementation("eager")
    right = stock(input_ids=ids[None]).logits[0].float()
    said, wrong = [], False
    with tempfile.TemporaryDirectory(prefix="moekit-doctor-") as folder:
        for bits, bound in CLOSE.items():
            engine = Engine(pack(model, Path(folder) / str(bits), bits=bits))
            found = engine.logits(ids.tolist()).float()
            engine.close()
            error = float((found - right).norm() / right.norm())
            wrong |= not error < bound
            said.append(f"{bits} bits {'the same numbers' if torch.equal(found, right) else f'off by {error:.1%}'}")
    return Check("expert", BROKEN if wrong else GOOD, f"refmoe from a store beside the stock model: {', '.join(said)}")


def _place(place: str) -> Check:
    if not (Path(place) / MANIFEST).is_file():
        model = Model.open(place, headers_only=True)
        check_packable(model, 16)
        return Check(place, GOOD, f"{_described(model.layout)}; can be packed: moekit pack {place} --out STORE")
    store = ExpertStore(place)
    buffer = torch.frombuffer(mmap.mmap(-1, slot_bytes(store)), dtype=torch.uint8)  # direct reads want whole pages
    for index, layer in store.layers.items():
        for expert in (0, len(layer.offsets) - 1):
            store.read(index, expert, buffer)
            store.check(index, expert, buffer)
    store.close()
    return Check(
        place, GOOD, f"a whole store of {_described(store.layout)}; two experts of each layer read and checked"
    )


def _described(layout: Layout) -> str:
    experts = sum(x.num_experts for x in layout.routed)
    return f"{layout.family}, {len(layout.routed)} MoE layers, {experts:,} experts"
