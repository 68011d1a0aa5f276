"""Models on the Hugging Face hub: headers by range requests, whole snapshots by its own library."""

from __future__ import annotations

import json
import re
from pathlib import Path

from moekit.checkpoint.reader import INDEX, SINGLE, Checkpoint, TensorInfo, check_index, check_shard_name, parse_header
from moekit.errors import ModelError


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of a hub id, `organisation/model`."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith((".", "/"))


def download(repo_id: str) -> Path:
    """The local snapshot of a hub model, fetched where it is missing.

    Raises:
        ModelError: no such model, no access, or no network.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(repo_id, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "original/*"])
        )
    except Exception as error:  # the hub's library raises many kinds for absent, gated and unreachable
        raise _unreachable(repo_id, error) from error


def remote_checkpoint(repo_id: str) -> Checkpoint:
    """Config and safetensors headers of a hub model; no weights are fetched.

    Raises:
        ModelError: no such model, no access, no network, or no safetensors.
        CheckpointError: headers that contradict the index.
    """
    from huggingface_hub import HfFileSystem, hf_hub_download

    try:
        config_file = Path(hf_hub_download(repo_id, "config.json"))
        config = json.loads(config_file.read_text())
        files = HfFileSystem()
        listing = {Path(x["name"]).name: x["size"] for x in files.ls(repo_id)}
        if INDEX in listing:
            weight_map = json.loads(files.read_text(f"{repo_id}/{INDEX}"))["weight_map"]
        elif SINGLE in listing:
            weight_map = None
        else:
            raise ModelError(
                "this hub model has no safetensors weights", where=repo_id, fix="look for a converted copy"
            )
        tensors: dict[str, TensorInfo] = {}
        for shard in sorted(set(weight_map.values())) if weight_map else [SINGLE]:
            check_shard_name(shard, f"{repo_id}/{INDEX}")
            with files.open(f"{repo_id}/{shard}", "rb", block_size=1 << 20) as stream:
                found = parse_header(Path(shard), stream.read(8), stream.read, files.size(f"{repo_id}/{shard}"))
            tensors |= {
                name: info for name, info in found.items() if weight_map is None or weight_map.get(name) == shard
            }
        if weight_map:
            check_index(weight_map, tensors, f"{repo_id}/{INDEX}")
    except OSError as error:
        raise _unreachable(repo_id, error) from error
    return Checkpoint(config_file.parent, config, tensors, local=False)


def _unreachable(repo_id: str, error: Exception) -> ModelError:
    return ModelError(
        f"no folder {repo_id!r} here, and the hub did not give a model of that name",
        where=repo_id,
        got=str(error).splitlines()[0][:300] if str(error) else type(error).__name__,
        fix="check the spelling, the network, and `hf auth login` for gated models",
    )
