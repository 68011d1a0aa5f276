"""Reading checkpoints: the same bytes as the safetensors library, a clear error for every file that is not right."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import fsspec
import huggingface_hub
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

import giant
import zoo
from memory import PEAK
from moekit.checkpoint import reader
from moekit.checkpoint.hub import is_hub_id, remote_checkpoint
from moekit.checkpoint.reader import DTYPES, INDEX, SINGLE, Checkpoint, TensorInfo, parse_header
from moekit.errors import CheckpointError, ModelError, UserError
from moekit.families.model import Model

SHAPES = [(), (0, 3), (5,), (4, 3, 2)]


def tensors_of_every_dtype() -> dict[str, torch.Tensor]:
    """Random bytes in every dtype and several shapes."""
    generator = torch.Generator().manual_seed(0)
    out = {}
    for code, dtype in DTYPES.items():
        for shape in SHAPES:
            count = torch.Size(shape).numel() * dtype.itemsize
            data = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), generator=generator, dtype=torch.uint8)
            out[f"{code} {list(shape)}"] = data.view(dtype).reshape(shape)
    return out


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def parse(data: bytes, file: str = "file") -> dict[str, TensorInfo]:
    """A safetensors file in memory, read as a local one is."""
    rest = memoryview(data)[8:]
    return parse_header(Path(file), data[:8], lambda count: bytes(rest[:count]), len(data))


def with_header(header: object, data_bytes: int, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data_bytes)


@pytest.fixture(scope="module")
def every_dtype(tmp_path_factory) -> tuple[dict[str, torch.Tensor], Checkpoint]:
    folder = tmp_path_factory.mktemp("dtypes")
    tensors = tensors_of_every_dtype()
    save_file(tensors, folder / SINGLE)
    (folder / "config.json").write_text("{}")
    with Checkpoint.open(folder) as checkpoint:
        yield tensors, checkpoint


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    return zoo.save("qwen3_moe", tmp_path_factory.mktemp("qwen") / "model", max_shard_size="30KB")


@pytest.fixture
def folder(qwen, tmp_path) -> Path:
    """A sharded tiny model to spoil."""
    return Path(shutil.copytree(qwen, tmp_path / "model"))


# ---- what is right


def test_reads_the_same_bytes_as_safetensors(every_dtype):
    tensors, checkpoint = every_dtype
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, expected in tensors.items():
        found = checkpoint.read(name)
        assert (found.dtype, found.shape, as_bytes(found)) == (expected.dtype, expected.shape, as_bytes(expected)), name


def test_reads_any_rows(every_dtype):
    tensors, checkpoint = every_dtype
    for name, expected in tensors.items():
        rows = range(expected.shape[0] + 1 if expected.dim() else 0)
        for start in rows:
            for stop in rows[start:]:
                assert as_bytes(checkpoint.read_rows(name, start, stop)) == as_bytes(expected[start:stop])


@pytest.mark.parametrize(("start", "stop"), [(0, 6), (-1, 2), (3, 2), (6, 6)])
def test_rows_end_where_the_tensor_ends(every_dtype, start, stop):
    with pytest.raises(IndexError, match="shape"):
        every_dtype[1].read_rows("F32 [5]", start, stop)


def test_reads_no_more_than_asked(every_dtype, monkeypatch):
    _, checkpoint = every_dtype
    read, preadv = [], reader.os.preadv

    def count(fd: int, buffers: list, offset: int) -> int:
        read.append(preadv(fd, buffers, offset))
        return read[-1]

    monkeypatch.setattr(reader.os, "preadv", count)
    checkpoint.read_rows("F64 [4, 3, 2]", 1, 3)
    assert sum(read) == 2 * 3 * 2 * 8


def test_unknown_tensor_is_named(every_dtype):
    with pytest.raises(CheckpointError, match="did you mean 'BF16"):
        every_dtype[1].read("BF16 [4, 3, 1]")


def test_one_file_counts_before_an_index_as_in_transformers(folder):
    """A folder that was saved into twice may hold both."""
    save_file({"x": torch.zeros(2)}, folder / SINGLE)
    assert list(Checkpoint.open(folder).tensors) == ["x"]


def test_shards_without_an_index_are_found(folder):
    with_index = Checkpoint.open(folder)
    (folder / INDEX).unlink()
    assert Checkpoint.open(folder).tensors == with_index.tensors


def test_fingerprint_names_the_weights(qwen, folder, tmp_path):
    same = Checkpoint.open(folder).fingerprint
    assert same == Checkpoint.open(qwen).fingerprint
    for name, info in Checkpoint.open(folder).tensors.items():  # whatever was trained, all of a tensor has changed
        kept = info.file.read_bytes()
        data = bytearray(kept)
        data[info.start : info.end] = bytes(x ^ 1 for x in data[info.start : info.end])
        info.file.write_bytes(data)
        assert Checkpoint.open(folder).fingerprint != same, name
        info.file.write_bytes(kept)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    assert Checkpoint.open(folder).fingerprint != same


# ---- what is not: headers


@pytest.fixture(scope="module")
def one_file() -> bytes:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "model.layers.0.experts.down_proj": torch.randn(4, 3, 2, generator=generator),
        "model.layers.0.gate.weight": torch.randn(4, 6, generator=generator).bfloat16(),
        "model.norm.weight": torch.randn(6, generator=generator).half(),
        "steps": torch.arange(3),
    }
    return save(tensors, metadata={"format": "pt"})


def test_truncation_anywhere_is_an_error(one_file):
    for cut in range(len(one_file)):
        with pytest.raises(CheckpointError, match=r"where: *shard-3") as found:
            parse(one_file[:cut], "shard-3")
        assert "fix:" in str(found.value)
    parse(one_file)


def test_bytes_behind_the_last_tensor_are_an_error(one_file):
    with pytest.raises(CheckpointError, match="after its last tensor"):
        parse(one_file + b"\0")


def kinds(infos: dict[str, TensorInfo]) -> list[tuple]:
    return sorted((info.start, info.end, info.dtype, info.shape) for info in infos.values())


def test_one_flipped_bit_is_noticed_or_changes_a_name_only(one_file):
    (length,) = struct.unpack("<Q", one_file[:8])
    expected, survived = kinds(parse(one_file)), 0
    for place in range(8 + length):
        for bit in range(8):
            data = bytearray(one_file)
            data[place] ^= 1 << bit
            try:
                found = parse(bytes(data))
            except (CheckpointError, ModelError):
                continue
            survived += 1
            assert kinds(found) == expected
    assert survived < 0.7 * 8 * length  # the names are long


@settings(max_examples=400)
@given(st.data())
def test_any_changed_header_bytes_give_an_error_or_whole_tensors(one_file, data):
    (length,) = struct.unpack("<Q", one_file[:8])
    changed = bytearray(one_file)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, 7 + length))] = data.draw(st.integers(0, 255))
    try:
        found = parse(bytes(changed))
    except (CheckpointError, ModelError):
        return
    position = 8 + length
    for start, end, dtype, shape in kinds(found):
        assert start == position
        assert end - start == torch.Size(shape).numel() * DTYPES[dtype].itemsize
        position = end
    assert position == len(one_file)


def row(start: object, end: object, shape: object = (2,), dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "data_bytes"),
    [
        ({"a": row(0, 8), "b": row(4, 12)}, 12),
        ({"a": row(0, 8), "b": row(0, 8)}, 8),
        ({"a": row(0, 8), "b": row(12, 20)}, 20),
        ({"a": row(4, 12)}, 12),
        ({"a": row(0, 8)}, 4),
        ({"a": row(-8, 0)}, 8),
        ({"a": row(8, 0)}, 8),
        ({"a": row(0.0, 8.0)}, 8),
        ({"a": row(0, 8.0)}, 8),
        ({"a": row("0", "8")}, 8),
        ({"a": row(False, 8)}, 8),
        ({"a": row(0, 8, [True, 2])}, 8),
        ({"a": row(0, 8, [2.0])}, 8),
        ({"a": row(0, 8, [-2, -1])}, 8),
        ({"a": row(0, 8, ["2"])}, 8),
        ({"a": row(0, 8, "2")}, 8),
        ({"a": row(0, 8, None)}, 8),
        ({"a": row(0, 8, [1] * 999 + [2])}, 8),
        ({"a": row(0, 8, [10**2000] * 3)}, 8),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[1' + b"0" * 5000 + b",8]}}", 8),
        ({"a": row(0, 8, dtype=["F32"])}, 8),
        ({"a": row(0, 8, dtype=None)}, 8),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}, 8),
        ({"a": [1, 2]}, 8),
        ({"a": None}, 8),
        ([], 0),
        (b"null", 0),
        (b"", 0),
        (b"{" + b'"a":{' * 100_000, 0),
        (b"\xff\xfe{}", 0),
        (b"9" * 5000, 0),
    ],
    ids=lambda x: str(x)[:40],
)
def test_header_that_the_format_does_not_allow(header, data_bytes):
    with pytest.raises(CheckpointError, match=r"(?s)where: .*fix: ") as found:
        parse(with_header(header, data_bytes))
    assert len(str(found.value)) < 1000


@pytest.mark.parametrize("length", [0, 1, 60, 1 << 20, 1 << 40, (1 << 64) - 1])
def test_header_that_lies_about_its_length(length):
    with pytest.raises(CheckpointError):
        parse(with_header({"a": row(0, 64, [16])}, 64, length))


def test_unknown_dtype_is_named():
    with pytest.raises(ModelError, match=r"(?s)'F4'.*where: .*: a\b.*BF16"):
        parse(with_header({"a": row(0, 8, dtype="F4")}, 8))


def test_empty_file_without_tensors_is_allowed():
    assert parse(with_header({"__metadata__": {"format": "pt"}}, 0)) == {}


# ---- what is not: folders


def refused(folder: Path, kind: type[UserError] = CheckpointError) -> str:
    """The message of a folder that cannot be opened; it always says where, and how to mend it."""
    with pytest.raises(kind, match=r"(?s)where: .*fix: ") as found:
        Model.open(folder)
    return str(found.value)


def rewrite_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "a/../../b.safetensors", 7, "a\0b"])
def test_index_that_points_outside(folder, shard):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = shard
    (folder / INDEX).write_text(json.dumps(index))
    message = refused(folder)
    assert "outside its folder" in message or "cannot be parsed" in message
    assert INDEX in message


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": [1]}', "[" * 100_000])
def test_index_that_is_none(folder, text):
    (folder / INDEX).write_text(text)
    assert "index cannot be parsed" in refused(folder)


def test_index_that_is_not_text(folder):
    (folder / INDEX).write_bytes(b"\xff\xff")
    assert "index cannot be read" in refused(folder)


def test_missing_shard_is_named(folder):
    shard = sorted(folder.glob("*.safetensors"))[2]
    shard.unlink()
    message = refused(folder)
    assert "a shard is missing" in message
    assert shard.name in message


def test_truncated_shard_is_named(folder):
    shard = sorted(folder.glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-1])
    message = refused(folder)
    assert "truncated" in message
    assert shard.name in message


def test_index_that_names_absent_tensors(folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.layers.7.x"] = index["weight_map"]["model.norm.weight"]
    (folder / INDEX).write_text(json.dumps(index))
    assert "model.layers.7.x" in refused(folder)


def test_shards_swapped_against_the_index(folder):
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)
    assert "not in the shards" in refused(folder)


def test_two_files_with_one_tensor_and_no_index(folder):
    (folder / INDEX).unlink()
    shard = sorted(folder.glob("*.safetensors"))[0]
    shutil.copy(shard, folder / "consolidated.safetensors")
    message = refused(folder)
    assert "two files hold the same tensor" in message
    assert "consolidated.safetensors" in message


def test_tensor_missing_from_everything(folder):
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["model.layers.1.mlp.experts.5.up_proj.weight"]
    (folder / INDEX).write_text(json.dumps(index))
    message = refused(folder)
    assert "on disk" in message
    assert "expert 5" in message


def test_flipped_byte_in_a_name_is_noticed(folder):
    """The header still parses; the model then lacks a parameter."""
    (folder / INDEX).unlink()
    shards = {info.file for name, info in Checkpoint.open(folder).tensors.items() if "layers.2" in name}
    for shard in sorted(shards)[:3]:
        kept = shard.read_bytes()
        shard.write_bytes(kept.replace(b"layers.2", b"layers.6", 1))
        assert "on disk" in refused(folder)
        shard.write_bytes(kept)


def test_shape_that_config_does_not_ask_for(folder):
    rewrite_json(folder / "config.json", moe_intermediate_size=12)
    model = Model.open(folder)
    with pytest.raises(CheckpointError, match=r"(?s)shape that config.json asks for|do not fill"):
        model.loader().read(1)


def test_file_that_shrinks_while_it_is_read(folder):
    checkpoint = Checkpoint.open(folder)
    name = "model.embed_tokens.weight"
    info = checkpoint.info(name)
    info.file.write_bytes(info.file.read_bytes()[: info.end - 5])
    with pytest.raises(CheckpointError, match=rf"(?s)ended early.*{info.file.name}: {name}"):
        checkpoint.read(name)
    checkpoint.close()
    info.file.unlink()
    with pytest.raises(CheckpointError, match=rf"(?s)cannot be read.*{info.file.name}"):
        checkpoint.read(name)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "last.ckpt"])
def test_pickles_are_refused(folder, file):
    for weights in [*folder.glob("*.safetensors"), folder / INDEX]:
        weights.unlink()
    (folder / file).write_bytes(b"\x80\x04cos\nsystem\n")
    message = refused(folder, ModelError)
    assert "pickle" in message
    assert file in message
    assert "safetensors" in message


def test_folder_without_weights(folder):
    for weights in [*folder.glob("*.safetensors"), folder / INDEX]:
        weights.unlink()
    assert "no safetensors" in refused(folder, ModelError)


def test_no_folder(tmp_path):
    message = refused(tmp_path / "nowhere", ModelError)
    assert "no such model folder" in message
    assert "hub id" in message


def test_folder_without_config(folder):
    (folder / "config.json").unlink()
    assert "no config.json" in refused(folder, ModelError)
    assert "this is a file" in refused(next(folder.glob("*.safetensors")), ModelError)


@pytest.mark.parametrize("data", [b"{", b"[1]", b"\xff", b"[" * 100_000, b"null"])
def test_config_that_is_none(folder, data):
    (folder / "config.json").write_bytes(data)
    assert "config.json" in refused(folder, ModelError)


def test_unknown_family_has_a_hint(folder):
    rewrite_json(folder / "config.json", model_type="qwen3_mo")
    message = refused(folder, ModelError)
    assert "unknown model type 'qwen3_mo'" in message
    assert "did you mean 'qwen3_moe'" in message


@pytest.mark.parametrize("known", [False, True])
def test_code_of_the_checkpoint_never_runs_unasked(folder, known, tmp_path):
    (folder / "modeling_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    auto_map = {"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    rewrite_json(folder / "config.json", auto_map=auto_map, **{} if known else {"model_type": "own"})
    if known:  # stock code runs it
        assert Model.open(folder).layout.family == "qwen3_moe"
    else:
        message = refused(folder, ModelError)
        assert "its own code" in message
        assert "--trust-remote-code" in message
    assert not (tmp_path / "ran").exists()


def test_dense_model_is_told_so(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes)).save_pretrained(tmp_path / "llama")
    assert "dense model" in refused(tmp_path / "llama", ModelError)


# ---- hub


class Counted(AbstractBufferedFile):
    """A remote file, read through fsspec's own read-ahead; every byte fetched is counted."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        self.fs.fetched += end - start
        with self.fs.local(self.path).open("rb") as stream:
            stream.seek(start)
            return stream.read(end - start)


class FakeHub(fsspec.AbstractFileSystem):
    """A hub that holds one model, `org/model`."""

    cachable = False

    def __init__(self, folder: Path):
        super().__init__()
        self.folder, self.fetched = folder, 0

    def local(self, path: str) -> Path:
        return self.folder / path.removeprefix("org/model/")

    def ls(self, path: str, detail: bool = True, **_: object) -> list:
        assert path == "org/model"
        rows = [
            {"name": f"org/model/{x.name}", "size": x.stat().st_size, "type": "file"} for x in self.folder.iterdir()
        ]
        return rows if detail else [x["name"] for x in rows]

    def info(self, path: str, **_: object) -> dict:
        return LocalFileSystem().info(str(self.local(path)))

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **_: object) -> Counted:
        return Counted(self, path, mode, block_size or "default")


@pytest.fixture
def hub(monkeypatch):
    def install(folder: Path) -> FakeHub:
        fake = FakeHub(folder)
        monkeypatch.setattr(huggingface_hub, "HfFileSystem", lambda: fake)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file: str(folder / file))
        return fake

    return install


@pytest.mark.parametrize("shards", ["1GB", "30KB"])
def test_only_headers_are_fetched_from_the_hub(hub, tmp_path, shards):
    model = zoo.build("qwen3_moe", hidden_size=512, num_hidden_layers=2, vocab_size=16_000)
    model.save_pretrained(tmp_path, max_shard_size=shards if shards == "1GB" else "10MB")
    fake = hub(tmp_path)
    size = sum(x.stat().st_size for x in tmp_path.glob("*.safetensors"))
    assert size > 60e6
    remote, local = Model.open("org/model", headers_only=True), Model.open(tmp_path)
    assert remote.layout == local.layout
    assert fake.fetched < 0.04 * size
    with pytest.raises(ModelError, match="only this model's headers"):
        remote.checkpoint.read("model.norm.weight")


def test_moekits_own_form_is_found_on_the_hub(hub, folder, tmp_path):
    """Its files have names of their own and no index."""
    tensors = {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}
    own = tmp_path / "own"
    own.mkdir()
    shutil.copy(folder / "config.json", own)
    names = sorted(tensors)
    for number, some in enumerate((names[:3], names[3:]), 1):
        save_file({name: tensors[name] for name in some}, own / f"moekit-{number:05}-of-00002.safetensors")
    hub(own)
    assert remote_checkpoint("org/model").tensors.keys() == tensors.keys()


def test_damaged_header_on_the_hub(hub, folder):
    shard = sorted(folder.glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-1])
    hub(folder)
    with pytest.raises(CheckpointError, match=f"(?s)truncated.*{shard.name}"):
        remote_checkpoint("org/model")


def test_missing_shard_on_the_hub(hub, folder):
    shard = sorted(folder.glob("*.safetensors"))[2]
    shard.unlink()
    hub(folder)
    with pytest.raises(CheckpointError, match=f"(?s)shard is missing.*{shard.name}"):
        remote_checkpoint("org/model")


def test_hub_model_without_safetensors(hub, folder):
    for weights in [*folder.glob("*.safetensors"), folder / INDEX]:
        weights.unlink()
    hub(folder)
    with pytest.raises(ModelError, match="no safetensors"):
        remote_checkpoint("org/model")


@pytest.mark.parametrize("error", [ValueError("Repo id must be ..."), ConnectionError("no route"), KeyError()])
def test_unreachable_hub(monkeypatch, error):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(ModelError, match=r"(?s)no folder 'org/model' here.*fix: "):
        Model.open("org/model", headers_only=True)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen/Qwen3-30B-A3B", True),
        ("deepseek-ai/DeepSeek-V3.1_x", True),
        ("refmoe", False),
        ("./models/x", False),
        ("../x", False),
        ("/models/x", False),
        ("a/b/c", False),
        ("a b/c", False),
        ("a/b\n", False),
        ("", False),
    ],
)
def test_what_may_be_a_hub_id(name, expected):
    assert is_hub_id(name) is expected


# ---- size


def test_a_checkpoint_of_689_gigabytes_is_inspected_in_little_memory(tmp_path):
    """Nothing but headers is read: the files are holes."""
    size = giant.deepseek_v3(tmp_path / "giant")
    assert size > 680e9
    code = (
        "import sys\nfrom moekit.cli import main\n"
        "code = main(['inspect', sys.argv[1]])\n"
        "print('peak', peak())\nsys.exit(code)"
    )
    run = subprocess.run(
        [sys.executable, "-c", PEAK + code, tmp_path / "giant"], capture_output=True, text=True, check=True
    )
    assert "689 GB, 684 B parameters, 37.6 B active" in run.stdout
    assert "256 experts + 1 shared, top-8" in run.stdout
    assert "mtp layer" in run.stdout
    assert int(run.stdout.split("peak ")[1]) < 1.2e9
