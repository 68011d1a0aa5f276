"""RICE: make the few experts louder that go with the tokens of a way of thinking.

    nPMI(j, m) = log( p(j, m) / (p(j) p(m)) ) / -log p(j, m)

over the pairs (token, expert that it chose): j that it is expert j, m that the token is a marker ("Wait", "think") in a
text of kind b; without markers, that the token is in a text of kind b.

    on      its weight times beta (64), before the family's own code adds up; the choice stays
    off     its weight divided by beta

The paper takes the two experts of the model with the highest nPMI: `top: 2, mode: on`.

Paper: M. Wang et al., "Two Experts Are All You Need for Steering Thinking: Reinforcing Cognitive Effort in MoE
Reasoning Models Without Additional Training", arXiv 2505.14681.

Deviations: scores are nPMI with kind b less nPMI with kind a where there are no markers (with two kinds these have
opposite signs). Beta is the paper's choice for DeepSeek-R1 and Qwen3-235B; for other models sweep it (`moekit steer
test --strengths`).
"""

from __future__ import annotations

import numpy as np

from moekit.errors import DataError
from moekit.layout import MoELayer
from moekit.methods._registry import method
from moekit.methods.steer._found import Found
from moekit.stats import Stats


@method(
    "rice",
    kind="steer",
    needs=("count",),
    summary="multiplies the weights of the experts that go with marker tokens, or with one kind of text",
    paper="Two Experts Are All You Need for Steering Thinking, arXiv 2505.14681",
)
def find(stats: Stats, layer: MoELayer, a: str, b: str, *, beta: float = 64.0, markers: tuple = ()) -> Found:
    """nPMI by expert; on multiplies its weight by `beta`. `markers` are token ids."""
    if not beta > 0:
        raise DataError("a weight cannot be multiplied by this", where="beta", expected="above 0", got=beta)
    kinds = {kind: stats.get("count", layer.index, kind) for kind in (a, b)}
    total_E = kinds[a] + kinds[b]
    if markers:
        rows = np.asarray(stats.layers[layer.index].vocabulary)
        number = stats.domain_numbers(b)[0]
        if not len(rows):
            raise DataError("tokens were not counted by expert", fix="measure with the group vocabulary")
        chosen = rows[(rows[:, 0] == number) & np.isin(rows[:, 1], np.asarray(markers)) & (rows[:, 2] < len(total_E))]
        with_E = np.bincount(chosen[:, 2], chosen[:, 3], len(total_E))
        scores = -npmi(with_E, total_E)
    else:
        scores = npmi(kinds[a], total_E) - npmi(kinds[b], total_E)
    return Found(scores, {"action": "scale", "strength": 1 / beta}, {"action": "scale", "strength": beta})


def npmi(with_E: np.ndarray, total_E: np.ndarray) -> np.ndarray:
    """Normalised pointwise mutual information [E] of an expert and an event, from pairs with the event and all pairs.

    In [-1, 1]; -1 where an expert is never chosen along with the event, 0 where it is never chosen.
    """
    pairs, event = total_E.sum(), with_E.sum()
    if not pairs or not event:
        return np.zeros(len(total_E))
    out = np.full(len(total_E), -1.0)
    seen = with_E > 0
    joint = with_E[seen] / pairs
    information = np.log(with_E[seen] * pairs / (total_E[seen] * event))
    out[seen] = np.divide(information, -np.log(joint), out=np.ones(len(joint)), where=joint < 1)
    out[total_E == 0] = 0.0
    return out
