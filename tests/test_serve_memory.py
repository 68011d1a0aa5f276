"""The memory that is promised holds: in a memory cgroup with the page cache counted, in a server that many long prompts
reach at once, and while packing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import moekit
import zoo
from memory import PEAK
from moekit.families.model import Model
from moekit.serve.packing import pack

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
MARGIN_BYTES = 8 << 20  # what the kernel counts for the process beside its own memory: page tables, sockets, pipes
CHANGES = {"hidden_size": 256, "moe_intermediate_size": 512, "num_experts": 64, "num_hidden_layers": 3}
RUN = """
import json, sys
from moekit.serve.device import most_held
from moekit.serve.engine import Engine
engine = Engine(sys.argv[1], memory=int(sys.argv[2]) or None, context=512)
written = list(engine.stream([x % 150 + 3 for x in range(400)], 12))
counts = engine.cache.counts
peak = most_held(engine.device)
print(json.dumps([written, engine.memory.budget, engine.memory.slots, counts.hit_rate, peak]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """150 MB of experts."""
    folder = tmp_path_factory.mktemp("memory") / "model"
    zoo.build("qwen3_moe", dtype=torch.bfloat16, **CHANGES).save_pretrained(folder)
    return folder


def child(code, *arguments, **kwargs):
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_a_budget_holds(model, tmp_path, monkeypatch):
    """The same text as without limit, and the peak as the system counts it; where there are cgroups, from a process
    that would be killed if it took more, the page cache counted."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from _cgroup import Cgroup

    store = pack(Model.open(model), tmp_path / "store")
    written, whole, every, *_ = child(RUN, store, 0)
    budget = whole - 100_000_000
    try:
        group = Cgroup(budget + MARGIN_BYTES)
    except OSError:  # it takes root
        group = None
    try:
        again, _, slots, hit_rate, peak = child(RUN, store, budget, preexec_fn=group and group.enter)
        assert again == written
        assert slots < every / 2
        assert 0 < hit_rate < 1
        assert peak <= budget
        if group is None:
            pytest.skip(f"no memory cgroup can be made here (it takes root); the peak was {peak:,} bytes of {budget:,}")
        assert group.killed == 0
        assert group.peak_bytes <= budget + MARGIN_BYTES
    finally:
        if group is not None:
            group.close()


def test_sixteen_long_prompts_at_once_stay_within_the_budget(tmp_path):
    """`moekit serve` on refmoe: keys and values of prompts that join others, experts with every number of rows."""
    pytest.importorskip("uvicorn", reason="no server here: pip install 'moekit[serve]'")
    if not Path("/proc/self/status").exists():
        pytest.skip("the system does not tell a process's peak")
    store = pack(moekit.open("refmoe"), tmp_path / "refmoe")
    command = [sys.executable, "-u", "-m", "moekit", "serve", str(store), "--port", "0", "--kept-tokens", "16384"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            port = next(x[1] for line in server.stdout if (x := re.search(r"127\.0\.0\.1:(\d+)/v1", line)))

            def ask(number):
                prompt = [(7 * number + 3 * x * x) % 3000 + 3 for x in range(900 - 10 * number)]
                body = {"model": "refmoe", "prompt": prompt, "max_tokens": 12, "temperature": 0}
                request = urllib.request.Request(
                    f"http://127.0.0.1:{port}/v1/completions",
                    json.dumps(body | {"logit_bias": {"0": -100}}).encode(),
                    {"Content-Type": "application/json"},
                )
                with urllib.request.urlopen(request, timeout=300) as answer:
                    return json.load(answer)["usage"]["completion_tokens"]

            with ThreadPoolExecutor(16) as clients:
                assert list(clients.map(ask, range(16))) == [12] * 16
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
                told = answer.read().decode()
            budget = float(re.search(r"memory_budget_bytes (\d\S*)", told)[1])
            status = Path(f"/proc/{server.pid}/status").read_text()
            peak = 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])
        finally:
            server.terminate()
    assert peak <= budget, f"{peak / 1e6:.0f} of {budget / 1e6:.0f} MB"


PACK = (
    PEAK
    + """
import json, sys, torch
from moekit.families.model import Model
from moekit.serve.packing import pack
model = Model.open(sys.argv[1])
before = peak()
pack(model, sys.argv[2], bits=int(sys.argv[3]))
print(json.dumps(peak() - before))
"""
)


def test_packing_needs_one_layer(tmp_path):
    """Nine layers of 13 MB each: no more than a few of them at once, with all that a first run of torch takes."""
    changes = CHANGES | {"hidden_size": 128, "moe_intermediate_size": 256, "num_hidden_layers": 9}
    zoo.build("qwen3_moe", dtype=torch.bfloat16, **changes).save_pretrained(tmp_path / "deep")
    layer = Model.open(tmp_path / "deep").layout.layers[0]
    bytes_a_layer = layer.num_experts * layer.expert_bytes
    assert child(PACK, tmp_path / "deep", tmp_path / "store", 4) < 4 * bytes_a_layer
