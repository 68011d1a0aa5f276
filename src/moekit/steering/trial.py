"""Many sets of ops beside the model as it is, over the same tokens: loss, divergence and agreement of every text.

Symbols: R rows (texts), T positions, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moekit.apply.steer import steering
from moekit.data import Batch, Dataset
from moekit.evaluation.compare import split_rows
from moekit.families.model import Model
from moekit.families.tokens import Tokens
from moekit.plans import Steer
from moekit.progress import Progress, silent
from moekit.stream import Stream
from moekit.view import MoEView

RUNS = 256  # batches that pass the layers together


@dataclass(frozen=True, eq=False)
class Scores:
    """What a set of ops does to the texts of all domains.

    Attributes:
        domain: number of each text's [R].
        tokens: predicted [R].
        nll: summed negative log-likelihood, nats [R].
        kl: summed KL(model as it is || steered), nats [R].
        agree: positions at which both models' likeliest token is the same [R].
    """

    domain: np.ndarray
    tokens: np.ndarray
    nll: np.ndarray
    kl: np.ndarray
    agree: np.ndarray


def trial(
    model: Model,
    data: Dataset,
    sets: Sequence[Sequence[Steer]],
    *,
    prompt: int | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> list[Scores]:
    """Run the model as it is and under each set of ops, in as few passes over the weights as 256 batches at once allow.

    Args:
        model: from `moekit.open`.
        data: texts.
        sets: ops that are in force together.
        prompt: tokens at the start of each text that were given and not written; None: all.
        dtype: to run in; None for the model's own.
        device: "cpu" or "cuda".
        progress: told as layers pass.

    Returns:
        Scores of the model as it is, then of each set.

    Raises:
        PlanError: ops that the routers cannot follow.
        CheckpointError: weights cannot be read.
    """
    loader = model.loader(dtype, device)
    view = MoEView(loader.model, model.layout)
    batches = split_rows(data, model.layout.vocab_size)
    variants: list[Sequence[Steer]] = [(), *sets]
    by_layer = [
        {index: [op for op in ops if op.layer == index] for index in {op.layer for op in ops}} for ops in variants
    ]
    rows: list[list[tuple]] = [[] for _ in variants]
    together = max(1, RUNS // len(variants))
    for start in range(0, len(batches), together):
        runs = [(batch, v) for batch in batches[start : start + together] for v in range(len(variants))]

        @contextlib.contextmanager
        def around(index: int, number: int, runs=runs):  # type: ignore[no-untyped-def]
            batch, v = runs[number]
            ops = by_layer[v].get(index, ())
            with (
                view.at(Tokens.of(*batch.ids.shape, prompt=prompt, mask=batch.mask)),
                steering(view, ops) if ops else contextlib.nullcontext(),
            ):
                yield

        source: list[torch.Tensor] = []
        stream = Stream(loader, progress=progress).run([x.ids for x, _ in runs], around=around)
        with contextlib.closing(stream):  # type: ignore[type-var]
            for (batch, v), logits in zip(runs, stream, strict=True):
                if v == 0:
                    source = [
                        x[: int(m.sum()) - 1].float().log_softmax(-1) for x, m in zip(logits, batch.mask, strict=True)
                    ]
                rows[v] += _score(logits, source, batch)
    return [_gathered(x) for x in rows]


def _score(logits_RTV: torch.Tensor, source: Sequence[torch.Tensor], batch: Batch) -> list[tuple]:
    out = []
    for row, p_TV in enumerate(source):
        count = len(p_TV)
        q_TV = logits_RTV[row, :count].float().log_softmax(-1)
        target_T = batch.ids[row, 1 : count + 1, None].to(q_TV.device)
        nll = -float(q_TV.gather(1, target_T).sum())
        agree = int((p_TV.argmax(-1) == q_TV.argmax(-1)).sum())
        kl = float((p_TV.exp() * (p_TV - q_TV)).sum())
        out.append((batch.domain, count, nll, kl, agree))
    return out


def _gathered(rows: Sequence[tuple]) -> Scores:
    domain, tokens, nll, kl, agree = (np.array(x) for x in zip(*rows, strict=True))
    return Scores(domain, tokens, nll, kl, agree)
