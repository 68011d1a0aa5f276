"""What `moekit steer test` prints: side effects, the effect, the doses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moekit.cli.screen import table

if TYPE_CHECKING:
    from moekit.evaluation.intervals import Interval
    from moekit.steering.assessment import Assessment, Controls


def screen(found: Assessment) -> list[object]:
    """Tables, side effects first, and how to read them."""
    columns = ("", "texts", "loss change [95%]", "perplexity x", "KL", "same top token", "random", "matched")

    def rows(domains: tuple[str, ...]) -> list[tuple[str, ...]]:
        return [
            (
                name,
                f"{found.texts[name]}",
                interval(x.change),
                f"{x.ratio.value:.3f}",
                f"{x.kl.value:.4f}",
                f"{x.agreement.value:.1%}",
                _mean(x.random),
                _mean(x.matched),
            )
            for name in domains
            for x in [found.whole.effects[name]]
        ]

    lines: list[object] = [
        table("side effects: elsewhere", columns, rows(found.elsewhere)),
        "",
        table("effect: target", columns, rows(found.targets)),
    ]
    for name in found.targets:
        x = found.whole.effects[name]
        for kind, beside in (("random", x.random), ("matched", x.matched)):
            if beside:
                drawn = ", ".join(f"{y:+.4f}" for y in beside.draws)
                clear = "differs from" if beside.excess.low > 0 or beside.excess.high < 0 else "cannot be told from"
                lines.append(f"{name}: {interval(beside.excess)} beyond {kind} experts (draws {drawn}): {clear} them")
    if len(found.doses) > 1:
        lines += ["", _doses(found)]
    if found.answers:
        lines += ["", *_answers(found.answers)]
    loss = ", ".join(f"{name} {value.value:.3f}" for name, value in found.loss.items())
    return [*lines, f"loss as it is, nats a token: {loss}"]


def _doses(found: Assessment) -> object:
    domains = (*found.elsewhere, *found.targets)
    columns = ["experts", "strength"]
    for name in domains:
        columns += [name, *(["random", "matched"] if name in found.targets else [])]
    rows = []
    for dose in found.doses:
        row = [str(dose.number), f"{dose.strength:g}"]
        for name in domains:
            x = dose.effects[name]
            row.append(f"{x.change.value:+.4f}")
            row += [_mean(x.random), _mean(x.matched)] if name in found.targets else []
        rows.append(row)
    return table("dose and response: loss change, nats a token", columns, rows)


def _answers(found: object) -> list[object]:
    assert isinstance(found, dict)
    share = {name: f"{x[0]:.1%} [{x[1]:.1%}, {x[2]:.1%}]" for name, x in found["share"].items()}
    said = ", ".join(f"{name} {x}" for name, x in share.items())
    lines: list[object] = [f"answers that match, of {found['prompts']}: {said}"]
    if "excess" in found:
        value, low, high = found["excess"]
        lines.append(f"beyond random experts: {value:+.1%} [{low:+.1%}, {high:+.1%}]")
    return lines


def _mean(controls: Controls | None) -> str:
    return "-" if controls is None else f"{controls.mean.value:+.4f}"


def interval(value: Interval) -> str:
    """`+0.0123 [+0.0101, +0.0145]`."""
    return f"{value.value:+.4f} [{value.low:+.4f}, {value.high:+.4f}]"
