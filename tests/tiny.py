"""Small things to run models on: batches of random tokens, and a model that text can be given to."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

import zoo
from moekit import refmoe
from moekit.data import Batch, Dataset


def batch(domain: int, *lengths: int, seed: int = 0, pad: int = 0) -> Batch:
    """Rows of these lengths, padded to the longest with `pad`."""
    generator = torch.Generator().manual_seed(100 * domain + seed)
    ids = torch.randint(3, 40, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return Batch(domain, ids.masked_fill(~mask, pad), mask)


def dataset(*batches: Batch, domains: tuple[str, ...] = ("code", "prose")) -> Dataset:
    """These batches as a dataset."""
    return Dataset(domains, list(batches), 12)


def save_talker(folder: Path, family: str = "qwen3_moe", vocab_size: int = 4096) -> Path:
    """A tiny model in bfloat16 with refmoe's tokenizer."""
    zoo.build(family, dtype=torch.bfloat16, vocab_size=vocab_size).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(refmoe.model_path() / name, folder)
    return folder
