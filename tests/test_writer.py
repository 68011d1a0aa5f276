"""What the writer writes is what was asked, whole or not at all, and a killed run goes on where it stopped."""

import errno
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moekit.checkpoint import writer
from moekit.checkpoint.place import JOB, claimed
from moekit.checkpoint.reader import DTYPES, INDEX, Checkpoint, read_header
from moekit.checkpoint.writer import Copy, Make, OutTensor, copy_block, plan_shards, write_checkpoint
from moekit.errors import CheckpointError, OutputError

CONFIG = {"model_type": "any", "dtype": "bfloat16", "name": "naïve"}
JOB_A, JOB_B = {"plan": "a"}, {"plan": "b"}


def filled(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Random bytes, seen as `dtype`."""
    count = torch.Size(shape).numel() * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    return torch.randint(high, (count,), dtype=torch.uint8).view(dtype).reshape(shape)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit by bit: NaNs too."""
    bits = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


def source(folder: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return Checkpoint.open(folder)


def copies(checkpoint: Checkpoint) -> list[OutTensor]:
    infos = sorted(checkpoint.tensors.values(), key=lambda x: x.start)
    return [OutTensor(x.name, x.dtype, x.shape, Copy(x.file, ((x.start, x.end),))) for x in infos]


def files(folder: Path) -> dict[str, bytes]:
    return {x.relative_to(folder).as_posix(): x.read_bytes() for x in folder.rglob("*") if x.is_file()}


@pytest.fixture
def checkpoint(tmp_path) -> Checkpoint:
    """Twelve tensors of 4000 bytes."""
    torch.manual_seed(0)
    return source(tmp_path / "in", {f"layer.{i:02}": torch.randn(10, 100) for i in range(12)})


def read_back(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def test_every_dtype_and_shape_comes_back_bit_identical_and_aligned(tmp_path):
    torch.manual_seed(0)
    shapes = [(3, 5), (), (0, 4), (7,), (2, 1, 3)]
    tensors = {f"{name}.{i}": filled(dtype, s) for name, dtype in DTYPES.items() for i, s in enumerate(shapes)}
    odd_first = dict(sorted(tensors.items(), key=lambda x: x[1].dtype.itemsize))
    made = [
        OutTensor(name, next(k for k, v in DTYPES.items() if v == x.dtype), tuple(x.shape), Make(lambda x=x: x))
        for name, x in odd_first.items()
    ]
    first = write_checkpoint(tmp_path / "made", made, CONFIG, job=JOB_A).path
    second = write_checkpoint(tmp_path / "copied", copies(Checkpoint.open(first)), CONFIG, job=JOB_A).path
    for out in (first, second):
        loaded = load_file(out / "model.safetensors")
        assert loaded.keys() == tensors.keys()
        assert all(same(loaded[name], x) for name, x in tensors.items())
        (length,) = struct.unpack("<Q", (out / "model.safetensors").read_bytes()[:8])
        header = json.loads((out / "model.safetensors").read_bytes()[8 : 8 + length])
        assert length % 8 == 0
        assert header.pop("__metadata__") == {"format": "pt"}
        assert all(row["data_offsets"][0] % DTYPES[row["dtype"]].itemsize == 0 for row in header.values())
        assert list(json.loads((out / "config.json").read_text()).items()) == list(CONFIG.items())
        assert sorted(x.name for x in out.iterdir()) == ["config.json", "model.safetensors"]
    assert not list(tmp_path.glob("*.partial"))


def test_shards_keep_to_their_size_and_the_index_names_them(tmp_path, checkpoint):
    seen = []
    written = write_checkpoint(
        tmp_path / "out",
        copies(checkpoint),
        CONFIG,
        job=JOB_A,
        shard_bytes=13_000,
        progress=lambda *told: seen.append(told),
    )
    names = [f"model-{i:05}-of-00004.safetensors" for i in range(1, 5)]
    assert sorted(x.name for x in written.path.glob("*.safetensors")) == names
    assert (written.shards, written.reused, written.bytes) == (4, 0, 48_000)
    index = json.loads((written.path / INDEX).read_text())
    assert index["metadata"] == {"total_size": 48_000}
    for name in names:
        held = read_header(written.path / name)
        assert sum(x.bytes for x in held.values()) == 12_000
        assert {index["weight_map"][x] for x in held} == {name}
    before, after = load_file(checkpoint.files[0]), read_back(written.path)
    assert all(same(before[name], after[name]) for name in before)
    assert Checkpoint.open(written.path).tensors.keys() == before.keys()
    sizes = sum((written.path / name).stat().st_size for name in names)
    assert [seen[0], seen[-1]] == [("bytes", 0, sizes), ("bytes", sizes, sizes)]


def test_a_tensor_larger_than_a_shard_has_a_file_of_its_own():
    tensors = [OutTensor(str(n), "U8", (n,), Make(lambda: None)) for n in (5, 4, 30, 1, 9)]
    groups = [[x.name for x in shard.tensors] for shard in plan_shards(tensors, 10)]
    assert groups == [["5", "4"], ["30"], ["1", "9"]]


def test_tensors_are_made_in_the_order_given_wherever_they_lie_in_the_file(tmp_path):
    """Codes and scales of a weight come from one computation, which must not be kept until the last scale's turn."""
    made: list[str] = []
    tensors, wanted = [], {}
    for n in range(4):
        for name, dtype, x in ((f"{n}.codes", "U8", torch.full((5,), n)), (f"{n}.scale", "F32", torch.full((3,), n))):
            wanted[name] = x.to(torch.uint8 if dtype == "U8" else torch.float32)
            fn = lambda name=name: made.append(name) or wanted[name]  # noqa: E731
            tensors.append(OutTensor(name, dtype, tuple(x.shape), Make(fn)))
    out = write_checkpoint(tmp_path / "out", tensors, CONFIG, job=JOB_A).path
    assert made == [x.name for x in tensors]
    held = read_header(out / "model.safetensors")
    assert [x[-5:] for x in sorted(held, key=lambda x: held[x].start)] == ["scale"] * 4 + ["codes"] * 4
    found = load_file(out / "model.safetensors")
    assert all(same(found[name], x) for name, x in wanted.items())


def test_spans_are_laid_one_after_the_other(tmp_path, checkpoint):
    info = checkpoint.info("layer.03")
    rows = [(2, 4), (9, 10), (0, 1)]
    spans = tuple((info.start + a * info.row_bytes, info.start + b * info.row_bytes) for a, b in rows)
    tensor = OutTensor("cut", "F32", (4, 100), Copy(info.file, spans))
    out = write_checkpoint(tmp_path / "out", [tensor], CONFIG, job=JOB_A).path
    assert same(load_file(out / "model.safetensors")["cut"], checkpoint.read("layer.03")[[2, 3, 9, 0]])


@pytest.mark.parametrize(
    "tensors",
    [
        [OutTensor("a", "F32", (2,), Make(lambda: torch.zeros(3)))],
        [OutTensor("a", "F32", (2,), Make(lambda: torch.zeros(2, dtype=torch.bfloat16)))],
        [OutTensor("a", "F32", (2,), Make(lambda: torch.zeros(2)))] * 2,
        [OutTensor("a", "F32", (2,), Copy(Path("x"), ((0, 4),)))],
    ],
)
def test_a_caller_that_contradicts_itself_makes_no_output(tmp_path, tensors):
    with pytest.raises(ValueError, match=r"announced|one name|add up"):
        write_checkpoint(tmp_path / "out", tensors, CONFIG, job=JOB_A)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("code", [errno.EXDEV, errno.ENOSYS, None])
def test_without_copying_in_the_kernel_the_bytes_are_the_same(tmp_path, checkpoint, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, "not here")

    monkeypatch.setattr(writer, "BUFFER_BYTES", 1000)
    monkeypatch.setattr(os, "copy_file_range", refuse) if code else monkeypatch.delattr(os, "copy_file_range")
    out = write_checkpoint(tmp_path / "out", copies(checkpoint), CONFIG, job=JOB_A).path
    before, after = load_file(checkpoint.files[0]), read_back(out)
    assert all(same(before[name], after[name]) for name in before)


KILLED = """
    import json, os, signal, sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    import test_writer as t
    def progress(stage, done, total):
        if done > {limit}:
            os.kill(os.getpid(), signal.SIGKILL)
    t.write_checkpoint({out!r}, t.copies(t.Checkpoint.open({source!r})), t.CONFIG, [(Path({side!r}), "side.txt")],
                       job=t.JOB_A, shard_bytes=8000, progress=progress)
"""


def run_child(code: str, **values: object) -> subprocess.CompletedProcess:
    """Run `code` in a process of its own; the library that this process uses is the one that it imports."""
    text = textwrap.dedent(code).format(tests=str(Path(__file__).parent), **values)
    return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)


def test_a_killed_run_is_continued_to_the_same_bytes(tmp_path, checkpoint):
    side = checkpoint.path / "side.txt"
    side.write_text("words")
    out = tmp_path / "out"
    values = {"out": str(out), "source": str(checkpoint.path), "side": str(side)}
    limit = 8000 * 2 + 4000 + 3000  # within the third of six shards, behind its first tensor
    assert run_child(KILLED, limit=limit, **values).returncode == -signal.SIGKILL
    partial = tmp_path / "out.partial"
    done = sorted(partial.glob("*.safetensors"))
    assert not out.exists()
    assert [x.name for x in done] == ["model-00001-of-00006.safetensors", "model-00002-of-00006.safetensors"]
    assert [x.name for x in partial.glob("*.tmp")] == ["model-00003-of-00006.safetensors.tmp"]
    inodes = [x.stat().st_ino for x in done]
    told = []
    again = write_checkpoint(
        out,
        copies(checkpoint),
        CONFIG,
        [(side, Path("side.txt"))],
        job=JOB_A,
        shard_bytes=8000,
        progress=lambda _, done, total: told.append(done),
    )
    assert (again.shards, again.reused) == (6, 2)
    assert [(out / x.name).stat().st_ino for x in done] == inodes
    assert told[0] > 16_000
    straight = write_checkpoint(
        tmp_path / "straight", copies(checkpoint), CONFIG, [(side, Path("side.txt"))], job=JOB_A, shard_bytes=8000
    )
    assert files(again.path) == files(straight.path)
    assert len(files(again.path)) == 6 + 3
    assert not partial.exists()


def interrupted(out: Path, checkpoint: Checkpoint, job: dict = JOB_A, after: int = 20_000) -> None:
    def stop(_, done, total):
        if done > after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(out, copies(checkpoint), CONFIG, job=job, shard_bytes=8000, progress=stop)


def test_an_interrupt_leaves_work_that_can_be_continued_and_no_output(tmp_path, checkpoint):
    out = tmp_path / "out"
    interrupted(out, checkpoint)
    assert not out.exists()
    assert json.loads((tmp_path / "out.partial" / JOB).read_text())["job"] == JOB_A
    written = write_checkpoint(out, copies(checkpoint), CONFIG, job=JOB_A, shard_bytes=8000)
    assert written.reused == 2
    before, after = load_file(checkpoint.files[0]), read_back(out)
    assert all(same(before[name], after[name]) for name in before)
    assert JOB not in files(out)


def test_a_shard_that_was_cut_short_is_written_again(tmp_path, checkpoint):
    out = tmp_path / "out"
    interrupted(out, checkpoint)
    os.truncate(tmp_path / "out.partial" / "model-00001-of-00006.safetensors", 100)
    assert write_checkpoint(out, copies(checkpoint), CONFIG, job=JOB_A, shard_bytes=8000).reused == 1
    assert Checkpoint.open(out).bytes == 48_000


@pytest.mark.parametrize(("job", "shard_bytes", "tensors"), [(JOB_B, 8000, 12), (JOB_A, 9000, 12), (JOB_A, 8000, 11)])
def test_the_work_of_another_job_is_not_continued(tmp_path, checkpoint, job, shard_bytes, tensors):
    out = tmp_path / "out"
    interrupted(out, checkpoint)
    before = files(tmp_path / "out.partial")
    todo = copies(checkpoint)[:tensors]
    with pytest.raises(OutputError, match="another job") as caught:
        write_checkpoint(out, todo, CONFIG, job=job, shard_bytes=shard_bytes)
    assert "delete" in caught.value.fix
    assert files(tmp_path / "out.partial") == before
    written = write_checkpoint(out, todo, CONFIG, job=job, shard_bytes=shard_bytes, overwrite=True)
    assert written.reused == 0
    assert len(read_back(out)) == tensors


def test_a_folder_of_unknown_origin_is_never_taken(tmp_path, checkpoint):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("years")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="taken"):
            write_checkpoint(tmp_path / "out", copies(checkpoint), CONFIG, job=JOB_A, overwrite=overwrite)
    assert files(tmp_path / "out.partial") == {"thesis.txt": b"years"}


def test_two_processes_do_not_write_one_output(tmp_path, checkpoint):
    with claimed(tmp_path / "out.partial"):
        with pytest.raises(OutputError, match="another process"):
            write_checkpoint(tmp_path / "out", copies(checkpoint), CONFIG, job=JOB_A)
        assert (tmp_path / "out.partial").exists()
    assert not (tmp_path / "out.partial").exists()


def test_a_small_disk_is_refused_before_anything_is_written(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 40_000, 40_000))
    with pytest.raises(OutputError, match="disk space") as caught:
        write_checkpoint(tmp_path / "out", copies(checkpoint), CONFIG, job=JOB_A)
    assert caught.value.got == "40,000 bytes free"
    needed = int(caught.value.expected.removesuffix(" bytes").replace(",", ""))
    assert 48_000 < needed < 50_000
    assert [x.name for x in tmp_path.iterdir()] == ["in"]


def test_what_is_finished_needs_no_more_space(tmp_path, checkpoint, monkeypatch):
    interrupted(tmp_path / "out", checkpoint)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 20_000, 20_000))
    with pytest.raises(OutputError, match="disk space"):
        write_checkpoint(tmp_path / "out", copies(checkpoint), CONFIG, job=JOB_A, shard_bytes=8000)
    assert not list((tmp_path / "out.partial").glob("*.tmp"))  # a half-written shard takes space no more
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 40_000, 40_000))
    assert write_checkpoint(tmp_path / "out", copies(checkpoint), CONFIG, job=JOB_A, shard_bytes=8000).reused == 2


def test_a_disk_that_fills_up_keeps_what_is_finished(tmp_path, checkpoint, monkeypatch):
    calls = []

    def fill_up(*args):
        calls.append(args)
        if len(calls) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return copy_block(*args)

    monkeypatch.setattr(writer, "copy_block", fill_up)
    with pytest.raises(OutputError, match="disk is full") as caught:
        write_checkpoint(tmp_path / "out", copies(checkpoint), CONFIG, job=JOB_A, shard_bytes=8000)
    assert "run the same again" in caught.value.fix
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert write_checkpoint(tmp_path / "out", copies(checkpoint), CONFIG, job=JOB_A, shard_bytes=8000).reused == 2


def test_other_errors_of_the_disk_are_told(tmp_path, checkpoint, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "copy_file_range", fail)
    with pytest.raises(OutputError, match="Input/output error"):
        write_checkpoint(tmp_path / "out", copies(checkpoint), CONFIG, job=JOB_A)


def test_a_source_that_shrinks_is_told_by_name(tmp_path, checkpoint):
    tensors = copies(checkpoint)
    os.truncate(checkpoint.files[0], checkpoint.info("layer.07").start + 10)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: layer\.07"):
        write_checkpoint(tmp_path / "out", tensors, CONFIG, job=JOB_A)
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_taken_is_refused_and_kept(tmp_path, checkpoint):
    tensors, out = copies(checkpoint), tmp_path / "out"
    out.mkdir()
    assert write_checkpoint(out, tensors, CONFIG, job=JOB_A).path == out  # an empty folder is free
    before = files(out)
    with pytest.raises(OutputError, match="not empty"):
        write_checkpoint(out, tensors, CONFIG, job=JOB_A)
    assert files(out) == before
    (out / "old.txt").write_text("old")
    write_checkpoint(out, tensors, CONFIG, job=JOB_B, overwrite=True)
    assert files(out) == before
    (out / "config.json").unlink()
    with pytest.raises(OutputError, match="only a model folder"):
        write_checkpoint(out, tensors, CONFIG, job=JOB_A, overwrite=True)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["in", "out"]


def test_impossible_places_are_refused(tmp_path, checkpoint, monkeypatch):
    tensors = copies(checkpoint)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="mkdir -p"):
        write_checkpoint(tmp_path / "no" / "out", tensors, CONFIG, job=JOB_A)
    with pytest.raises(OutputError, match="is a file"):
        write_checkpoint(tmp_path / "file", tensors, CONFIG, job=JOB_A)
    with pytest.raises(OutputError, match="shard size"):
        write_checkpoint(tmp_path / "out", tensors, CONFIG, job=JOB_A, shard_bytes=0)
    with pytest.raises(OutputError, match="mount point"):
        write_checkpoint("/", tensors, CONFIG, job=JOB_A)
    with pytest.raises(OutputError, match="that are read"):
        write_checkpoint(checkpoint.path, tensors, CONFIG, job=JOB_A, overwrite=True)
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in checkpoint.path.iterdir():
        (linked / file.name).symlink_to(file)
    with pytest.raises(OutputError, match="that are read"):
        write_checkpoint(linked, copies(Checkpoint.open(linked)), CONFIG, job=JOB_A, overwrite=True)
    shutil.rmtree(linked)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="no permission"):
        write_checkpoint(tmp_path / "out", tensors, CONFIG, job=JOB_A)
    assert len(files(tmp_path)) == 3


def test_side_files_are_copied_with_their_folders_and_through_the_links_of_a_hub_cache(tmp_path):
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    (snapshot / "sub").mkdir(parents=True)
    (blobs / "aa").write_text("tokenizer")
    (blobs / "bb").write_text("template")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/aa")
    (snapshot / "sub" / "chat.jinja").symlink_to("../../../blobs/bb")
    (snapshot / "again.json").symlink_to("tokenizer.json")
    names = [Path("tokenizer.json"), Path("sub/chat.jinja"), Path("again.json")]
    tensors = [OutTensor("a", "F32", (2,), Make(lambda: torch.zeros(2)))]
    out = write_checkpoint(tmp_path / "out", tensors, CONFIG, [(snapshot / x, x) for x in names], job=JOB_A).path
    assert [(out / x).read_text() for x in names] == ["tokenizer", "template", "tokenizer"]
    assert not any((out / x).is_symlink() for x in names)


@pytest.mark.parametrize("relative", ["../evil", "sub/../../evil", "/evil", "config.json", "model.safetensors", JOB])
def test_side_files_with_dangerous_names_are_refused(tmp_path, checkpoint, relative):
    side = checkpoint.path / "side.txt"
    side.write_text("words")
    with pytest.raises(OutputError, match="refused"):
        write_checkpoint(tmp_path / "out", copies(checkpoint), CONFIG, [(side, Path(relative))], job=JOB_A)
    assert [x.name for x in tmp_path.iterdir()] == ["in"]


def test_a_side_file_that_links_out_of_its_folder_is_refused(tmp_path, checkpoint):
    (tmp_path / "secret").write_text("key")
    link = checkpoint.path / "tokenizer.json"
    link.symlink_to("../secret")
    with pytest.raises(OutputError, match="outside"):
        write_checkpoint(tmp_path / "out", copies(checkpoint), CONFIG, [(link, Path(link.name))], job=JOB_A)
    assert not (tmp_path / "out").exists()


def test_the_last_files_are_added_before_the_output_has_its_name(tmp_path, checkpoint):
    seen = []

    def finish(folder: Path) -> None:
        seen.extend(sorted(files(folder)))
        (folder / "report.md").write_text("done")

    out = write_checkpoint(tmp_path / "out", copies(checkpoint), CONFIG, job=JOB_A, finish=finish).path
    assert seen == ["config.json", "model.safetensors", JOB]
    assert sorted(files(out)) == ["config.json", "model.safetensors", "report.md"]


FLAT = """
    import os, sys
    sys.path.insert(0, {tests!r})
    import test_writer as t
    from memory import PEAK
    exec(PEAK)
    if {refuse}:
        del os.copy_file_range
    tensors = t.copies(t.Checkpoint.open({source!r}))
    before = peak()
    t.write_checkpoint({out!r}, tensors, t.CONFIG, job=t.JOB_A)
    print(peak() - before)
"""


@pytest.mark.parametrize("refuse", [False, True])
def test_memory_does_not_grow_with_the_checkpoint(tmp_path, refuse):
    folder, size = tmp_path / "in", 300_000_000
    folder.mkdir()
    header = json.dumps({"big": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.truncate(8 + len(header) + size)  # a hole: zeros without disk
    (folder / "config.json").write_text("{}")
    child = run_child(FLAT, source=str(folder), out=str(tmp_path / "out"), refuse=refuse)
    assert child.returncode == 0, child.stderr
    assert int(child.stdout) < 100e6
    assert Checkpoint.open(tmp_path / "out").bytes == size
