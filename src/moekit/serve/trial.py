"""A trial at the start: does this model give each text of a batch the logits that the text gets alone?

Three texts of different lengths run alone, and then together: two join, the third joins later, the longest leaves. What
a family keeps in its cache, how it masks padding and what it makes of positions all takes part. Nothing is assumed
about a family: one that fails, or whose logits differ by more than rounding does, is served one text at a time.
"""

from __future__ import annotations

import statistics

import torch
from transformers import DynamicCache

from moekit.families.caches import join, keep
from moekit.families.detect import dtype_of
from moekit.families.resident import empty_cache
from moekit.serve.engine import Engine

LENGTHS = (3, 40, 17)
# (of the median token, of the worst one), of the logits' own size: rounding may flip a router's near tie.
TOLERANCE = {torch.float32: (1e-4, 1e-3), torch.float16: (0.01, 0.05), torch.bfloat16: (0.03, 0.1)}


def why_not(engine: Engine) -> str | None:
    """Why texts cannot share forwards; None: they can."""
    try:
        errors = differences(engine)
    except Exception as error:  # a family may fail in any way
        return f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        engine.forget()
    median, worst = TOLERANCE.get(dtype_of(engine.layout), (0.0, 0.0))
    if statistics.median(errors) <= median and max(errors) <= worst:
        return None
    return f"logits of a batch differ by up to {max(errors):.2g} of their size from those of single texts"


def differences(engine: Engine) -> list[float]:
    """||together - alone|| / ||alone|| of the logits of each text and token that ran together."""
    generator = torch.Generator().manual_seed(0)
    longest = min(max(LENGTHS), engine.context - 4)
    size = max(2, engine.layout.vocab_size)
    texts = [torch.randint(size, (1, min(n, longest) + 3), generator=generator) for n in LENGTHS]
    given = [min(n, longest) for n in LENGTHS]

    def prompt(number: int) -> DynamicCache:
        past = empty_cache(engine.model)
        engine.forward(texts[number][:, : given[number]], past, "prefill")
        return past

    alone: dict[tuple[int, int], torch.Tensor] = {}
    for number, ids in enumerate(texts):
        past = prompt(number)
        for step in range(3):
            place = given[number] + step
            alone[number, step] = engine.forward(ids[:, place : place + 1], past, "decode")[0]
    past, rows, errors, done = join([prompt(0), prompt(1)]), [0, 1], [], [0, 0, 0]
    for turn in range(3):
        if turn == 1:
            past, rows = join([past, prompt(2)]), [0, 1, 2]
        if turn == 2:
            rows = [0, 2]
            keep(past, [0, 2], max(given[x] + done[x] for x in rows))
        lengths = [given[x] + done[x] for x in rows]
        ids_B1 = torch.cat([texts[x][:, place : place + 1] for x, place in zip(rows, lengths, strict=True)])
        for number, logits in zip(rows, engine.forward(ids_B1, past, "decode", lengths), strict=True):
            expected = alone[number, done[number]].float()
            expected = expected - expected.mean()
            found = logits.float() - logits.float().mean()
            errors.append(float((found - expected).norm() / expected.norm()))
            done[number] += 1
    return errors
