"""How large a trace of every token is, and how much memory writing it takes: synthetic routing, the real recorder.

    python benchmarks/trace_size.py            # 1 M tokens x 48 layers x top-8 of 128: 4 GB of disk, a few minutes
    python benchmarks/trace_size.py --quick    # 32 k tokens, seconds

No model runs: the recorder is shown routers' logits made of a part that the token id decides and noise, token ids being
Zipf distributed, four domains of 512-token sequences. Sizes are in GB (1e9 bytes) for a million tokens:

choices_gb         expert ids (one byte) and weights (float16), as in a memory-mapped safetensors shard
tokens_gb          all of `--tokens`: choices, margins, token columns
stats_mb           the sums that every trace holds, in MB, whatever the number of tokens; `words_mb`: counts by token id
parquet_gb         the wide table, zstd, exact weights
parquet_uint8_gb   the same with weights in a byte
peak_rss_gb        peak resident memory of the whole process while recording, imports included
"""

from __future__ import annotations

import argparse
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from _goals import finish

from moekit.data import Batch
from moekit.layout import Layout, MoELayer, Part, Router
from moekit.recording.recorder import TRACED, Places, Recorder, thinned, token_columns
from moekit.stats import Stats
from moekit.trace import Trace
from moekit.trace.writer import TokenWriter, load_layer_stats, save_head, save_layer_stats
from moekit.view import Call

LAYERS, EXPERTS, TOP_K, VOCABULARY, RANK = 48, 128, 8, 32_000, 16
DOMAINS, ROWS, LENGTH = 4, 16, 512


def synthetic_layout() -> Layout:
    """48 layers of 128 experts, top 8."""
    router = Router("softmax", renormalised=True)
    layers = [
        MoELayer(
            i, f"layers.{i}", f"layers.{i}.experts", f"layers.{i}.gate", EXPERTS, (), EXPERTS, TOP_K, router, 1, 0, ()
        )
        for i in range(LAYERS)
    ]
    parts = {"experts": Part(1, 1)}
    return Layout(
        "synthetic", "synthetic", "Synthetic", 1, LAYERS, VOCABULARY, "float32", None, tuple(layers), parts, 1, ()
    )


def synthetic_batches(tokens: int, rng: np.random.Generator) -> Iterator[Batch]:
    """Batches of Zipf distributed token ids, domain after domain."""
    words = rng.permutation(VOCABULARY)
    count = tokens // (ROWS * LENGTH)
    for number in range(count):
        ranks = rng.zipf(1.2, (ROWS, LENGTH)) % VOCABULARY
        ids = torch.from_numpy(words[ranks].astype(np.int64))
        yield Batch(number * DOMAINS // count, ids, torch.ones(ids.shape, dtype=torch.bool))


def record(folder: Path, tokens: int) -> None:
    """Write a trace of synthetic routing."""
    layout, rng = synthetic_layout(), np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    batches = list(synthetic_batches(tokens, rng))
    writer = TokenWriter(folder, layout.routed, tokens)
    recorder = Recorder(layout.routed, DOMAINS, TRACED, writer)
    places = Places.of(batches)
    recorder.first_rows = places.rows
    table = torch.randn(VOCABULARY, RANK, generator=generator)
    noise = torch.randn(4 * ROWS * LENGTH, EXPERTS, generator=generator)
    maps = torch.randn(LAYERS, RANK, EXPERTS, generator=generator) / RANK**0.5
    for number, batch in enumerate(batches):
        recorder.batch = (number, batch)
        words = table[batch.ids.reshape(-1)]
        for layer in layout.routed:
            start = int(rng.integers(len(noise) - len(words)))
            logits = torch.addmm(noise[start : start + len(words)], words, maps[layer.index])
            weights, ids = logits.softmax(-1).topk(TOP_K)
            call = Call(layer, words, ids, weights / weights.sum(-1, keepdim=True), logits)
            recorder.routed(call)
            recorder.finished(call, words)
        recorder.previous.clear()
        columns = token_columns(batch, places.sequences[number])
        unknown = {"predicted": np.full(batch.tokens, -1), "loss": np.full(batch.tokens, np.nan)}
        writer.write_tokens(places.rows[number], **columns, **unknown)
    writer.close()
    for layer in layout.routed:
        save_layer_stats(folder, "prefill", layer.index, thinned(recorder.take(layer.index, tokens), layer))
    counts = np.bincount([x.domain for x in batches], minlength=DOMAINS) * ROWS
    kept = {i: load_layer_stats(folder, "prefill", i) for i in range(LAYERS)}
    names = tuple(f"domain {i}" for i in range(DOMAINS))
    manifest = {"model": "synthetic", "fingerprint": "", "layout": layout.to_dict(), "data": {}}
    stats = Stats(layout.hash, names, counts * LENGTH, counts, kept, manifest)
    save_head(folder, {"prefill": stats}, manifest, has_tokens=True)


def size(folder: Path) -> int:
    """Bytes below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main() -> None:
    """Record, measure, say so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="32 k tokens instead of 1 M")
    parser.add_argument("--workdir", type=Path, help="where to write; a temporary folder by default")
    options = parser.parse_args()
    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp(prefix="trace-size-", dir=options.workdir))
    try:
        tokens = 2**15 if options.quick else 2**20 // 8192 * 8192
        started = time.perf_counter()
        record(work / "trace", tokens)
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        trace = Trace.open(work / "trace")
        scale = 1e-9 * 1e6 / tokens
        layer = trace.layer(0)
        choices = LAYERS * (layer.ids.nbytes + layer.weights.nbytes) * scale
        every = (size(work / "trace" / "layers") + size(work / "trace" / "tokens")) * scale
        sums = size(work / "trace" / "stats")
        words = sum(x.vocabulary.nbytes + x.following.nbytes for x in trace.stats.layers.values())
        parquet = {}
        for weights in ("float32", "uint8"):
            file = trace.to_parquet(work / f"{weights}.parquet", weights=weights)
            parquet[weights] = file.stat().st_size * scale
            file.unlink()
        print(
            f"{tokens:,} tokens x {LAYERS} layers x top-{TOP_K}: recorded in {seconds:.0f} s, GB for a million tokens"
        )
        for name, value in (("choices", choices), ("all of --tokens", every), ("Parquet", parquet["float32"])):
            print(f"  {name:<18}{value:.3f}")
        print(f"  {'Parquet, uint8':<18}{parquet['uint8']:.3f}")
        print(f"  statistics        {sums / 1e6:.0f} MB in all, {words / 1e6:.0f} MB of it counts by token id")
        finish(
            "trace_size",
            {
                "choices_gb": (choices, 1.16, "<="),
                "tokens_gb": (every, 1.30, "<="),
                "parquet_gb": (parquet["float32"], 1.15, "<="),
                "parquet_uint8_gb": (parquet["uint8"], 0.75, "<="),
                "stats_mb": (sums / 1e6, 300, "<="),
                "peak_rss_gb": (peak / 1e9, 1.5, "<="),
            },
            tokens=tokens,
            words_mb=round(words / 1e6, 1),
            recording_s=round(seconds, 1),
        )
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
