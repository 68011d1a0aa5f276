"""The errors that moekit raises for a user's mistake: where, what was expected, what was found, how to fix it.

Everything that a user can cause (a wrong path, a recipe typo, a corrupt file, a full disk) is a `UserError` of one of
the kinds below; the command line prints it on one screen and exits with 2. Any other exception is moekit's own bug: the
command line says so and exits with 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can mend.

    Args:
        problem: one sentence, what is wrong.
        where: the file, option, tensor or key concerned.
        expected: what would have been right.
        got: what was found.
        fix: what to do about it.
    """

    kind = "error"

    def __init__(self, problem: str, *, where: object = "", expected: object = "", got: object = "", fix: str = ""):
        self.problem, self.where, self.expected, self.got, self.fix = problem, where, expected, got, fix
        super().__init__(str(self))

    def __str__(self) -> str:
        rows = [("where", self.where), ("expected", self.expected), ("got", self.got), ("fix", self.fix)]
        return "\n".join([self.problem, *(f"  {name + ':':<10}{value}" for name, value in rows if str(value))])

    def __reduce__(self):
        return _rebuild, (type(self), self.problem, self.where, self.expected, self.got, self.fix)


def _rebuild(kind: type[UserError], problem: str, where: object, expected: object, got: object, fix: str) -> UserError:
    return kind(problem, where=where, expected=expected, got=got, fix=fix)


class ModelError(UserError):
    """The model cannot be used: not found, dense, of a family that moekit does not support, or of a refused format."""

    kind = "model"


class CheckpointError(UserError):
    """The files of a checkpoint are corrupt, truncated, missing, or contradict each other."""

    kind = "checkpoint"


class DataError(UserError):
    """The text given cannot be used: missing, empty, not text, or too short."""

    kind = "data"


class RecipeError(UserError):
    """A recipe or an option is wrong: unknown key, wrong type, impossible value."""

    kind = "recipe"


class PlanError(UserError):
    """A plan does not fit the model that it is applied to, or asks for what the model cannot do."""

    kind = "plan"


class OutputError(UserError):
    """The output cannot be written: the folder is not empty, the disk is full, or it belongs to another job."""

    kind = "output"


class VerificationError(UserError):
    """What was written does not behave as the plan says; the output is kept aside and marked."""

    kind = "verification"


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`"did you mean 'x'?"` for the nearest of `choices`, else the list of choices."""
    options = sorted(choices)
    near = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"one of: {', '.join(options)}"
