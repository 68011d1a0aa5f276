"""Proof that a checkpoint does what its plan says: stock transformers on the files against the plan applied live.

A few sequences tell that the whole works; which experts their tokens choose is left to chance. So the weights of all
that is there are compared too (`moekit.evaluation.weights`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from moekit.data import Batch, Dataset
from moekit.evaluation.compare import Subject, logits_of
from moekit.evaluation.weights import compare_weights
from moekit.families.model import Model
from moekit.plans import Plan
from moekit.progress import Progress, silent

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}  # of the largest logit of a position
AGREEING = 0.99  # share of positions within tolerance: near-ties in a router may fall either way by a rounding error
SEQUENCES, LENGTH = 4, 128


@dataclass(frozen=True)
class Verification:
    """What was compared and found.

    Attributes:
        ok: at least `AGREEING` of the positions are within tolerance, and no weight is wrong.
        loaded_by: "stock transformers" or, where the model does not fit in memory, "stock layers, streamed".
        dtype: that both ran in.
        positions: compared.
        within: share of positions within tolerance.
        tolerance: largest allowed difference relative to the position's largest logit.
        max_difference: largest absolute difference of two logits.
        generated: what the new model says after the first tokens of the text, greedily; None when streamed.
        experts: whose weights were compared, in all layers.
        wrong: weights that are not those of the source under the plan.
    """

    ok: bool
    loaded_by: str
    dtype: str
    positions: int
    within: float
    tolerance: float
    max_difference: float
    generated: str | None = None
    experts: int = 0
    wrong: tuple[str, ...] = ()


def verify(
    source: Model,
    plan: Plan,
    result: Model,
    data: Dataset | None = None,
    tokenizer: Any = None,
    progress: Progress = silent,
    instead: Plan | None = None,
) -> Verification:
    """Compare `result`, loaded from its files, with `source` under the live plan: logits on a few sequences of `data`,
    and every weight.

    Small models are compared in float32 and loaded by stock transformers; where the new model does not fit in half of
    the free memory, or is packed and the package for that is not installed, its stock layers are streamed, in its own
    dtype.

    Args:
        source: the model that was changed.
        plan: what was done to it.
        result: the new checkpoint.
        data: any text, tokenised; None: random tokens.
        tokenizer: to show a generated text; None for none.
        progress: told as layers pass.
        instead: a plan that `plan` does the same as, in weights: logits are compared with this one applied live, within
            what rounding to the dtype of `result` makes.
    """
    fits = result.fits(torch.float32)
    dtype = torch.float32 if fits else result.dtype
    batches = _sample(data) if data else _random(result.layout.vocab_size)
    tolerance = max(TOLERANCE[dtype], TOLERANCE[result.dtype]) if instead else TOLERANCE[dtype]
    live = logits_of(Subject(source, instead or plan), batches, dtype, progress=progress)
    generated = None
    with contextlib.closing(live), contextlib.ExitStack() as stack:
        if fits:
            model = result.load(dtype)
            baked: Iterable[torch.Tensor] = (model(input_ids=x.ids, use_cache=False).logits for x in batches)
            stack.enter_context(torch.inference_mode())
        else:
            baked = stack.enter_context(
                contextlib.closing(logits_of(Subject(result), batches, dtype, progress=progress))
            )
        relative, largest = [], 0.0
        for batch, ours, theirs in zip(batches, baked, live, strict=True):
            ours, theirs = ours[batch.mask].float(), theirs[batch.mask].float()
            difference = (ours - theirs).abs().amax(-1)
            relative.append(difference / theirs.abs().amax(-1).clamp_min(1e-6))
            largest = max(largest, float(difference.max()))
        if fits and tokenizer is not None:
            generated = _generate(model, batches[0].ids[:1, :16], tokenizer)
    every = torch.cat(relative)
    within = float((every <= tolerance).float().mean())
    weights = compare_weights(source, plan, result, progress)
    return Verification(
        ok=within >= AGREEING and not weights.wrong,
        loaded_by="stock transformers" if fits else "stock layers, streamed",
        dtype=str(dtype).removeprefix("torch."),
        positions=len(every),
        within=within,
        tolerance=tolerance,
        max_difference=largest,
        generated=generated,
        experts=weights.experts,
        wrong=weights.wrong,
    )


def _sample(data: Dataset) -> list[Batch]:
    """One short row from each of the first batches of every domain."""
    rows, seen = [], dict.fromkeys(range(len(data.domains)), 0)
    for batch in data.batches:
        if seen[batch.domain] < max(1, SEQUENCES // len(data.domains)):
            seen[batch.domain] += 1
            rows.append(Batch(batch.domain, batch.ids[:1, :LENGTH], batch.mask[:1, :LENGTH]))
    return rows


def _random(vocab_size: int) -> list[Batch]:
    ids = torch.randint(vocab_size, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))
    return [Batch(0, row[None], torch.ones(1, LENGTH, dtype=torch.bool)) for row in ids]


def _generate(model: torch.nn.Module, prompt: torch.Tensor, tokenizer: Any) -> str:
    out = model.generate(prompt, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)
