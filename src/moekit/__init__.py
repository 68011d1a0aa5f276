"""moekit: the workbench for Mixture-of-Experts language models.

    import moekit

    m = moekit.open("refmoe")                                          # layout and files, nothing loaded
    stats = moekit.measure(m, data={"python": "texts/"})               # one streamed pass
    plan = moekit.plan("easy-ep", stats, keep=0.5, domain="python")    # data that a person can read
    out = moekit.bake(m, plan, "out/")                                 # a smaller checkpoint, streamed
    print(moekit.evaluate(out, against=m, data={"python": "held-out/"}))

The functions here are the short way; each is a few lines around the module that does the work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moekit.data import Dataset
    from moekit.evaluation import Evaluation
    from moekit.families.model import Model
    from moekit.pipeline import Result
    from moekit.plans import Plan
    from moekit.stats import Stats

__version__ = "0.1.0"
__all__ = ["bake", "evaluate", "load_data", "measure", "open", "plan"]

Texts = Mapping[str, str | Path] | Sequence[str]


def open(name: str | Path, *, trust_remote_code: bool = False) -> Model:
    """Understand a model without loading it.

    Args:
        name: a folder, a hub id (its files are downloaded), or "refmoe".
        trust_remote_code: allow code that the checkpoint brings along.

    Raises:
        ModelError: not an MoE model that moekit supports.
        CheckpointError: files are missing or damaged.
    """
    from moekit.families.model import Model

    return Model.open(name, trust_remote_code=trust_remote_code)


def load_data(
    model: Model, texts: Texts, *, tokens: int | None = 65_536, sequence_length: int = 512, seed: int = 0
) -> Dataset:
    """Read and tokenise texts with a model's own tokenizer.

    Args:
        model: from `open`.
        texts: path or dataset by domain, or `NAME=PATH` items.
        tokens: of each domain, at most; None: all.
        sequence_length: tokens of a sequence, at most.
        seed: which part of a longer text is taken.

    Raises:
        DataError: a text that cannot be read, or too short.
    """
    from moekit.data import Dataset, load_tokenizer

    tokenizer = load_tokenizer(model.path, trust_remote_code=model.trust_remote_code)
    return Dataset.build(
        texts, tokenizer, tokens=tokens, sequence_length=sequence_length, seed=seed, tokens_per_batch=8_192
    )


def measure(model: Model, data: Texts | Dataset, **settings: Any) -> Stats:
    """Take statistics in one streamed pass; `settings` go to `moekit.measurement.measure`.

    Args:
        model: from `open`.
        data: texts by domain, or a tokenised `Dataset`.

    Raises:
        UserError: see `moekit.measurement.measure`.
    """
    from moekit.measurement import measure as run

    return run(model, _dataset(model, data), **settings)


def plan(
    method: str,
    stats: Stats,
    *,
    keep: float | int | None = None,
    domain: str | Sequence[str] | None = None,
    **settings: Any,
) -> Plan:
    """Decide what to change; `settings` go to `moekit.methods.make_plan`.

    Args:
        method: a name of `moekit.methods.names()`.
        stats: from `measure`.
        keep: share (0.5) or number (64) of experts that a layer keeps; quantising methods keep all.
        domain: whose statistics count; None: all.

    Raises:
        UserError: see `moekit.methods.make_plan`.
    """
    from moekit.methods import make_plan

    return make_plan(method, stats, stats.layout, keep=keep, domain=domain, **settings)


def bake(model: Model, plan: Plan, out: str | Path, *, data: Texts | Dataset | None = None, **settings: Any) -> Result:
    """Write the model that a plan makes, and prove by stock transformers that it does what the plan says.

    The folder also gets report.json, report.md, plan.json and a model card; `settings` go to `moekit.pipeline.produce`.

    Args:
        model: from `open`.
        plan: from `plan`.
        out: a new folder.
        data: compare the result with its source on these texts, for the report.

    Raises:
        VerificationError: the files do not do what the plan says; they are kept beside `out`.
        UserError: see `moekit.pipeline.produce`.
    """
    from moekit.pipeline import produce

    texts = None if data is None else _dataset(model, data)
    return produce(model, plan, Path(out), text=texts, evaluation=texts, **settings)


def evaluate(
    model: Model | Result | str | Path,
    *,
    data: Texts | Dataset,
    against: Model | None = None,
    plan: Plan | None = None,
    **settings: Any,
) -> Evaluation:
    """Perplexity by domain and, against a source model, KL divergence and top-1 agreement.

    Args:
        model: from `open` or `bake`, or a folder.
        data: texts by domain, or a tokenised `Dataset`.
        against: the source model; with a plan, None is the model without it.
        plan: is applied live.

    Raises:
        UserError: see `moekit.evaluation.evaluate`.
    """
    from moekit.evaluation import evaluate as run
    from moekit.evaluation.compare import Subject
    from moekit.families.model import Model
    from moekit.pipeline import Result

    place = model.path if isinstance(model, Result) else model
    opened = place if isinstance(place, Model) else Model.open(place or "nowhere: only planned")
    subject, against = (Subject(opened, plan), against or opened) if plan else (opened, against)
    return run(subject, _dataset(opened, data), against=against, **settings)


def _dataset(model: Model, texts: Texts | Dataset) -> Dataset:
    from moekit.data import Dataset

    return texts if isinstance(texts, Dataset) else load_data(model, texts)
