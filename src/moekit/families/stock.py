"""The stock transformers model of a checkpoint, built without weights: config, class, decoder layers, experts modules.

Only this package looks at configs and model classes. The private corners of transformers that a weightless model needs
are all in this file and in `names.py`; the family tests hold them to what `from_pretrained` does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from moekit.errors import ModelError, did_you_mean
from moekit.families.packings import packing_of, quantisation_settings

QUANTISATIONS = ("fp8", "mxfp4")  # read, sliced and dequantised layer by layer; anything else is refused by name


def load_config(folder: Path, raw: dict, trust_remote_code: bool = False) -> PretrainedConfig:
    """The transformers config of a folder.

    Args:
        folder: where config.json lies.
        raw: config.json as a dict.
        trust_remote_code: allow code that the checkpoint brings along.

    Raises:
        ModelError: unknown model type, or code from the checkpoint would have to run.
    """
    model_type = raw.get("model_type", "")
    known = transformers.CONFIG_MAPPING.keys()
    if model_type not in known and "auto_map" in raw and not trust_remote_code:
        raise ModelError(
            "this checkpoint brings its own code, which moekit does not run unless asked",
            where=folder / "config.json",
            got=f"model_type {model_type!r}, auto_map {raw['auto_map']}",
            fix="read that code; if you trust it, pass --trust-remote-code",
        )
    if model_type not in known and not trust_remote_code:
        raise ModelError(
            f"unknown model type {model_type!r}",
            where=folder / "config.json",
            expected=f"a family of transformers {transformers.__version__}",
            fix=f"upgrade transformers if the family is newer ({did_you_mean(model_type, known)})"[:400],
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds for a config that its class does not accept
        raise ModelError(
            "transformers cannot read this config", where=folder / "config.json", got=str(error)[:500]
        ) from error


def quantisation(config: PretrainedConfig) -> str | None:
    """ "fp8", "mxfp4", the name of a `Packing` or None; ModelError for any other quantisation."""
    settings = quantisation_settings(config)
    if not settings:
        return None
    if packing := packing_of(config):
        return packing.name
    method = str(settings.get("quant_method", "unknown")).rsplit(".", 1)[-1].lower()
    if method not in QUANTISATIONS:
        raise ModelError(
            f"checkpoints quantised by {method!r} are not supported",
            expected="bf16, fp16, fp32, fp8 with block scales, mxfp4, or packed integers",
            got=f"quantization_config.quant_method = {method}",
            fix="use the unquantised checkpoint and quantise the result",
        )
    return method


def model_class(config: PretrainedConfig, trust_remote_code: bool = False) -> type[PreTrainedModel] | None:
    """The transformers class that the config names, or the causal language model of its type; None for auto classes."""
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if trust_remote_code:
        return None
    raise ModelError(
        "transformers has no language model class for this config",
        got=f"model_type {config.model_type!r}, architectures {config.architectures}",
        fix="moekit supports causal language models of stock transformers",
    )


def build(
    config: PretrainedConfig,
    dtype: torch.dtype = torch.bfloat16,
    *,
    buffers: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The stock model with its parameters on the meta device, in eval mode.

    Args:
        config: is copied, and its quantisation is dropped (weights are dequantised when they are read).
        dtype: of the parameters.
        buffers: also compute the buffers that no checkpoint holds (rotary frequencies), on CPU.

    Raises:
        ModelError: no class for it, or the class cannot be built from it.
    """
    config = copy.deepcopy(config)
    for part in {id(config): config, id(config.get_text_config()): config.get_text_config()}.values():
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    cls = model_class(config, trust_remote_code)
    try:
        with torch.device("meta"):
            model = (
                AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=True)
                if cls is None
                else cls._from_config(config, dtype=dtype)
            )
    except Exception as error:  # model classes raise many kinds for a config that they cannot be built from
        raise ModelError(
            "transformers cannot build a model from this config",
            got=f"model_type {config.model_type!r}: {error}"[:500],
            fix="compare config.json with the one of a model of this family that works",
        ) from error
    if buffers:
        for tensor in (*model.parameters(), *model.buffers()):
            tensor._is_hf_initialized = True
        model._move_missing_keys_from_meta_to_device(set(), {"": "cpu"}, None, None)
        model._initialize_missing_keys(False)
    return model.eval()


@dataclass(frozen=True)
class ExpertsAt:
    """An experts module of a stock model: decoder layer index, its path, the path of the list of decoder layers."""

    layer: int
    path: str
    layers_path: str


def is_experts(module: nn.Module) -> bool:
    """The experts contract of transformers 5: a gate function and stacked down projections."""
    return (
        hasattr(module, "_apply_gate")
        and isinstance(getattr(module, "down_proj", None), nn.Parameter)
        and module.down_proj.dim() == 3
    )


def find_experts(model: nn.Module, contract: Callable[[nn.Module], bool] = is_experts) -> list[ExpertsAt]:
    """The modules that meet the contract inside the language model's decoder layers, in order (no vision towers)."""
    found = []
    for path, module in model.named_modules():
        if contract(module):
            parts = path.split(".")
            at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
            if at is not None and not any("vision" in part or "visual" in part or "audio" in part for part in parts):
                found.append(ExpertsAt(int(parts[at]), path, ".".join(parts[:at])))
    return sorted(found, key=lambda x: (x.layers_path, x.layer))
