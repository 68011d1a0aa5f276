"""simulate(routes, ...): a recorded routing replayed through a cache, without a model and without a disk.

    at best     t = max(c, n b / w)                        reading hidden behind computing, as far as it goes
    expected    t = sum over layers of c / L + n_l b / w   what a layer misses is waited for; with a predictor, what was
                                                           read ahead of it during the layer before is not

c   time to compute a token, s
n   experts that are read for the token, of layer l: n_l
b   bytes of an expert
w   bandwidth of the disk, bytes/s
L   MoE layers

Read ahead are the likeliest experts of the next layer that are not resident, as many as the disk reads in c / L (its
pause), at most `AHEAD`; they take no resident's place.

Symbols: T tokens, L MoE layers, E experts, K chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from moekit.errors import DataError, RecipeError
from moekit.serve.policies import POLICIES, Policy, Residency, Sizes, policy_named
from moekit.serve.predictors.base import Predictor, Seen, top
from moekit.serve.predictors.flow import context
from moekit.serve.routes import Routes

AHEAD = 3  # experts read ahead at once: as many as the engine has slots for
BOUND = "belady"
REPLAYED = 50_000  # experts asked for, where a policy is chosen


@dataclass(frozen=True)
class Machine:
    """What a token costs.

    Attributes:
        expert_bytes: of an expert as it is read.
        bytes_per_s: of the disk.
        compute_s: of a token whose experts are all in memory.
    """

    expert_bytes: int
    bytes_per_s: float = 1e9
    compute_s: float = 0.02


@dataclass(frozen=True, eq=False)
class Replay:
    """What a policy would have done.

    Attributes:
        policy: its name.
        predictor: its name, or "none".
        slots: experts that may stay.
        hits: experts found in memory, by MoE layer [L].
        misses: experts read, by MoE layer [L].
        ahead: of the misses, those that were read ahead [L].
        wasted: experts read ahead that were not needed.
        read: experts read for each token, ahead and wasted ones included [T].
        best_s: time of each token if reading hides behind computing [T].
        expected_s: time of each token if layers wait for what they miss [T].
        expert_bytes: of an expert.
    """

    policy: str
    predictor: str
    slots: int
    hits: np.ndarray
    misses: np.ndarray
    ahead: np.ndarray
    wasted: int
    read: np.ndarray
    best_s: np.ndarray
    expected_s: np.ndarray
    expert_bytes: int

    @property
    def hit_rate(self) -> float:
        """Share of experts found in memory."""
        return float(self.hits.sum() / max(1, self.hits.sum() + self.misses.sum()))

    @property
    def layer_hit_rates(self) -> np.ndarray:
        """The same by MoE layer [L]."""
        return self.hits / np.maximum(1, self.hits + self.misses)

    @property
    def token_bytes(self) -> float:
        """Read for a token, mean."""
        return float(self.read.mean() * self.expert_bytes)

    def row(self) -> dict[str, object]:
        """As JSON has it."""
        return {
            "policy": self.policy,
            "predictor": self.predictor,
            "slots": self.slots,
            "hit_rate": self.hit_rate,
            "hit_rate_by_layer": self.layer_hit_rates.tolist(),
            "bytes_per_token": self.token_bytes,
            "read_ahead": int(self.ahead.sum()),
            "wasted": self.wasted,
            "best_ms": 1e3 * float(self.best_s.mean()),
            "expected_ms": 1e3 * float(self.expected_s.mean()),
            "expected_p99_ms": 1e3 * float(np.quantile(self.expected_s, 0.99)),
        }


def sizes_of(routes: Routes, slots: int) -> Sizes:
    """The sizes that a policy is made for.

    Raises:
        RecipeError: no slot.
    """
    if slots < 1:
        raise RecipeError(
            "no expert fits into this memory", where="memory", expected="one expert at least", fix="give more memory"
        )
    return Sizes(min(slots, routes.layers * routes.experts), routes.layers, routes.experts, routes.top_k)


def simulate(
    routes: Routes,
    policy: str | Callable[[Sizes], Policy],
    slots: int,
    machine: Machine,
    *,
    trace: Routes | None = None,
    predictor: Predictor | None = None,
    name: str = "none",
) -> Replay:
    """Replay routes, every token by itself, text after text, from an empty memory.

    Args:
        routes: what is replayed.
        policy: a name, or what makes one.
        slots: experts that may stay.
        machine: what reading and computing cost.
        trace: routes of other texts, for policies that learn beforehand.
        predictor: tells the next layer's experts; None: nothing is read ahead.
        name: of the predictor.

    Raises:
        RecipeError: no slot, no such policy, or it needs a trace.
        DataError: the trace is of another model.
    """
    sizes = sizes_of(routes, slots)
    if trace is not None:
        routes.check_like(trace)
    if isinstance(policy, str):
        more = {"future": routes} if policy == BOUND else {}
        made, label = policy_named(policy, sizes, trace, **more), policy
    else:
        made = policy(sizes)
        label = type(made).__name__.lower()
    residency = Residency(made, sizes.slots)
    read_s, pause_s = machine.expert_bytes / machine.bytes_per_s, machine.compute_s / routes.layers
    room = min(AHEAD, int(pause_s / read_s)) if predictor is not None else 0
    hits, misses, ahead = (np.zeros(routes.layers, np.int64) for _ in range(3))
    waited, read = np.zeros(len(routes.ids), np.int64), np.zeros(len(routes.ids), np.int64)
    wasted = 0
    for number, (start, end) in enumerate(zip(routes.starts, routes.ends, strict=True)):
        residency.begin()
        told = _orders(routes, number, predictor, routes.top_k + 1) if predictor is not None and room else {}
        for token, layers in enumerate(routes.ids[start:end].tolist(), int(start)):
            for layer, chosen in enumerate(layers):
                needed = [expert for expert in chosen if expert < routes.experts]
                early: set[int] = set()
                if layer and layer in told:
                    wanted = told[layer][token - start]
                    early = set([x for x in wanted if not residency.resident[layer, x]][:room])
                decision = residency.layer(layer, needed)
                helped = len(early.intersection(decision.misses))
                hits[layer] += len(decision.hits)
                misses[layer] += len(decision.misses)
                ahead[layer] += helped
                wasted += len(early) - helped
                waited[token] += len(decision.misses) - helped
                read[token] += len(decision.misses) + len(early) - helped
    compute = machine.compute_s
    return Replay(
        label, name, sizes.slots, hits, misses, ahead, wasted, read,
        np.maximum(compute, read * read_s), compute + waited * read_s, machine.expert_bytes,
    )  # fmt: skip


def seen_in(routes: Routes, number: int) -> Seen:
    """All that is known of a text's tokens; `Seen.before` takes away what a predictor must not see."""
    rows = slice(int(routes.starts[number]), int(routes.ends[number]))
    used = routes.used(rows)
    counts = np.cumsum(used, axis=0) - used
    ids = {layer: routes.ids[rows, layer] for layer in range(routes.layers)}
    tokens = context(routes.tokens[rows], np.zeros(1, np.int64))
    return Seen(tokens, counts, ids, {layer: x[rows] for layer, x in routes.hidden.items()})


def _orders(routes: Routes, number: int, predictor: Predictor, count: int) -> dict[int, list[list[int]]]:
    """By layer, for each token of a text, the experts that a predictor tells, likeliest first."""
    seen = seen_in(routes, number)
    layers = range(max(1, predictor.first), routes.layers)
    return {layer: top(predictor.scores(layer, seen.before(layer)), count).tolist() for layer in layers}


@dataclass(frozen=True, eq=False)
class Recall:
    """How well a predictor tells experts.

    Attributes:
        at_k: share of the chosen experts among the k likeliest, by MoE layer [L]; nan where it tells nothing.
        at_2k: among the 2 k likeliest.
    """

    at_k: np.ndarray
    at_2k: np.ndarray


def recall(routes: Routes, predictor: Predictor) -> Recall:
    """Hold a predictor against what was chosen."""
    asked = range(predictor.first, routes.layers)
    scored = ((layer, seen.before(layer)) for seen in _texts(routes) for layer in asked)
    return _recall(routes, ((layer, seen, predictor.scores(layer, seen)) for layer, seen in scored))


def fresh_recall(routes: Routes, scores: Callable[[int, Seen], np.ndarray]) -> Recall:
    """The control: the layer's own router is asked about what it is given itself, which must give 100%.

    Args:
        routes: with hidden states, from `moekit.serve.predictors.routers.recorded`.
        scores: of a layer, from its own hidden states.
    """
    return _recall(
        routes, ((layer, seen, scores(layer, seen)) for seen in _texts(routes) for layer in range(routes.layers))
    )


def _texts(routes: Routes) -> Iterator[Seen]:
    return (seen_in(routes, number) for number in range(len(routes.starts)))


def _recall(routes: Routes, told: Iterator[tuple[int, Seen, np.ndarray]]) -> Recall:
    found, total = np.zeros((2, routes.layers)), np.zeros(routes.layers)
    texts = np.zeros(routes.layers, np.int64)
    for layer, _, scores_TE in told:
        number = texts[layer]
        texts[layer] += 1
        true_TK = routes.ids[routes.starts[number] : routes.ends[number], layer]
        real = true_TK < routes.experts
        for row, count in enumerate((routes.top_k, 2 * routes.top_k)):
            guess = top(scores_TE, count)
            found[row, layer] += ((true_TK[:, :, None] == guess[:, None, :]).any(2) & real).sum()
        total[layer] += real.sum()
    rates = np.divide(found, total, out=np.full_like(found, np.nan), where=total > 0)
    return Recall(rates[0], rates[1])


def usable_policies(trace: Routes | None) -> list[str]:
    """The policies that can be replayed, the bound last."""
    names = [name for name in POLICIES if name != BOUND and (trace is not None or name != "static")]
    return [*names, BOUND]


def best_policy(routes: Routes, slots: int) -> str:
    """The policy with the most hits on every other text of a trace, having learned from the rest.

    Args:
        routes: of texts like those that will be run; of a long trace some texts, evenly spread, are replayed.
        slots: experts that may stay.

    Raises:
        DataError: a trace of one text only.
    """
    if len(routes.starts) < 2:
        raise DataError("a policy is chosen from several texts", got="a trace of one", fix="record more texts")
    texts = np.arange(len(routes.starts))
    known, replayed = routes.texts(texts[::2]), routes.texts(texts[1::2])
    replayed = replayed.spread(REPLAYED // (routes.layers * routes.top_k))
    choice = [name for name in usable_policies(known) if name != BOUND]
    return max(choice, key=lambda name: simulate(replayed, name, slots, Machine(1), trace=known).hit_rate)
