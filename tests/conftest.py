"""Fixtures that several test files share."""

from __future__ import annotations

import os

# Some CPUs' matrix products depend on where a matrix lies in memory: then not even the stock forward gives the same
# bits twice. Read when torch loads.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

import tiny
import zoo
from moekit.families.model import Model


@pytest.fixture(autouse=True)
def quiet() -> None:
    """No bars and warnings of transformers between ours."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Model]:
    """The tiny model of a family (with changes to its config), saved once in a session."""
    known: dict[str, Model] = {}

    def get(family: str, **changes: Any) -> Model:
        key = f"{family} {changes}"
        if key not in known:
            folder = tmp_path_factory.mktemp(family) / "model"
            zoo.build(family, **changes).save_pretrained(folder)
            known[key] = Model.open(folder)
        return known[key]

    return get


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model that has refmoe's tokenizer, for whole jobs."""
    return tiny.save_talker(tmp_path_factory.mktemp("talker") / "talker")
