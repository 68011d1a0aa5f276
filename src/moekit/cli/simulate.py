"""moekit simulate: replay a trace through every cache policy and predictor, without running the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from moekit.cli.screen import bars, console, table
from moekit.errors import DataError, RecipeError, VerificationError

if TYPE_CHECKING:
    from moekit.layout import Layout
    from moekit.serve.predictors import Predictor
    from moekit.serve.predictors.routers import Routers
    from moekit.serve.routes import Routes
    from moekit.serve.simulate import Machine, Recall, Replay

EVERY = "all"


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("simulate")(simulate)


def simulate(
    trace: Path = typer.Argument(help="A folder that `moekit trace --tokens` made."),
    memory: str | None = typer.Option(None, help="For experts, as 2GiB.  [default: a quarter of all experts]"),
    slots: int | None = typer.Option(None, min=1, help="The same, as a number of experts."),
    policy: list[str] = typer.Option([], help="Which to replay; several times.  [default: all]"),
    predictor: list[str] = typer.Option([], help="Which to read ahead by; several times, or all.  [default: none]"),
    learn: Path | None = typer.Option(
        None, help="Another trace to learn from beforehand.  [default: every other text of TRACE, the rest is replayed]"
    ),
    model: str | None = typer.Option(None, help="The traced model, for predictors that look at hidden states."),
    store: Path | None = typer.Option(None, help="A packed model: bytes of an expert, and its disk measured."),
    bandwidth: str = typer.Option("1GB", help="Of the disk, a second, where no store is given."),
    compute_ms: float = typer.Option(20.0, min=0.0, help="To compute a token whose experts are all in memory."),
    tokens: int = typer.Option(16_384, min=1, help="To replay, at most, of texts evenly spread."),
    as_json: bool = typer.Option(False, "--json", help="Print everything as one JSON object instead."),
) -> None:
    """How often would each cache policy find an expert in memory, and how long would a token take?

    Every token is replayed by itself, as in writing, text after text. Belady's policy knows the future: nobody does
    better.
    """
    from moekit.serve.routes import Routes
    from moekit.serve.simulate import recall, usable_policies
    from moekit.serve.simulate import simulate as replay
    from moekit.trace import Trace

    if memory is not None and slots is not None:
        raise RecipeError("--memory and --slots say the same thing", fix="give one of them")
    opened = Trace.open(trace)
    known, routes = _split(Routes.of(opened), learn)
    routes = routes.spread(tokens).interleaved()
    machine = _machine(opened.layout, store, bandwidth, compute_ms)
    count = _slots(routes, machine, memory, slots)
    names = usable_policies(known) if not policy or EVERY in policy else list(dict.fromkeys([*policy, "belady"]))
    with bars() as progress:
        predictors, routers, routes = _predictors(predictor, model, known, routes)
        recalls = {name: recall(routes, made) for name, made in predictors.items()}
        jobs = [(name, other) for name in names for other in ("none", *(predictors if name != "belady" else ()))]
        replays = []
        for number, (name, other) in enumerate(jobs, 1):
            replays.append(
                replay(routes, name, count, machine, trace=known, predictor=predictors.get(other), name=other)
            )
            progress("replays", number, len(jobs))
    control = None if routers is None else _control(routes, routers)
    if as_json:
        typer.echo(json.dumps(_as_json(routes, machine, count, replays, recalls, control)))
    else:
        _show(opened, routes, known, machine, count, replays, recalls, control)


def _split(routes: Routes, learn: Path | None) -> tuple[Routes, Routes]:
    """(routes to learn from, routes to replay)."""
    from moekit.serve.routes import Routes

    if learn is not None:
        known = Routes.of(learn)
        routes.check_like(known)
        return known, routes
    if len(routes.starts) < 2:
        raise DataError(
            "a trace of one text cannot be both learned from and replayed",
            fix="record shorter sequences (moekit trace --sequence-length), or give --learn",
        )
    numbers = range(len(routes.starts))
    return routes.texts(numbers[::2]), routes.texts(numbers[1::2])


def _machine(layout: Layout, store: Path | None, bandwidth: str, compute_ms: float) -> Machine:
    from moekit.recipe import parse_bytes
    from moekit.serve.cache import slot_bytes
    from moekit.serve.disk import read_speed
    from moekit.serve.simulate import Machine
    from moekit.serve.store import ExpertStore

    if store is None:
        expert = max(x.expert_bytes for x in layout.routed)
        return Machine(expert, float(parse_bytes(bandwidth)), compute_ms / 1e3)
    opened = ExpertStore(store)
    try:
        return Machine(slot_bytes(opened), read_speed(opened), compute_ms / 1e3)
    finally:
        opened.close()


def _slots(routes: Routes, machine: Machine, memory: str | None, slots: int | None) -> int:
    from moekit.recipe import parse_bytes

    if slots is not None:
        return slots
    if memory is not None:
        return parse_bytes(memory) // machine.expert_bytes
    return max(1, routes.layers * routes.experts // 4)


def _predictors(
    wanted: list[str], model: str | None, known: Routes, routes: Routes
) -> tuple[dict[str, Predictor], Routers | None, Routes]:
    """Trained predictors by name, the model's routers, and the routes as the model reads them now."""
    from moekit.serve.predictors import PREDICTORS, predictor_named
    from moekit.serve.predictors.routers import recorded

    routers = None
    if model is not None:
        import moekit

        opened = moekit.open(model)
        routes, routers = recorded(opened, routes)
        known, _ = recorded(opened, known)
    names = [name for name in wanted if name not in ("none", EVERY)]
    if EVERY in wanted:
        names = [x for x in PREDICTORS if routers is not None or x not in ("gate", "pregate")]
    return {name: predictor_named(name, known, routers) for name in names}, routers, routes


def _control(routes: Routes, routers: Routers) -> float:
    """Recall of the true gate, which must be 1.

    Raises:
        VerificationError: it is not; nothing that was simulated can be trusted then.
    """
    from moekit.serve.simulate import fresh_recall

    found = float(fresh_recall(routes, lambda layer, seen: routers.scores(layer, seen.hidden[layer])).at_k.min())
    if found < 1.0:
        raise VerificationError("the true gate does not tell all experts", expected="100%", got=f"{found:.4%}")
    return found


def _as_json(
    routes: Routes,
    machine: Machine,
    slots: int,
    replays: list[Replay],
    recalls: dict[str, Recall],
    control: float | None,
) -> dict[str, object]:
    return {
        "tokens": len(routes.ids),
        "texts": len(routes.starts),
        "experts": routes.layers * routes.experts,
        "slots": slots,
        "expert_bytes": machine.expert_bytes,
        "bytes_per_s": machine.bytes_per_s,
        "compute_ms": 1e3 * machine.compute_s,
        "replays": [x.row() for x in replays],
        "recall_at_k": {name: [None if x != x else x for x in r.at_k.tolist()] for name, r in recalls.items()},
        "fresh_recall": control,
    }


def _show(
    opened: object,
    routes: Routes,
    known: Routes,
    machine: Machine,
    slots: int,
    replays: list[Replay],
    recalls: dict[str, Recall],
    control: float | None,
) -> None:
    import numpy as np

    from moekit.recipe import format_bytes

    screen, every = console(), routes.layers * routes.experts
    screen.print(
        f"{routes.layers} MoE layers x {routes.experts} experts, top-{routes.top_k}; {len(routes.ids):,} tokens of "
        f"{len(routes.starts)} texts replayed, {len(known.ids):,} learned from\n"
        f"{min(slots, every)} of {every} experts in memory ({min(slots, every) / every:.0%}), "
        f"{format_bytes(machine.expert_bytes)} each; disk {format_bytes(int(machine.bytes_per_s))}/s; "
        f"{1e3 * machine.compute_s:.4g} ms to compute a token\n"
    )
    bound = next(x.hit_rate for x in replays if x.policy == "belady")
    rows = []
    for x in sorted(replays, key=lambda x: (x.policy == "belady", np.mean(x.expected_s), -x.hit_rate)):
        useful = f"{x.ahead.sum() / max(1, x.ahead.sum() + x.wasted):.0%}" if x.predictor != "none" else ""
        rows.append([x.policy, x.predictor, f"{x.hit_rate:.1%}", f"{x.hit_rate / bound:.0%}" if bound else "",
                     format_bytes(round(x.token_bytes)), useful, f"{1e3 * x.expected_s.mean():.1f}",
                     f"{1e3 * np.quantile(x.expected_s, 0.99):.1f}", f"{1e3 * x.best_s.mean():.1f}"])  # fmt: skip
    columns = ["policy", "read ahead by", "found", "of Belady", "a token", "useful", "ms a token", "p99", "at best"]
    screen.print(table("", columns, rows))
    if recalls:
        layers = [f"layer {number}" for number in range(routes.layers)] if routes.layers <= 8 else []
        found = [
            [name, f"{np.nanmean(r.at_k):.1%}", f"{np.nanmean(r.at_2k):.1%}"]
            + [("" if x != x else f"{x:.0%}") for x in r.at_k[: len(layers)]]
            for name, r in recalls.items()
        ]
        screen.print()
        screen.print(table("", ["told of the experts", "by k guesses", "by 2 k", *layers], found))
    if control is not None:
        screen.print(f"self-check: the layers' own routers tell {control:.0%}")
