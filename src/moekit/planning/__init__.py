"""What to do for a budget of bytes, when no method is named.

rest, held = hold_out(calibration)
stats = measure(model, rest, groups=groups(model.layout))
choice = plan_for_budget(model, stats, held, 8_000_000_000)
print(choice)                    # what, and why
choice.steps                     # of a recipe
choice.frontier.save("folder")   # bytes against predicted error: a plot, a table, all points
"""

from moekit.planning.candidates import Candidate, candidates, groups
from moekit.planning.choose import Choice, check_budget, plan_for_budget
from moekit.planning.frontier import Frontier, Point
from moekit.planning.heldout import hold_out
from moekit.planning.refine import Fitting
from moekit.planning.shortlist import shortlist

__all__ = [
    "Candidate",
    "Choice",
    "Fitting",
    "Frontier",
    "Point",
    "candidates",
    "check_budget",
    "groups",
    "hold_out",
    "plan_for_budget",
    "shortlist",
]
