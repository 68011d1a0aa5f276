"""Calibration honesty: how far what was measured on one text holds for the text that a model is for.

How unlike two texts use a layer's experts is the Jensen-Shannon divergence of their shares:

    J(c, e) = H((p_c + p_e) / 2) - H(p_c) / 2 - H(p_e) / 2          bits, 0 to 1

p_c, p_e   by expert, share of the slots that the source model's router gave it on calibration and evaluation text
H          entropy in bits

Samples of one text are not used quite alike either. To second order J is sum_j (p_cj - p_ej)^2 / (8 ln 2 m_j), with m
the mean of the two, so that two samples of one text are expected to give

    noise = sum_j (v_cj / S_c + v_ej / S_e) / (8 ln 2 m_j)

S          sequences of a sample
v_j        variance over its sequences of expert j's share (tokens of one sequence are not independent)

An evaluation domain has drifted if J less noise, in the mean over layers, is above `DRIFT_BITS` for the calibration
domain that is nearest to it. On refmoe text of a domain's own other documents gives at most 0.0025 bits and text of the
nearest other domain at least 0.047; there the loss that half of the experts costs has more than doubled already
(docs/benchmarks/calibration.md).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moekit.layout import Layout, MoELayer
from moekit.methods.cold import COLD_TOKENS, cold_experts
from moekit.stats import Stats
from moekit.trace.domains import information

DRIFT_BITS = 0.02


@dataclass(frozen=True)
class Drift:
    """How an evaluation domain uses experts, beside the calibration domain that uses them most alike.

    Attributes:
        domain: the evaluation domain.
        nearest: the calibration domain.
        divergence: bits, by decoder layer index.
        noise: bits that two samples of one text would be expected to give; NaN where a text has one sequence only.
        kept_mass: by layer, the share of the evaluation text's gate mass that goes to experts which are not dropped.
    """

    domain: str
    nearest: str
    divergence: Mapping[int, float]
    noise: Mapping[int, float]
    kept_mass: Mapping[int, float]

    @property
    def mean(self) -> float:
        """Mean divergence over layers, bits."""
        return float(np.mean(list(self.divergence.values())))

    @property
    def excess(self) -> float:
        """Mean divergence less noise, bits; NaN where the noise is not known."""
        return self.mean - float(np.mean(list(self.noise.values())))

    @property
    def drifted(self) -> bool:
        """Whether that is above `DRIFT_BITS`."""
        return self.excess > DRIFT_BITS


@dataclass(frozen=True)
class Coverage:
    """What calibration text says of a model's experts, and whether it speaks for the evaluation text.

    Attributes:
        domains: calibration domains that decided.
        tokens: of them.
        cold: by layer, experts that fewer than `COLD_TOKENS` of these chose.
        kept_mass: by layer, the share of the calibration text's gate mass that goes to experts which are not dropped.
        drifts: one for each evaluation domain; none without evaluation text.
    """

    domains: Sequence[str]
    tokens: int
    cold: Mapping[int, Sequence[int]]
    kept_mass: Mapping[int, float]
    drifts: Sequence[Drift] = ()

    def warnings(self) -> Iterator[str]:
        """A sentence for each evaluation domain that the calibration text does not speak for."""
        for drift in self.drifts:
            if drift.drifted:
                yield (
                    f"warning: {drift.domain!r} does not use experts as the calibration text does: {drift.mean:.3f} "
                    f"bits from {drift.nearest!r} ({drift.mean - drift.excess:.4f} expected of samples of one text, "
                    f"told above {DRIFT_BITS}); calibrate on such text if the model is for it"
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; layers are strings there."""

        def plain(by_layer: Mapping[int, float]) -> dict[str, float | None]:
            return {str(index): None if np.isnan(value) else value for index, value in by_layer.items()}

        return {
            "domains": list(self.domains),
            "tokens": self.tokens,
            "cold_below": COLD_TOKENS,
            "cold": {str(index): list(experts) for index, experts in self.cold.items()},
            "kept_mass": plain(self.kept_mass),
            "drift_above": DRIFT_BITS,
            "drifts": [
                asdict(x)
                | {"divergence": plain(x.divergence), "noise": plain(x.noise), "kept_mass": plain(x.kept_mass)}
                | {"mean": x.mean, "excess": None if np.isnan(x.excess) else x.excess, "drifted": x.drifted}
                for x in self.drifts
            ],
            "warnings": list(self.warnings()),
        }


def coverage(
    stats: Stats,
    layout: Layout,
    dropped: Mapping[int, Collection[int]],
    domains: Sequence[str],
    usage: Stats | None = None,
) -> Coverage:
    """What the calibration text covers.

    Args:
        stats: of the source model on calibration text.
        layout: of the source model.
        dropped: by decoder layer index, experts that went and were not merged into others.
        domains: calibration domains that decided.
        usage: of the source model on evaluation text; None: there is none.

    Raises:
        DataError: no such domain.
    """
    drifts = [] if usage is None else [_drift(stats, usage, layout, dropped, domains, x) for x in usage.domains]
    return Coverage(
        domains=tuple(domains),
        tokens=stats.token_count(domains),
        cold=cold_experts(stats, layout, domains),
        kept_mass=_kept_mass(stats, layout, dropped, domains),
        drifts=tuple(drifts),
    )


def _kept_mass(
    stats: Stats, layout: Layout, dropped: Mapping[int, Collection[int]], domains: str | Sequence[str]
) -> dict[int, float]:
    out = {}
    for layer in layout.routed:
        mass_E = stats.get("gate_mass", layer.index, domains)
        out[layer.index] = 1 - float(mass_E[list(dropped.get(layer.index, ()))].sum() / (mass_E.sum() or 1))
    return out


def _drift(
    stats: Stats,
    usage: Stats,
    layout: Layout,
    dropped: Mapping[int, Collection[int]],
    domains: Sequence[str],
    domain: str,
) -> Drift:
    """Beside the nearest of `domains`."""
    candidates = []
    for name in domains:
        both = (stats, name), (usage, domain)
        divergence = {x.index: _divergence(*(a.get("count", x.index, b) for a, b in both)) for x in layout.routed}
        noise = {x.index: _noise(x, *both) for x in layout.routed}
        candidates.append(Drift(domain, name, divergence, noise, _kept_mass(usage, layout, dropped, domain)))
    return min(candidates, key=lambda x: x.mean)


def _divergence(ours_E: np.ndarray, theirs_E: np.ndarray) -> float:
    """Jensen-Shannon divergence of two counts, bits: what a slot tells of the text, both texts weighing the same."""
    return float(information(np.stack([ours_E, theirs_E]), balanced=True))


def _noise(layer: MoELayer, *sources: tuple[Stats, str]) -> float:
    """The divergence that two samples of one text would be expected to give, bits."""
    shares, errors = [], []
    for stats, domain in sources:
        sequences = int(stats.sequences[stats.domain_numbers(domain)].sum())
        share_E, square_E = (stats.get(x, layer.index, domain) for x in ("sequence_share", "sequence_share_sq"))
        if sequences < 2:
            return float("nan")
        mean_E = share_E / sequences
        variance_E = (square_E / sequences - mean_E**2).clip(0) * sequences / (sequences - 1)
        shares.append(mean_E / layer.top_k)
        errors.append(variance_E / layer.top_k**2 / sequences)
    mean_E = np.mean(shares, axis=0)
    return float((np.sum(errors, axis=0) / mean_E.clip(1e-12)).sum() / (8 * np.log(2)))
