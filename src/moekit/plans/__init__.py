"""A Plan: what to do to a model, as data that a person can read, compare and keep.

Methods make plans; `moekit.apply` carries them out, on disk (bake) or on a live model (live). A plan names the layout
that it was made for and is checked against it before anything is loaded.
"""

from moekit.plans.base import Op
from moekit.plans.checks import check_droppable, check_feasible, check_merge, check_quantised, check_values
from moekit.plans.counts import drop_lowest, keep_count
from moekit.plans.dynamic import Odp
from moekit.plans.factoring import Factor
from moekit.plans.holding import Hold
from moekit.plans.ops import OUTER, UNQUANTISED, AnyOp, Drop, Group, Merge, Quantize, QuantizeDense, Values
from moekit.plans.plan import ITEMSIZE, Kind, Plan
from moekit.plans.standins import Replace, check_stand_ins, constant_name
from moekit.plans.steering import Scope, Steer, check_steering
from moekit.plans.tensors import PlanTensors

__all__ = [
    "ITEMSIZE",
    "OUTER",
    "UNQUANTISED",
    "AnyOp",
    "Drop",
    "Factor",
    "Group",
    "Hold",
    "Kind",
    "Merge",
    "Odp",
    "Op",
    "Plan",
    "PlanTensors",
    "Quantize",
    "QuantizeDense",
    "Replace",
    "Scope",
    "Steer",
    "Values",
    "check_droppable",
    "check_feasible",
    "check_merge",
    "check_quantised",
    "check_stand_ins",
    "check_steering",
    "check_values",
    "constant_name",
    "drop_lowest",
    "keep_count",
]
