"""What a run has made, of each of its steps and in all."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from moekit.apply.bake import Baked
from moekit.evaluation import Evaluation
from moekit.evaluation.coverage import Coverage
from moekit.evaluation.verify import Verification
from moekit.plans import Plan
from moekit.stats import Stats


@dataclass(frozen=True)
class Done:
    """What one step has made.

    Attributes:
        plan: what was decided.
        baked: what was written; None when only planned.
        verification: proof that the files do what the plan says; None where it was not wanted.
        seconds: by stage.
    """

    plan: Plan
    baked: Baked | None = None
    verification: Verification | None = None
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(repr=False)
class Result:
    """What a run made.

    Attributes:
        plan: what was done; of several steps the last one's.
        stats: what it was decided from; None where the plan was given.
        path: the new model; None when only planned.
        baked: what was written, against the model before all steps.
        verification: proof that the files do what the plan says.
        evaluation: the new model against its source, by domain.
        coverage: what the calibration text says of experts, and whether it speaks for the evaluation text; None where
            the plan was given or needs no statistics.
        seconds: by stage, of all steps together.
        steps: what each step made.
    """

    plan: Plan
    stats: Stats | None = None
    path: Path | None = None
    baked: Baked | None = None
    verification: Verification | None = None
    evaluation: Evaluation | None = None
    coverage: Coverage | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    steps: list[Done] = field(default_factory=list)

    def __repr__(self) -> str:
        proof = self.verification
        said = "not verified" if proof is None else f"verified, logits within {proof.max_difference:.2g}"
        size = f"{self.baked.bytes_before:,} -> {self.baked.bytes_after:,} bytes, " if self.baked else ""
        return f"<Result {self.path}: {size}{said}>"
