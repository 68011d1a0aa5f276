"""Traces of models that do not exist, with routing that has something to see, for tests of what reads traces."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moekit.arrays import write_arrays
from moekit.layout import Layout, MoELayer, Router
from moekit.stats import POSITION_BUCKETS, LayerStats, Stats, add_up, position_bucket
from moekit.trace.store import PHASES, SCHEMA, Trace, layer_path

WORDS = (
    "the",
    " of",
    " def",
    "(",
    ")",
    "\n",
    "    ",
    " return",
    " x",
    " 7",
    " God",
    "{",
    "}",
    '"',
    ";",
    " and",
    "é",
    "𝛼",
)
HIDDEN = 16
VARIANTS = 40  # token ids for each text of the vocabulary


def layout(layers: int, experts: int, top_k: int) -> Layout:
    """The layout of a model with MoE layers 1, 2, ... (layer 0 is dense)."""
    rows = tuple(
        MoELayer(
            index=i,
            path=f"model.layers.{i}",
            experts_path=f"model.layers.{i}.mlp.experts",
            router_path=f"model.layers.{i}.mlp.gate",
            router_width=experts,
            correction_biases=(),
            num_experts=experts,
            top_k=top_k,
            router=Router("softmax"),
            inner_size=8,
            shared_experts=0,
            tensors=(),
        )
        for i in range(1, layers + 1)
    )
    return Layout(
        family="qwen3_moe",
        text_family="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        hidden_size=HIDDEN,
        num_layers=layers + 1,
        vocab_size=1000,
        dtype="bfloat16",
        quantisation=None,
        layers=rows,
        parts={},
        active_params=0,
        expert_count_keys=(),
    )


def synthetic_trace(
    folder: Path,
    *,
    layers: int = 4,
    experts: int = 8,
    top_k: int = 2,
    domains: Sequence[str] = ("python", "prose", "math"),
    tokens: int = 160,
    sequence_length: int = 40,
    vocabulary: Sequence[str] = WORDS,
    model: str = "synthetic",
    keep_tokens: bool = True,
    decode: bool = False,
    drift: float = 0.0,
    seed: int = 0,
) -> Trace:
    """Write and open a trace: experts prefer some tokens and some domains, and layers resemble the layer before.

    Args:
        folder: to write.
        tokens: of each domain.
        vocabulary: texts of the token ids, which are drawn from 0 to `VARIANTS` times its length.
        keep_tokens: write every token, not only the sums.
        decode: the second half of each sequence counts as generated.
        drift: how far the router has moved from that of the same seed without drift.
        seed: of everything.
    """
    rng = np.random.default_rng(seed)
    shape, N, T = layout(layers, experts, top_k), len(domains), tokens * len(domains)
    ids = rng.integers(0, VARIANTS * len(vocabulary), (N, tokens))
    ids = np.where(rng.random(ids.shape) < 0.5, ids, ids[:, :1] + rng.integers(0, 20, ids.shape)).reshape(-1)
    ids %= VARIANTS * len(vocabulary)
    domain = np.repeat(np.arange(N), tokens)
    place = np.tile(np.arange(tokens), N)
    columns = {
        "id": ids.astype(np.int32),
        "domain": domain.astype(np.uint16),
        "sequence": (place // sequence_length + domain * 1000).astype(np.int32),
        "position": (place % sequence_length).astype(np.int32),
        "phase": (decode * (place % sequence_length >= sequence_length // 2)).astype(np.uint8),
        "predicted": np.roll(ids, -1).astype(np.int32),
        "loss": rng.gamma(2.0, 1.0, T).astype(np.float32),
    }
    phases = PHASES[: 1 + decode]
    sums: dict[str, dict[int, LayerStats]] = {phase: {} for phase in phases}
    carried, before = rng.normal(size=(T, experts)), None
    rows: dict[int, dict[str, np.ndarray]] = {}
    for layer in shape.routed:
        words, taste = rng.normal(size=(VARIANTS * len(vocabulary), experts)), rng.normal(size=(N, experts))
        moved = drift * np.random.default_rng(layer.index).normal(size=(T, experts))
        carried = 0.6 * carried[:, rng.permutation(experts)] + 0.8 * rng.normal(size=(T, experts))
        logits = 0.9 * words[ids] + 1.2 * taste[domain] + carried + moved
        order = np.argsort(-logits, 1)
        chosen = order[:, :top_k]
        score = np.exp(logits - logits.max(1, keepdims=True))
        score /= score.sum(1, keepdims=True)
        ranked = np.take_along_axis(score, order, 1)
        weights = ranked[:, :top_k] / ranked[:, :top_k].sum(1, keepdims=True)
        margin = ranked[:, top_k - 1] - ranked[:, top_k] if experts > top_k else ranked[:, top_k - 1]
        rows[layer.index] = {
            "ids": chosen.astype(np.uint8 if experts < 256 else np.uint16),
            "weights": weights.astype(np.float16),
            "margin": margin.astype(np.float16),
        }
        one = np.zeros((T, experts))
        np.put_along_axis(one, chosen, 1.0, 1)
        gate = np.zeros((T, experts))
        np.put_along_axis(gate, chosen, weights, 1)
        directions = rng.normal(size=(experts, HIDDEN))
        peaks = rng.gamma(2.0, 1.0, experts) * np.where(rng.random(experts) < 0.02, 40, 1)
        entropy = -(score * np.log(np.maximum(score, 1e-30))).sum(1)
        for number, phase in enumerate(phases):
            stats = sums[phase][layer.index] = LayerStats()
            mine = [np.flatnonzero((domain == n) & (columns["phase"] == number)) for n in range(N)]

            def stack(read, mine=mine):
                return np.stack([read(x) for x in mine])

            bucket = position_bucket(columns["position"])
            count = stack(lambda t, one=one: one[t].sum(0))
            stats.arrays = {
                "count": count,
                "gate_mass": stack(lambda t, gate=gate: gate[t].sum(0)),
                "peak": np.where(count > 0, peaks, 0.0),
                "output": (count[:, :, None] * directions).astype(np.float32),
                "coactivation": stack(lambda t, one=one: one[t].T @ one[t]),
                "logit": stack(lambda t, logits=logits: logits[t].sum(0)),
                "logit_gram": stack(lambda t, logits=logits: logits[t].T @ logits[t]),
                "position_tokens": stack(
                    lambda t, b=bucket: np.bincount(b[t], minlength=POSITION_BUCKETS).astype(float)
                ),
                "entropy": stack(lambda t, b=bucket, v=entropy: np.bincount(b[t], v[t], POSITION_BUCKETS)),
                "margin": stack(lambda t, b=bucket, v=margin: np.bincount(b[t], v[t], POSITION_BUCKETS)),
            }
            if before is not None:
                stats.arrays["transition"] = stack(lambda t, a=before, b=one: a[t].T @ b[t])
            phased = columns["phase"] == number
            stats.vocabulary = _words(domain[phased], ids[phased], chosen[phased])
            stats.following = _words(domain[phased], columns["predicted"][phased], chosen[phased])
        before = one
    _write(folder, shape, domains, tokens, sequence_length, columns, rows, sums, vocabulary, model, keep_tokens)
    return Trace.open(folder)


def _words(domain: np.ndarray, ids: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    k = chosen.shape[1]
    flat = [np.repeat(domain, k), np.repeat(ids, k), chosen.reshape(-1), np.ones(chosen.size, np.int64)]
    return add_up(np.stack(flat, 1))


def _write(folder, shape, domains, tokens, length, columns, rows, sums, vocabulary, model, keep_tokens):
    (folder / "stats").mkdir(parents=True)
    sequences = -(-tokens // length)
    for number, (phase, layers) in enumerate(sums.items()):
        counts = np.array(
            [((columns["domain"] == n) & (columns["phase"] == number)).sum() for n in range(len(domains))]
        )
        manifest = {"model": model, "layout": shape.to_dict()}
        per_domain = np.full(len(domains), sequences)
        Stats(shape.hash, tuple(domains), counts, per_domain, layers, manifest).save(folder / "stats" / phase)
    head = {
        "schema": SCHEMA,
        "model": model,
        "fingerprint": "0" * 16,
        "layout": shape.to_dict(),
        "layers": [x.index for x in shape.routed],
        "domains": list(domains),
        "tokens": {name: tokens for name in domains},
        "sequences": {name: sequences for name in domains},
        "phases": list(sums),
        "has_tokens": keep_tokens,
        "data": {},
        "versions": {},
    }
    (folder / "trace.json").write_text(json.dumps(head))
    texts = {
        str(i): vocabulary[i % len(vocabulary)] + "ab"[i % 2] * (i // len(vocabulary) > 0)
        for i in range(VARIANTS * len(vocabulary))
    }
    (folder / "vocabulary.json").write_text(json.dumps(texts))
    if keep_tokens:
        (folder / "tokens").mkdir()
        (folder / "layers").mkdir()
        write_arrays(folder / "tokens" / "tokens.safetensors", columns)
        for index, arrays in rows.items():
            write_arrays(layer_path(folder, index), arrays)
