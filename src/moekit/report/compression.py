"""The report that every baked model carries: report.json with every number, report.md and a model card for people."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from moekit.checkpoint.hub import is_hub_id
from moekit.families.packings import OWN, in_own_form
from moekit.recipe import format_bytes

# by kind of plan: what is done to a model, and what it has then
DONE = {
    "prune": "pruned",
    "merge": "merged",
    "factor": "factored",
    "quantize": "quantised",
    "heal": "healed",
    "steer": "steered",
}
WITH = {
    "factor": "factored experts",
    "replace": "constants for some experts",
    "quantize": "quantised experts",
    "heal": "healed weights",
    "steer": "steered routers or experts",
}


def write_report(folder: str | Path, report: Mapping[str, Any]) -> None:
    """Write report.json, report.md, recipe.yaml and the model card README.md into `folder`.

    A card of the source stays as README.source.md; its licence and languages go into the new card.

    Args:
        folder: of the new model.
        report: plain data, as `moekit.pipeline.report_of` gives it.
    """
    path = Path(folder)
    (path / "report.json").write_text(json.dumps(report, indent=1))
    text = "\n".join(markdown(report)) + "\n"
    (path / "report.md").write_text(text)
    card = path / "README.md"
    head = {}
    if card.is_file():
        head = _front_matter(card.read_text(encoding="utf-8", errors="replace"))
        card.rename(path / "README.source.md")
    library = OWN if in_own_form(path) else "transformers"
    card.write_text(model_card(report, head, library) + text)
    if report["recipe"]:
        (path / "recipe.yaml").write_text(str(report["recipe"]))


def _front_matter(text: str) -> dict[str, Any]:
    if not text.startswith("---\n"):
        return {}
    try:
        found = yaml.safe_load(text[4:].split("\n---", 1)[0])
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def model_card(report: Mapping[str, Any], source: Mapping[str, Any], library: str = "transformers") -> str:
    """The metadata that hubs read: what the source's card says of licence and languages, and where this comes from;
    `library`: what loads it.
    """
    carried = {key: source[key] for key in ("license", "license_name", "license_link", "language") if key in source}
    what = [DONE.get(kind, kind) for kind in report["kinds"]]
    name = report["model"]["name"]
    head = carried | {
        "base_model": name if is_hub_id(name) else Path(name).name,  # a path says nothing to others
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["moekit", "mixture-of-experts", *what],
    }
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n\n"


def markdown(report: Mapping[str, Any]) -> Iterator[str]:
    """The report's lines."""
    model, size = report["model"], report["bytes"]
    kept = {layer: len(experts) for layer, experts in report["kept"].items()}
    fewer = set(report["kinds"]) & {"prune", "merge"}
    what = [f"{_span(kept.values())} of {model['experts']} experts a layer"] if fewer else []
    what += [words for kind, words in WITH.items() if kind in report["kinds"]]
    yield f"# {model['name']} with {', '.join(what)}"
    yield ""
    steps = report["steps"] if len(report["steps"]) > 1 else []
    how = f"in {len(steps)} steps" if steps else f"with `{report['method']}` ({_settings(report['settings'])})"
    yield f"Made by moekit {report['versions']['moekit']} {how}."
    if size:
        share = size["after"] / size["before"]
        yield f"{format_bytes(size['before'])} before, {format_bytes(size['after'])} after ({share:.0%})."
    if steps:
        yield from _steps(steps)
    if report["evaluation"]:
        yield from _evaluation(report["evaluation"])
    if proof := report["verification"]:
        yield from _verification(proof, "the model before the last step" if steps else "the source")
    yield from ("", "## What to know", "")
    yield from (f"- {note}" for note in report["notes"])
    if report["coverage"]:
        yield from _coverage(report["coverage"])
    if fewer:
        yield from _kept(report)
    yield from ("", "## Made from", "")
    yield f"- model `{model['name']}` ({model['family']}), fingerprint `{model['fingerprint']}`"
    for name, domain in (report["calibration"] or {"domains": {}})["domains"].items():
        yield f"- calibration `{name}`: {domain['tokens']:,} tokens, hash `{domain['hash']}`"
    yield "- versions: " + ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    yield "- seconds: " + ", ".join(f"{name} {value:g}" for name, value in report["seconds"].items())
    if report["recipe"]:
        yield from ("", "```yaml", str(report["recipe"]).rstrip(), "```")


def _steps(steps: list[Mapping[str, Any]]) -> Iterator[str]:
    yield from ("", "## Steps", "", "| | method | settings | before | after | largest logit difference |")
    yield "|---|---|---|---|---|---|"
    for number, step in enumerate(steps, 1):
        size, proof = step["bytes"], step["verification"]
        found = f"{proof['max_difference']:.2g}" if proof else "not verified"
        yield (
            f"| {number} | `{step['method']}` | {_settings(step['settings'])} | {format_bytes(size['before'])} "
            f"| {format_bytes(size['after'])} | {found} |"
        )


def _coverage(coverage: Mapping[str, Any]) -> Iterator[str]:
    drifts, below = coverage["drifts"], coverage["cold_below"]
    yield from ("", "## What the calibration text covers", "")
    yield (
        f"Decided on {coverage['tokens']:,} tokens of {', '.join(coverage['domains'])}. "
        f"A cold expert is one that fewer than {below} of them chose. Gate mass kept: the share of the source's router "
        "weight that goes to experts which keep their weights, or are merged; not to those dropped or made constants."
    )
    if drifts:
        yield (
            "Divergence: how unlike the source's use of experts is on evaluation text and on the nearest calibration "
            "text (Jensen-Shannon, bits, mean over layers), beside what samples of one text would give; text has "
            f"drifted where the difference is above {coverage['drift_above']:g}."
        )
        yield from ("", "| evaluation text | nearest | divergence | of one text | drifted | gate mass kept |")
        yield "|---|---|---|---|---|---|"
        for x in drifts:
            noise = "unknown" if x["excess"] is None else f"{x['mean'] - x['excess']:.4f}"
            mass = sum(x["kept_mass"].values()) / len(x["kept_mass"])
            said = "**yes**" if x["drifted"] else "no"
            yield f"| {x['domain']} | {x['nearest']} | {x['mean']:.4f} | {noise} | {said} | {mass:.1%} |"
    names = [x["domain"] for x in drifts]
    columns = ("layer", "cold experts", "gate mass kept", *(f"kept on {x}, divergence" for x in names))
    yield from ("", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|")
    for layer, cold in coverage["cold"].items():
        cells = [f"{len(cold)}: {_ranges(cold)}" if cold else "0", f"{coverage['kept_mass'][layer]:.1%}"]
        cells += [f"{x['kept_mass'][layer]:.1%}, {x['divergence'][layer]:.4f}" for x in drifts]
        yield f"| {layer} | {' | '.join(cells)} |"


def _kept(report: Mapping[str, Any]) -> Iterator[str]:
    yield from ("", "## Kept experts", "", "| layer | kept | gate mass removed | experts |", "|---|---|---|---|")
    for layer, experts in report["kept"].items():
        removed = report["removed_gate_mass"].get(layer)
        share = "" if removed is None else f"{removed:.1%}"
        yield f"| {layer} | {len(experts)} | {share} | {_ranges(experts)} |"


def _evaluation(evaluation: Mapping[str, Any]) -> Iterator[str]:
    yield from (
        "",
        "## How good it is",
        "",
        "95% intervals over sequences; KL in nats a token, from the source model.",
        "",
    )
    yield "| domain | tokens | perplexity before | after | ratio | KL | same top token |"
    yield "|---|---|---|---|---|---|---|"
    for name, score in evaluation["domains"].items():
        columns = ("source_perplexity", "perplexity", "ratio", "kl", "agreement")
        yield f"| {name} | {score['tokens']:,} | {' | '.join(_interval(score[x]) for x in columns)} |"


def _verification(proof: Mapping[str, Any], against: str) -> Iterator[str]:
    yield from ("", "## Proof", "")
    yield (
        f"The files, run by {proof['loaded_by']}, against {against} with the plan applied live ({proof['dtype']}, "
        f"{proof['positions']} positions): largest logit difference {proof['max_difference']:.2g}; "
        f"{proof['within']:.1%} of positions within {proof['tolerance']:g} of their largest logit. "
        f"Read back, the weights are those of the source under the plan, in each of {proof['experts']:,} experts too."
    )
    if proof["generated"]:
        yield from ("", "It continues the first evaluation text with:", "", "```", proof["generated"], "```")


def _interval(values: list[float]) -> str:
    value, low, high = values
    return f"{value:.3g} [{low:.3g}, {high:.3g}]"


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_word(value)}" for key, value in settings.items())


def _word(value: object) -> str:
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _span(counts: Any) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def _ranges(numbers: list[int]) -> str:
    """`0-3, 7, 9-12`."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
