"""How fast and how lean moekit streams checkpoints larger than memory: a statistics pass, dropping, merging, rounding.

    python benchmarks/stream.py --workdir FOLDER      # about 11 GB of disk; checkpoints are made once and kept there
    python benchmarks/stream.py --quick               # 0.2 GB, under a minute

Two Qwen3-MoE checkpoints of equal layer size, one twice as deep as the other, with a structured routing (see
`_synthetic.py`). All that is measured runs in child processes of its own:

peak_rss_gb      peak resident memory of the whole process (VmHWM), the largest of all passes and bakes
rss_flat         the pass' peak on the deep checkpoint over that on the shallow one
pass_over_limit  wall time of `moekit.measure` (all groups of statistics) over the longer of two limits: reading the
                 checkpoint at the disk's speed, and the same matrix products alone: attention and router in bfloat16,
                 experts by the faster of the library's calls (bfloat16, or float32 after converting the weight), all
                 experts equally busy. With many tokens the products are the longer
read_over_limit  the same with few tokens, where the disk should be
bake_over_cp     wall time of writing the bake over `cp -r` and `sync` of what it wrote: both end with the bytes on the
                 disk. `bake_over_plain_cp` compares with a `cp` that may leave them in memory
shrink_rss_gb    peak resident memory of merging half of the experts (m-smoe), of rounding all to 4 bits (rtn-int4), and
                 of GPTQ to 4 bits on a checkpoint of two such layers
merge_over_limit, quantise_over_limit    wall time of writing the merged, or rounded, checkpoint over the longer of two
                 limits: reading the source and writing (and syncing) as many bytes as came out, at the disk's speed;
                 and the arithmetic alone (`_shrunk.py`): similarity of units, assignment and mean of each group; the
                 largest of each group, codes and words of each matrix

Files are dropped from the page cache before they are read where the system lets us ("cold" in the output). Each run
stands beside its yardsticks, which take turns at being first; ratios are medians over such pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import _shrunk
from _goals import finish
from _synthetic import Shape, make

READ_BYTES = 1 << 24
ROWS = 512  # tokens of a sequence
DOMAINS = ("kjv", "python")


def child_make(folder: str, layers: str, shape: str) -> dict[str, Any]:
    make(Path(folder), int(layers), Shape(**json.loads(shape)))
    return {}


def child_pass(folder: str, tokens: str, stats: str) -> dict[str, Any]:
    """The statistics pass by the public face; `stats`: where to keep them, "" for nowhere."""
    import moekit
    from moekit import refmoe

    opened = time.perf_counter()
    model = moekit.open(folder)
    texts = {name: refmoe.texts()[name] for name in DOMAINS}
    data = moekit.load_data(model, texts, tokens=int(tokens) // len(texts), sequence_length=ROWS)
    started, busy = time.perf_counter(), time.process_time()
    out = moekit.measure(model, data)
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - busy
    if stats:
        out.save(Path(stats))
    counts_LE = [layer.arrays["count"].sum(0) for layer in out.layers.values()]
    shares = [max(x) / x.mean() for x in counts_LE]
    return {
        "seconds": seconds,
        "open_s": started - opened,
        "cpu_s": cpu_s,
        "tokens": sum(data.tokens.values()),
        "batches": [list(batch.ids.shape) for batch in data.batches],
        "busiest_expert": statistics.median(shares),
        "rss": peak_rss(),
    }


def child_bake(folder: str, stats: str, out: str) -> dict[str, Any]:
    """Half the experts of every layer, by frequency; written, and not verified (stock transformers would load it)."""
    import moekit
    from moekit.apply.bake import bake
    from moekit.stats import Stats

    model = moekit.open(folder)
    plan = moekit.plan("frequency", Stats.load(Path(stats)), keep=0.5)
    started = time.perf_counter()
    baked = bake(model.checkpoint, model.understanding, plan, out)
    return {"seconds": time.perf_counter() - started, "bytes": baked.bytes_after, "rss": peak_rss()}


def child_products(batches: str, shape: str) -> dict[str, Any]:
    """Seconds that the matrix products of one layer take alone, on all batches: medians of interleaved runs."""
    import torch
    from torch.nn.functional import linear, scaled_dot_product_attention

    sizes = Shape(**json.loads(shape))
    weights = {name: torch.randn(size).bfloat16() for name, size in sizes.products().items()}
    router = torch.randn(sizes.experts, sizes.hidden).bfloat16()
    up = torch.randn(sizes.experts, 2 * sizes.inner, sizes.hidden).bfloat16()
    down = torch.randn(sizes.experts, sizes.hidden, sizes.inner).bfloat16()
    wide_up, wide_down = torch.empty(up.shape[1:]), torch.empty(down.shape[1:])

    def dense(rows: int, length: int) -> None:
        hidden = torch.ones(rows * length, sizes.hidden).bfloat16()
        q, k, v = (
            linear(hidden, weights[x]).view(rows, length, -1, sizes.head).transpose(1, 2) for x in ("q", "k", "v")
        )
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        linear(mixed.transpose(1, 2).reshape(len(hidden), -1), weights["o"])
        linear(hidden, router)

    def experts(rows: int, length: int, wide: bool) -> None:
        dtype = torch.float32 if wide else torch.bfloat16
        hidden = torch.ones(max(1, rows * length * sizes.chosen // sizes.experts), sizes.hidden, dtype=dtype)
        for expert in range(sizes.experts):
            middle = linear(hidden, wide_up.copy_(up[expert]) if wide else up[expert])[:, : sizes.inner].contiguous()
            linear(middle, wide_down.copy_(down[expert]) if wide else down[expert])

    calls = {"dense": dense, "bfloat16": partial(experts, wide=False), "float32": partial(experts, wide=True)}
    wall: dict[str, list[float]] = {name: [] for name in calls}
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for _ in range(4):
            for name, call in calls.items():
                started, busy = time.perf_counter(), time.process_time()
                for rows, length in json.loads(batches):
                    call(rows, length)
                wall[name].append(time.perf_counter() - started)
                cpu[name].append(time.process_time() - busy)
    seconds, cpu_s = ({name: statistics.median(x[1:]) for name, x in times.items()} for times in (wall, cpu))
    best = min(("bfloat16", "float32"), key=lambda x: seconds[x])
    return {
        "seconds": seconds["dense"] + seconds[best],
        "cpu_s": cpu_s["dense"] + cpu_s[best],
        "experts_in": best,
        "dense_s": seconds["dense"],
        "experts_s": {name: seconds[name] for name in ("bfloat16", "float32")},
    }


def peak_rss() -> int:
    """Bytes; VmHWM where there is one, because ru_maxrss of a child may be that of the process that started it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(x for x in lines if x.startswith("VmHWM")).split()[1])
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def watched(run: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """The same, and the process' peak memory with it."""
    return lambda *args: run(*args) | {"rss": peak_rss()}


CHILDREN = {"make": child_make, "pass": child_pass, "bake": child_bake, "products": child_products} | {
    x.__name__: watched(x)
    for x in (_shrunk.merge, _shrunk.quantise, _shrunk.gptq, _shrunk.merge_alone, _shrunk.round_alone)
}


def child(name: str, *args: object) -> dict[str, Any]:
    """Run one of `CHILDREN` in a process of its own."""
    command = [sys.executable, __file__, "--child", name, *map(str, args)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def drop_cache(folder: Path) -> bool:
    """Send what is dirty to the disk and forget the pages of a folder's files; False where the system cannot."""
    for file in folder.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            try:
                os.fsync(handle)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            except (AttributeError, OSError):
                return False
            finally:
                os.close(handle)
    return True


def read_seconds(folder: Path) -> float:
    """Time to read all weights of a folder once, in order, in large blocks."""
    buffer = memoryview(bytearray(READ_BYTES))
    drop_cache(folder)
    started = time.perf_counter()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - started


def copy_seconds(source: Path, target: Path) -> dict[str, float]:
    """Time of `cp -r`, without and with the `sync` of what it wrote; the copy is removed again."""
    drop_cache(source)
    started = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    plain = time.perf_counter() - started
    subprocess.run(["sync", *target.rglob("*")], check=True)
    synced = time.perf_counter() - started
    shutil.rmtree(target)
    return {"cp_s": plain, "cp_sync_s": synced}


def write_seconds(folder: Path, size: int) -> float:
    """Time to write this many bytes to a new file and to see them on the disk."""
    block, file = os.urandom(READ_BYTES), folder / "written"
    started = time.perf_counter()
    with file.open("wb", buffering=0) as stream:
        for start in range(0, size, READ_BYTES):
            stream.write(block[: size - start])
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - started
    file.unlink()
    return seconds


def in_turn(number: int, *calls: Callable[[], Any]) -> list[Any]:
    """What the calls return; each odd time they run in reverse order, so that a tired disk is fair to all."""
    out = [call() for call in (reversed(calls) if number % 2 else calls)]
    return out[::-1] if number % 2 else out


def passes(folder: Path, layers: int, shape: Shape, tokens: int, repeats: int, stats: Path | str) -> dict[str, Any]:
    """Passes over a checkpoint, each beside its yardsticks."""
    rows = []
    for number in range(repeats):

        def one() -> dict[str, Any]:
            drop_cache(folder)
            run = child("pass", folder, tokens, stats)
            return {"pass": run, "alone": child("products", json.dumps(run["batches"]), json.dumps(asdict(shape)))}

        row, read_s = in_turn(number, one, lambda: read_seconds(folder))
        row |= {"read_s": read_s, "products_s": layers * row["alone"]["seconds"]}
        row["over_limit"] = row["pass"]["seconds"] / max(read_s, row["products_s"])
        row["cpu_over_products"] = row["pass"]["cpu_s"] / (layers * row["alone"]["cpu_s"])
        rows.append(row)
        what = f"{row['pass']['tokens']:,} tokens through {layers} layers"
        print(
            f"{what}: {row['pass']['seconds']:.2f} s; reading {read_s:.2f} s, products {row['products_s']:.2f} s",
            flush=True,
        )
    return {
        **{name: statistics.median(row[name] for row in rows) for name in ("over_limit", "cpu_over_products")},
        "rss": max(row["pass"]["rss"] for row in rows),
        "runs": rows,
    }


def bakes(folder: Path, stats: Path, workdir: Path, repeats: int) -> dict[str, Any]:
    """50% bakes, each beside copying what such a bake has written."""
    first, out = workdir / "baked", workdir / "baked-again"

    def bake(target: Path) -> dict[str, Any]:
        shutil.rmtree(target, ignore_errors=True)
        drop_cache(folder)
        return child("bake", folder, stats, target)

    bake(first)
    rows = []
    for number in range(repeats):
        run, copy = in_turn(number, lambda: bake(out), lambda: copy_seconds(first, workdir / "copy"))
        shutil.rmtree(out)
        rows.append(run | copy)
        print(
            f"bake of {run['bytes'] / 1e9:.2f} GB: {run['seconds']:.2f} s; "
            f"cp {copy['cp_s']:.2f} s, with sync {copy['cp_sync_s']:.2f} s",
            flush=True,
        )
    shutil.rmtree(first)
    return {
        "over_cp": statistics.median(x["seconds"] / x["cp_sync_s"] for x in rows),
        "over_plain_cp": statistics.median(x["seconds"] / x["cp_s"] for x in rows),
        "rss": max(x["rss"] for x in rows),
        "runs": rows,
    }


def shrunk(folder: Path, layers: int, shape: Shape, workdir: Path, repeats: int, stats: Path) -> dict[str, Any]:
    """Merging and rounding a checkpoint, each beside its limits."""
    ways = {"merge": ("merge_alone", (folder, stats)), "quantise": ("round_alone", (folder,))}
    found = {}
    for name, (alone, given) in ways.items():
        out, rows = workdir / f"out-{name}", []
        for number in range(repeats):

            def make_it(name: str = name, given: tuple[Path, ...] = given, out: Path = out) -> dict[str, Any]:
                drop_cache(folder)
                run = child(name, *given, out)
                shutil.rmtree(out)
                return run

            run, bare = in_turn(number, make_it, lambda alone=alone: child(alone, json.dumps(asdict(shape))))
            disk_s = read_seconds(folder) + write_seconds(workdir, run["bytes"])
            row = run | {"disk_s": disk_s, "arithmetic_s": layers * bare["seconds"]}
            row["over_limit"] = run["seconds"] / max(disk_s, row["arithmetic_s"])
            row["cpu_over_arithmetic"] = run["cpu_s"] / (layers * bare["cpu_s"])
            rows.append(row)
            print(
                f"{name} to {run['bytes'] / 1e9:.2f} GB: {run['seconds']:.2f} s, {run['rss'] / 1e9:.2f} GB of memory; "
                f"disk {disk_s:.2f} s, arithmetic {row['arithmetic_s']:.2f} s",
                flush=True,
            )
        found[name] = {"rss": max(x["rss"] for x in rows), "runs": rows} | {
            key: statistics.median(x[key] for x in rows) for key in ("over_limit", "cpu_over_arithmetic")
        }
    return found


def by_gptq(folder: Path, tokens: int, workdir: Path) -> dict[str, Any]:
    """GPTQ on a checkpoint."""
    out = workdir / "out-gptq"
    run = child("gptq", folder, tokens, out)
    shutil.rmtree(out)
    shutil.rmtree(workdir / "out-gptq.tensors")
    print(f"gptq, {tokens:,} tokens: {run['fit_s']:.2f} s, {run['rss'] / 1e9:.2f} GB of memory", flush=True)
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="0.2 GB instead of 4 GB, one run of each")
    parser.add_argument("--workdir", type=Path, help="where checkpoints are kept; default: a temporary folder")
    parser.add_argument("--tokens", type=int, help="tokens of the long pass (default 16384; quick: 4096)")
    parser.add_argument("--repeats", type=int, help="runs of each (default 3; quick: 1)")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        name, *rest = args.child
        print(json.dumps(CHILDREN[name](*rest)))
        return
    with tempfile.TemporaryDirectory(prefix="moekit-stream-") as temporary:
        run(args, Path(args.workdir or temporary))


def run(args: argparse.Namespace, workdir: Path) -> None:
    shape = Shape(hidden=512, inner=384) if args.quick else Shape()
    deep = 8 if args.quick else -(-4_000_000_000 // shape.layer_bytes())
    shallow = deep // 2
    repeats, tokens = args.repeats or (1 if args.quick else 3), args.tokens or (4096 if args.quick else 16_384)
    folders = {}
    for layers in (2, shallow, deep):
        folder = folders[layers] = workdir / f"qwen3-moe-{shape.hidden}x{shape.experts}-{layers}"
        if not folder.exists():
            started = time.perf_counter()
            child("make", folder, layers, json.dumps(asdict(shape)))
            print(f"made {folder} in {time.perf_counter() - started:.0f} s", flush=True)
    stats = workdir / "stats"
    shutil.rmtree(stats, ignore_errors=True)
    cold = drop_cache(folders[deep])
    small = passes(folders[shallow], shallow, shape, tokens, 1, "")
    large = passes(folders[deep], deep, shape, tokens, repeats, stats)
    few = passes(folders[deep], deep, shape, ROWS, repeats, "")
    baked = bakes(folders[deep], stats, workdir, repeats)
    smaller = shrunk(folders[deep], deep, shape, workdir, repeats, stats)
    fitted = by_gptq(folders[2], 1024 if args.quick else 4096, workdir)
    size = sum(x.stat().st_size for x in folders[deep].glob("*.safetensors"))
    finish(
        "stream",
        {
            "peak_rss_gb": (max(small["rss"], large["rss"], few["rss"], baked["rss"]) / 1e9, 1.6, "<="),
            "rss_flat": (large["rss"] / small["rss"], 1.1, "<="),
            "pass_over_limit": (large["over_limit"], 1.3, "<="),
            "read_over_limit": (few["over_limit"], 1.3, "<="),
            "bake_over_cp": (baked["over_cp"], 1.5, "<="),
            "shrink_rss_gb": (max(x["rss"] for x in (*smaller.values(), fitted)) / 1e9, 2.0, "<="),
            "merge_over_limit": (smaller["merge"]["over_limit"], 1.5, "<="),
            "quantise_over_limit": (smaller["quantise"]["over_limit"], 1.5, "<="),
        },
        quick=args.quick,
        checkpoint_gb=round(size / 1e9, 2),
        layer_mb=round(shape.layer_bytes() / 1e6),
        cold=cold,
        threads=os.environ.get("OMP_NUM_THREADS", str(os.cpu_count())),
        pass_cpu_over_products_cpu=round(large["cpu_over_products"], 3),
        bake_over_plain_cp=round(baked["over_plain_cp"], 3),
        passes={"shallow": small, "deep": large, "few tokens": few},
        bakes=baked,
        smaller=smaller,
        gptq=fitted,
    )


if __name__ == "__main__":
    main()
