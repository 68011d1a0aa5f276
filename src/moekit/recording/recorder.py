"""What both ways of recording share: the observer, where rows go, the model in memory, the folder while it is written.

Symbols: B rows, T positions, K chosen, V vocabulary.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import nn

from moekit.checkpoint.place import check_place, claimed, move, sign, take_over
from moekit.data import Batch, load_tokenizer
from moekit.errors import DataError, ModelError, OutputError
from moekit.families.model import Model
from moekit.families.seam import IMPLEMENTATION
from moekit.layout import MoELayer
from moekit.measurement import Gatherer
from moekit.stats import WORDS, LayerStats
from moekit.trace.words import thin
from moekit.trace.writer import TokenWriter, save_vocabulary
from moekit.view import Call

TRACED = ("routing", "vocabulary")  # groups of statistics that need no expert's output
WITH_OUTPUTS = (*TRACED, "scores", "outputs")
LOGIT_BYTES = 1 << 30  # of one batch, where the model's head runs
MEMORY_SHARE = 0.7  # of the free memory that a model may take to be loaded as a whole
ROW_CHUNK = 256  # positions whose log-probabilities are held at once


class Recorder(Gatherer):
    """A Gatherer that also writes every token's experts.

    Args:
        layers: MoE layers.
        domains: number of domains.
        groups: of statistics.
        writer: takes the tokens; None keeps sums only.

    Attributes:
        first_rows: by batch number, the row of its first real token on disk.
    """

    def __init__(self, layers: Sequence[MoELayer], domains: int, groups: Sequence[str], writer: TokenWriter | None):
        super().__init__(layers, domains, groups)
        self.writer = writer
        self.first_rows: Sequence[int] = ()

    def finished(self, call: Call, output: torch.Tensor) -> None:
        """Add up, then write."""
        super().finished(call, output)
        if self.writer is None:
            return
        keep = slice(None) if self._all_real else self._real.to(call.ids.device)
        assert self.margin is not None
        arrays = {"ids": call.ids[keep], "weights": call.weights[keep].half(), "margin": self.margin.half()}
        if self.writer.logits and call.logits is not None:
            arrays["logits"] = call.logits[keep].half()
        row = self.first_rows[self.batch[0]]
        self.writer.write_layer(call.layer.index, row, **{name: x.cpu().numpy() for name, x in arrays.items()})


@dataclass(frozen=True)
class Places:
    """Where batches lie among all rows and sequences of a trace: in order of their domains."""

    rows: list[int]
    sequences: list[int]

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> Places:
        """Domain after domain, the batches of each in their order."""
        order = sorted(range(len(batches)), key=lambda number: batches[number].domain)
        out = cls([0] * len(batches), [0] * len(batches))
        for starts, size in ((out.rows, lambda x: x.tokens), (out.sequences, lambda x: len(x.ids))):
            ends = accumulate((size(batches[number]) for number in order), initial=0)
            for number, start in zip(order, ends, strict=False):
                starts[number] = start
        return out


def loaded_model(model: Model, dtype: torch.dtype | None, device: str) -> nn.Module:
    """The stock model; on the CPU its experts run as they do when streamed, so that both give the same numbers."""
    loaded = model.load(dtype, device)
    if torch.device(device).type == "cpu":
        loaded.set_experts_implementation(IMPLEMENTATION)
    return loaded


def fits_in_memory(model: Model, dtype: torch.dtype | None, device: str) -> bool:
    """Whether a model may be loaded as a whole: not quantised, and well below the free memory."""
    if model.layout.quantisation:
        return False
    if torch.device(device).type == "cuda":
        free_bytes = torch.cuda.mem_get_info(device)[0]
    else:
        free_bytes = psutil.virtual_memory().available
    return model.layout.total.params * (dtype or model.dtype).itemsize < MEMORY_SHARE * free_bytes


def split(batches: Sequence[Batch], vocab_size: int) -> list[Batch]:
    """Batches of fewer rows, where the logits of one would be too large."""
    out = []
    for batch in batches:
        rows = max(1, LOGIT_BYTES // (4 * vocab_size * batch.ids.shape[1]))
        starts = range(0, len(batch.ids), rows)
        out += [Batch(batch.domain, batch.ids[i : i + rows], batch.mask[i : i + rows]) for i in starts]
    return out


def token_columns(batch: Batch, first_sequence: int) -> dict[str, np.ndarray]:
    """Columns of `moekit.trace.store.TOKEN_ARRAYS` for the real tokens of a batch that is read."""
    rows = torch.arange(first_sequence, first_sequence + len(batch.ids))[:, None].expand(batch.ids.shape)
    count = batch.tokens
    return {
        "id": batch.ids[batch.mask].numpy(),
        "domain": np.full(count, batch.domain),
        "sequence": rows[batch.mask].numpy(),
        "position": batch.positions[batch.mask].numpy(),
        "phase": np.zeros(count, np.uint8),
    }


def head_columns(logits_BTV: torch.Tensor, batch: Batch) -> dict[str, np.ndarray]:
    """`predicted` and `loss` of the real tokens of a batch."""
    real = batch.mask.reshape(-1).nonzero()[:, 0].to(logits_BTV.device)
    following = batch.following[batch.mask].to(logits_BTV.device)
    flat = logits_BTV.reshape(-1, logits_BTV.shape[-1])
    predicted, loss = [], []
    for start in range(0, len(real), ROW_CHUNK):
        logits = flat[real[start : start + ROW_CHUNK]].float()
        target = following[start : start + ROW_CHUNK, None]
        found = logits.logsumexp(-1) - logits.gather(1, target.clamp_min(0))[:, 0]
        predicted.append(logits.argmax(-1).cpu())
        loss.append(found.masked_fill(target[:, 0] < 0, torch.nan).cpu())
    return {"predicted": torch.cat(predicted).numpy(), "loss": torch.cat(loss).numpy()}


def save_words(folder: Path, model: Model, ids: np.ndarray) -> None:
    """Write the text of these token ids; nothing where the model came without a tokenizer."""
    try:
        tokenizer = load_tokenizer(model.path, trust_remote_code=model.trust_remote_code)
    except ModelError:
        return
    texts = dict(zip(ids.tolist(), tokenizer.batch_decode(ids[:, None].tolist()), strict=True))
    broken = [word for word, text in texts.items() if "\ufffd" in text]  # part of a character: show the raw token
    save_vocabulary(folder, texts | dict(zip(broken, tokenizer.convert_ids_to_tokens(broken), strict=True)))


def thinned(stats: LayerStats, layer: MoELayer) -> LayerStats:
    """A layer's sums with counts by token id made small (`moekit.trace.words.thin`): a trace is not added to."""
    small = {name: thin(rows, layer.num_experts, layer.top_k) for name in WORDS if len(rows := getattr(stats, name))}
    return LayerStats(stats.arrays, **small)


def check_domains(domains: Sequence[str], tokens: dict[str, int]) -> None:
    """Refuse a domain without tokens.

    Raises:
        DataError: there is one.
    """
    for name in domains:
        if not tokens.get(name):
            raise DataError(f"the domain {name!r} has no tokens", fix="leave it out, or give it text")


@contextlib.contextmanager
def claimed_folder(final: Path, job: dict, overwrite: bool) -> Iterator[Path]:
    """The folder that becomes `final` when all has gone well; it holds what an interrupted run of this job left."""
    if not (overwrite and (final / "trace.json").is_file()):
        check_place(final, overwrite=False)
    folder = final.with_name(final.name + ".partial")
    job = json.loads(json.dumps(job))
    try:
        with claimed(folder):
            take_over(folder, job, overwrite)
            sign(folder, job)
            yield folder
            move(folder, final)
    except ModelError:
        shutil.rmtree(folder, ignore_errors=True)  # going on would go wrong again
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise OutputError(
            "the disk is full" if full else "the trace could not be written",
            where=error.filename or folder,
            got=error.strerror or error,
            fix="free some space, or write to another disk" if full else "mend this, and run the same again",
        ) from error
