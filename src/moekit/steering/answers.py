"""What a model says: answers to prompts, labelled by a pattern or a function, and their share under plans."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from moekit.apply.steer import steering
from moekit.data import load_tokenizer
from moekit.errors import ModelError, RecipeError
from moekit.evaluation.intervals import ratio_interval
from moekit.families.model import Model
from moekit.plans import Plan, Steer
from moekit.progress import Progress, silent
from moekit.recording.prompts import Prompt, encode_prompts, load_prompts
from moekit.steering.doses import controls
from moekit.view import MoEView

Labeller = Callable[[str], str | bool]
EXAMPLES = 4
BATCH = 8  # prompts that run together


def pattern_labeller(pattern: str) -> Labeller:
    """ "match" or "other": whether a regular expression is found in an answer.

    Raises:
        RecipeError: it is no regular expression.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise RecipeError("this is no regular expression", where="pattern", got=f"{pattern}: {error}") from None
    return lambda answer: "match" if compiled.search(answer) else "other"


def label_answers(
    model: Model,
    prompts: Sequence[Prompt],
    label: str | Labeller,
    *,
    max_new_tokens: int = 64,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Let a model answer, greedily, and label each answer: what `load_kinds(data=...)` reads, a line each.

    Args:
        model: from `moekit.open`; it is loaded into memory.
        prompts: texts, or chats (rendered by the model's template).
        label: a regular expression (labels "match" and "other"), or a function of the answer that gives the label.
        max_new_tokens: of an answer, at most.
        dtype: to run in; None for the model's own.
        device: "cpu" or "cuda".
        progress: told in prompts.

    Returns:
        {"text" or "messages": the prompt, "answer": ..., "label": ...} for each prompt.

    Raises:
        DataError: no prompts, or an empty one.
        ModelError: the model does not fit in memory, or has no tokenizer.
        RecipeError: no regular expression.
    """
    labeller = pattern_labeller(label) if isinstance(label, str) else label
    rows = encode_prompts(model, "prompts", prompts)
    stock, tokenizer = loaded(model, dtype, device)
    answers = write_answers(stock, tokenizer, rows, max_new_tokens, progress=progress)
    out: list[dict[str, Any]] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        given = {"text": prompt} if isinstance(prompt, str) else {"messages": list(prompt)}
        out.append({**given, "answer": answer, "label": str(labeller(answer))})
    return out


def load_questions(model: Model, file: str | Path, chat: bool = False) -> list[Prompt]:
    """Prompts of a file, a line or a record each.

    Raises:
        DataError: no prompts, or no such file.
        ModelError: the tokenizer has no chat template.
    """
    found = load_prompts({"prompts": str(file)})["prompts"]
    if not chat:
        return found
    tokenizer = load_tokenizer(model.path, trust_remote_code=model.trust_remote_code)
    if not tokenizer.chat_template:
        raise ModelError("this tokenizer has no chat template", where=model.name, fix="leave --chat out")
    return [[{"role": "user", "content": x}] if isinstance(x, str) else x for x in found]


def loaded(model: Model, dtype: torch.dtype | None, device: str) -> tuple[nn.Module, Any]:
    """The stock model in memory, and its tokenizer.

    Raises:
        ModelError: it does not fit, or has no tokenizer.
    """
    if not model.fits(dtype, device):
        raise ModelError(
            "the model is written on with, and does not fit in memory",
            where=model.name,
            fix="leave answers out, or use a smaller model",
        )
    tokenizer = load_tokenizer(model.path, trust_remote_code=model.trust_remote_code)
    return model.load(dtype, device), tokenizer


def write_answers(
    stock: Any, tokenizer: Any, rows: Sequence[Sequence[int]], max_new_tokens: int, *, progress: Progress = silent
) -> list[str]:
    """What a loaded model writes after each prompt, greedily; prompts of one length run together, unpadded.

    Args:
        stock: a stock transformers model.
        tokenizer: of it.
        rows: token ids of the prompts.
        max_new_tokens: of an answer, at most.
        progress: told of "answers".
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    out = [""] * len(rows)
    done = 0
    while done < len(order):
        length = len(rows[order[done]])
        some = [i for i in order[done : done + BATCH] if len(rows[i]) == length]
        ids = torch.tensor([list(rows[i]) for i in some], device=stock.device)
        with torch.inference_mode():
            found = stock.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
            )
        for i, text in zip(some, tokenizer.batch_decode(found[:, length:], skip_special_tokens=True), strict=True):
            out[i] = text
        done += len(some)
        progress("answers", done, len(order))
    return out


def answered(
    model: Model,
    plan: Plan,
    prompts: str | Path,
    label: str | Labeller,
    *,
    draws: int = 3,
    seed: int = 0,
    chat: bool = False,
    tokens: int = 64,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Share of a model's answers that match: as it is, under a plan, and under random controls of it.

    Args:
        model: from `moekit.open`; it is loaded into memory.
        plan: a steering plan.
        prompts: a file, a line or a record each.
        label: a regular expression, or a function of the answer that says "match" or True.
        draws: of random experts in the same layers.
        seed: of the draws.
        chat: put prompts into the model's chat template.
        tokens: of an answer, at most.
        dtype: to run in; None for the model's own.
        device: "cpu" or "cuda".
        progress: told of "answers".

    Returns:
        Plain data: `prompts`; `share` [value, low, high] by "plain", "plan" and "random"; `change` of the plan over the
        plain model and `excess` over the controls, paired over prompts; `draws`; a few `examples`.

    Raises:
        UserError: as `label_answers` and `load_questions`.
    """
    labeller = pattern_labeller(label) if isinstance(label, str) else label
    rows = encode_prompts(model, "prompts", load_questions(model, prompts, chat))
    stock, tokenizer = loaded(model, dtype, device)
    view = MoEView(stock, model.layout)

    def hits(ops: Sequence[Steer]) -> tuple[np.ndarray, list[str]]:
        with steering(view, ops):
            answers = write_answers(stock, tokenizer, rows, tokens, progress=progress)
        return np.array([labeller(x) in ("match", True) for x in answers], float), answers

    plain, before = hits(())
    steered, after = hits(plan.steers())
    drawn = [hits(ops)[0] for ops in controls(plan.steers(), model.layout, draws, seed=seed)]
    ones, shares = np.ones(len(rows)), {"plain": plain, "plan": steered}
    out = {"prompts": len(rows), "change": list(ratio_interval(steered - plain, ones))}
    if drawn:
        shares["random"] = np.mean(drawn, axis=0)
        out["excess"] = list(ratio_interval(steered - shares["random"], ones))
        out["draws"] = [float(x.mean()) for x in drawn]
    out["share"] = {name: list(ratio_interval(x, ones)) for name, x in shares.items()}
    out["examples"] = [{"before": a, "after": b} for a, b in list(zip(before, after, strict=True))[:EXAMPLES]]
    return out
