"""LiveTracer: a loaded model that says, for a text typed just now, which experts each token chose.

Symbols: T tokens, K chosen.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from moekit.data import Batch, load_tokenizer
from moekit.errors import DataError
from moekit.families.model import Model
from moekit.families.seam import Call
from moekit.measurement import Gatherer
from moekit.recording.recorder import loaded_model
from moekit.view import MoEView

MOST_TOKENS = 1024


class _Listener(Gatherer):
    """Keeps a batch's choices by layer, after the checks of the statistics that they are what the router decided."""

    def __init__(self, model: Model, batch: Batch):
        super().__init__(model.layout.routed, 1, ("routing",))
        self.batch = (0, batch)
        self.choices: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def finished(self, call: Call, output: torch.Tensor) -> None:
        super().finished(call, output)
        assert self.margin is not None
        self.choices.append((call.ids.cpu(), call.weights.float().cpu(), self.margin.float().cpu()))


class LiveTracer:
    """Traces short texts with a model that is loaded once.

    Args:
        model: from `moekit.open`.
        dtype: to run in; None for the model's own.
        device: "cpu" or "cuda".

    Raises:
        ModelError: it cannot be loaded here, or has no tokenizer.
    """

    def __init__(self, model: Model, dtype: torch.dtype | None = None, device: str = "cpu"):
        self.model, self.device = model, device
        self.tokenizer = load_tokenizer(model.path, trust_remote_code=model.trust_remote_code)
        self.loaded = loaded_model(model, dtype, device)
        self.view = MoEView(self.loaded, model.layout)

    def __call__(self, text: str) -> dict[str, Any]:
        """Which experts each token of a text chose.

        Returns:
            tokens: the text of each [T]; ids and weights: by MoE layer, [T, K]; margin: by MoE layer, [T]; seconds.

        Raises:
            DataError: the text is empty or too long.
            ModelError: routing and experts do not agree.
        """
        ids = self.tokenizer(text, verbose=False)["input_ids"]
        if not 0 < len(ids) <= MOST_TOKENS:
            raise DataError("this text cannot be traced", expected=f"1 to {MOST_TOKENS:,} tokens", got=f"{len(ids):,}")
        started = time.monotonic()
        row = torch.tensor([ids])
        listener = _Listener(self.model, Batch(0, row, torch.ones_like(row, dtype=torch.bool)))
        with torch.inference_mode(), self.view.watch(listener):
            self.loaded(input_ids=row.to(self.device), use_cache=False)
        choices, weights, margin = zip(*listener.choices, strict=True)
        return {
            "tokens": self.tokenizer.batch_decode([[x] for x in ids]),
            "ids": [x.tolist() for x in choices],
            "weights": [x.tolist() for x in weights],
            "margin": [x.tolist() for x in margin],
            "seconds": time.monotonic() - started,
        }
