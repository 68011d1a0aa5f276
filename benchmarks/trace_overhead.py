"""What watching costs: a traced forward over the same forward unwatched, interleaved in one run.

    python benchmarks/trace_overhead.py             # 0.6 GB of disk and 2 GB of memory, two minutes
    python benchmarks/trace_overhead.py --quick     # the same model, fewer rounds: under a minute

A Qwen3-MoE of over 200 M parameters (64 experts a layer, 8 chosen) with a structured routing reads batches of 1,024
tokens, in memory and in float32. Each round runs every mode on the same batch, in an order that rotates:

plain        the model, its experts run as moekit runs them on the CPU (bit-identical to transformers' eager loop)
stock        the model as transformers runs it by default, for comparison only
statistics   what `moekit trace` does: all sums over routing and vocabulary
tokens       what `moekit trace --tokens` does: the same, every token's experts, weights and margins written to disk,
             and what the model predicted with what loss

Goals are medians over rounds of CPU time over that of `plain` in the same round: other work on the machine disturbs it
less than wall time, whose ratios are given too.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers
from _goals import finish
from _synthetic import Shape, make

from moekit.data import Batch
from moekit.families.model import Model
from moekit.families.seam import IMPLEMENTATION
from moekit.recording.recorder import TRACED, Recorder, head_columns, token_columns
from moekit.trace.writer import TokenWriter
from moekit.view import MoEView

SHAPE, LAYERS = Shape(hidden=1024, inner=512, experts=64, chosen=8), 3
ROWS, LENGTH = 4, 256
MODES = ("plain", "stock", "statistics", "tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 rounds instead of 12")
    parser.add_argument("--rounds", type=int, help="of all modes")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1: CPU time is then the work done)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="moekit-overhead-") as folder:
        run(args, Path(folder))


def run(args: argparse.Namespace, folder: Path) -> None:
    rounds = args.rounds or (4 if args.quick else 12)
    make(folder / "model", LAYERS, SHAPE)
    model = Model.open(folder / "model")
    live = model.load(torch.float32)
    view = MoEView(live, model.layout)
    default = live.config._experts_implementation
    generator = torch.Generator().manual_seed(0)
    batches = [
        Batch(
            0, torch.randint(3, SHAPE.vocabulary, (ROWS, LENGTH), generator=generator), torch.ones(ROWS, LENGTH).bool()
        )
        for _ in range(rounds + 1)
    ]
    total = sum(x.tokens for x in batches)
    writer = TokenWriter(folder, model.layout.routed, total, False)
    recorders = {
        "statistics": Recorder(model.layout.routed, 1, TRACED, None),
        "tokens": Recorder(model.layout.routed, 1, TRACED, writer),
    }

    def forward(number: int) -> torch.Tensor:
        return live(input_ids=batches[number].ids, use_cache=False).logits

    def watched(name: str, number: int) -> None:
        recorder, batch = recorders[name], batches[number]
        recorder.batch = number, batch
        recorder.first_rows = [i * ROWS * LENGTH for i in range(len(batches))]
        with view.watch(recorder):
            logits = forward(number)
        recorder.previous.clear()
        if name == "tokens":
            columns = token_columns(batch, number * ROWS) | head_columns(logits, batch)
            writer.write_tokens(recorder.first_rows[number], **columns)

    def once(mode: str, number: int) -> tuple[float, float]:
        live.set_experts_implementation(default if mode == "stock" else IMPLEMENTATION)
        wall, cpu = time.perf_counter(), time.process_time()
        if mode in recorders:
            watched(mode, number)
        else:
            forward(number)
        return time.process_time() - cpu, time.perf_counter() - wall

    times: list[dict[str, tuple[float, float]]] = []
    with torch.inference_mode():
        for number in range(len(batches)):
            order = MODES[number % len(MODES) :] + MODES[: number % len(MODES)]
            times.append({mode: once(mode, number) for mode in order})
    writer.close()
    counted = [int(recorders[x].sums[0]["count"].sum()) for x in ("statistics", "tokens")]
    assert counted == [total * SHAPE.chosen] * 2, "the recorders did not see everything"
    measured = times[1:]  # the first warms up

    def ratio(mode: str, clock: int) -> float:
        return statistics.median(x[mode][clock] / x["plain"][clock] for x in measured)

    for mode in MODES:
        seconds = statistics.median(x[mode][0] for x in measured)
        print(
            f"{mode:<12}{seconds:8.3f} s of CPU a batch, x {ratio(mode, 0):.3f} of plain; wall x {ratio(mode, 1):.3f}"
        )
    finish(
        "trace_overhead",
        {"statistics": (ratio("statistics", 0), 1.05, "<="), "tokens": (ratio("tokens", 0), 1.10, "<=")},
        quick=args.quick,
        params_m=round(model.layout.total.params / 1e6),
        rounds=len(measured),
        threads=args.threads,
        wall={mode: round(ratio(mode, 1), 4) for mode in MODES},
        stock_over_plain=round(ratio("stock", 0), 4),
        plain_s=round(statistics.median(x["plain"][0] for x in measured), 4),
    )


if __name__ == "__main__":
    main()
