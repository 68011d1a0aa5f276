"""Serving: 1, 4 and 16 clients at once, and a long prompt that comes while others write.

    python benchmarks/serving.py             # refmoe, a few minutes
    python benchmarks/serving.py --quick     # fewer tokens and rounds: under a minute
    python benchmarks/serving.py --write     # also writes docs/benchmarks/serving.md

`moekit serve` runs as a process of its own; clients are threads here that stream completions of prompts from refmoe's
texts. Rounds of all numbers of clients are interleaved; each number is the median of its rounds. All experts are in
memory: what is measured is the scheduler and the batching, not the disk (that is benchmarks/offload.py).

tokens/s        of all clients together, from the first request to the last token
first token     from sending a request to its first text, median of requests
p99 / median    of the times between a client's chunks of text
long prompt     clients write while another sends a prompt of 1,600 tokens: the longest pause of a writer over the time
                that the prompt takes (1 would mean that writers wait for all of it)
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from _goals import finish

import moekit
from moekit import refmoe
from moekit.data import load_tokenizer
from moekit.serve.packing import pack

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "serving.md"
CLIENTS = (1, 4, 16)
PROMPT_TOKENS, LONG_TOKENS = 48, 1600
NO_END = {"0": -100}  # refmoe's end of text: all answers are equally long


@dataclass
class Answer:
    """What a client saw: when it asked, when each chunk of text came, tokens written, and the error, s."""

    asked: float = 0.0
    chunks: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str = ""


def ask(port: int, prompt: list[int], tokens: int) -> Answer:
    """Stream one completion."""
    answer = Answer(time.perf_counter())
    body = {"model": "refmoe", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "logit_bias": NO_END}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=240)
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"{response.status} {response.read()[:200]!r}")
        for line in response:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if event["choices"]:
                    answer.chunks.append(time.perf_counter())
                else:
                    answer.tokens = event["usage"]["completion_tokens"]
    except Exception as error:  # counted, and printed at the end
        answer.error = f"{type(error).__name__}: {error}"
    return answer


def together(port: int, prompts: list[list[int]], tokens: int) -> list[Answer]:
    """Several at once."""
    answers: list[Answer] = [Answer() for _ in prompts]

    def one(number: int) -> None:
        answers[number] = ask(port, prompts[number], tokens)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def gaps(answers: list[Answer]) -> list[float]:
    """Between a client's chunks, ascending."""
    return sorted(b - a for answer in answers for a, b in zip(answer.chunks, answer.chunks[1:], strict=False))


def long_prompt(port: int, prompts: list[list[int]], long: list[int], tokens: int) -> tuple[float, float, list[Answer]]:
    """(longest pause of the writers, time of the long prompt, everything)."""
    answers: list[Answer] = []
    writers = threading.Thread(target=lambda: answers.extend(together(port, prompts, tokens)))
    writers.start()
    time.sleep(0.5)  # all of them write by then
    started = time.perf_counter()
    extra = ask(port, long, 1)
    took = time.perf_counter() - started
    writers.join()
    return max(gaps(answers), default=0.0), took, [*answers, extra]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="24 tokens and one round instead of 64 and three")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    parser.add_argument("--threads", type=int, default=1, help="of the server's torch")
    args = parser.parse_args()
    tokens, rounds = (24, 1) if args.quick else (64, 3)
    with tempfile.TemporaryDirectory(prefix="moekit-serving-") as folder:
        store = pack(moekit.open("refmoe"), Path(folder) / "refmoe")
        command = [sys.executable, "-m", "moekit", "serve", str(store), "--port", "0"]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(args.threads), "PYTHONUNBUFFERED": "1"},
        )
        try:
            port = next(int(x[1]) for line in process.stdout if (x := re.search(r"127\.0\.0\.1:(\d+)/v1", line)))
            measure(args, store, port, tokens, rounds)
        finally:
            process.terminate()
            process.wait(60)


def measure(args: argparse.Namespace, store: Path, port: int, tokens: int, rounds: int) -> None:
    tokenizer = load_tokenizer(store)
    tokenizer.model_max_length = 1 << 30  # texts are cut below
    ids = [tokenizer(path.read_text("utf-8")).input_ids for path in refmoe.texts().values()]
    prompts = [ids[i % 6][1000 + 100 * i :][:PROMPT_TOKENS] for i in range(max(CLIENTS))]
    seen: dict[int, list[dict[str, float]]] = {n: [] for n in CLIENTS}
    long_rounds: list[float] = []
    errors: list[str] = []
    together(port, prompts, 4)  # warms up
    for number in range(rounds):
        for n in CLIENTS[number % 3 :] + CLIENTS[: number % 3]:
            answers = together(port, prompts[:n], tokens)
            errors += [x.error for x in answers if x.error]
            between = gaps(answers) or [float("nan")]
            took = max(x.chunks[-1] for x in answers if x.chunks) - min(x.asked for x in answers)
            seen[n].append(
                {
                    "rate": sum(x.tokens for x in answers) / took,
                    "first_s": statistics.median(x.chunks[0] - x.asked for x in answers if x.chunks),
                    "tail": between[int(0.99 * len(between))] / statistics.median(between),
                    "median_s": statistics.median(between),
                }
            )
        pause, took, answers = long_prompt(port, prompts[:4], ids[0][:LONG_TOKENS], tokens)
        errors += [x.error for x in answers if x.error]
        long_rounds.append(pause / took)

    def middle(n: int, key: str) -> float:
        return statistics.median(x[key] for x in seen[n])

    lines = [
        "| clients | tokens/s against one client | first token, ms | between tokens, ms | p99 / median |",
        "|---|---|---|---|---|",
    ]
    for n in CLIENTS:
        ratio, first, between = middle(n, "rate") / middle(1, "rate"), middle(n, "first_s"), middle(n, "median_s")
        lines.append(f"| {n} | {ratio:.2f} | {1e3 * first:.0f} | {1e3 * between:.1f} | {middle(n, 'tail'):.2f} |")
    longest = statistics.median(long_rounds)
    lines.append(f"\nLongest pause of a writer beside a prompt of {LONG_TOKENS:,} tokens: {longest:.2f} of its time.")
    lines.append(
        "\n"
        "One client alone writes three times as fast as when the goals were set (17.3 ms a token then), sixteen twice\n"
        "as fast (46.3 ms): so what many gain over one fell."
    )
    print("\n".join(lines), *errors[:3], sep="\n")
    line = finish(
        "serving",
        {
            "four_clients": (middle(4, "rate") / middle(1, "rate"), 2.0, ">="),
            "sixteen_clients": (middle(16, "rate") / middle(1, "rate"), 4.0, ">="),
            "p99_over_median_at_16": (middle(16, "tail"), 3.0, "<="),
            "pause_over_long_prompt": (longest, 0.5, "<="),
            "failures": (len(errors), 0, "<="),
        },
        quick=args.quick,
        threads=args.threads,
        rounds=rounds,
        tokens_per_s={n: round(middle(n, "rate"), 1) for n in CLIENTS},
    )
    if args.write:
        write(lines, line)


def write(lines: list[str], line: dict) -> None:
    goals = [
        f"| {name.replace('_', ' ')} | {row['value']} | {row['sign']} {row['goal']} | {'yes' if row['met'] else 'no'} |"
        for name, row in line["goals"].items()
    ]
    text = "\n".join(
        [
            "# Serving: many clients, one model",
            "",
            "`python benchmarks/serving.py --write` writes this page: `moekit serve` on refmoe, all experts in memory,",
            f"{line['threads']} thread of torch on a machine of two cores; its docstring says what is measured.",
            "",
            *lines,
            "",
            "| goal | measured | wanted | met |",
            "|---|---|---|---|",
            *goals,
            "",
        ]
    )
    PAGE.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
