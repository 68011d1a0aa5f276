"""What this machine can do, measured in about a second: disk, memory, what a call costs; and what it may use."""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

PROBE_BYTES = 64 << 20
READERS = 4
PAGE = 4096
NO_LIMIT = 1 << 60  # what cgroups of version 1 say where there is none


@dataclass(frozen=True)
class Disk:
    """Speed of reads, bytes a second.

    Attributes:
        direct: reads go past the page cache (O_DIRECT); otherwise the speeds may be those of memory.
        large: 1 MiB each, four at a time.
        small: 64 KiB each, eight at a time.
    """

    direct: bool
    large: float
    small: float


def disk_speed(place: Path) -> Disk:
    """Measure where a store lies (its largest file is read) or would lie (a file of 64 MiB is written and removed).

    Raises:
        OSError: nothing can be read or written there.
    """
    files = sorted(place.glob("experts-*.bin"), key=lambda x: x.stat().st_size)
    if files and files[-1].stat().st_size >= 4 << 20:
        return _read_speed(files[-1])
    with tempfile.NamedTemporaryFile(dir=place, prefix=".moekit-probe-") as file:
        block = os.urandom(1 << 20)
        for _ in range(PROBE_BYTES >> 20):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return _read_speed(Path(file.name))


def _read_speed(file: Path) -> Disk:
    flag, direct = getattr(os, "O_DIRECT", 0), True
    try:
        handle = os.open(file, os.O_RDONLY | flag)
        os.preadv(handle, [mmap.mmap(-1, PAGE)], 0)
        direct = bool(flag)
    except OSError:
        handle, direct = os.open(file, os.O_RDONLY), False
    try:
        size = min(file.stat().st_size, PROBE_BYTES)
        return Disk(direct, _reads(handle, size, 1 << 20, READERS), _reads(handle, size, 64 << 10, 2 * READERS))
    finally:
        os.close(handle)


def _reads(handle: int, size: int, block: int, readers: int) -> float:
    """Bytes a second of blocks in an order that is no order, for at most 0.4 s."""
    offsets = torch.randperm(size // block, generator=torch.Generator().manual_seed(0)).mul(block).tolist()
    ends = time.perf_counter() + 0.4

    def some(mine: Sequence[int]) -> int:
        buffer, done = mmap.mmap(-1, block), 0
        for offset in mine:
            done += os.preadv(handle, [buffer], offset)
            if time.perf_counter() > ends:
                break
        return done

    started = time.perf_counter()
    with ThreadPoolExecutor(readers) as pool:
        done = sum(pool.map(some, [offsets[i::readers] for i in range(readers)]))
    return done / (time.perf_counter() - started)


def memory_speed() -> float:
    """Bytes a second that all threads together read from memory."""
    numbers = torch.zeros(96 << 17, dtype=torch.int64)  # 96 MiB: more than most caches
    return numbers.nbytes / quickest(numbers.sum)


def call_seconds() -> float:
    """What PyTorch takes for a call with next to nothing to compute."""
    x = torch.ones(8, dtype=torch.bfloat16)

    def many() -> None:
        for _ in range(100):
            x.mul(x)

    with torch.inference_mode():
        return quickest(many) / 100


def quickest(call: Callable[[], object], repeats: int = 3) -> float:
    """Seconds of the quickest of some calls, after one that does not count."""
    call()
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
    return best


def memory_limit(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes that the control groups of this process allow it (version 1 or 2); None: no limit."""
    limits = []
    with suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "" or "memory" in controllers.split(","):
                name = "memory.max" if controllers == "" else "memory.limit_in_bytes"
                base = root if controllers == "" else root / "memory"
                place = base / path.strip("/")
                for folder in (place, *place.parents):
                    with suppress(OSError, ValueError):
                        limits.append(int((folder / name).read_text()))
                    if folder == root:
                        break
    real = [x for x in limits if x < NO_LIMIT]
    return min(real) if real else None


def memory_free() -> int:
    """Bytes that this process could still take."""
    limit, free = memory_limit(), psutil.virtual_memory().available
    return free if limit is None else min(free, limit)


def processor() -> str:
    """Name of the CPU."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    import platform

    return platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Of the instruction sets that matter here, those that the CPU has (Linux; elsewhere none are named)."""
    names = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16")
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next(x for x in lines if x.startswith(("flags", "Features"))).split()
        return [x for x in names if x in flags]
    return []
