"""Models on the Hugging Face hub: headers by range requests, whole snapshots by its own library."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moekit.checkpoint.reader import (
    INDEX,
    SINGLE,
    Checkpoint,
    TensorInfo,
    check_index,
    parse_header,
    parse_index,
    read_config,
)
from moekit.errors import CheckpointError, ModelError, UserError

FETCH_BYTES = 1 << 17  # of one range request: about what the header of a shard takes
CONNECTIONS = 8


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
        CheckpointError: headers that are damaged or contradict the index.
    """
    from huggingface_hub import HfFileSystem, hf_hub_download

    try:
        folder = Path(hf_hub_download(repo_id, "config.json")).parent
        config = read_config(folder)
        files = HfFileSystem()
        names = {str(x).removeprefix(f"{repo_id}/") for x in files.ls(repo_id, detail=False)}
        index = f"{repo_id}/{INDEX}"
        whole = [SINGLE]
        if SINGLE in names:  # before an index, as stock transformers chooses
            weight_map = None
        elif INDEX in names:
            weight_map = parse_index(files.read_text(index, encoding="utf-8"), index)
        elif own := sorted(x for x in names if x.endswith(".safetensors") and "/" not in x):
            weight_map, whole = None, own  # moekit's own form has files of its own name, and needs no index
        else:
            raise ModelError(
                "this hub model has no safetensors weights", where=repo_id, fix="look for a converted copy"
            )

        def header(shard: str) -> dict[str, TensorInfo]:
            if "/" not in shard and shard not in names:
                raise CheckpointError("a shard is missing", where=f"{repo_id}/{shard}", fix="look for another copy")
            with files.open(f"{repo_id}/{shard}", "rb", block_size=FETCH_BYTES) as stream:
                return parse_header(Path(shard), stream.read(8), stream.read, stream.size)

        tensors: dict[str, TensorInfo] = {}
        shards = sorted(set(weight_map.values())) if weight_map else whole
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            for shard, found in zip(shards, pool.map(header, shards), strict=True):
                tensors |= {x: info for x, info in found.items() if weight_map is None or weight_map.get(x) == shard}
        if weight_map:
            check_index(weight_map, tensors, index)
    except UserError:
        raise
    except Exception as error:  # the hub's library raises many kinds for absent, gated and unreachable
        raise _unreachable(repo_id, error) from error
    return Checkpoint(folder, config, tensors, local=False)


def _unreachable(repo_id: str, error: Exception) -> ModelError:
    return ModelError(
        f"no folder {repo_id!r} here, and the hub did not give a model of that name",
        where=repo_id,
        got=str(error).splitlines()[0][:300] if str(error) else type(error).__name__,
        fix="check the spelling, the network, and `hf auth login` for gated models",
    )
