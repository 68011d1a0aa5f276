"""What `stream.py` runs in processes of their own to make a checkpoint smaller, and the bare arithmetic of it.

Symbols: I hidden units of an expert, F numbers of a unit, O output rows, G groups of a row.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _synthetic import Shape

KEEP = 0.5
GROUP, WORD = 128, 8  # columns that share a scale; codes of 4 bits in a word of 32


def merge(folder: str, stats: str, out: str) -> dict[str, Any]:
    """Half the experts of every layer merged into the others by m-smoe, from statistics that are there."""
    import moekit
    from moekit.stats import Stats

    plan = moekit.plan("m-smoe", Stats.load(Path(stats)), keep=KEEP)
    return _bake(folder, plan, out)


def quantise(folder: str, out: str) -> dict[str, Any]:
    """All experts rounded to 4 bits, as compressed-tensors."""
    import moekit
    from moekit.methods import make_plan

    plan = make_plan("rtn-int4", None, moekit.open(folder).layout)
    return _bake(folder, plan, out)


def gptq(folder: str, tokens: str, out: str) -> dict[str, Any]:
    """All experts to 4 bits by GPTQ: a pass over text that rounds, then the bake."""
    import moekit
    from moekit import refmoe
    from moekit.fitting import Fit, decide

    model = moekit.open(folder)
    data = moekit.load_data(model, {"python": refmoe.texts()["python"]}, tokens=int(tokens), sequence_length=512)
    started = time.perf_counter()
    plan = decide("gptq-int4", Fit(model, model, None, data, Path(out + ".tensors")))
    fitted_s = time.perf_counter() - started
    return {"fit_s": fitted_s, **_bake(folder, plan, out)}


def _bake(folder: str, plan: Any, out: str) -> dict[str, Any]:
    import moekit
    from moekit.apply.bake import bake

    model = moekit.open(folder)
    started, busy = time.perf_counter(), time.process_time()
    baked = bake(model.checkpoint, model.understanding, plan, out)
    return {
        "seconds": time.perf_counter() - started,
        "cpu_s": time.process_time() - busy,
        "bytes": baked.bytes_after,
    }


def merge_alone(shape: str) -> dict[str, Any]:
    """The arithmetic of one group of two experts: how alike their units are, the assignment, the mean."""
    import torch
    from scipy.optimize import linear_sum_assignment

    sizes = Shape(**json.loads(shape))
    a_IF, b_IF = (torch.randn(sizes.inner, 3 * sizes.hidden).bfloat16() for _ in range(2))

    def call() -> None:
        a, b = a_IF.float(), b_IF.float()
        _, order_I = linear_sum_assignment((a @ b.T).double().numpy(), maximize=True)
        (a.mul_(0.5) + b[order_I].mul_(0.5)).bfloat16()

    groups = sizes.experts - int(KEEP * sizes.experts)
    return {name: groups * x for name, x in _timed(call).items()}


def round_alone(shape: str) -> dict[str, Any]:
    """The arithmetic of rounding a layer's experts to 4 bits: the largest of each group, codes, words."""
    import torch

    sizes = Shape(**json.loads(shape))
    weights = [torch.randn(*x).bfloat16() for x in ((sizes.inner, sizes.hidden),) * 2 + ((sizes.hidden, sizes.inner),)]
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)

    def call() -> None:
        for weight in weights:
            groups_OGN = weight.float().unflatten(1, (-1, GROUP))
            scale_OG = groups_OGN.abs().amax(-1) / 7
            codes = (groups_OGN / scale_OG[..., None] + 8).round_().clamp_(0, 15).int()
            (codes.view(len(weight), -1, WORD) << shifts).sum(-1, dtype=torch.int32)

    return {name: sizes.experts * x for name, x in _timed(call).items()}


def _timed(call: Callable[[], None]) -> dict[str, float]:
    """Seconds of wall and processor time, medians of five runs after a first one."""
    wall, cpu = [], []
    for _ in range(6):
        started, busy = time.perf_counter(), time.process_time()
        call()
        wall.append(time.perf_counter() - started)
        cpu.append(time.process_time() - busy)
    return {"seconds": statistics.median(wall[1:]), "cpu_s": statistics.median(cpu[1:])}
