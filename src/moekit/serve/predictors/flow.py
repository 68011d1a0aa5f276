"""Flow: a small learned model tells all layers' experts from the token ids alone, before layer 0 runs.

    p [L, E] = sigmoid(W_2 gelu(W_1 [e(x_t); e'(x_(t-1)); e''(x_(t-2))]))      by binary cross-entropy on a trace

x_t     the token that runs; x_(t-1), x_(t-2) the two before it
e       embeddings learned along with it, of the tokens that the trace has; all others share one

Paper: X. He et al., "ExpertFlow: Optimized Expert Activation and Token Allocation for Efficient Mixture-of-Experts
Inference", arXiv 2410.17954 (routing path predictor). Deviations: three tokens and two linear maps instead of a small
encoder-decoder transformer that reads the whole prompt, so that it trains in seconds and costs nothing to ask; the
regrouping of tokens over batches is not here.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from moekit.serve.predictors.base import Predictor, Seen
from moekit.serve.routes import Routes

WIDTH, INNER = 48, 192
STEPS, BATCH = 600, 256


class Flow(Predictor):
    """ExpertFlow's routing-path predictor, small."""

    first = 0

    def __init__(self, trace: Routes | None = None, routers: object = None):
        super().__init__(trace, None)
        assert trace is not None
        self._known = np.unique(trace.tokens)
        words, outputs = len(self._known) + 1, trace.layers * trace.experts
        self._shape = (trace.layers, trace.experts)
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
            torch.manual_seed(0)
            self._embed = nn.ModuleList(nn.Embedding(words, WIDTH) for _ in range(3))
            self._model = nn.Sequential(nn.Linear(3 * WIDTH, INNER), nn.GELU(), nn.Linear(INNER, outputs))
            self._train(trace)
        self._asked: tuple[np.ndarray, np.ndarray] | None = None

    def scores(self, layer: int, seen: Seen) -> np.ndarray:
        """Logits of the layer's experts; all layers' are told at once and kept until other tokens come."""
        if self._asked is None or not np.array_equal(self._asked[0], seen.tokens):
            with torch.inference_mode():
                told = self._forward(self._numbers(seen.tokens)).reshape(-1, *self._shape).numpy()
            self._asked = (seen.tokens.copy(), told)
        return self._asked[1][:, layer]

    def _numbers(self, tokens_T3: np.ndarray) -> torch.Tensor:
        """Rows of the embeddings; 0 for a token that the trace has not."""
        place = np.searchsorted(self._known, tokens_T3).clip(max=len(self._known) - 1)
        return torch.as_tensor(np.where(self._known[place] == tokens_T3, place + 1, 0))

    def _forward(self, numbers_T3: torch.Tensor) -> torch.Tensor:
        return self._model(torch.cat([embed(numbers_T3[:, i]) for i, embed in enumerate(self._embed)], 1))

    def _train(self, trace: Routes) -> None:
        numbers = self._numbers(context(trace.tokens, trace.starts))
        parameters = [*self._embed.parameters(), *self._model.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=STEPS)
        rng = np.random.default_rng(0)
        for _ in range(STEPS):
            rows = rng.integers(len(numbers), size=BATCH)
            target = torch.as_tensor(one_hot(trace, rows))
            dropped = numbers[rows] * (torch.rand(len(rows), 3) > 0.1)  # so that unknown tokens have a meaning
            loss = nn.functional.binary_cross_entropy_with_logits(self._forward(dropped), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def one_hot(trace: Routes, rows: np.ndarray) -> np.ndarray:
    """Whether tokens chose each expert [T, L E]."""
    ids = trace.ids[rows].astype(np.int64)
    out = np.zeros((*ids.shape[:2], trace.experts + 1), np.float32)
    np.put_along_axis(out, ids, 1.0, axis=2)
    return out[:, :, :-1].reshape(len(rows), -1)


def context(tokens_T: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Each token and the two before it in its text, -1 where there is none [T, 3]."""
    out = np.full((len(tokens_T), 3), -1, np.int64)
    out[:, 0] = tokens_T
    out[1:, 1], out[2:, 2] = tokens_T[:-1], tokens_T[:-2]
    out[starts, 1:] = -1
    second = starts[starts + 1 < len(tokens_T)] + 1
    out[second, 2] = -1
    return out
