"""SteerMoE: ban what one kind of text routes to more often, force what the other does, before the router chooses.

    delta_j = rate of tokens of kind a that choose j  -  rate of tokens of kind b that choose j
    off     its logit is the lowest there is: another expert takes the slot
    on      its logit is just above all others: it takes a slot, with a weight like the strongest's

Experts are ranked by |delta| (mode "both"), by delta ("off") or by -delta ("on").

Paper: M. Fayyaz et al., "Steering MoE LLMs via Expert (De)Activation", arXiv 2509.09660.

Deviations: none known. At most k experts of a layer are forced; what does not fit is left out.
"""

from __future__ import annotations

from moekit.layout import MoELayer
from moekit.methods._registry import method
from moekit.methods.steer._found import BAN, FORCE, Found
from moekit.stats import Stats


@method(
    "steermoe",
    kind="steer",
    needs=("count",),
    summary="bans experts that one kind of text routes to more often, forces those of the other",
    paper="Steering MoE LLMs via Expert (De)Activation, arXiv 2509.09660",
)
def find(stats: Stats, layer: MoELayer, a: str, b: str) -> Found:
    """Difference of rates by expert; off bans, on forces."""
    rates = [stats.get("count", layer.index, kind) / max(1, stats.token_count([kind])) for kind in (a, b)]
    return Found(rates[0] - rates[1], BAN, FORCE)
