"""The registry: a method is one decorated function in one file, and one line here.

Lines are names and places, so that listing the methods imports none of them; the folder that a method lives in is its
kind.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from moekit.errors import RecipeError, did_you_mean
from moekit.stats import ALL_GROUPS, FIELDS

if TYPE_CHECKING:
    from moekit.plans import Kind

METHODS = {
    "random": "moekit.methods.prune.random:scores",
    "frequency": "moekit.methods.prune.frequency:scores",
    "gate-mass": "moekit.methods.prune.gate_mass:scores",
    "ean": "moekit.methods.prune.ean:scores",
    "man": "moekit.methods.prune.man:scores",
    "reap": "moekit.methods.prune.reap:scores",
    "easy-ep": "moekit.methods.prune.easy_ep:scores",
    "naee": "moekit.methods.prune.naee:kept",
    "m-smoe": "moekit.methods.merge.m_smoe:groups",
    "hc-smoe": "moekit.methods.merge.hc_smoe:groups",
    "ream": "moekit.methods.merge.ream:groups",
    "mone": "moekit.methods.replace.mone:scores",
    "odp": "moekit.methods.live.odp:way",
    "mc-smoe": "moekit.methods.factor.mc_smoe:way",
    "rtn-int8": "moekit.methods.quantize.rtn:int8",
    "rtn-int4": "moekit.methods.quantize.rtn:int4",
    "rtn-int3": "moekit.methods.quantize.rtn:int3",
    "rtn-int2": "moekit.methods.quantize.rtn:int2",
    "gptq-int4": "moekit.methods.quantize.gptq:int4",
    "gptq-int3": "moekit.methods.quantize.gptq:int3",
    "gptq-int2": "moekit.methods.quantize.gptq:int2",
    "mc-moe": "moekit.methods.quantize.mc_moe:way",
    "router-lstsq": "moekit.methods.heal.router_lstsq:sums",
    "distill": "moekit.methods.heal.distill:tuning",
    "router-distill": "moekit.methods.heal.router_distill:tuning",
    "reconstruct": "moekit.methods.heal.reconstruct:tuning",
    "mote": "moekit.methods.steer.mote:find",
    "steermoe": "moekit.methods.steer.steermoe:find",
    "rice": "moekit.methods.steer.rice:find",
    "contrast": "moekit.methods.steer.contrast:find",
}


@dataclass(frozen=True)
class Method:
    """What is known of a method; calling it calls its function.

    Attributes:
        name: as in the registry.
        kind: what it does, and the folder that it lives in: "prune", "merge", "factor", "quantize", "heal", "steer" ...
        needs: names of `moekit.stats.FIELDS` that it reads.
        summary: one line for lists.
        paper: title and arXiv id; empty for baselines without one.
        options: its settings with their defaults, from the function's keyword-only arguments.
        function: what it computes; the arguments are those of its kind.
        most_experts: the largest layer that it can take; such a pruning method chooses sets, others score. 0: any.
        choices: the possible values of options that are one of a few.
    """

    name: str
    kind: Kind
    needs: tuple[str, ...]
    summary: str
    paper: str
    options: Mapping[str, Any]
    function: Callable[..., Any]
    most_experts: int = 0
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.function(*args, **options)

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of statistics to measure for it: "scores" always, for super experts and what notes report; none
        for factoring, quantising and healing, which keep all experts.
        """
        if self.kind in ("factor", "quantize", "heal") and not self.needs:
            return ()
        return tuple(x for x in ALL_GROUPS if x == "scores" or any(FIELDS[name][0] == x for name in self.needs))

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All its options: those given, checked, over the defaults.

        Raises:
            RecipeError: no such option, a value of another type than the default's, or none of the few possible ones.
        """
        for key, value in given.items():
            if key not in self.options:
                fix = did_you_mean(key, self.options) if self.options else "leave it out"
                raise RecipeError(f"the method {self.name!r} has no option {key!r}", where=f"options.{key}", fix=fix)
            wanted = type(self.options[key])
            if type(value) is not wanted and not (wanted is float and type(value) is int):
                raise RecipeError(
                    f"an option of the method {self.name!r} has the wrong type",
                    where=f"options.{key}",
                    expected=f"{wanted.__name__}, as {self.options[key]!r}",
                    got=repr(value),
                )
            if value not in (possible := self.choices.get(key, (value,))):
                raise RecipeError(
                    f"the method {self.name!r} has no {key} {value!r}",
                    where=f"options.{key}",
                    expected=" or ".join(possible),
                    fix=did_you_mean(value, possible),
                )
        return dict(self.options) | dict(given)


def method(
    name: str, *, kind: Kind, needs: tuple[str, ...] = (), summary: str, paper: str = "", most_experts: int = 0
) -> Callable[[Callable[..., Any]], Method]:
    """Declare the decorated function to be a method; see `Method` for the arguments."""

    def declare(function: Callable[..., Any]) -> Method:
        keywords = [x for x in inspect.signature(function).parameters.values() if x.kind is x.KEYWORD_ONLY]
        options = {x.name: x.default for x in keywords}
        literal = [x.name for x in keywords if str(x.annotation).startswith("Literal[")]
        types = get_type_hints(function) if literal else {}
        choices = {name: get_args(types[name]) for name in literal}
        return Method(name, kind, needs, summary, paper, options, function, most_experts, choices)

    return declare


def get(name: str) -> Method:
    """The method of that name.

    Raises:
        RecipeError: no such method.
    """
    if name not in METHODS:
        raise RecipeError(f"there is no method {name!r}", where="method", fix=did_you_mean(name, METHODS))
    module, _, attribute = METHODS[name].partition(":")
    return vars(import_module(module))[attribute]


def names(kind: str | None = None) -> tuple[str, ...]:
    """Names of all methods, or of those of one kind, in the registry's order."""
    return tuple(name for name, place in METHODS.items() if kind in (None, place.split(".")[2]))
