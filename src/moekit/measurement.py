"""measure(model, data) -> Stats: one streamed pass over the data that takes every statistic that methods ask for.

Symbols: T tokens of a batch, K chosen, E experts, D hidden, N domains.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from moekit import __version__
from moekit.data import Batch, Dataset
from moekit.errors import ModelError
from moekit.families.model import Model
from moekit.families.seam import ExpertRows
from moekit.layout import MoELayer
from moekit.progress import Progress, silent
from moekit.stats import FIELDS, GROUPS, POSITION_BUCKETS, LayerStats, Stats, add_up, position_bucket
from moekit.stream import DEFAULT_SPILL_BYTES, Checkpoints, Stream
from moekit.view import Call, MoEView, Observer


class Gatherer(Observer):
    """Adds up the statistics of every MoE layer that it is shown.

    Args:
        layers: MoE layers, in order.
        domains: number of domains.
        hidden_size: D.
        groups: which of `moekit.stats.GROUPS` to take.

    Attributes:
        batch: (number, Batch) that runs now; to be set before each forward.
        previous: chosen experts of the previous MoE layer by batch number, for transitions.
    """

    def __init__(self, layers: Sequence[MoELayer], domains: int, hidden_size: int, groups: Sequence[str] = GROUPS):
        self.groups = frozenset(groups)
        self.wants_outputs = bool(self.groups & {"scores", "outputs"})
        self.wants_residual = "scores" in self.groups
        self.batch: tuple[int, Batch] = (0, None)
        self.previous: dict[int, torch.Tensor] = {}
        self.sums: dict[int, dict[str, torch.Tensor]] = {}
        self.words: dict[int, list[np.ndarray]] = {}
        sizes = {"D": hidden_size, "P": POSITION_BUCKETS}
        for i, layer in enumerate(layers):
            sizes |= {"E": layer.num_experts, "F": layers[i - 1].num_experts if i else 0}
            shapes = {
                name: [sizes[x] for x in axes] for name, (group, axes, _) in FIELDS.items() if group in self.groups
            }
            self.sums[layer.index] = {
                name: torch.zeros(domains, *shape, dtype=torch.float32 if name == "output" else torch.float64)
                for name, shape in shapes.items()
                if 0 not in shape
            }
            self.words[layer.index] = []

    def routed(self, call: Call) -> None:
        _, batch = self.batch
        tokens = batch.ids.numel()
        if call.ids.shape != (tokens, call.layer.top_k) or call.hidden.shape[0] != tokens:
            raise _mismatch(call.layer, f"{list(call.ids.shape)} choices for {tokens} tokens, top {call.layer.top_k}")
        self._real = batch.mask.reshape(-1)
        self._all_real = bool(self._real.all())
        if self.wants_outputs:
            self._norms = torch.zeros(call.ids.shape, dtype=torch.float32, device=call.ids.device)

    def expert(self, call: Call, rows: ExpertRows) -> None:
        sums, domain = self.sums[call.layer.index], self.batch[1].domain
        norms = torch.linalg.vector_norm(rows.output, dim=-1, dtype=torch.float32)
        self._norms[rows.tokens, rows.ranks] = norms
        output = rows.output if self._all_real else rows.output[self._real.to(rows.tokens.device)[rows.tokens]]
        if not len(output):
            return
        if "peak" in sums:
            low, high = output.aminmax()
            peak = torch.maximum(-low, high).double().cpu()
            sums["peak"][domain, rows.expert] = torch.maximum(sums["peak"][domain, rows.expert], peak)
        if "output" in sums:
            sums["output"][domain, rows.expert] += output.sum(0, dtype=torch.float32).cpu()

    def finished(self, call: Call, output: torch.Tensor) -> None:
        number, batch = self.batch
        layer, domain = call.layer, batch.domain
        sums = {name: array[domain] for name, array in self.sums[layer.index].items()}
        keep = self._real.to(call.ids.device)
        ids = call.ids[keep].long()
        flat = ids.reshape(-1)

        def by_expert(values_TK: torch.Tensor) -> torch.Tensor:
            return torch.bincount(flat, weights=values_TK.reshape(-1).double(), minlength=layer.num_experts).cpu()

        if "scores" in self.groups:
            weights, norms = call.weights[keep].float(), self._norms[keep]
            gated = norms if layer.router.weighs_input else weights * norms
            shift = _shift(call.residual[keep], output.reshape(call.ids.shape[0], -1)[keep])
            sums["count"] += torch.bincount(flat, minlength=layer.num_experts).cpu()
            sums["gate_mass"] += by_expert(weights)
            sums["norm"] += by_expert(norms)
            sums["norm_sq"] += by_expert(norms * norms)
            sums["gated_norm"] += by_expert(gated)
            sums["easy_ep"] += by_expert(shift[:, None] * gated)
        if self.groups & {"outputs", "routing"}:
            logits = call.logits[keep].float()
            self._check_logits(layer, logits, ids)
        if "outputs" in self.groups:
            sums["logit"] += logits.sum(0, dtype=torch.float64).cpu()
            sums["logit_gram"] += (logits.T @ logits).double().cpu()
        if "routing" in self.groups:
            self._routing(layer, number, batch, sums, logits, ids)
        if "vocabulary" in self.groups:
            self._vocabulary(layer, batch, ids)

    def _check_logits(self, layer: MoELayer, logits: torch.Tensor, ids: torch.Tensor) -> None:
        """Refuse a trace in which the router's logits do not explain its choice (where nothing else decides)."""
        router = layer.router
        if router.correction_bias or router.groups > 1 or "special" in router.score:
            return
        lowest = logits.gather(1, ids).amin(-1)
        better = (logits > lowest[:, None]).sum(-1)
        if bool((better >= layer.top_k).any()):
            raise _mismatch(layer, "experts were chosen that the logits do not favour")

    def _routing(
        self,
        layer: MoELayer,
        number: int,
        batch: Batch,
        sums: dict[str, torch.Tensor],
        logits: torch.Tensor,
        ids: torch.Tensor,
    ) -> None:
        chosen = torch.zeros(len(ids), layer.num_experts, device=ids.device).scatter_(1, ids, 1.0)
        sums["coactivation"] += (chosen.T @ chosen).double().cpu()
        before = self.previous.get(number)
        if before is not None and "transition" in sums:
            came = torch.zeros(len(ids), sums["transition"].shape[0], device=ids.device)
            came.scatter_(1, before.to(ids.device).long(), 1.0)
            sums["transition"] += (came.T @ chosen).double().cpu()
        self.previous[number] = ids.to(torch.int16).cpu()
        scores = logits.sigmoid() if layer.router.score.startswith("sigmoid") else logits.softmax(-1)
        scores = scores / scores.sum(-1, keepdim=True).clamp_min(1e-20)
        entropy = -torch.special.xlogy(scores, scores).sum(-1)
        best = scores.topk(min(layer.top_k + 1, layer.num_experts), -1).values
        margin = best[:, layer.top_k - 1] - (best[:, layer.top_k] if best.shape[1] > layer.top_k else 0.0)
        positions = np.broadcast_to(np.arange(batch.ids.shape[1]), batch.ids.shape)[batch.mask.numpy()]
        bucket = torch.from_numpy(position_bucket(positions))
        sums["position_tokens"] += torch.bincount(bucket, minlength=POSITION_BUCKETS)
        for name, values in (("entropy", entropy), ("margin", margin)):
            sums[name] += torch.bincount(bucket, weights=values.double().cpu(), minlength=POSITION_BUCKETS)

    def _vocabulary(self, layer: MoELayer, batch: Batch, ids: torch.Tensor) -> None:
        words = batch.ids.reshape(-1)[self._real]
        keys = (words[:, None] * layer.num_experts + ids.cpu()).reshape(-1)
        unique, counts = torch.unique(keys, return_counts=True)
        rows = torch.stack(
            [torch.full_like(unique, batch.domain), unique // layer.num_experts, unique % layer.num_experts, counts], 1
        )
        self.words[layer.index].append(rows.numpy())

    def take(self, index: int, tokens: int) -> LayerStats:
        """The finished sums of a layer; its memory is given up.

        Raises:
            ModelError: the counts do not add up to tokens x top_k.
        """
        sums, words = self.sums.pop(index), self.words.pop(index)
        stats = LayerStats({name: x.numpy() for name, x in sums.items()})
        if words:
            stats.vocabulary = add_up(np.concatenate(words))
        if "count" in sums and not float(sums["count"].sum()).is_integer():
            raise ModelError("counts are not whole numbers", where=f"layer {index}")
        return stats


def _shift(residual: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """max(0, 1 - cos(h, h + y)) for each token [T]."""
    h, y = residual.float(), output.float()
    return (1 - torch.cosine_similarity(h, h + y, dim=-1)).clamp_min(0)


def _mismatch(layer: MoELayer, what: str) -> ModelError:
    return ModelError(
        "what the router decided and what the experts were given do not agree; statistics would be wrong",
        where=f"layer {layer.index}",
        got=what,
        fix="please report this family",
    )


def measure(
    model: Model,
    data: Dataset,
    *,
    groups: Sequence[str] = GROUPS,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    workdir: str | Path | None = None,
    spill_bytes: int = DEFAULT_SPILL_BYTES,
    checkpoint_s: float = 60.0,
    progress: Progress = silent,
) -> Stats:
    """Take statistics of `model` on `data` in one pass, one layer's weights in memory.

    Args:
        model: from `moekit.open`.
        data: from `moekit.data`.
        groups: which quantities ("scores", "outputs", "routing", "vocabulary").
        dtype: to run in; None for the model's own.
        device: "cpu" or "cuda".
        workdir: where an interrupted pass leaves what it needs to go on; None for nowhere.
        spill_bytes: hidden states beyond this wait on disk.
        checkpoint_s: seconds between checkpoints.
        progress: told as layers pass.

    Raises:
        ModelError: routing and experts do not agree (the family is not understood).
        CheckpointError: weights cannot be read.
    """
    layout = model.layout
    layers = layout.routed
    loader = model.loader(dtype, device)
    view = MoEView(loader.model, layout)
    gatherer = Gatherer(layers, len(data.domains), layout.hidden_size, groups)
    manifest = _manifest(model, data, groups, loader.dtype)
    identity = json.dumps(manifest, sort_keys=True)
    work = None if workdir is None else Path(workdir)
    store = None if work is None else Checkpoints(work, identity, {"previous": gatherer.previous}, checkpoint_s)
    done: dict[int, LayerStats] = {}
    tokens = sum(data.tokens.values())

    @contextlib.contextmanager
    def around(index: int, number: int) -> Iterator[None]:
        if index not in layout.by_index:
            yield
            return
        gatherer.batch = (number, data.batches[number])
        with view.watch(gatherer, layers=[index]):
            yield

    def after_layer(index: int) -> None:
        if index in layout.by_index:
            done[index] = gatherer.take(index, tokens)
            if work is not None:
                _keep(work, identity, index, done[index])

    stream = Stream(loader, spill_bytes=spill_bytes, checkpoints=store, progress=progress)
    for _ in stream.run(
        [x.ids for x in data.batches], around=around, after_layer=after_layer, last_layer=layers[-1].index
    ):
        pass
    for layer in layers:
        if layer.index not in done:
            done[layer.index] = _kept(work, layer.index)
    if work is not None:
        shutil.rmtree(work, ignore_errors=True)
    sequences = np.zeros(len(data.domains), np.int64)
    for batch in data.batches:
        sequences[batch.domain] += len(batch.ids)
    counts = np.array([data.tokens[name] for name in data.domains], np.int64)
    return Stats(layout.hash, tuple(data.domains), counts, sequences, dict(sorted(done.items())), manifest)


def _manifest(model: Model, data: Dataset, groups: Sequence[str], dtype: torch.dtype) -> dict:
    return {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "layout": model.layout.to_dict(),
        "data": data.describe(),
        "groups": sorted(groups),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of what decides numbers."""
    return {
        "moekit": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    }


def _keep(work: Path, identity: str, index: int, stats: LayerStats) -> None:
    one = Stats(identity, (), np.zeros(0, np.int64), np.zeros(0, np.int64), {index: stats})
    one.save(work / f"layer-{index:04d}")


def _kept(work: Path | None, index: int) -> LayerStats:
    if work is None:
        raise ModelError("a MoE layer was never run", where=f"layer {index}")
    return Stats.load(work / f"layer-{index:04d}").layers[index]
