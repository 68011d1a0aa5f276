"""Reuse: the experts stay that are expected back soonest; a newcomer that is not among them is used and forgotten.

    expected wait = d / L + 1 / p - 1      tokens until the expert is needed again; the longest waits go
    p = w_1 recent + w_2 text + w_3 all    chance that a token of this text chooses the expert

recent  share of the last tokens that chose it, each token counting half as much as the one `half_life` tokens later
text    share of the running text's tokens, each counting half as much as one 256 later, as if some tokens had been seen
        before it began: with a trace 16 of the traced text that is most like it (by the cosine of their activation
        matrices), else 4 of `all`
all     share of all tokens, those of a trace included where one is given
w       how much each tells: least squares of "the next token chooses it" on the three, fitted as tokens come, from a
        start that held on the reference model
d       layers until its layer runs again, 1 to L

All numbers of a layer change only when that layer runs, so that newcomers are weighed against residents as they will be
when they meet again. That is what keeps it at or above the hot set where places are fewer than one token's experts
(L k), where LRU and ARC throw away each expert just before it is needed.

Paper: none. MoE-Infinity has the text and its match, EdgeMoE the long run, LRU the last tokens; the rule that puts them
together is Belady's with expected times.
"""

from __future__ import annotations

import numpy as np

from moekit.serve.matrices import Library
from moekit.serve.policies.base import Scored, Sizes
from moekit.serve.routes import Routes

START = np.array([0.35, 0.55, 0.10])
START_TOKENS = 256  # as many tokens the start of the weights is worth
TRACE_TOKENS = 256  # as many the long-run share of a trace is worth
TEXT_LIFE = 256.0  # tokens after which one of the text counts half: a server is not told where texts begin
LIKE_TOKENS, PLAIN_TOKENS = 16.0, 4.0  # that a text begins with: of the traced text like it, or of all tokens
LEAST = 1e-4  # of a chance


class Reuse(Scored):
    """Expected time to the next use.

    Args:
        sizes: of the model and the memory.
        trace: where the long-run shares start, and texts that the running one may be like.
        future: unused.
        half_life: of recent use, tokens.
    """

    def __init__(
        self,
        sizes: Sizes,
        trace: Routes | None = None,
        future: Routes | None = None,
        half_life: float = 12.0,
    ):
        super().__init__(sizes, trace, future)
        self._keep = 2.0 ** (-1.0 / half_life)
        self._library = None if trace is None else Library(trace)
        self._like = None if self._library is None else self._library.shares.mean(0) * sizes.top_k
        shape = (sizes.layers, sizes.experts)
        even = sizes.top_k / sizes.experts
        worth = 8.0 if trace is None else TRACE_TOKENS
        self._all = np.full(shape, even * worth) if trace is None else trace.frequency * worth
        self._all_tokens = np.full(sizes.layers, worth)
        self._text, self._text_tokens = np.zeros(shape), np.zeros(sizes.layers)
        self._recent = self._all / worth
        self._features = np.zeros((sizes.layers, 3, sizes.experts))
        self._gram, self._moment = np.zeros((3, 3)), np.zeros(3)
        for layer in range(sizes.layers):
            self._describe(layer)
            self._gram += START_TOKENS * self._features[layer] @ self._features[layer].T
        self._gram += START_TOKENS * sizes.cycle * np.diag([0.01, 0.01, 0.01])
        self._moment = self._gram @ START
        self.weights = START.copy()
        self._wait = 1.0 / np.maximum(self._chance(), LEAST) - 1.0

    def begin(self) -> None:
        """Nothing is known of the text yet."""
        self._text[:] = 0
        self._text_tokens[:] = 0

    def step(self) -> None:
        """Solve for the weights again, and look for the text that is most like this one."""
        if self._library is not None:
            self._like = self._library.nearest(self._text) * self.sizes.top_k
        self.weights = np.linalg.solve(self._gram, self._moment)

    def used(self, layer: int, experts: np.ndarray, counts: np.ndarray) -> None:
        """Learn how well its use was told, then add it to what is known."""
        tokens = max(1.0, counts.sum() / self.sizes.top_k)
        share = np.zeros(self.sizes.experts)
        share[experts] = counts / tokens
        told = self._features[layer]
        self._gram += told @ told.T
        self._moment += told @ share
        keep = self._keep**tokens
        self._recent[layer] *= keep
        self._recent[layer] += (1 - keep) * share
        fading = 2.0 ** (-tokens / TEXT_LIFE)
        self._text[layer] *= fading
        self._text_tokens[layer] *= fading
        self._text[layer, experts] += counts
        self._text_tokens[layer] += tokens
        self._all[layer, experts] += counts
        self._all_tokens[layer] += tokens
        self._describe(layer)
        chance = np.maximum(self.weights @ self._features[layer], LEAST)
        self._wait[layer] = 1.0 / chance - 1.0

    def scores(self, layer: int) -> np.ndarray:
        """The wait, negative."""
        layers = self.sizes.layers
        distance = (np.arange(layers) - layer - 1) % layers + 1
        return -(self._wait + (distance / layers)[:, None])

    def _describe(self, layer: int) -> None:
        every = self._all[layer] / self._all_tokens[layer]
        before, worth = (every, PLAIN_TOKENS) if self._like is None else (self._like[layer], LIKE_TOKENS)
        text = (self._text[layer] + worth * before) / (self._text_tokens[layer] + worth)
        self._features[layer] = self._recent[layer], text, every

    def _chance(self) -> np.ndarray:
        return np.einsum("f,lfe->le", self.weights, self._features)
