"""Proof that a family's models run from an expert store: the stock model's logits, bit for bit."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from family_proofs import Specimen, load
from moekit.errors import ModelError
from moekit.families.model import Model
from moekit.families.resident import empty_cache
from moekit.serve import engine
from moekit.serve.packing import pack

CHUNK = 8  # of the 12 tokens: a prompt goes through in two parts


def runs(specimen: Specimen) -> str:
    """Packed in bf16, then run in chunks with a cache of keys and values, as stock eager experts do in these chunks."""
    stock = load(specimen, specimen.folder, torch.bfloat16)
    folder, store = (specimen.folder.with_name(specimen.folder.name + x) for x in ("-bf16", "-store"))
    stock.save_pretrained(folder)
    model = Model.open(folder)
    if specimen.layout.cannot_run or not stock.can_generate():
        with pytest.raises(ModelError):
            pack(model, store)
        assert not list(store.parent.glob(store.name + "*"))
        return "refused"
    ids = specimen.batch["input_ids"][0]
    with patch.object(engine, "CHUNK_TOKENS", CHUNK):
        running = engine.Engine(pack(model, store), context=64)
        found = running.logits(ids)
        running.close()
    past = empty_cache(stock)
    with torch.no_grad():
        parts = [stock(input_ids=x[None], past_key_values=past, use_cache=True) for x in ids.split(CHUNK)]
    expected = torch.cat([x.logits[0] for x in parts])
    if model.understanding.family.by_contract:
        assert torch.equal(found, expected)
    else:  # stock multiplies all tokens with all experts at once
        assert torch.allclose(found, expected, rtol=0.02, atol=0.02)
    return "yes"
