"""One generation loop for all decoding methods: several passes over several texts, each with a cache of its own.

A runner is a live model with branches: ways of reading the same text (as it is, weakened, steered, behind another
prompt). All branches of all texts are rows of one batch, told apart by tags. A method says how the logits of all
branches of all runners become one distribution; one token is drawn from it for each text and given to every branch.

Symbols: B texts, R branches, S columns, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moekit.errors import DataError
from moekit.families.resident import empty_cache
from moekit.families.tokens import Tokens
from moekit.layout import Layout
from moekit.progress import Progress, silent
from moekit.serve.sampling import Sampling, choose
from moekit.view import MoEView

# What a branch changes, for the rows with a tag.
BranchChange = Callable[[MoEView, int], AbstractContextManager[Any]]
# Logits [B, V] of all branches, runner by runner, to scores [B, V].
Combine = Callable[[Sequence[torch.Tensor]], torch.Tensor]


@dataclass(frozen=True)
class Branch:
    """One way of reading the texts.

    Attributes:
        change: what is different; None: nothing.
        before: token ids that stand in front of each prompt.
    """

    change: BranchChange | None = None
    before: tuple[int, ...] = ()


class Runner:
    """A live model that reads each text in several branches.

    Args:
        model: a stock model in eval mode.
        layout: its layout.
        branches: at least one.
    """

    def __init__(self, model: nn.Module, layout: Layout, branches: Sequence[Branch] = (Branch(),)):
        self.model, self.branches = model, tuple(branches)
        self.view = MoEView(model, layout)

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end a text."""
        found = self.model.generation_config.eos_token_id
        return frozenset([] if found is None else [found] if isinstance(found, int) else found)

    @contextmanager
    def changed(self) -> Iterator[None]:
        """What the branches change is in force."""
        with ExitStack() as stack:
            for tag, branch in enumerate(self.branches):
                if branch.change is not None:
                    stack.enter_context(branch.change(self.view, tag))
            yield

    def start(self, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Read the prompts, padded on the left; logits [B, V] of what follows, by branch."""
        rows = [[*branch.before, *prompt] for branch in self.branches for prompt in prompts]
        width = max(map(len, rows))
        self._cache, self._count = empty_cache(self.model), len(prompts)
        self._tags = torch.arange(len(self.branches)).repeat_interleave(len(prompts))
        self._prompt, self._past = width, 0
        self._padded = any(len(row) < width for row in rows)
        self._mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
        return self._run(ids)

    def step(self, tokens_B: torch.Tensor) -> list[torch.Tensor]:
        """Read one more token of each text; logits as of `start`."""
        if self._padded:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], 1)
        return self._run(tokens_B.repeat(len(self.branches))[:, None])

    def _run(self, ids_RS: torch.Tensor) -> list[torch.Tensor]:
        device, columns = self.model.get_input_embeddings().weight.device, ids_RS.shape[1]
        padding: dict[str, torch.Tensor] = {}
        if self._padded:
            places = (self._mask.cumsum(-1) - 1).clamp_min(0)[:, self._past :]
            padding = {"attention_mask": self._mask.to(device), "position_ids": places.to(device)}
        tokens = Tokens.of(
            *ids_RS.shape,
            past=self._past,
            prompt=self._prompt,
            mask=self._mask if self._padded else None,
            tags=self._tags,
        )
        with self.view.at(tokens):
            out = self.model(
                input_ids=ids_RS.to(device), past_key_values=self._cache, use_cache=True, logits_to_keep=1, **padding
            )
        self._past += columns
        return list(out.logits[:, -1].cpu().split(self._count))


def first(logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """No method: the first branch's own logits."""
    return logits[0]


@torch.inference_mode()
def decode(
    runners: Sequence[Runner],
    prompts: Sequence[Sequence[int]],
    combine: Combine = first,
    *,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    batch_size: int = 8,
    finished: Callable[[list[int]], bool] | None = None,
    progress: Progress = silent,
) -> list[list[int]]:
    """Continue texts.

    Args:
        runners: the first one's end-of-text tokens end a text.
        prompts: token ids.
        combine: what the logits of all branches say together.
        max_new_tokens: of a text, at most.
        sampling: how tokens are chosen; None: the likeliest. Text n is drawn with seed + n, whatever the batch.
        batch_size: texts that are continued together. Rows of different lengths are padded on the left.
        finished: whether a text ends with what was written so far.
        progress: told in texts.

    Returns:
        Token ids that were written, without the one that ends the text.

    Raises:
        DataError: no prompts, an empty one, or a setting out of range.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise DataError("at least one token and one text are needed", got=f"{max_new_tokens} and {batch_size}")
    if not prompts or not all(len(x) for x in prompts):
        raise DataError("there is nothing to continue", expected="prompts of at least one token", got=len(prompts))
    settings = sampling or Sampling()
    ends = runners[0].ends
    written: list[list[int]] = []
    with ExitStack() as stack:
        for runner in runners:
            stack.enter_context(runner.changed())
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            draws = [torch.Generator().manual_seed(settings.seed + start + row) for row in range(len(batch))]
            rows: list[list[int]] = [[] for _ in batch]
            active = [True] * len(batch)
            logits = [x for runner in runners for x in runner.start(batch)]
            for count in range(max_new_tokens):
                scores_BV = combine(logits)
                tokens = [
                    choose(scores, settings, draw) if on else 0
                    for scores, draw, on in zip(scores_BV, draws, active, strict=True)
                ]
                for row, token in enumerate(tokens):
                    if active[row] and token not in ends:
                        rows[row].append(token)
                    active[row] &= token not in ends and not (finished is not None and finished(rows[row]))
                if not any(active) or count + 1 == max_new_tokens:
                    break
                logits = [x for runner in runners for x in runner.step(torch.tensor(tokens))]
            written += rows
            progress("texts", len(written), len(prompts))
    return written
