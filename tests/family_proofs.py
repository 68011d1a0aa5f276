"""What is proven of every family: one function a claim, run on a tiny checkpoint that stock transformers has saved.

A proof fails by an assertion. Where a family cannot do something, the proof is that moekit refuses it, and the reason
goes into the family's row of docs/families.md. Ground truth comes from stock modules and from `zoo_probe`, never from
moekit.

Symbols: T tokens, K chosen, E experts.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moekit.apply.bake import bake
from moekit.checkpoint.reader import Checkpoint
from moekit.errors import ModelError, PlanError
from moekit.families.detect import Understanding, understand
from moekit.families.loader import Loader
from moekit.families.seam import Call, ExpertRows, Observer, observed_experts
from moekit.layout import Layout, MoELayer
from moekit.plans import Plan, drop_lowest, keep_count
from moekit.stream import Checkpoints, Stream
from moekit.view import MoEView
from zoo import EXPERTS, MULTIMODAL, TOP_K, ZOO, inputs, save
from zoo_probe import expert_tensors, experts_of

PERMUTED, DROPPED = (
    1e-5,
    1e-4,
)  # largest differences of logits (PERMUTED, not on Intel's CPUs: as a share of the largest)
INTEL = "GenuineIntel" in Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else False
BF16 = 2**-6  # largest difference of a layer's routed sum, as a share of its largest value
# Config and code of these limit the choice to groups in the zoo (`n_group` 2, `topk_group` 1).
GROUPED = {
    *("deepseek_v2", "mistral4", "mistral_large4", "deepseek_v3", "deepseek_v32", "axk1", "axk2", "bailing_hybrid"),
    *("beam", "dots1", "dots3_note_text", "exaone_moe", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm5_next"),
    *("glm_moe_dsa", "hy_v4", "kimi_linear", "mimo_v2_flash", "nemotron_h", "solar_open", "dots3_note"),
}
NOTES = {
    "ernie4_5_vl_moe": "the text experts only",
    "gemma4_text": "the router reads another tensor than the experts",
    "muse_spark": "statistics are taken in the experts' own space",
    "deepseek_v4": "layer 0 routes by token id: dropping rewrites its table",
    "zaya": "the router's last output skips the experts: no expert is counted then",
    "llama4_text": "the experts' input is multiplied by the score; every expert runs on every token",
    "qwen4_exp_text": "n-gram embeddings; wide residual stream: EASY-EP compares with the experts' input",
}


@dataclass
class Specimen:
    """One family's tiny checkpoint, and what is read from it."""

    name: str
    root: Path

    @cached_property
    def entry(self):
        return (ZOO | MULTIMODAL)[self.name]

    @cached_property
    def folder(self) -> Path:
        return save(self.name, self.root / self.name)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint.open(self.folder)

    @cached_property
    def understanding(self) -> Understanding:
        return understand(self.checkpoint)

    @property
    def layout(self) -> Layout:
        return self.understanding.layout

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.folder / "model.safetensors")

    @cached_property
    def stock(self) -> nn.Module:
        return load(self, self.folder)

    @cached_property
    def batch(self) -> dict[str, Tensor]:
        return inputs(self.name)

    @cached_property
    def logits(self) -> Tensor:
        return run(self.stock, self.batch)


def load(specimen: Specimen, folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The stock model of a folder with transformers' eager experts."""
    cls = getattr(transformers, specimen.entry.model_class)
    return cls.from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval()


@torch.no_grad()
def run(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch, use_cache=False).logits


def text_experts(specimen: Specimen) -> dict[str, nn.Module]:
    """The stock model's experts modules that text runs through, by path."""
    skipped = "vision|encoder"  # the encoder's experts are tied to the decoder's
    return {path: module for path, module in experts_of(specimen.stock).items() if not re.search(skipped, path)}


def layer_number(path: str) -> int:
    return int(re.search(r"\blayers\.(\d+)", path).group(1))


# ---- reads


def reads(specimen: Specimen) -> str:
    """The layout says what the stock model is."""
    layout, modules = specimen.layout, text_experts(specimen)
    assert [x.index for x in layout.routed] == sorted(map(layer_number, modules))
    assert {x.experts_path for x in layout.routed} == set(modules)
    assert {x.num_experts for x in layout.routed} == {len(x.down_proj) for x in modules.values()} == {EXPERTS}
    assert {x.top_k for x in layout.routed} == {1 if specimen.name == "zaya" else TOP_K}
    assert {x.router.groups for x in layout.routed} == {2 if specimen.name in GROUPED else 1}
    state = specimen.stock.state_dict()
    for layer in layout.routed:
        held = [x for x in state if x.startswith(layer.path + ".")]
        biases = [
            x for x in held if re.search(r"correction_bias|expert_bias|balancing_biases", x) and "vision" not in x
        ]
        assert sorted(layer.correction_biases) == sorted(biases)
        assert layer.router.correction_bias == bool(biases)
        assert bool(layer.shared_experts) == any("shared" in x for x in held)
        experts = modules[layer.experts_path]
        assert {layer.inner_size, layer.width} == set(experts.down_proj.shape[1:])
        assert layer.expert_bytes == sum(x[0].nbytes for x in experts.parameters(recurse=False))
    assert_tensors(specimen)
    assert layout.total.bytes == specimen.checkpoint.bytes
    assert layout.total.params == sum(x.numel() for x in specimen.tensors.values())
    return "yes"


def assert_tensors(specimen: Specimen) -> None:
    """The layout lists exactly the tensors on disk that change with the number of experts, with the right axes."""
    truth = expert_tensors(specimen.name)
    if specimen.name == "ernie4_5_vl_moe":  # experts E and up and the second router belong to vision
        vision = re.compile(rf"weight_1$|experts\.({'|'.join(map(str, range(EXPERTS, 2 * EXPERTS)))})\.")
        truth = {name: axis for name, axis in truth.items() if not vision.search(name)}
    listed = [x for layer in specimen.layout.layers for x in layer.tensors]
    assert {x.name: x.axis for x in listed if x.role != "table"} == truth
    assert [x.name for x in listed if x.role == "table"] == [x for x in specimen.tensors if x.endswith("tid2eid")]
    for tensor in listed:
        number = re.search(r"experts\.(\d+)\.", tensor.name)
        assert tensor.expert == (int(number.group(1)) if number else None)
        in_experts = ".experts." in tensor.name or re.search(r"(in|out)put_linear", tensor.name)
        if "bias" not in tensor.name:
            assert (tensor.role == "expert") == bool(in_experts)


def disk_form(layout: Layout) -> str:
    """How the experts lie on disk, in words."""
    names = {
        re.sub(r".*\.experts\.(\d+\.)?|.*block_sparse_moe\.", "", x.name).removesuffix(".weight")
        for x in layout.layers[0].tensors
        if x.role == "expert"
    }
    single = any(x.expert is not None for x in layout.layers[0].tensors)
    return ("one tensor an expert: " if single else "fused: ") + ", ".join(sorted(names))


# ---- writes back


def writes_back(specimen: Specimen) -> str:
    """A plan that changes nothing makes the same tensors under the same names, byte for byte, and the same config."""
    out = bake(
        specimen.checkpoint, specimen.understanding, Plan(layout_hash=specimen.layout.hash), out_of(specimen)
    ).path
    written = load_file(out / "model.safetensors")
    assert written.keys() == specimen.tensors.keys()
    assert all(same_bytes(tensor, written[name]) for name, tensor in specimen.tensors.items())
    assert json.loads((out / "config.json").read_text()) == json.loads((specimen.folder / "config.json").read_text())
    return "yes"


def out_of(specimen: Specimen, name: str = "same") -> Path:
    return specimen.root / f"{specimen.name}-{name}"


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
    )


# ---- permutation


def permutes(specimen: Specimen) -> str:
    """Experts in another order (in their groups), with their router rows and biases, are the same model."""
    generator = torch.Generator().manual_seed(0)
    tensors = dict(specimen.tensors)
    for layer in specimen.layout.routed:
        tensors |= permuted(layer, specimen.tensors, generator)
    folder = out_of(specimen, "permuted")
    folder.mkdir()
    (folder / "config.json").write_text((specimen.folder / "config.json").read_text())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = load(specimen, folder)
    unit = 1.0 if INTEL else float(specimen.logits.abs().max().clamp(1))
    assert (run(model, specimen.batch) - specimen.logits).abs().max() < PERMUTED * unit
    assert any(not torch.equal(tensor, tensors[name]) for name, tensor in specimen.tensors.items())
    return "yes"


def permuted(layer: MoELayer, tensors: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """The layer's tensors with expert `order[i]` in place i."""
    size = layer.num_experts // layer.router.groups
    order = torch.cat([g * size + torch.randperm(size, generator=generator) for g in range(layer.router.groups)])
    names = {(re.sub(r"experts\.\d+\.", "experts.", x.name), x.expert): x.name for x in layer.tensors}
    out = {}
    for (kind, expert), name in names.items():
        tensor = next(x for x in layer.tensors if x.name == name)
        old = tensors[name]
        if tensor.role == "table":
            out[name] = order.argsort()[old.long()].to(old.dtype)
        elif expert is not None:
            out[name] = tensors[names[kind, int(order[expert])]]
        else:
            rest = torch.arange(layer.num_experts, old.shape[tensor.axis])
            out[name] = old.index_select(tensor.axis, torch.cat([order, rest])).contiguous()
    return out


# ---- ids


class Recorder(Observer):
    """Keeps what a view shows: calls and rows of experts by layer."""

    wants_residual = True

    def __init__(self, outputs: bool):
        self.wants_outputs = outputs
        self.calls: dict[int, Call] = {}
        self.rows: dict[int, list[ExpertRows]] = defaultdict(list)
        self.sums: dict[int, Tensor] = {}

    def routed(self, call: Call) -> None:
        self.calls[call.layer.index] = call

    def expert(self, call: Call, rows: ExpertRows) -> None:
        self.rows[call.layer.index].append(ExpertRows(rows.expert, rows.tokens, rows.ranks, rows.output.clone()))

    def finished(self, call: Call, output: Tensor) -> None:
        self.sums[call.layer.index] = output.clone()


@contextlib.contextmanager
def overheard(specimen: Specimen) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """(ids_TK, weights_TK) by layer, as the stock router returns them; heard with plain hooks."""
    heard, handles = {}, []

    def listen(number: int, _module: nn.Module, _args: tuple, output: tuple) -> None:
        if specimen.name.startswith("llama4"):
            weights, ids = output[0].topk(TOP_K)
        else:
            ids = next(x for x in output if x.dtype == torch.long)
            weights = output[2] if output[1] is ids else output[1]
        heard[number] = ids, weights

    for path in text_experts(specimen):
        for name, module in specimen.stock.get_submodule(path.rpartition(".")[0]).named_children():
            if name in ("gate", "router"):
                handles.append(module.register_forward_hook(partial(listen, layer_number(path))))
    yield heard
    for handle in handles:
        handle.remove()


def ids_agree(specimen: Specimen) -> str:
    """What an observer sees is what the router decided and what the experts did; watching changes nothing."""
    if specimen.layout.cannot_run:
        with pytest.raises(ModelError, match="not run it"):
            MoEView(specimen.stock, specimen.layout)
        return "refused"
    view, state = MoEView(specimen.stock, specimen.layout), specimen.stock.state_dict()
    for outputs in (False, True):
        seen = Recorder(outputs)
        with overheard(specimen) as heard, view.watch(seen):
            assert torch.equal(run(specimen.stock, specimen.batch), specimen.logits)
        tokens = specimen.batch["input_ids"].numel()
        assert sorted(seen.calls) == sorted(heard) == [x.index for x in specimen.layout.routed]
        for index, call in seen.calls.items():
            ids, weights = heard[index]
            if specimen.name == "zaya":  # a weight of zero: the token skips the experts, whatever id is given
                assert not weights.all()
                ids = ids.masked_fill(weights == 0, EXPERTS)
            assert torch.equal(call.ids, ids)
            assert torch.equal(call.weights, weights)
            assert call.ids.shape == (tokens, call.layer.top_k)
            assert call.logits.shape == (tokens, call.layer.num_experts)
            assert len(call.hidden) == len(call.residual) == tokens
            if call.layer.router.follows_logits:
                assert torch.equal(call.logits.topk(call.layer.top_k).indices.sort(-1).values, ids.sort(-1).values)
            if outputs:
                assert_outputs(call, seen.rows[index], seen.sums[index])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in text_experts(specimen).values())
    assert torch.equal(run(specimen.stock, specimen.batch), specimen.logits)
    assert specimen.stock.state_dict().keys() == state.keys()
    return "yes"


def assert_outputs(call: Call, rows: list[ExpertRows], total: Tensor) -> None:
    """Every chosen pair was shown once, and the weighted outputs are the layer's sum."""
    pairs = sorted((t, r, x.expert) for x in rows for t, r in zip(x.tokens.tolist(), x.ranks.tolist(), strict=True))
    chosen = [
        (t, r, e) for t, row in enumerate(call.ids.tolist()) for r, e in enumerate(row) if e < call.layer.num_experts
    ]
    assert pairs == chosen
    again = torch.zeros_like(total)
    for x in rows:
        weight = 1.0 if call.layer.router.weighs_input else call.weights[x.tokens, x.ranks, None]
        again.index_add_(0, x.tokens, x.output * weight)
    assert torch.allclose(again, total, atol=1e-5)


# ---- dropping


def drops(specimen: Specimen) -> str:
    """Banning experts in the live model gives exactly the smaller checkpoint's logits, and leaves no trace."""
    layout, generator = specimen.layout, torch.Generator().manual_seed(0)
    ops = []
    for layer in layout.routed:
        scores = torch.rand(layer.num_experts, generator=generator).tolist()
        ops.append(drop_lowest(layer, scores, keep_count(layer, 0.5)))
    plan = Plan(layout_hash=layout.hash, ops=ops)
    if layout.cannot_drop:
        with pytest.raises(PlanError, match="cannot be removed"):
            bake(specimen.checkpoint, specimen.understanding, plan, out_of(specimen, "half"))
    if layout.cannot_run:
        return "refused"
    banned, seen = plan.dropped(), Recorder(False)
    before = {name: tensor.clone() for name, tensor in specimen.stock.state_dict().items()}
    view = MoEView(specimen.stock, layout)
    with view.ban(banned), view.watch(seen):
        live = run(specimen.stock, specimen.batch)
    for index, call in seen.calls.items():
        assert not set(call.ids.flatten().tolist()) & set(banned[index])
    assert torch.equal(run(specimen.stock, specimen.batch), specimen.logits)
    after = specimen.stock.state_dict()
    assert after.keys() == before.keys()
    assert all(same_bytes(tensor, after[name]) for name, tensor in before.items())
    assert (live - specimen.logits).abs().max() > 100 * DROPPED
    if layout.cannot_drop:
        return "refused"
    out = bake(specimen.checkpoint, specimen.understanding, plan, out_of(specimen, "half")).path
    small = load(specimen, out)
    assert {len(x.down_proj) for path, x in experts_of(small).items() if "vision" not in path} == {EXPERTS // 2}
    assert (run(small, specimen.batch) - live).abs().max() < DROPPED
    return "yes"


# ---- streaming


class _InterruptError(Exception):
    pass


def same_sums(a: Tensor, b: Tensor) -> bool:
    """Equal; but for the last bits on CPUs whose sums depend on where a matrix lies (on Intel's, MKL can forbid it)."""
    return torch.equal(a, b) if INTEL else torch.allclose(a, b, rtol=0, atol=1e-6 * float(b.abs().max().clamp(1)))


def streams(specimen: Specimen) -> str:
    """Layer by layer is the stock forward, bit for bit: in memory, spilled, and resumed."""
    if specimen.layout.cannot_run:
        with pytest.raises(ModelError, match="not run it"):
            Loader(specimen.checkpoint, specimen.understanding)
        return "refused"
    batches = [inputs(specimen.name, batch=b, length=t, seed=b)["input_ids"] for b, t in ((2, 12), (3, 9), (1, 17))]
    wanted = [run(specimen.stock, {"input_ids": ids}) for ids in batches]
    loader = Loader(specimen.checkpoint, specimen.understanding, dtype=torch.float32)
    assert all(map(same_sums, Stream(loader).run(batches), wanted))

    def interrupt(index: int) -> None:
        if index == 1:
            raise _InterruptError

    folder = out_of(specimen, "stream")
    with pytest.raises(_InterruptError):
        list(Stream(loader, checkpoints=Checkpoints(folder, "x", every_s=0)).run(batches, after_layer=interrupt))
    again = Stream(loader, spill_bytes=0, checkpoints=Checkpoints(folder, "x", every_s=0))
    assert all(map(same_sums, again.run(batches), wanted))
    assert again.resumed_at == 1

    assert_bf16(specimen, batches[:1])
    return "yes"


def assert_bf16(specimen: Specimen, batches: list[Tensor]) -> None:
    """In bf16 the stream is the stock forward too, bit for bit, and moekit's experts function comes near to eager's."""
    stock = load(specimen, specimen.folder, torch.bfloat16)
    calls, handles = [], []
    for path, module in experts_of(stock).items() if not specimen.name.startswith("llama4") else ():
        if "vision" not in path:
            handles.append(module.register_forward_hook(lambda *call: calls.append(call)))
    wanted = [run(stock, {"input_ids": ids}) for ids in batches]
    for handle in handles:
        handle.remove()
    for module, args, output in calls:
        with torch.no_grad():
            assert (observed_experts(module, *args) - output).abs().max() <= BF16 * output.abs().max()
    loader = Loader(specimen.checkpoint, specimen.understanding, dtype=torch.bfloat16)
    for module in experts_of(loader.model).values():
        if hasattr(module, "_apply_gate"):
            module.config._experts_implementation = "eager"
    assert all(map(torch.equal, Stream(loader).run(batches), wanted))
