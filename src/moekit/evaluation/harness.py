"""What moekit gives lm-evaluation-harness, and takes from it; the only module that imports `lm_eval`.

A model that fits in memory is transformers' own, in the harness's own `HFLM`. One that does not is run layer by layer:
`StreamedLM` is an `HFLM` too, so that prompts, tokens and truncation are the same, but all requests go through each
layer before the next is read. Log-probabilities are taken in float32 (the harness's default, the model's dtype, makes
ties of bfloat16 logits).
"""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from moekit.data import Batch, load_tokenizer
from moekit.errors import DataError, RecipeError
from moekit.evaluation.compare import LOGIT_BYTES, Subject, logits_of
from moekit.families.model import Model
from moekit.plans import Plan
from moekit.progress import Progress

PASS_BATCHES = 512  # that go through the layers together: each is a thread
STDERR_RESAMPLES = 1000  # for the metrics whose standard error has no formula

Request = tuple[object, list[int], list[int]]  # (its name, tokens before, tokens to score)


class Tasks:
    """Tasks by name, from a folder of one's own or from the harness.

    Args:
        names: of tasks, groups or tags.
        folder: of YAML files; relative paths of data files in them start there. None: the harness's own tasks only.

    Raises:
        RecipeError: no such folder, an unknown name, or a task that runs code of the model's making or needs images.
        DataError: a task's YAML is wrong, or its data cannot be had.
    """

    def __init__(self, names: Sequence[str], folder: Path | None = None):
        if folder is not None and not folder.is_dir():
            raise RecipeError("no such folder of tasks", where=folder, fix="give the folder that holds the YAML files")
        self.names, self.folder = list(dict.fromkeys(names)), folder and folder.resolve()
        self._manager = self._find()
        self.tasks: dict[str, Any] = {}
        self.load()
        for name, task in self.tasks.items():
            for mark, what in (("UNSAFE_CODE", "runs the code that a model writes"), ("MULTIMODAL", "needs images")):
                if getattr(task, mark, False):
                    raise RecipeError(f"the task {name!r} {what}, which moekit does not", fix="use lm-eval itself")

    def _find(self) -> TaskManager:
        """A manager that knows the names; of the folder alone where that is enough (the harness has 14,000 tasks)."""
        if self.folder is not None:
            manager = TaskManager(include_path=str(self.folder), include_defaults=False)
            if set(self.names) <= set(manager.all_subtasks):
                return manager
        manager = TaskManager(include_path=None if self.folder is None else str(self.folder))
        for name in self.names:
            if name not in manager.all_tasks:
                near = difflib.get_close_matches(name, manager.all_tasks, n=1)
                raise RecipeError(
                    f"there is no task {name!r}",
                    where=self.folder or "--tasks",
                    fix=f"did you mean {near[0]!r}?" if near else "`lm-eval ls tasks` lists the harness's own",
                )
        return manager

    def load(self) -> list[Any]:
        """The tasks and groups, made anew: a task keeps what a model has answered."""
        found: list[Any] = []
        for name in self.names:
            try:
                with contextlib.chdir(self.folder or "."):
                    loaded = self._manager.load([name])
            except Exception as error:  # a wrong YAML, a missing file or no network come out as any kind of exception
                raise DataError(
                    f"the task {name!r} cannot be loaded",
                    where=self.folder or "",
                    got=f"{type(error).__name__}: {error}"[:400],
                    fix="check its YAML and its data files (paths start at the task folder); "
                    "data sets of the hub are downloaded once",
                ) from error
            self.tasks |= loaded["tasks"]
            groups = loaded.get("groups", {})
            found += [groups[name]] if name in groups else loaded["tasks"].values()
        return found

    @property
    def generating(self) -> list[str]:
        """Names of those in which the model has to write."""
        return [name for name, task in self.tasks.items() if task.OUTPUT_TYPE == "generate_until"]

    def run(self, lm: HFLM, limit: int | None, num_fewshot: int | None) -> dict[str, Any]:
        """What `lm_eval.simple_evaluate` returns, with samples."""
        found = simple_evaluate(
            model=lm,
            tasks=self.load(),
            task_manager=self._manager,
            limit=limit,
            num_fewshot=num_fewshot,
            bootstrap_iters=STDERR_RESAMPLES,
            log_samples=True,
        )
        return dict(found)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The harness neither prints, nor logs, nor draws bars, nor starts processes to bootstrap or to ask git."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    sink = io.StringIO()
    try:
        with (
            contextlib.redirect_stdout(sink),
            contextlib.redirect_stderr(sink),
            mock.patch.dict(os.environ, {"DISABLE_MULTIPROC": "1"}),
            mock.patch("lm_eval.evaluator.get_git_commit_hash", return_value=None, create=True),
        ):
            yield
    finally:
        logger.setLevel(level)


class _Told(CacheHook):
    """Tells of each answered request; the harness calls it so that answers may be cached."""

    def __init__(self, progress: Progress):
        super().__init__(None)
        self.done, self.total, self._progress = 0, 0, progress

    def add_partial(self, attr: str, req: object, res: object) -> None:
        self.done += 1
        self._progress("requests", self.done, max(self.done, self.total))


class LoadedLM(HFLM):
    """A stock model in memory.

    Args:
        model: from `moekit.open`.
        dtype: to run in.
        device: "cpu" or "cuda".
        batch_size: sequences at once.
        progress: told of each request.
    """

    def __init__(self, model: Model, dtype: torch.dtype | None, device: str, batch_size: int, progress: Progress):
        super().__init__(
            pretrained=model.load(dtype, device),
            backend="causal",
            tokenizer=load_tokenizer(model.path, trust_remote_code=model.trust_remote_code),
            batch_size=batch_size,
            softmax_dtype=torch.float32,
        )
        self._told = _Told(progress)
        self.set_cache_hook(self._told)

    def _loglikelihood_tokens(self, requests: list[Request], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        self._told.total += len(requests)
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def generate_until(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[str]:
        """Texts that go on where the prompts end."""
        self._told.total += len(requests)
        return super().generate_until(requests, *args, **kwargs)


class StreamedLM(HFLM):
    """A stock model, one layer in memory.

    Args:
        model: from `moekit.open`.
        dtype: to run in; None for the model's own.
        device: "cpu" or "cuda".
        progress: told as layers pass.
        plan: applied live.
    """

    def __init__(
        self, model: Model, dtype: torch.dtype | None, device: str, progress: Progress, plan: Plan | None = None
    ):
        self._subject, self._dtype, self._runs_on, self._progress = Subject(model, plan), dtype, device, progress
        super().__init__(
            pretrained=model.loader(dtype).model,  # without weights: for its config
            backend="causal",
            tokenizer=load_tokenizer(model.path, trust_remote_code=model.trust_remote_code),
            batch_size=1 << 30,  # all windows of a rolling task come in one call
            softmax_dtype=torch.float32,
        )

    def _loglikelihood_tokens(self, requests: list[Request], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding gives it) of each request; equal inputs run once."""
        by_input: dict[tuple[int, ...], list[int]] = {}
        for number, (_, before, scored) in enumerate(requests):
            if len(scored) > self.max_length:
                raise DataError(
                    "an answer is longer than the model's context", got=len(scored), expected=self.max_length
                )
            ids = (before + scored)[-(self.max_length + 1) :]
            by_input.setdefault(tuple(ids[:-1]), []).append(number)
        answers: dict[int, tuple[float, bool]] = {}
        batches = self._batches(sorted(by_input, key=lambda x: (-len(x), x)))
        for start in range(0, len(batches), PASS_BATCHES):
            part = batches[start : start + PASS_BATCHES]
            padded = [_padded(rows) for rows in part]
            logits = logits_of(self._subject, padded, self._dtype, self._runs_on, self._progress)
            with contextlib.closing(logits):
                for rows, logits_BTV in zip(part, logits, strict=True):
                    for row, logits_TV in zip(rows, logits_BTV, strict=True):
                        for number in by_input[row]:
                            answers[number] = _answer(logits_TV[: len(row)], requests[number][2])
        return [answers[number] for number in range(len(requests))]

    def _batches(self, inputs: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
        """Inputs, longest first, in batches whose logits are not too large."""
        out: list[list[tuple[int, ...]]] = []
        vocabulary = self._subject.model.layout.vocab_size
        for row in inputs:
            if not out or 4 * vocabulary * len(out[-1][0]) * (len(out[-1]) + 1) > LOGIT_BYTES:
                out.append([])
            out[-1].append(row)
        return out


def _padded(rows: list[tuple[int, ...]]) -> Batch:
    """Padded on the right, where a causal model's earlier tokens do not see it."""
    ids_BT = np.zeros((len(rows), len(rows[0])), np.int64)
    mask_BT = np.zeros_like(ids_BT, bool)
    for number, row in enumerate(rows):
        ids_BT[number, : len(row)], mask_BT[number, : len(row)] = row, True
    return Batch(0, torch.from_numpy(ids_BT), torch.from_numpy(mask_BT))


def _answer(logits_TV: torch.Tensor, scored: list[int]) -> tuple[float, bool]:
    """Of the tokens that the last positions of an input predict."""
    chosen_TV = logits_TV[-len(scored) :].float().log_softmax(-1)
    target_T = torch.tensor(scored, device=chosen_TV.device)
    greedy = bool((chosen_TV.argmax(-1) == target_T).all())
    return float(chosen_TV.gather(1, target_T[:, None]).sum()), greedy
