"""Decoding with everything in memory, one text: moekit against transformers and llama.cpp, on the same weights.

    python benchmarks/decode.py --quick            # refmoe, a minute
    python benchmarks/decode.py --write            # a model made here, and SmolLM2 as MoE where it has been made

Needs the extra `bench`; llama.cpp only where `llama-cpp-python` is installed (compiled for this CPU). Goals: moekit
with four-bit experts at least 3 times as fast as the fastest of transformers' experts implementations, in bfloat16 at
least twice, and with four bits everywhere at least as fast as llama.cpp with q4_0. All take turns in rounds, each
writes the same number of tokens after the same prompt; medians of a token, the median over rounds of the ratios.

"4" and "8" round experts alone (`moekit pack --bits`); "4 and 4" attention, shared experts and dense layers too
(`--rest-bits 4`), and the vocabulary's matrix to 8 bits: what q4_0 has here, though llama.cpp also rounds the
activations that it multiplies by to 8 bits, and moekit none. "16 exact" gives the logits of transformers' eager experts
bit for bit; "16 fast" multiplies the same numbers by native kernels, which sum in another order. What rounding costs:
[lossy.md](lossy.md).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import _llama_cpp
import torch
import transformers
from _goals import finish

import moekit
from moekit.families.model import Model
from moekit.serve.engine import Engine
from moekit.serve.native import ISAS, native
from moekit.serve.packing import pack

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "decode.md"
SMOLLM2 = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moekit" / "smollm2-moe"
STOCK = ("eager", "batched_mm", "grouped_mm")
OURS = (  # name, bits of experts, of the rest, exact
    *(("16 exact", 16, 16, True), ("16 fast", 16, 16, False), ("8", 8, 16, None)),
    *(("4", 4, 16, None), ("4 and 4", 4, 4, None)),
)
PROMPT = 16
GOALS = {"16": 2.0, "4": 3.0}


def made_here(folder: Path) -> Path:
    """A Qwen3-MoE of 650 M parameters, 215 M of them active, whose router spreads tokens; no text is claimed of it."""
    if (folder / "config.json").exists():
        return folder
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=16384, hidden_size=1024, intermediate_size=512, moe_intermediate_size=512, num_hidden_layers=12,
        num_attention_heads=16, num_key_value_heads=4, head_dim=64, num_experts=32, num_experts_per_tok=8,
        max_position_embeddings=4096, tie_word_embeddings=False, norm_topk_prob=True,
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    for layer in model.model.layers:
        layer.mlp.gate.weight.data.normal_(0, 0.05)
    model.save_pretrained(folder)
    return folder


def of_moekit(engine: Engine, ids: list[int], tokens: int) -> list[float]:
    """Seconds of each token."""
    list(engine.stream(ids, tokens))
    return list(engine.timing.token_s)


@torch.inference_mode()
def of_stock(model: transformers.PreTrainedModel, name: str, ids: list[int], tokens: int) -> list[float]:
    """Seconds of each token."""
    model.set_experts_implementation(name)
    past = transformers.DynamicCache(config=model.config)
    out, found = model(torch.tensor([ids]), past_key_values=past, use_cache=True, logits_to_keep=1), []
    for _ in range(tokens - 1):
        started = time.perf_counter()
        out = model(out.logits[:, -1:].argmax(-1), past_key_values=past, use_cache=True, logits_to_keep=1)
        found.append(time.perf_counter() - started)
    return found


def of_llama(llama: _llama_cpp.Llama, ids: list[int], tokens: int) -> list[float]:
    """Seconds of each token."""
    llama.forget()
    logits, found = llama.feed(ids), []
    for _ in range(tokens - 1):
        started = time.perf_counter()
        logits = llama.feed([int(logits.argmax())])
        found.append(time.perf_counter() - started)
    return found


def contenders(folder: Path, work: Path, threads: int) -> dict[str, Callable[[list[int], int], list[float]]]:
    """What is compared, by name."""
    from _gguf import write_gguf

    source, out = Model.open(folder), {}
    stock = source.load(torch.bfloat16)
    for name in STOCK:
        out[f"transformers {name}"] = lambda ids, tokens, name=name: of_stock(stock, name, ids, tokens)
    for label, bits, rest, exact in OURS:
        store = work / (f"{folder.name}-{bits}" + (f"-rest{rest}" if rest < 16 else ""))
        if not store.exists():
            pack(source, store, bits=bits, rest_bits=rest)
        engine = Engine(store, exact=exact, context=512)
        out[f"moekit {label}"] = lambda ids, tokens, engine=engine: of_moekit(engine, ids, tokens)
    for quant in ("bf16", "q4_0") if _llama_cpp.installed() else ():
        file = work / f"{folder.name}-{quant}.gguf"
        llama = _llama_cpp.Llama(file if file.exists() else write_gguf(folder, file, quant), 512, threads)
        out[f"llama.cpp {quant}"] = lambda ids, tokens, llama=llama: of_llama(llama, ids, tokens)
    return out


def compare(folder: Path, work: Path, tokens: int, rounds: int, threads: int) -> dict[str, list[float]]:
    """Median seconds of a token, one for each round, by contender."""
    ids = torch.randint(5, 500, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    who = contenders(folder, work, threads)
    for run in who.values():
        run(ids, 8)
        run(ids, tokens)  # every expert that the text needs is in memory now
    found: dict[str, list[float]] = {x: [] for x in who}
    for _ in range(rounds):
        for name, run in who.items():
            found[name].append(statistics.median(run(ids, tokens)))
    return found


def ratio(found: dict[str, list[float]], name: str, other: str) -> float:
    """How many times as fast, the median over rounds."""
    return statistics.median(b / a for a, b in zip(found[name], found[other], strict=True))


def best_stock(found: dict[str, list[float]]) -> str:
    """The fastest of transformers' experts implementations."""
    return min((x for x in found if x.startswith("transformers")), key=lambda x: statistics.median(found[x]))


def table(found: dict[str, list[float]]) -> list[str]:
    """Rows of Markdown."""
    best, theirs = best_stock(found), "llama.cpp q4_0"
    lines = [f"| | ms a token | times as fast as {best} | as {theirs} |", "|---|--:|--:|--:|"]
    for name, seconds in found.items():
        other = f"{ratio(found, name, theirs):.2f}" if theirs in found else ""
        lines.append(f"| {name} | {1e3 * statistics.median(seconds):.2f} | {ratio(found, name, best):.2f} | {other} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="refmoe, few tokens")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    parser.add_argument("--model", type=Path, action="append", help="a Qwen2-MoE or Qwen3-MoE checkpoint instead")
    parser.add_argument("--work", type=Path, help="folder that keeps what is made on the way, for the next time")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    tokens, rounds = (12, 2) if args.quick else (args.tokens, args.rounds)
    from _gguf import faithful

    page, goals, extra = [], {}, {}
    with tempfile.TemporaryDirectory(prefix="moekit-decode-") as scratch:
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        if args.quick:
            folders = [Path(moekit.open("refmoe").path)]
        else:
            folders = args.model or [made_here(work / "made"), *([SMOLLM2] if SMOLLM2.is_dir() else [])]
        for folder in folders:
            found = compare(folder, work, tokens, rounds, args.threads)
            name, best = "refmoe" if args.quick else folder.name, best_stock(found)
            goals[f"{name}: int4 against {best}"] = (ratio(found, "moekit 4", best), GOALS["4"], ">=")
            goals[f"{name}: bf16 against {best}"] = (ratio(found, "moekit 16 fast", best), GOALS["16"], ">=")
            if "llama.cpp q4_0" in found:
                equal = ratio(found, "moekit 4 and 4", "llama.cpp q4_0")
                goals[f"{name}: 4 and 4 against llama.cpp q4_0"] = (equal, 1.0, ">=")
            extra[name] = {x: round(1e3 * statistics.median(y), 3) for x, y in found.items()}
            same = faithful(transformers.AutoConfig.from_pretrained(folder))
            note = (
                "" if same else " (llama.cpp's graph does not renormalise this router's weights: same cost, other text)"
            )
            page += [f"## {name}", "", *table(found), "", f"{tokens} tokens, {rounds} rounds{note}.", ""]
            print("\n".join(page[-len(found) - 8 :]), flush=True)
    line = finish("decode", goals, ms_a_token=extra, threads=args.threads, native=native()[1] or "used")
    if args.write:
        met = [
            f"| {x} | {y['value']} | {y['goal']} | {'yes' if y['met'] else 'no'} |" for x, y in line["goals"].items()
        ]
        head = ["# Decoding with everything in memory", "", (__doc__ or "").split("\n\n")[2], "",
                (__doc__ or "").split("\n\n")[3].strip(), ""]  # fmt: skip
        rows = ["| goal | times as fast | hoped for | met |", "|---|--:|--:|---|", *met, ""]
        kernels = native()[0]
        turns = (
            f"By `python benchmarks/decode.py --write`: {args.threads} thread(s), native kernels for "
            f"{ISAS[kernels.isa] if kernels else 'none'}. `made` is a Qwen3-MoE of 12 layers (hidden 1024, 32 experts "
            "of 512, 8 a token; 650 M parameters, 215 M active) made by this benchmark, `smollm2-moe` SmolLM2 made an "
            "MoE (`benchmarks/_smollm2.py`). Contenders take turns, so what else runs on the machine meets all of them."
        )
        PAGE.write_text("\n".join([*head, *rows, *page, turns]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
