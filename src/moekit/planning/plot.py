"""The frontier as a picture: SVG that stands for itself, light or dark."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from moekit.recipe import format_bytes

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 66, 176, 18, 48
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c6bb1", "#9c6b3c", "#6b7280")
STYLE = """
    svg { --ink: #1f2328; --soft: #59636e; --line: #d1d9e0 }
    @media (prefers-color-scheme: dark) { svg { --ink: #f0f6fc; --soft: #9198a1; --line: #3d444d } }
    text { font: 12px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: var(--ink) }
    .soft { fill: var(--soft) } .grid { stroke: var(--line) } .front { fill: none; stroke: var(--soft) }
    .budget { stroke: var(--ink); stroke-dasharray: 5 4 } .kl { fill: none; stroke: var(--ink); stroke-width: 1.5 }
    .chosen { fill: none; stroke: var(--ink); stroke-width: 2.5 }
"""


@dataclass(frozen=True)
class Dot:
    """One candidate: bytes, predicted error, measured KL, kind, whether it is on the front and chosen, and its name."""

    bytes: int
    predicted: float
    measured: float | None
    kind: tuple[str, float]
    front: bool
    chosen: bool
    name: str


def draw(dots: Sequence[Dot], source_bytes: int, budget_bytes: int) -> str:
    """An SVG: dots by kind, the front as a line, what was measured as diamonds, the budget as a dashed line.

    The error axis is logarithmic; errors of zero (the model as it is) are left out.
    """
    shown = [dot for dot in dots if dot.predicted > 0]
    values = [dot.predicted for dot in shown] + [dot.measured for dot in shown if dot.measured]
    low, high = (math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))) if values else (-3, 0)
    high = max(high, low + 1)

    def at_x(size: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * size / source_bytes

    def at_y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - math.log10(value)) / (high - low)

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    out += ["<title>Bytes against predicted error</title>", f"<style>{STYLE}</style>"]
    for power in range(low, high + 1):
        y = at_y(10.0**power)
        out.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        out.append(f'<text class="soft" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    for quarter in range(5):
        x, said = at_x(source_bytes * quarter / 4), format_bytes(source_bytes * quarter / 4)
        out.append(f'<text class="soft" x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{said}</text>')
    x = at_x(min(budget_bytes, source_bytes))
    out.append(f'<line class="budget" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}"/>')
    line = " ".join(f"{at_x(dot.bytes):.1f},{at_y(dot.predicted):.1f}" for dot in shown if dot.front)
    out.append(f'<polyline class="front" points="{line}"/>')
    kinds = sorted({dot.kind for dot in shown})
    colour = {kind: COLOURS[i % len(COLOURS)] for i, kind in enumerate(kinds)}
    for dot in sorted(shown, key=lambda dot: dot.front):
        x, y = at_x(dot.bytes), at_y(dot.predicted)
        said = html.escape(f"{dot.name}: {format_bytes(dot.bytes)}, predicted error {dot.predicted:.2g}")
        radius, faint = (4.0, "") if dot.front else (2.5, ' opacity="0.45"')
        out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour[dot.kind]}"{faint}>')
        out.append(f"<title>{said}</title></circle>")
        if dot.chosen:
            out.append(f'<circle class="chosen" cx="{x:.1f}" cy="{y:.1f}" r="8"/>')
        if dot.measured:
            y = at_y(dot.measured)
            said = html.escape(f"{dot.name}: measured KL {dot.measured:.4f}")
            diamond = f"M{x:.1f},{y - 6:.1f} l6,6 l-6,6 l-6,-6 z"
            out.append(f'<path class="kl" d="{diamond}"><title>{said}</title></path>')
    out += _legend(kinds, colour)
    out.append(
        f'<text x="{LEFT}" y="{HEIGHT - 10}">size, budget {html.escape(format_bytes(budget_bytes))} dashed</text>'
    )
    return "\n".join([*out, "</svg>"])


def _legend(kinds: Sequence[tuple[str, float]], colour: dict[tuple[str, float], str]) -> list[str]:
    said = {"": "all experts", "prune": "fewer, pruned", "merge": "fewer, merged"}
    out, x, y = [], WIDTH - RIGHT + 16, TOP + 8
    out.append(f'<text x="{x}" y="{y}">predicted error</text>')
    for what, bits in kinds:
        y += 19
        out.append(f'<circle cx="{x + 4}" cy="{y - 4}" r="4" fill="{colour[what, bits]}"/>')
        out.append(f'<text class="soft" x="{x + 14}" y="{y}">{said[what]}, {bits:g} bits</text>')
    y += 19
    out.append(f'<path class="kl" d="M{x + 4},{y - 10} l6,6 l-6,6 l-6,-6 z"/>')
    out.append(f'<text class="soft" x="{x + 14}" y="{y}">measured KL, nats</text>')
    y += 19
    out.append(f'<circle class="chosen" cx="{x + 4}" cy="{y - 4}" r="6"/>')
    out.append(f'<text class="soft" x="{x + 14}" y="{y}">chosen</text>')
    return out
