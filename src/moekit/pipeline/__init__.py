"""A recipe carried out: measure, decide, bake, verify, evaluate, report. Nothing appears at `out` before all is right.

The new model is written and proven in `OUT.unverified` and gets its name at the end; a model that fails its proof is
kept as `OUT.failed`. What a run needs until then lies in `OUT.work`: statistics, and for a recipe of several steps the
model that each step has made, so that an interrupted run goes on where it stopped. Nothing is removed that this program
has not made.
"""

from moekit.pipeline.account import report_of
from moekit.pipeline.budget import choose
from moekit.pipeline.execution import run
from moekit.pipeline.job import PLANNED, Estimate, Job, bytes_after, estimate, prepare
from moekit.pipeline.production import FAILED, WHY_FAILED, produce
from moekit.pipeline.result import Done, Result

__all__ = [
    "FAILED",
    "PLANNED",
    "WHY_FAILED",
    "Done",
    "Estimate",
    "Job",
    "Result",
    "bytes_after",
    "choose",
    "estimate",
    "prepare",
    "produce",
    "report_of",
    "run",
]
