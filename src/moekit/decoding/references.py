"""A reference set: questions that a model answers right by itself, each with the pathway that it took (for C3PO).

A folder: references.json (model, settings, prompts and answers as token ids) and references.safetensors (`embedding`
[N, D], and for each layer `pathway.L` [N, E]: scores of all experts at the prompt's last token), float32.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moekit.arrays import read_arrays, write_arrays
from moekit.checkpoint.place import check_place, replace, write_text
from moekit.data import load_tokenizer
from moekit.decoding.loop import Runner, decode
from moekit.decoding.pathways import Pathway, read
from moekit.decoding.questions import Marking, Question, accuracy
from moekit.errors import DataError
from moekit.families.model import Model
from moekit.progress import Progress, silent

HEAD, ARRAYS = "references.json", "references.safetensors"


@dataclass(frozen=True)
class References:
    """Questions that were answered right, N of them.

    Attributes:
        prompts: token ids.
        answers: token ids that the model wrote, with the text that ends the answer, if there was one.
        pathways: by decoder layer index, [N, E].
        embeddings: [N, D].
        manifest: model, settings, how many were asked.
    """

    prompts: list[list[int]]
    answers: list[list[int]]
    pathways: Pathway
    embeddings: torch.Tensor
    manifest: dict[str, Any]

    def __len__(self) -> int:
        return len(self.prompts)

    @cached_property
    def directions(self) -> torch.Tensor:
        """Embeddings less their mean, each of length one [N, D]."""
        return self.direction(self.embeddings)

    def direction(self, embedding: torch.Tensor) -> torch.Tensor:
        """An embedding [..., D] less the references' mean, of length one: only what tells texts apart is compared."""
        return torch.nn.functional.normalize(embedding - self.embeddings.mean(0), dim=-1)

    @classmethod
    def load(cls, folder: str | Path, model: Model | None = None) -> References:
        """What `build` wrote.

        Raises:
            DataError: not such a folder, damaged, or of another model than `model`.
        """
        path = Path(folder)
        try:
            head = json.loads((path / HEAD).read_text(encoding="utf-8"))
            prompts, answers = head.pop("prompts"), head.pop("answers")
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                "this is no reference set",
                where=path,
                got=str(error)[:200],
                fix="make one: moekit steer reference MODEL --data qa.jsonl --out DIR",
            ) from None
        if model is not None and (head["layout"], head["fingerprint"]) != (model.layout.hash, model.fingerprint):
            raise DataError(
                "the reference set is of another model",
                where=path,
                expected=f"{model.layout.hash} {model.fingerprint}",
                got=f"{head['layout']} {head['fingerprint']}",
                fix="make one with this model: moekit steer reference",
            )
        arrays = {name: torch.from_numpy(np.array(x)) for name, x in read_arrays(path / ARRAYS).items()}
        pathways = {int(name.partition(".")[2]): x for name, x in arrays.items() if name.startswith("pathway.")}
        return cls(prompts, answers, pathways, arrays["embedding"], head)


def build(
    model: Model,
    questions: Sequence[Question],
    out: str | Path,
    *,
    marking: Marking | None = None,
    max_new_tokens: int = 64,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    batch_size: int = 1,
    progress: Progress = silent,
) -> References:
    """Let a model answer questions, greedily, and keep those that it answers right.

    Args:
        model: from `moekit.open`; it is loaded into memory.
        questions: with answers.
        out: a new folder.
        marking: where an answer ends and what of it counts; None: its first line.
        max_new_tokens: of an answer, at most.
        dtype: to run in; None for the model's own.
        device: "cpu" or "cuda".
        batch_size: questions that are answered together.
        progress: told in texts, then in pathways.

    Raises:
        DataError: no question is answered right.
        OutputError: `out` is taken.
    """
    rule, final = marking or Marking(), Path(out).absolute()
    rule.check()
    check_place(final, overwrite=False)
    tokenizer = load_tokenizer(model.path, trust_remote_code=model.trust_remote_code)
    prompts = [tokenizer(x.prompt).input_ids for x in questions]
    loaded = model.load(dtype, device)
    runner = Runner(loaded, model.layout)
    written = decode(
        [runner],
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        finished=rule.finished(tokenizer),
        progress=progress,
    )
    marks = accuracy([tokenizer.decode(x, skip_special_tokens=True) for x in written], questions, rule)
    kept = [row for row, right in enumerate(marks) if right]
    if not kept:
        raise DataError(
            "the model answers none of the questions right, so there is nothing to refer to",
            expected="answers like the model's, cut by --stop and --extract",
            got=f"{len(questions)} questions; the first: {tokenizer.decode(written[0])[:60]!r}, not "
            f"{questions[0].answer!r}",
            fix="give easier questions, or say how an answer is written",
        )
    found = []
    for count, row in enumerate(kept, 1):
        found.append(read(loaded, runner.view, prompts[row]))
        progress("pathways", count, len(kept))
    references = References(
        [list(prompts[row]) for row in kept],
        [written[row] for row in kept],
        {index: torch.stack([pathway[index] for pathway, _ in found]) for index in found[0][0]},
        torch.stack([embedding for _, embedding in found]),
        {
            "layout": model.layout.hash,
            "fingerprint": model.fingerprint,
            "dtype": str(dtype or model.dtype).removeprefix("torch."),
            "asked": len(questions),
            "questions": hashlib.sha256(json.dumps([[x.prompt, x.answer] for x in questions]).encode()).hexdigest(),
            "stop": rule.stop,
            "extract": rule.extract,
            "max_new_tokens": max_new_tokens,
        },
    )
    _save(references, final)
    return references


def _save(references: References, final: Path) -> None:
    folder = final.with_name(final.name + ".partial")
    folder.mkdir(exist_ok=True)
    arrays = {f"pathway.{index}": x.numpy() for index, x in references.pathways.items()}
    write_arrays(folder / ARRAYS, {"embedding": references.embeddings.numpy()} | arrays)
    head = references.manifest | {"prompts": references.prompts, "answers": references.answers}
    write_text(folder / HEAD, json.dumps(head))
    replace(folder, final)
