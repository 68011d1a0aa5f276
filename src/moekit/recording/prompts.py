"""Prompts: what a model is to continue, from files to token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from moekit.data import load_tokenizer
from moekit.data.sources import Source
from moekit.errors import DataError
from moekit.families.model import Model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Chat = list[dict[str, Any]]
Prompt = str | Sequence[int] | Chat  # text, token ids, or a chat's messages


def load_prompts(sources: Mapping[str, str]) -> dict[str, list[Prompt]]:
    """Prompts by domain from files: each line of a text file, each record of a JSON file.

    Of a chat, and of a prompt with its completion, a last turn of the assistant is left out: the model is to write it.

    Raises:
        DataError: a source that cannot be read, or holds no prompt.
    """
    out: dict[str, list[Prompt]] = {}
    for name, spec in sources.items():
        found: list[Prompt] = []
        for document in Source(spec):
            content = document.content
            if isinstance(content, Path):
                found += [line for line in content.read_text("utf-8-sig").splitlines() if line.strip()]
            elif isinstance(content, str):
                found.append(content)
            else:
                found.append(content[:-1] if content[-1]["role"] == "assistant" else content)
        if not found:
            raise DataError(f"the domain {name!r} has no prompts", where=spec, fix="give one on each line")
        out[name] = found
    return out


def encode_prompts(model: Model, domain: str, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of each prompt.

    Raises:
        DataError: no prompts, an empty one, or a chat that the tokenizer cannot render.
        ModelError: texts, but no tokenizer.
    """
    if not prompts:
        raise DataError(f"the domain {domain!r} has no prompts", fix="leave it out, or give it some")
    rows = []
    tokenizer = None
    for number, prompt in enumerate(prompts, 1):
        where = f"domain {domain!r}, prompt {number}"
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], dict)):
            tokenizer = tokenizer or load_tokenizer(model.path, trust_remote_code=model.trust_remote_code)
            row = (
                tokenizer(prompt)["input_ids"]
                if isinstance(prompt, str)
                else _rendered(cast(Chat, prompt), tokenizer, where)
            )
        else:
            row = [int(cast(int, x)) for x in prompt]
        if not row:
            raise DataError("an empty prompt", where=where, fix="remove it")
        rows.append(row)
    return rows


def _rendered(chat: Chat, tokenizer: PreTrainedTokenizerBase, where: str) -> list[int]:
    try:  # a template is a program of the model's author and raises what it likes
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    except Exception as error:
        fix = "give plain text, or a chat model"
        raise DataError(
            "chat cannot be rendered by the tokenizer's chat template", where=where, got=str(error)[:200], fix=fix
        ) from None
