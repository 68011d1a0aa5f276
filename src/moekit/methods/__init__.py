"""Methods: what decides, from statistics alone, what to do to a model. Each is one file and returns its part of a Plan.

`names` and `get` look methods up; `make_plan` runs one.
"""

from moekit.methods._driver import SOLVED_ROWS, check_common, check_keep, check_layout, check_options, make_plan
from moekit.methods._registry import METHODS, Method, get, method, names
from moekit.methods.prune import removed_gate_mass
from moekit.methods.super_experts import peaks, super_experts

__all__ = [
    "METHODS",
    "SOLVED_ROWS",
    "Method",
    "check_common",
    "check_keep",
    "check_layout",
    "check_options",
    "get",
    "make_plan",
    "method",
    "names",
    "peaks",
    "removed_gate_mass",
    "super_experts",
]
