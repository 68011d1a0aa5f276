"""Streaming is the stock forward: the same bits, one layer in memory, whatever interrupts it."""

import _thread
import contextlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import giant
from memory import PEAK
from moekit.errors import CheckpointError, ModelError
from moekit.families.loader import Loader
from moekit.families.model import Model
from moekit.stream import Checkpoints, Fork, Stream

# A pair goes from layer to layer in the last two; inkling's routers score shared experts too.
FAMILIES = ["qwen3_moe", "deepseek_v3", "gpt_oss", "jamba", "inkling_text", "zaya", "hy_v4"]
LAYERS = 3  # of the tiny models used here, but jamba


@pytest.fixture
def qwen(opened) -> Model:
    return opened("qwen3_moe")


def batches(*shapes: tuple[int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 150, shape, generator=generator) for shape in shapes or [(2, 12), (1, 7), (3, 1)]]


def stock(model: Model, ids: list[torch.Tensor], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    loaded = model.load(dtype)
    loaded.set_experts_implementation("eager")  # grouped_mm, the default, sums in another order
    with torch.inference_mode():
        return [loaded(input_ids=x, use_cache=False).logits for x in ids]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def empty(loader: Loader) -> bool:
    """No weights are left in the model, and its layers are as they were."""
    return all(x.is_meta for x in loader.model.parameters()) and not any("forward" in vars(x) for x in loader.layers)


@contextlib.contextmanager
def no_thread_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


# ---- the same numbers


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_is_the_stock_forward_bit_for_bit(opened, family):
    model, ids = opened(family), batches((2, 12), (1, 1), (1, 30))
    loader = model.loader(torch.float32)
    with no_thread_left():
        found = list(Stream(loader).run(ids))
    assert same(found, stock(model, ids))
    assert empty(loader)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_bfloat16_is_within_2_percent_of_the_largest_logit(opened, family):
    """Experts' matrix products are made in blocks of rows: sums are rounded elsewhere."""
    ids = batches((2, 12), (1, 30))
    found = Stream(opened(family).loader(torch.bfloat16)).run(ids)
    for mine, theirs in zip(found, stock(opened(family), ids, torch.bfloat16), strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine - theirs).abs().max() <= 0.02 * theirs.abs().max()


@pytest.mark.parametrize("family", ["qwen3_moe", "jamba", "zaya", "hy_v4"])
@pytest.mark.parametrize("limit", [0, 4000])
def test_hidden_states_that_wait_on_disk_come_back_unchanged(opened, family, limit, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ids = batches((2, 8), (2, 8), (1, 3))
    written = []

    def look(layer: int, number: int) -> contextlib.nullcontext:
        written.append(len(list(tmp_path.rglob("*-*"))))
        return contextlib.nullcontext()

    found = list(Stream(opened(family).loader(torch.float32), spill_bytes=limit).run(ids, around=look))
    assert same(found, list(Stream(opened(family).loader(torch.float32)).run(ids)))
    assert max(written) > 0
    assert not list(tmp_path.iterdir())


def test_nothing_is_spilled_below_the_limit(qwen, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(tempfile, "TemporaryDirectory", refuse)
    list(Stream(qwen.loader(torch.float32)).run(batches()))


def test_stops_after_a_layer(qwen):
    loader, passed, read = qwen.loader(torch.float32), [], []
    stock_read = loader.read
    loader.read = lambda index: read.append(index) or stock_read(index)
    found = list(Stream(loader).run(batches(), last_layer=1, after_layer=passed.append))
    assert found == []
    assert passed == [0, 1]
    assert read == [-1, 0, 1]
    assert empty(loader)


def test_a_stop_runs_a_layer_without_going_on_and_takes_its_weights_as_they_are(qwen):
    ids, loader, passed = batches((2, 12), (1, 7)), qwen.loader(torch.float32), {}
    stock_outputs = {}
    list(Stream(loader).run(ids, passed=lambda *x: stock_outputs.__setitem__(x[:2], x[2].clone()), last_layer=1))
    with no_thread_left():
        for stop in Stream(loader).stops(ids, passed=lambda *x: passed.__setitem__(x[:2], x[2].clone()), last_layer=1):
            key = f"{loader.layers_path}.{stop.layer}.mlp.experts.down_proj"
            (args, kwargs), weight = stop.arguments(1), loader.model.get_parameter(key).requires_grad_()
            rehearsed = stop.forward(*args, **kwargs)
            assert torch.equal(rehearsed, stop.run(1))
            rehearsed.sum().backward()
            assert weight.grad.abs().sum() > 0
            if stop.layer == 0:
                assert torch.equal(rehearsed, stock_outputs[0, 1])
                weight.data.zero_()
    assert empty(loader)
    assert list(passed) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert not torch.equal(passed[0, 1], stock_outputs[0, 1])


def test_a_stream_left_at_a_stop_cleans_up(qwen):
    loader = qwen.loader(torch.float32)
    with no_thread_left():
        stops = Stream(loader).stops(batches())
        next(stops)
        stops.close()
    assert empty(loader)


def test_one_layer_and_one_batch_of_logits_at_a_time(qwen):
    loader = qwen.loader(torch.float32)
    heads = []
    loader.model.lm_head.register_forward_hook(lambda *_: heads.append(1))

    def look(layer: int, number: int) -> contextlib.nullcontext:
        full = [i for i, x in enumerate(loader.layers) if any(not p.is_meta for p in x.parameters())]
        assert full == [layer]
        return contextlib.nullcontext()

    for number, _ in enumerate(Stream(loader).run(batches(), around=look), 1):
        assert len(heads) == number


def test_what_is_called_when(qwen):
    calls = []

    @contextlib.contextmanager
    def around(layer: int, number: int) -> Iterator[None]:
        calls.append(("in", layer, number))
        yield
        calls.append(("out", layer, number))

    told = []
    stream = Stream(qwen.loader(torch.float32), progress=lambda *x: told.append(x))
    list(stream.run(batches((1, 4), (1, 4)), around=around, after_layer=lambda x: calls.append(("after", x))))
    expected = []
    for layer in range(LAYERS):
        for number in range(2):
            expected += [("in", layer, number), ("out", layer, number)]
        expected.append(("after", layer))
    assert calls == expected
    assert [x for x in told if x[0] == "layers"] == [("layers", n, 6) for n in range(1, 7)]
    assert [x for x in told if x[0] == "head"] == [("head", 1, 2), ("head", 2, 2)]


# ---- interrupted


class CrashError(Exception):
    """Stands for a kill."""


def crash_at(layer: int, number: int = 1):
    def around(at_layer: int, at_number: int) -> contextlib.nullcontext:
        if (at_layer, at_number) == (layer, number):
            raise CrashError
        return contextlib.nullcontext()

    return around


def run_crash_run(model: Model, folder: Path, layer: int, prepare: Callable[[Loader], None] = lambda _: None) -> int:
    """Crash at a layer, run again, compare with a run that never stopped; returns the layer that was gone on with."""
    ids = batches((2, 8), (1, 5), (1, 5))

    def stream(carry: dict | None) -> Stream:
        loader = model.loader(torch.float32)
        prepare(loader)
        store = None if carry is None else Checkpoints(folder, "job", carry, every_s=0)
        return Stream(loader, checkpoints=store, spill_bytes=0)

    with pytest.raises(CrashError):
        list(stream({"note": layer}).run(ids, around=crash_at(layer)))
    carry: dict = {}
    again, ran = stream(carry), []
    assert same(list(again.run(ids, after_layer=ran.append)), list(stream(None).run(ids)))
    assert ran == list(range(again.resumed_at, model.layout.num_layers))
    assert carry == ({"note": layer} if again.resumed_at else {})
    return again.resumed_at


@pytest.mark.parametrize("family", ["qwen3_moe", "jamba", "zaya", "hy_v4"])
def test_goes_on_at_the_layer_where_it_crashed(opened, family, tmp_path):
    model = opened(family)
    for layer in range(model.layout.num_layers):
        assert run_crash_run(model, tmp_path / f"{layer}", layer) == layer


def test_no_checkpoint_where_a_layer_depends_on_more_than_the_last_output(qwen, tmp_path):
    """The last layer is given the first one's output too: only at layer 1 can this model be resumed."""

    def skip_connection(loader: Loader) -> None:
        first: dict[threading.Thread, torch.Tensor] = {}
        loader.layers[0].register_forward_hook(
            lambda _module, _args, out: first.update({threading.current_thread(): out})
        )
        loader.layers[2].register_forward_pre_hook(
            lambda _module, args: (args[0] + first[threading.current_thread()], *args[1:])
        )

    assert [run_crash_run(qwen, tmp_path / f"{x}", x, skip_connection) for x in range(LAYERS)] == [0, 1, 1]


def crashed(model: Model, folder: Path, identity: str = "job", layer: int = 2) -> None:
    with pytest.raises(CrashError):
        list(
            Stream(model.loader(torch.float32), checkpoints=Checkpoints(folder, identity, every_s=0)).run(
                batches(), around=crash_at(layer)
            )
        )


def resumed(model: Model, folder: Path, identity: str = "job", ids: list[torch.Tensor] | None = None) -> int:
    stream = Stream(model.loader(torch.float32), checkpoints=Checkpoints(folder, identity, every_s=1e9))
    expected = list(Stream(model.loader(torch.float32)).run(ids or batches()))
    assert same(list(stream.run(ids or batches())), expected)
    return stream.resumed_at


def test_what_another_job_left_is_removed(qwen, tmp_path):
    """Kept, it could be resumed later with what this job has written beside it."""
    crashed(qwen, tmp_path)
    assert resumed(qwen, tmp_path, "other job") == 0
    assert resumed(qwen, tmp_path, "job") == 0


def test_another_number_of_batches_is_not_resumed(qwen, tmp_path):
    crashed(qwen, tmp_path)
    assert resumed(qwen, tmp_path, ids=batches((1, 3))) == 0


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"not a pickle"])
def test_damaged_checkpoint_is_not_resumed(qwen, tmp_path, data):
    crashed(qwen, tmp_path)
    (tmp_path / "hidden" / "state.pt").write_bytes(data)
    assert resumed(qwen, tmp_path) == 0


def test_checkpoints_that_were_cut_off_are_not_seen(qwen, tmp_path):
    """Killed while a checkpoint was written: the one before counts."""
    crashed(qwen, tmp_path, layer=1)
    (tmp_path / "hidden.next").mkdir(exist_ok=True)
    (tmp_path / "hidden.next" / "batch-000000.pt").write_bytes(b"half")
    assert resumed(qwen, tmp_path) == 1


# ---- cleaning up


def run_expecting(loader: Loader, error: type[BaseException], **arguments: object) -> None:
    with no_thread_left(), pytest.raises(error):
        list(Stream(loader, spill_bytes=0).run(batches(), **arguments))
    assert empty(loader)
    assert same(list(Stream(loader).run(batches())), list(Stream(loader).run(batches())))  # usable again


@pytest.mark.parametrize("layer", range(LAYERS))
def test_error_around_a_layer(qwen, layer):
    run_expecting(qwen.loader(torch.float32), CrashError, around=crash_at(layer))


def test_error_inside_a_layer(qwen):
    loader = qwen.loader(torch.float32)

    def fail(*_: object) -> None:
        raise CrashError

    handle = loader.layers[1].mlp.register_forward_hook(fail)
    with no_thread_left(), pytest.raises(CrashError):
        list(Stream(loader).run(batches()))
    assert empty(loader)
    handle.remove()
    assert same(list(Stream(loader).run(batches())), stock(qwen, batches()))


@pytest.mark.parametrize("where", ["embed_tokens", "norm"])
def test_error_in_the_models_own_forward(qwen, where):
    loader = qwen.loader(torch.float32)

    def fail(*_: object) -> None:
        raise CrashError

    loader.model.model.get_submodule(where).register_forward_hook(fail)
    with no_thread_left(), pytest.raises(CrashError):
        list(Stream(loader).run(batches()))
    assert empty(loader)


def test_error_while_a_layer_is_read(qwen):
    loader = qwen.loader(torch.float32)
    stock_read = loader.read

    def read(index: int) -> dict:
        if index == 1:
            raise CheckpointError("gone")
        return stock_read(index)

    loader.read = read
    with no_thread_left(), pytest.raises(CheckpointError, match="gone"):
        list(Stream(loader).run(batches()))
    assert empty(loader)


def test_interrupt_while_the_model_runs(qwen):
    """The driver waits for a thread that is busy when the user presses Ctrl-C."""
    loader = qwen.loader(torch.float32)

    def interrupt(*_: object) -> None:
        _thread.interrupt_main()
        time.sleep(0.2)

    loader.model.model.rotary_emb.register_forward_hook(interrupt)
    with no_thread_left(), pytest.raises(KeyboardInterrupt):
        list(Stream(loader).run(batches()))
    assert empty(loader)


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_closed_early(qwen, taken):
    loader = qwen.loader(torch.float32)
    with no_thread_left():
        logits = Stream(loader, spill_bytes=0).run(batches())
        for _ in range(taken):
            next(logits)
        logits.close()
    assert empty(loader)
    assert same(list(Stream(loader).run(batches())), stock(qwen, batches()))


# ---- models that are run otherwise


def test_layers_out_of_order(qwen):
    loader = qwen.loader(torch.float32)
    loader.layers = nn.ModuleList(reversed(loader.layers))
    with no_thread_left(), pytest.raises(ModelError, match="does not run its layers in order"):
        list(Stream(loader).run(batches()))


def test_a_layer_that_is_left_out(qwen):
    loader = qwen.loader(torch.float32)
    first, _, third = loader.layers
    loader.model.model.layers = nn.ModuleList([first, third])
    with no_thread_left(), pytest.raises(ModelError, match="does not run its layers in order"):
        list(Stream(loader).run(batches()))


def test_layers_that_are_run_twice(qwen):
    loader = qwen.loader(torch.float32)
    forward = loader.model.model.forward
    loader.model.model.forward = lambda *args, **kwargs: [forward(*args, **kwargs) for _ in range(2)][1]
    with no_thread_left(), pytest.raises(ModelError, match="layers more than once"):
        list(Stream(loader).run(batches()))


# ---- forks


def test_fork_runs_by_itself_from_where_it_leaves(qwen):
    """What a fork changes while it is at a layer is what changing the whole run there does."""
    ids = batches((2, 8), (1, 5))
    loader = qwen.loader(torch.float32)

    def louder(layers: tuple[int, ...], runs: tuple[int, ...]):
        @contextlib.contextmanager
        def around(layer: int, run: int) -> Iterator[None]:
            def more(_module: nn.Module, _args: tuple, out: torch.Tensor) -> torch.Tensor:
                return 2 * out

            handle = loader.layers[layer].mlp.register_forward_hook(more) if layer in layers and run in runs else None
            yield
            if handle:
                handle.remove()

        return around

    forks = [Fork(1, lambda layer: layer == 1), Fork(0, lambda layer: False), Fork(0, lambda layer: layer == 2)]
    found = list(Stream(loader, spill_bytes=0).run(ids, forks=forks, around=louder((1, 2), (2, 4))))
    plain = list(Stream(loader).run(ids))
    changed = list(Stream(loader).run(ids, around=louder((1, 2), (1,))))
    late = list(Stream(loader).run(ids, around=louder((2,), (0,))))
    assert same(found, [*plain, changed[1], late[0]])  # a fork that never leaves gives nothing
    assert not torch.equal(changed[1], plain[1])


# ---- memory


def test_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    """25 MB a layer: six more of them must not show in the peak of the process."""
    hidden, inner, experts = 512, 512, 16
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": hidden,
        "moe_intermediate_size": inner,
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 1000,
        "dtype": "bfloat16",
    }

    def layer(number: int) -> Iterator[giant.Row]:
        path = f"model.layers.{number}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{path}.{norm}.weight", "BF16", (hidden,)
        for norm in ("q_norm", "k_norm"):
            yield f"{path}.self_attn.{norm}.weight", "BF16", (64,)
        for name in ("q_proj", "k_proj", "v_proj"):
            yield f"{path}.self_attn.{name}.weight", "BF16", (256, hidden)
        yield f"{path}.self_attn.o_proj.weight", "BF16", (hidden, 256)
        yield f"{path}.mlp.gate.weight", "BF16", (experts, hidden)
        for expert in range(experts):
            for name in ("gate_proj", "up_proj"):
                yield f"{path}.mlp.experts.{expert}.{name}.weight", "BF16", (inner, hidden)
            yield f"{path}.mlp.experts.{expert}.down_proj.weight", "BF16", (hidden, inner)

    outer: list[giant.Row] = [(f"{x}.weight", "BF16", (1000, hidden)) for x in ("model.embed_tokens", "lm_head")]
    outer.append(("model.norm.weight", "BF16", (hidden,)))
    code = (
        "import sys, torch\n"
        "from moekit.families.model import Model\nfrom moekit.stream import Stream\n"
        "for folder in sys.argv[1:]:\n"
        "    for logits in Stream(Model.open(folder).loader()).run([torch.ones(1, 16, dtype=torch.int64)] * 2):\n"
        "        assert logits.shape == (1, 16, 1000)\n"
        "    print(peak())"
    )
    folders = [tmp_path / f"{layers}" for layers in (6, 12)]
    for layers, folder in zip((6, 12), folders, strict=True):
        settings = config | {"num_hidden_layers": layers}
        assert giant.write_sparse_checkpoint(folder, settings, [outer, *map(layer, range(layers))]) > layers * 25e6
    run = subprocess.run([sys.executable, "-c", PEAK + code, *folders], capture_output=True, text=True, check=True)
    six, twelve = map(int, run.stdout.split())
    assert twelve - six < 30e6
