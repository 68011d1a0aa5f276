"""evaluate(model, data, against=source): both models streamed side by side over the same tokens.

Two streams run layer by layer, each with its own model, and then give logits batch by batch; a batch's logits are
compared and forgotten, so that nothing as large as tokens x vocabulary is ever kept. A model may be looked at through a
plan that is applied live (`Subject`), which is how a baked checkpoint is proven to do what its plan says.

Symbols: B rows, T positions, V vocabulary; p the source's distribution, q the model's.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from moekit.apply.live import live
from moekit.data import Batch, Dataset
from moekit.errors import DataError
from moekit.evaluation.intervals import Interval, ratio_interval
from moekit.families.model import Model
from moekit.families.seam import Call
from moekit.families.tokens import Tokens
from moekit.markup import html_table
from moekit.plans import Plan
from moekit.progress import Progress, silent
from moekit.stream import Stream
from moekit.view import MoEView, Observer

LOGIT_BYTES = 256 << 20  # float32 logits of one batch
ROW_CHUNK = 128  # positions whose log-probabilities are held at once


@dataclass(frozen=True)
class Subject:
    """A model, seen through a plan that is applied live (None: as it is).

    Attributes:
        prompt: tokens at the start of each row that were given and not written, for plans that tell them apart; None:
            all of them.
    """

    model: Model
    plan: Plan | None = None
    prompt: int | None = None


class Watcher(Observer):
    """An observer that is told which batch runs.

    Attributes:
        batch: (number, Batch).
    """

    batch: tuple[int, Batch]


class _Active(Watcher):
    """Counts, by domain, the experts that real tokens run: not slots that stay empty, not constants."""

    def __init__(self, subject: Subject, domains: int):
        layout, replaced = subject.model.layout, subject.plan.replaced() if subject.plan else {}
        self._idle = {
            layer.index: [*layer.constants, *(replaced[layer.index].experts if layer.index in replaced else ())]
            for layer in layout.routed
        }
        self._run, self._tokens = np.zeros(domains), np.zeros(domains)

    def routed(self, call: Call) -> None:
        """Add a layer's choices."""
        batch = self.batch[1]
        ids = call.ids[batch.mask.reshape(-1).to(call.ids.device)]
        idle = torch.tensor([*self._idle[call.layer.index], call.layer.num_experts], device=ids.device)
        self._run[batch.domain] += int((~torch.isin(ids, idle)).sum())
        self._tokens[batch.domain] += len(ids)

    def means(self) -> list[float]:
        """Experts of a token in a layer, by domain."""
        return (self._run / np.maximum(self._tokens, 1)).tolist()


@dataclass(frozen=True)
class DomainScore:
    """One domain's results; intervals are 95%, over sequences.

    Attributes:
        tokens: predicted tokens.
        perplexity: exp of the mean negative log-likelihood.
        kl: mean KL(p || q) in nats a token; None without a source.
        agreement: share of positions where both models' likeliest token is the same; None without a source.
        ratio: perplexity over the source's, paired; None without a source.
        source_perplexity: of the source on the same tokens.
        active_experts: experts that run for a token in an MoE layer, on average; None without a live plan.
    """

    tokens: int
    sequences: int
    perplexity: Interval
    kl: Interval | None = None
    agreement: Interval | None = None
    ratio: Interval | None = None
    source_perplexity: Interval | None = None
    active_experts: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """Results by domain.

    Attributes:
        max_logit_difference: the largest absolute difference of two logits; None without a source.
    """

    domains: Mapping[str, DomainScore]
    max_logit_difference: float | None = None

    def to_dict(self) -> dict:
        """Plain data for JSON."""
        return asdict(self)

    def save(self, file: str | Path) -> Path:
        """Write as JSON."""
        path = Path(file)
        path.write_text(json.dumps(self.to_dict(), indent=1))
        return path

    def __str__(self) -> str:
        lines = [f"{'domain':<14}{'tokens':>9}{'perplexity':>12}{'x source':>10}{'KL':>9}{'same top token':>16}"]
        for name, x in self.domains.items():
            compared = (
                f"{x.ratio.value:>10.3f}{x.kl.value:>9.4f}{x.agreement.value:>16.1%}"
                if x.kl and x.ratio and x.agreement
                else ""
            )
            active = "" if x.active_experts is None else f"   {x.active_experts:.2f} experts a token"
            lines.append(f"{name:<14}{x.tokens:>9,}{x.perplexity.value:>12.3f}{compared}{active}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        names = {
            "tokens": "tokens",
            "perplexity": "perplexity",
            "ratio": "times the source's",
            "kl": "KL, nats",
            "agreement": "same top token",
        }
        known = [name for name in names if any(getattr(x, name) is not None for x in self.domains.values())]
        rows = [(domain, *(getattr(x, name) for name in known)) for domain, x in self.domains.items()]
        return html_table("Evaluation with 95% intervals", ("domain", *(names[x] for x in known)), rows)

    def rows(self) -> list[dict[str, object]]:
        """One flat row a domain, for tables."""
        return [{"domain": name, **asdict(score)} for name, score in self.domains.items()]


@dataclass
class _Sums:
    """Sums of one sequence."""

    tokens: int = 0
    nll: float = 0.0
    source_nll: float = 0.0
    kl: float = 0.0
    agree: int = 0


def evaluate(
    model: Model | Subject,
    data: Dataset,
    *,
    against: Model | Subject | None = None,
    watcher: Watcher | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> Evaluation:
    """Score a model on data, and compare it with another.

    Args:
        model: what to score.
        data: tokenised with the model's tokenizer.
        against: the source to compare with; must have the same vocabulary.
        watcher: sees every MoE call of the source, or without one of the model; None for nobody.
        dtype: to run in; None for each model's own.
        device: "cpu" or "cuda".
        progress: told as layers pass.

    Raises:
        DataError: no domain has a token to predict, or the vocabularies differ.
    """
    subject = model if isinstance(model, Subject) else Subject(model)
    source = Subject(against) if isinstance(against, Model) else against
    if source is not None and source.model.layout.vocab_size != subject.model.layout.vocab_size:
        raise DataError(
            "the two models have different vocabularies",
            expected=source.model.layout.vocab_size,
            got=subject.model.layout.vocab_size,
        )
    batches = split_rows(data, subject.model.layout.vocab_size)
    active = _Active(subject, len(data.domains)) if subject.plan and (source or not watcher) else None
    ours = logits_of(subject, batches, dtype, device, progress, active or (None if source else watcher))
    theirs = logits_of(source, batches, dtype, device, progress, watcher) if source else None
    sums: list[list[_Sums]] = [[] for _ in data.domains]
    largest = 0.0
    with contextlib.closing(ours), contextlib.closing(theirs) if theirs is not None else contextlib.nullcontext():
        for batch in batches:
            mine, other = next(ours), next(theirs) if theirs is not None else None
            for row in range(len(batch.ids)):
                found, difference = _score_row(
                    mine[row], None if other is None else other[row], batch.ids[row], batch.mask[row]
                )
                sums[batch.domain].append(found)
                largest = max(largest, difference)
            del mine, other
    scores = {name: _domain_score(rows, source is not None) for name, rows in zip(data.domains, sums, strict=True)}
    if active:
        scores = {
            name: replace(score, active_experts=mean)
            for (name, score), mean in zip(scores.items(), active.means(), strict=True)
        }
    return Evaluation(scores, largest if source is not None else None)


def logits_of(
    subject: Subject,
    batches: list[Batch],
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    progress: Progress = silent,
    watcher: Watcher | None = None,
) -> Generator[torch.Tensor, None, None]:
    """Logits [B, T, V] of each batch, streamed, with the subject's plan applied live."""
    model, plan = subject.model, subject.plan
    loader = model.loader(dtype, device)
    view = MoEView(loader.model, model.layout)

    def around(_index: int, number: int) -> contextlib.AbstractContextManager:
        if watcher is not None:
            watcher.batch = number, batches[number]
        return view.at(Tokens.of(*batches[number].ids.shape, prompt=subject.prompt, mask=batches[number].mask))

    with (
        live(view, plan, loader) if plan else contextlib.nullcontext(),
        view.watch(watcher) if watcher is not None else contextlib.nullcontext(),
    ):
        yield from Stream(loader, progress=progress).run([x.ids for x in batches], around=around)


def split_rows(data: Dataset, vocab_size: int) -> list[Batch]:
    """The batches of `data`, cut into fewer rows where their logits would be too large."""
    out = []
    for batch in data.batches:
        rows = max(1, LOGIT_BYTES // (4 * vocab_size * batch.ids.shape[1]))
        out += [
            Batch(batch.domain, batch.ids[i : i + rows], batch.mask[i : i + rows])
            for i in range(0, len(batch.ids), rows)
        ]
    return out


def _score_row(
    mine_TV: torch.Tensor, other_TV: torch.Tensor | None, ids_T: torch.Tensor, mask_T: torch.Tensor
) -> tuple[_Sums, float]:
    length = int(mask_T.sum())
    sums = _Sums(tokens=max(0, length - 1))
    largest = 0.0
    for start in range(0, length - 1, ROW_CHUNK):
        stop = min(start + ROW_CHUNK, length - 1)
        target = ids_T[start + 1 : stop + 1, None].to(mine_TV.device)
        logits = mine_TV[start:stop].float()
        q = logits.log_softmax(-1)
        sums.nll -= float(q.gather(1, target).sum())
        if other_TV is not None:
            theirs = other_TV[start:stop].float()
            p = theirs.log_softmax(-1)
            sums.source_nll -= float(p.gather(1, target).sum())
            sums.kl += float((p.exp() * (p - q)).sum())
            sums.agree += int((p.argmax(-1) == q.argmax(-1)).sum())
            largest = max(largest, float((logits - theirs).abs().max()))
    return sums, largest


def _domain_score(rows: list[_Sums], compared: bool) -> DomainScore:
    rows = [x for x in rows if x.tokens]
    if not rows:
        raise DataError("a domain has no token to predict", fix="give longer texts")
    column = {
        name: np.array([getattr(x, name) for x in rows], np.float64)
        for name in ("tokens", "nll", "source_nll", "kl", "agree")
    }
    tokens = column["tokens"]
    basic = DomainScore(int(tokens.sum()), len(rows), ratio_interval(column["nll"], tokens, exponential=True))
    if not compared:
        return basic
    return DomainScore(
        basic.tokens,
        basic.sequences,
        basic.perplexity,
        kl=ratio_interval(column["kl"], tokens),
        agreement=ratio_interval(column["agree"], tokens),
        ratio=ratio_interval(column["nll"] - column["source_nll"], tokens, exponential=True),
        source_perplexity=ratio_interval(column["source_nll"], tokens, exponential=True),
    )
