"""doctor: what it finds, and that it says so when something is broken; limits of control groups, versions 1 and 2."""

from __future__ import annotations

import json
from importlib import metadata

import pytest

import moekit
import zoo
from moekit.cli import main
from moekit.serve import checkup as module
from moekit.serve import machine
from moekit.serve.checkup import BROKEN, GOOD, NOTE, Check, checkup
from moekit.serve.packing import pack


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return pack(moekit.open("refmoe"), tmp_path_factory.mktemp("doctor") / "store", bits=4)


def states(checks):
    return {x.name: x.state for x in checks}


def test_a_healthy_machine(store, capsys):
    assert main(["doctor", str(store), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"]
    says = {x["name"]: x["says"] for x in found["checks"]}
    assert "two experts of each layer read and checked" in says[str(store)]
    assert "GB/s in reads of 1 MiB" in says["disk"]
    assert "16 bits" in says["expert"]
    assert says["torch"] == metadata.version("torch")
    assert not list(store.glob(".moekit-probe-*"))


@pytest.fixture
def quick(monkeypatch):
    """Without the parts that take long."""
    for name in ("_expert", "_cuda", "_memory", "_disk"):
        monkeypatch.setattr(module, name, lambda *_: Check("x", GOOD, "left out"))


def test_what_is_broken_is_said_and_ends_with_1(quick, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(module, "_expert", lambda: 1 / 0)
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "broken expert" in shown
    assert "ZeroDivisionError" in shown
    assert states(checkup(str(tmp_path)))[str(tmp_path)] == BROKEN  # neither store nor model


def test_wrong_experts_are_found(monkeypatch):
    real = module.Engine.logits
    monkeypatch.setattr(module.Engine, "logits", lambda self, ids: 2 * real(self, ids))
    assert module._expert().state == BROKEN


def test_a_damaged_store_is_found(quick, store, tmp_path):
    for file in store.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    whole = (tmp_path / "experts-00001.bin").read_bytes()
    (tmp_path / "experts-00001.bin").write_bytes(b"\0" + whole[1:])
    found = {x.name: x for x in checkup(str(tmp_path))}[str(tmp_path)]
    assert found.state == BROKEN
    assert "layer 1, expert 0" in found.says


def test_a_model_is_checked_for_packing(quick, tmp_path):
    zoo.build("mixtral").save_pretrained(tmp_path / "model")
    found = {x.name: x for x in checkup(str(tmp_path / "model"))}[str(tmp_path / "model")]
    assert found.state == GOOD
    assert "can be packed" in found.says


def test_versions_that_do_not_do(monkeypatch):
    wanted = ["torch>=99", "no-such-package>=1", 'absent-extra; extra == "data"']
    monkeypatch.setattr(metadata, "requires", lambda _: wanted)
    found = {x.name: x for x in (*module.versions(), *module.extras())}
    assert found["torch"].state == found["no-such-package"].state == BROKEN
    assert 'pip install "torch>=99"' in found["torch"].says
    assert "absent: data" in found["extras"].says


def test_no_native_kernels_and_a_slow_disk_are_worth_a_note(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "native", lambda: (None, "there is no C compiler"))
    assert module._kernels().state == NOTE
    for disk in (machine.Disk(True, 1e8, 1e8), machine.Disk(False, 9e9, 9e9)):
        monkeypatch.setattr(module, "disk_speed", lambda _, disk=disk: disk)
        assert module._disk(tmp_path).state == NOTE


@pytest.mark.parametrize(
    ("line", "files", "limit"),
    [
        ("0::/user/one", {"user/one/memory.max": "max", "user/memory.max": "5000"}, 5000),
        ("0::/user/one", {"user/one/memory.max": "3000", "user/memory.max": "5000"}, 3000),
        ("4:cpu,memory:/box", {"memory/box/memory.limit_in_bytes": "7000"}, 7000),
        ("4:memory:/box", {"memory/box/memory.limit_in_bytes": str(2**63 - 4096)}, None),
        ("4:cpu:/box", {"memory/box/memory.limit_in_bytes": "7000"}, None),
        ("0::/", {}, None),
    ],
)
def test_limits_of_control_groups(tmp_path, line, files, limit):
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text)
    (tmp_path / "own").write_text(line + "\n")
    assert machine.memory_limit(tmp_path / "fs", tmp_path / "own") == limit
    assert machine.memory_limit(tmp_path / "fs", tmp_path / "absent") is None


def test_reads_are_measured_without_direct_reads_too(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "PROBE_BYTES", 4 << 20)
    monkeypatch.setattr(machine.os, "O_DIRECT", 0)
    disk = machine.disk_speed(tmp_path)
    assert not disk.direct
    assert disk.large > 0
    assert disk.small > 0
    assert not list(tmp_path.iterdir())
