"""Figures for papers: the report's main views drawn by matplotlib, in sizes and fonts that fit a page.

The numbers are those of `moekit.report.data`; text stays text in SVG and PDF, and the same trace gives the same file.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

import numpy as np

from moekit.errors import DataError, OutputError, RecipeError, did_you_mean
from moekit.report import data, structure
from moekit.report.source import Source
from moekit.trace import Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE_INCHES = 6.8
FORMATS = (".svg", ".pdf", ".png")
STYLE: Any = {
    "font.size": 8,
    "axes.linewidth": 0.6,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "moekit",
    "pdf.fonttype": 42,
    "text.parse_math": False,  # a name may hold dollar signs
}
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c6bb1", "#9c6b3c")
DASHES = ("-", "--", ":")
GREY = "#6b7280"
SPECIALISTS = 3  # of each domain
FLOW_LAYERS = 5


def save(
    trace: Trace, kind: str, out: str | FilePath, *, domain: str | None = None, first: int | None = None
) -> FilePath:
    """Draw a figure into a file that appears whole or not at all.

    Args:
        trace: what to draw.
        kind: a name of `FIGURES`.
        out: ends in .svg, .pdf or .png.
        domain: one domain instead of all (heatmap, flow).
        first: decoder layer with which the flow begins.

    Raises:
        RecipeError: unknown kind.
        DataError: unknown domain or layer, or the trace has not what the figure needs.
        OutputError: another file type, matplotlib is missing, or the file cannot be written.
    """
    out = FilePath(out)
    if kind not in FIGURES:
        raise RecipeError(f"no figure {kind!r}", fix=did_you_mean(kind, FIGURES))
    check_figure(out)
    if domain is not None:
        trace.stats.domain_numbers(domain)
    source = Source(trace)
    if first is not None and first not in source.layers:
        trace.moe_layer(first)
    return _write(lambda: FIGURES[kind](source, domain, source.layers.index(first) if first is not None else 0), out)


def save_doses(result: Mapping[str, Any], out: str | FilePath) -> FilePath:
    """Draw the dose and response of a steering plan into a file that appears whole or not at all.

    Args:
        result: of `moekit.steering.Assessment.to_dict`.
        out: ends in .svg, .pdf or .png.

    Raises:
        OutputError: another file type, matplotlib is missing, or the file cannot be written.
    """
    out = FilePath(out)
    check_figure(out)
    return _write(lambda: dose_response(result), out)


def check_figure(out: FilePath) -> None:
    """Refuse a figure that could not be written, before there is anything to draw.

    Raises:
        OutputError: another file type than .svg, .pdf and .png, or matplotlib is missing.
    """
    if out.suffix.lower() not in FORMATS:
        raise OutputError("a figure of this type cannot be written", where=out, expected=" or ".join(FORMATS))
    if importlib.util.find_spec("matplotlib") is None:
        raise OutputError("figures need matplotlib, which is not here", fix="pip install 'moekit[viz]'")


def _write(draw: Callable[[], Figure], out: FilePath) -> FilePath:
    import matplotlib

    part = out.with_name(out.name + ".partial")
    try:
        with matplotlib.rc_context(STYLE):
            figure = draw()
            out.parent.mkdir(parents=True, exist_ok=True)
            kept: dict[str, Any] = {"Date": None} if out.suffix.lower() == ".svg" else {}
            kept |= {"CreationDate": None} if out.suffix.lower() == ".pdf" else {}
            figure.savefig(part, format=out.suffix[1:].lower(), dpi=300, metadata=kept)
        part.replace(out)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise OutputError("the figure cannot be written", where=out, got=error.strerror or str(error)) from None
    return out


def heatmap(source: Source, domain: str | None, _first: int) -> Figure:
    """Share of tokens by layer and expert, a panel a domain, one colour scale."""
    share = data.usage(source)["share"].values
    names = [domain] if domain else source.domains
    columns = min(2, len(names))
    rows = -(-len(names) // columns)
    height = 0.5 + rows * (0.55 + np.clip(0.045 * len(source.layers), 0.5, 2.2))
    figure = _figure(height)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).reshape(-1)
    top = float(np.nanquantile(share, 0.995))
    for panel, name in zip(panels, names, strict=False):
        image = panel.imshow(share[source.domains.index(name)], cmap="viridis", vmin=0, vmax=top, aspect="auto")
        panel.set_title(name, loc="left")
        _layer_ticks(panel.yaxis, source)
    for panel in panels[len(names) :]:
        panel.remove()
    figure.supxlabel("expert", fontsize=8)
    figure.supylabel("layer", fontsize=8)
    figure.colorbar(image, ax=list(panels[: len(names)]), label="share of tokens", extend="max", shrink=0.8, pad=0.02)
    return figure


def specialisation(source: Source, domain: str | None, _first: int) -> Figure:
    """The strongest experts of each domain with 95% interval, chance, and share elsewhere."""
    found = data.specialisation(source)
    if found is None:
        raise DataError("specialisation needs two domains or more", where=source.trace.path, got=len(source.domains))
    rows = [x for x in found["rows"] if (x["domain"] == domain if domain else x["rank"] < SPECIALISTS)]
    figure = _figure(0.6 + 0.19 * len(rows))
    panel = figure.subplots()
    at = np.arange(len(rows))[::-1]
    value = {name: np.array([x[name] for x in rows]) for name in ("share", "low", "high", "null_low", "null_high")}
    panel.barh(
        at, value["null_high"] - value["null_low"], 0.8, value["null_low"], color="#e5e7eb", label="chance (95%)"
    )
    colours = [_colour(source.domains.index(x["domain"])) for x in rows]
    spread = np.abs(np.stack([value["share"] - value["low"], value["high"] - value["share"]]))
    panel.barh(at, value["share"], 0.36, color=colours)
    panel.errorbar(
        value["share"], at, xerr=spread, fmt="none", ecolor="black", elinewidth=0.8, capsize=2, label="95% interval"
    )
    elsewhere = [x["elsewhere"] for x in rows]
    panel.plot(elsewhere, at, "o", mfc="white", mec="black", ms=3.5, mew=0.7, label="other domains")
    panel.set_yticks(at, [f"{x['domain']}  {x['layer']}.{x['expert']}" for x in rows])
    panel.set_xlabel("share of the domain's tokens")
    panel.set_xlim(left=0)
    panel.legend(frameon=False, fontsize=7, loc="lower right")
    return figure


def dose_response(result: Mapping[str, Any]) -> Figure:
    """Change of the loss by dose with 95% interval: a line a domain, and the controls of those that are meant."""
    whole = max(dose["number"] for dose in result["doses"])
    sweeps = {
        "experts changed": [(dose["number"], dose) for dose in result["doses"] if dose["strength"] == 1],
        "strength": [(dose["strength"], dose) for dose in result["doses"] if dose["number"] == whole],
    }
    sweeps = {name: sorted(x, key=lambda y: y[0]) for name, x in sweeps.items() if len(x) > 1 or name[0] == "e"}
    figure = _figure(2.6)
    panels = figure.subplots(1, len(sweeps), sharey=True, squeeze=False)[0]
    names = sorted(result["domains"], key=lambda x: result["domains"][x]["role"] != "elsewhere")
    for panel, (axis, doses) in zip(panels, sweeps.items(), strict=True):
        at = [0, *(x for x, _ in doses)]
        panel.axhline(0, color=GREY, lw=0.6)
        for n, name in enumerate(names):
            role, found = result["domains"][name]["role"], [dose["domains"][name] for _, dose in doses]
            value, low, high = np.array([[0.0] * 3, *(x["change"] for x in found)]).T
            style = {"marker": "o", "ms": 3, "lw": 1.4 if role == "target" else 1, "capsize": 2, "elinewidth": 0.8}
            label = f"{name} ({role})"
            panel.errorbar(at, value, np.abs([value - low, high - value]), color=_colour(n), label=label, **style)
            for kind, dashes in (("random", ":"), ("matched", "--")):
                if role == "target" and all(x[kind] for x in found):
                    beside = [0.0, *(x[kind]["mean"][0] for x in found)]
                    panel.plot(at, beside, dashes, color=_colour(n), lw=0.9, label=f"{name}, {kind} experts")
        panel.set_xlabel(axis)
    panels[0].set_ylabel("change of the loss, nats a token")
    panels[0].legend(frameon=False, fontsize=7)
    return figure


def balance(source: Source, _domain: str | None, _first: int) -> Figure:
    """How evenly layers spread their load: four lines by layer, for all domains and each."""
    found = data.balance(source)
    figure = _figure(3.6)
    titles = {
        "entropy": "normalised entropy",
        "gini": "Gini index",
        "max_over_mean": "largest over mean",
        "experts_for_70": "experts that hold 70% of the weight",
    }
    panels = figure.subplots(2, 2, sharex=True).reshape(-1)
    for panel, (name, title) in zip(panels, titles.items(), strict=True):
        values = found[name].values
        for n, label in enumerate(source.domains):
            panel.plot(source.layers, values[n + 1], color=_colour(n), ls=_dash(n), lw=1, label=label)
        panel.plot(source.layers, values[0], color="black", lw=1.6, label="all domains")
        panel.set_title(title, loc="left")
        panel.xaxis.get_major_locator().set_params(integer=True)
    figure.supxlabel("layer", fontsize=8)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=7)
    return figure


def flow(source: Source, domain: str | None, first: int) -> Figure:
    """Which experts follow which through some neighbouring MoE layers."""
    found = structure.flow(source)
    if found is None:
        raise DataError("this trace has no transitions between layers", where=source.trace.path)
    n = 1 + source.domains.index(domain) if domain else 0
    last = min(first + FLOW_LAYERS, len(source.layers)) - 1
    if last == first:
        raise DataError(
            "the flow needs a layer after its first", where=source.trace.path, fix="begin at an earlier one"
        )
    figure = _figure(3.4)
    panel = figure.subplots()
    panel.axis("off")
    share, lift, nodes = (found[name].values[n] for name in ("share", "lift", "nodes"))
    home = np.nanargmax(np.nan_to_num(data.usage(source)["share"].values, nan=-1.0), axis=0)
    gap, width = 0.012, 0.07
    places, bottom = [], 0.0
    for i in range(first, last + 1):
        sizes = share[i].sum(1) if i < len(share) else share[i - 1].sum(0)
        starts = np.cumsum(sizes + gap * (sizes > 0)) - sizes - gap * (sizes > 0)
        places.append(starts)
        bottom = max(bottom, float((starts + sizes).max()))
        for node, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            if not size:
                continue
            expert = int(nodes[i, node]) if node < nodes.shape[1] else None
            colour = GREY if expert is None else _colour(int(home[i, expert]))
            panel.add_patch(_box(i, start, width, size, colour))
            if size > 0.02:
                text = "others" if expert is None else str(expert)
                panel.text(i + width + 0.02, start + size / 2, text, va="center", fontsize=6.5)
        panel.text(i, -0.03, f"layer {source.layers[i]}", fontsize=7, color=GREY)
    for i in range(first, last):
        left, right = places[i - first].copy(), places[i + 1 - first].copy()
        for a, b in np.argwhere(share[i] > 0).tolist():
            size = share[i, a, b]
            panel.add_patch(_ribbon(i + width, i + 1, left[a], right[b], size, min(0.6, 0.1 + 0.09 * lift[i, a, b])))
            left[a] += size
            right[b] += size
    panel.set_xlim(first, last + width + 0.3)
    panel.set_ylim(bottom, -0.06)
    shown = [_box(0, 0, 0, 0, _colour(k)) for k in range(len(source.domains))]
    labels = [f"used most by {name}" for name in source.domains]
    figure.legend(shown, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=7)
    return figure


FIGURES: dict[str, Callable[[Source, str | None, int], Figure]] = {
    "heatmap": heatmap,
    "specialisation": specialisation,
    "flow": flow,
    "balance": balance,
}


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(PAGE_INCHES, height), layout="constrained")


def _layer_ticks(axis: Any, source: Source) -> None:
    every = max(1, len(source.layers) // 6)
    axis.set_ticks(range(0, len(source.layers), every), [str(x) for x in source.layers[::every]])


def _box(x: float, y: float, width: float, height: float, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, color=colour, lw=0)


def _ribbon(x0: float, x1: float, y0: float, y1: float, size: float, alpha: float) -> Any:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    middle = (x0 + x1) / 2
    points = [
        *((x0, y0), (middle, y0), (middle, y1), (x1, y1)),
        *((x1, y1 + size), (middle, y1 + size), (middle, y0 + size), (x0, y0 + size), (x0, y0)),
    ]
    codes = [Path.MOVETO, *[Path.CURVE4] * 3, Path.LINETO, *[Path.CURVE4] * 3, Path.CLOSEPOLY]
    return PathPatch(Path(points, codes), facecolor=GREY, alpha=alpha, lw=0)


def _colour(n: int) -> str:
    return COLOURS[n % len(COLOURS)]


def _dash(n: int) -> str:
    return DASHES[n // len(COLOURS) % len(DASHES)]
