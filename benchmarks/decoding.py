"""Do experts help at decoding? Right answers and time of SCMoE and C3PO against greedy decoding.

    python benchmarks/decoding.py            # refmoe: arithmetic; the MoE made of SmolLM2: short questions
    python benchmarks/decoding.py --quick    # refmoe, few questions: under a minute
    python benchmarks/decoding.py --write    # and docs/benchmarks/decoding.md
    python benchmarks/decoding.py --only time --write

refmoe's questions are lines of its held-out arithmetic, cut before the answer; its references come from other lines of
them. The larger model is asked for capitals, opposites, past tenses and sums (`_questions.py`; it is too small for
GSM8K), each behind three examples; its references are other questions of the same kinds. An answer is right when its
first line is, or for the larger model its first word.

Accuracies have 95% bootstrap intervals over questions; differences from greedy are paired. Time is that of one more
token, one text, greedy and SCMoE in turn on one thread; the median of ratios of neighbouring runs.

Goals: some setting of SCMoE, and some surrogate of C3PO, beats greedy by more than chance (the interval of the
difference is above zero); SCMoE takes at most 1.35 times greedy's time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from _goals import finish
from _questions import short_questions
from _smollm2 import CACHE
from prune_methods import DOCS

import moekit
from moekit import refmoe
from moekit.data import load_tokenizer
from moekit.decoding.c3po import C3PO, Pathfinder, decode_mixed
from moekit.decoding.loop import Runner, decode
from moekit.decoding.methods import Decoder, greedy, scmoe
from moekit.decoding.questions import Marking, Question, accuracy
from moekit.decoding.references import build
from moekit.decoding.weak import Weak
from moekit.evaluation.intervals import Interval, ratio_interval
from moekit.families.model import Model

WEAK = ("rank:2", "rank:3", "rank:4", "random", "top-1")
SURROGATES = ("gradient", "kernel", "mode")
GOAL = 1.35  # of greedy's time
LEAST_GAIN = 0.1  # points: the low end of an interval above zero
LENGTH = 24  # tokens between two readings of the clock


def arithmetic() -> list[Question]:
    """The held-out lines of arithmetic, each cut before its answer."""
    lines = Path(refmoe.texts()["math"]).read_text("utf-8").splitlines()
    cut = [line.rindex("= ") + 1 for line in lines]
    return [Question(line[:at], line[at + 1 :]) for line, at in zip(lines, cut, strict=True)]


def scores(
    model: Model,
    dtype: torch.dtype,
    asked: list[Question],
    given: list[Question],
    marking: Marking,
    rules: Sequence[str],
    mixed: int,
) -> dict[str, dict[str, Any]]:
    """Accuracy of every method, and its difference from greedy on the same questions.

    Args:
        model: to ask.
        dtype: to run in.
        asked: the questions.
        given: what references are made of.
        marking: what counts.
        rules: weak passes.
        mixed: how many of the questions C3PO is asked.
    """
    tokenizer = load_tokenizer(model.path)
    prompts = [tokenizer(x.prompt).input_ids for x in asked]
    loaded = model.load(dtype), model.layout
    finished, marks = marking.finished(tokenizer), {}

    def mark(written: list[list[int]]) -> list[bool]:
        return accuracy([tokenizer.decode(x) for x in written], asked[: len(written)], marking)

    def run(name: str, made: Decoder) -> None:
        marks[name] = mark(
            decode(made.runners, prompts, made.combine, max_new_tokens=8, batch_size=16, finished=finished)
        )
        print(model.name, name, sum(marks[name]), len(marks[name]), flush=True)

    run("greedy", greedy(loaded))
    for rule in rules:
        run(f"SCMoE, {rule}", scmoe(loaded, Weak.parse(rule)))
    run("SCMoE, rank:3, beta 1", scmoe(loaded, Weak("rank", 3), beta=1.0))
    with tempfile.TemporaryDirectory() as folder:
        references = build(
            model, given, Path(folder) / "ref", marking=marking, max_new_tokens=8, dtype=dtype, batch_size=16
        )
    print(model.name, len(references), "references of", len(given), flush=True)
    for surrogate in SURROGATES:
        finder = Pathfinder(Runner(*loaded), references, C3PO(surrogate=surrogate))
        written, _ = decode_mixed(finder, prompts[:mixed], max_new_tokens=8, finished=finished)
        marks[f"C3PO, {surrogate}"] = mark(written)
        print(model.name, surrogate, sum(marks[f"C3PO, {surrogate}"]), len(written), flush=True)
    return {name: row(x, marks["greedy"], len(references)) for name, x in marks.items()}


def row(marks: list[bool], plain: list[bool], references: int) -> dict[str, Any]:
    """Accuracy, and the paired difference from greedy."""
    ours, theirs, ones = np.array(marks, float), np.array(plain[: len(marks)], float), np.ones(len(marks))
    return {
        "asked": len(marks),
        "right": ratio_interval(ours, ones),
        "gain": ratio_interval(ours - theirs, ones),
        "references": references,
    }


def token_s(made: Decoder, prompt: list[int], count: int) -> float:
    """Seconds for each of `count` more tokens, without the prompt."""
    runner = made.runners[0]
    with torch.inference_mode(), runner.changed():
        logits = runner.start([prompt])
        started = time.perf_counter()
        for _ in range(count):
            logits = runner.step(made.combine(logits).argmax(-1))
        return (time.perf_counter() - started) / count


def latency(model: Model, rounds: int) -> dict[str, float]:
    """Milliseconds a token of greedy and SCMoE, and their ratio, in turn."""
    loaded = model.load(), model.layout
    plain, contrasted = greedy(loaded), scmoe(loaded, Weak("rank", 3))
    prompt = load_tokenizer(model.path)("The answer to the question is that").input_ids
    token_s(contrasted, prompt, 4)
    pairs = np.array([(token_s(plain, prompt, LENGTH), token_s(contrasted, prompt, LENGTH)) for _ in range(rounds)])
    return {
        "greedy_ms": 1e3 * float(np.median(pairs[:, 0])),
        "scmoe_ms": 1e3 * float(np.median(pairs[:, 1])),
        "ratio": float(np.median(pairs[:, 1] / pairs[:, 0])),
    }


def table(name: str, rows: dict[str, dict[str, Any]]) -> list[str]:
    """One model's accuracies."""
    shares: Callable[[Interval], str] = lambda x: f"{x.value:.1%} [{x.low:.1%}, {x.high:.1%}]"  # noqa: E731
    points: Callable[[Interval], str] = lambda x: f"{100 * x.value:+.1f} [{100 * x.low:+.1f}, {100 * x.high:+.1f}]"  # noqa: E731
    known = next(iter(rows.values()))["references"]
    lines = [f"## {name}", "", f"{known} references.", "", "| method | questions | right | points over greedy |"]
    lines.append("|---|--:|--:|--:|")
    for method, x in rows.items():
        gain = "" if method == "greedy" else points(Interval(*x["gain"]))
        lines.append(f"| {method} | {x['asked']} | {shares(Interval(*x['right']))} | {gain} |")
    return [*lines, ""]


def page(found: dict[str, Any]) -> str:
    """docs/benchmarks/decoding.md."""
    lines = ["# Decoding by experts", "", "By `python benchmarks/decoding.py --write`; 95% intervals.", ""]
    for name, rows in found.get("scores", {}).items():
        lines += table(name, rows)
    if "time" in found:
        lines += ["## Time", "", "One text, one thread, a token more:", "", "| model | greedy | SCMoE | ratio |"]
        lines.append("|---|--:|--:|--:|")
        for name, x in found["time"].items():
            lines.append(f"| {name} | {x['greedy_ms']:.1f} ms | {x['scmoe_ms']:.1f} ms | {x['ratio']:.2f} |")
        lines.append("")
    return "\n".join(lines)


def best(found: dict[str, Any], method: str) -> float:
    """The largest lower end of an interval of gains, in points."""
    lows = [100 * x["gain"][1] for rows in found["scores"].values() for n, x in rows.items() if n.startswith(method)]
    return max(lows, default=float("nan"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="refmoe, few questions; no page")
    parser.add_argument(
        "--only", choices=("refmoe", "large", "time"), help="one part; the others are kept as they were"
    )
    parser.add_argument("--write", action="store_true", help="write the page, and the numbers beside it")
    parser.add_argument("--keep", type=Path, help="where the numbers of earlier parts are (JSON)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    started = time.perf_counter()
    parts = {args.only} if args.only else {"refmoe", "time"} if args.quick else {"refmoe", "large", "time"}
    found: dict[str, Any] = {"scores": {}, "time": {}}
    if args.keep and args.keep.exists():
        found = json.loads(args.keep.read_text("utf-8"))
    small = moekit.open("refmoe")
    large = moekit.open(CACHE) if CACHE.exists() and not args.quick else None
    if "refmoe" in parts:
        lines = arithmetic()
        asked, given, mixed = (60, 100, 8) if args.quick else (600, 600, 150)
        found["scores"]["refmoe, arithmetic"] = scores(
            small, torch.float32, lines[:asked], lines[-given:], Marking(), WEAK, mixed
        )
    if "large" in parts and large is not None:
        questions = short_questions(0)
        found["scores"]["SmolLM2-MoE, short questions"] = scores(
            large,
            torch.bfloat16,
            questions[:80],
            questions[80:],
            Marking(extract=r"^\s*([\w-]+)"),
            [x for x in WEAK if x != "rank:4"],
            30,
        )
    if "time" in parts:
        for name, model in (("refmoe", small), ("SmolLM2-MoE", large)):
            if model is not None:
                found["time"][name] = latency(model, 3 if args.quick else 15)
                print(name, found["time"][name], flush=True)
    if args.keep:
        args.keep.write_text(json.dumps(found), "utf-8")
    if args.write:
        (DOCS / "benchmarks" / "decoding.md").write_text(page(found), "utf-8")
    finish(
        "decoding",
        {
            "scmoe_gain_points_low_end": (best(found, "SCMoE"), LEAST_GAIN, ">="),
            "c3po_gain_points_low_end": (best(found, "C3PO"), LEAST_GAIN, ">="),
            "scmoe_time_over_greedy": (max((x["ratio"] for x in found["time"].values()), default=np.nan), GOAL, "<="),
        },
        quick=args.quick,
        seconds=round(time.perf_counter() - started, 1),
        found=found,
    )


if __name__ == "__main__":
    main()
