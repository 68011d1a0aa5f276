"""What running the models of the zoo shows: their experts and routers at work, and their tensors on disk."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from zoo import EXPERTS, MULTIMODAL, TOP_K, ZOO, build, inputs


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    """Experts modules by path: those with the contract, or Llama 4's, which hold the same tensors without it."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(getattr(module, "down_proj", None), nn.Parameter)
        and (hasattr(module, "_apply_gate") or type(module).__name__ == "Llama4TextExperts")
    }


def expert_tensors(model_type: str) -> dict[str, int | None]:
    """Tensors on disk that have to do with routed experts: the axis that counts them, None for one tensor per expert.

    Found without knowing the family: what changes when the model has four experts more. (A table of expert numbers,
    as DeepSeek V4's `tid2eid`, keeps its shape and is not found.)
    """
    few, many = (disk_shapes(model_type, experts) for experts in (EXPERTS, EXPERTS + 4))
    axes = {name: [a != b for a, b in zip(few[name], many[name], strict=True)] for name in few}
    fused = {name: changed.index(True) for name, changed in axes.items() if any(changed)}
    added = {re.sub(r"\.\d+\.", ".*.", name) for name in many.keys() - few.keys()}
    return fused | {name: None for name in few if re.sub(r"\.\d+\.", ".*.", name) in added}


def disk_shapes(model_type: str, experts: int = EXPERTS) -> dict[str, list[int]]:
    """Names and shapes of the tensors of a family's tiny checkpoint with this many experts."""
    counts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    fields = {
        field.name for field in dataclasses.fields(type((ZOO | MULTIMODAL)[model_type].config().get_text_config()))
    }
    with tempfile.TemporaryDirectory() as folder:
        build(model_type, **{name: experts for name in counts if name in fields}).save_pretrained(folder)
        with safe_open(f"{folder}/model.safetensors", "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}


@dataclasses.dataclass
class Watch:
    """Records what goes through the MoE layers of a running model.

    Attributes:
        calls: for each call of an experts module its path and arguments.
        routers: class and outputs of each module that runs beside the experts and returns a tuple.
        layers: what each decoder layer with experts returns.
    """

    calls: list[tuple[str, tuple[Tensor, ...]]] = dataclasses.field(default_factory=list)
    routers: list[tuple[str, tuple[Tensor, ...]]] = dataclasses.field(default_factory=list)
    layers: list[Any] = dataclasses.field(default_factory=list)

    def attach(self, model: nn.Module) -> Watch:
        """Hook `model` and return self."""
        for path, experts in experts_of(model).items():
            experts.register_forward_pre_hook(lambda module, args, path=path: self.calls.append((path, args)))
            for name, module in model.get_submodule(path.rpartition(".")[0]).named_children():
                if name in ("gate", "router"):
                    module.register_forward_hook(lambda m, args, out: self.routers.append((type(m).__name__, out)))
            if layer := re.match(r".*?\blayers\.\d+", path):
                model.get_submodule(layer.group()).register_forward_hook(lambda m, args, out: self.layers.append(out))
        return self


def _shape(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_shape, value))})"
    return f"{str(value.dtype)[6]}{list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _holding(config: dict[str, Any], value: int, pattern: str, prefix: str = "") -> list[str]:
    """Names in a config, nested ones with dots, that match `pattern` and hold `value`."""
    found = [prefix + name for name, v in config.items() if v == value and re.search(pattern, name)]
    return found + [n for k, v in config.items() if isinstance(v, dict) for n in _holding(v, value, pattern, f"{k}.")]


def describe(model_type: str) -> str:
    """Build, run, save and reload one family; say in a few lines what was seen."""
    entry, model, batch = (ZOO | MULTIMODAL)[model_type], build(model_type), inputs(model_type)
    watch = Watch().attach(model)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        logits = model(**batch).logits
        model.save_pretrained(folder)
        config = json.loads(Path(folder, "config.json").read_text())
        again = type(model).from_pretrained(folder).eval()
        same = torch.equal(logits, again(**batch).logits)
        same &= all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())
    finite = bool(logits.isfinite().all())
    shapes = disk_shapes(model_type)
    disk = {re.sub(r"\.\d+", ".*", name): (shapes[name], axis) for name, axis in expert_tensors(model_type).items()}
    tensors = [arg for _, args in watch.calls for arg in args if not arg.is_floating_point()]
    k = tensors[0].shape[-1] if tensors else TOP_K
    return "\n".join(
        [
            f"{model_type} ({entry.model_class}){' -- ' if entry.notes else ''}{entry.notes}",
            f"  logits {_shape(logits)}, finite {finite}, std {logits.std():.2f}; reload same {same}",
            f"  experts modules {len(experts_of(model))}, called {len(watch.calls)} times with "
            + _distinct(args for _, args in watch.calls),
            f"  distinct sets of experts chosen {[len(t.sort(dim=-1).values.unique(dim=0)) for t in tensors]}",
            f"  router {watch.routers[0][0]} -> {_distinct(out for _, out in watch.routers)}",
            f"  layer -> {_distinct(watch.layers)}",
            f"  config E {_holding(config, EXPERTS, 'expert')}, k {_holding(config, k, 'topk|top_k|per_tok|moe_k')}",
            *(f"  disk {name} {shape}, axis {axis}" for name, (shape, axis) in disk.items()),
        ]
    )


def _distinct(values: Iterable[Any]) -> str:
    return " or ".join(sorted({_shape(value) for value in values}))


def main() -> None:
    """Describe the families named on the command line, or all."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in sys.argv[1:] or [*ZOO, *MULTIMODAL]:
        print(describe(name), flush=True)
