"""Plans that requests choose by name, each in force for its own rows of a batch only."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch

from moekit.apply.steer import steering
from moekit.errors import PlanError
from moekit.families.tokens import Tokens
from moekit.plans import Plan
from moekit.view import MoEView


class Steering:
    """Loaded steering plans.

    A plan's edits are on the model as long as a text that chose it is kept, and find its rows by its number (tag).
    Without such a text nothing is on the model, and nothing is slower.

    Args:
        view: of the model.
        plans: by the name that requests give.

    Raises:
        PlanError: a plan for another model, one that the routers cannot follow, or that does more than steer.
    """

    def __init__(self, view: MoEView, plans: Mapping[str, Plan]):
        for name, plan in plans.items():
            plan.check(view.layout)
            if not plan.steers() or len(plan.steers()) < len(plan.ops):
                raise PlanError(
                    "a request can only choose a plan that steers",
                    where=name,
                    expected="ops that steer",
                    got=sorted({op.op for op in plan.ops}) or "no ops",
                    fix="bake the other ops into the model before it is packed",
                )
        self._view, self._plans = view, dict(plans)
        self._tags = {name: number for number, name in enumerate(plans, 1)}
        self._now: frozenset[str] = frozenset()
        self._stack = ExitStack()

    @property
    def names(self) -> list[str]:
        """Of the plans."""
        return sorted(self._plans)

    def use(self, names: Collection[str]) -> None:
        """Have these plans on the model, and no others."""
        if self._now == frozenset(names):
            return
        self.close()
        for name in sorted(names):
            self._stack.enter_context(steering(self._view, self._plans[name].steers(), self._tags[name]))
        self._now = frozenset(names)

    @contextmanager
    def running(self, names: list[str | None], starts: list[int], prompts: list[int], columns: int) -> Iterator[None]:
        """Say which tokens a forward is made of.

        Args:
            names: the plan of each row; None: none.
            starts: place of each row's first token in its text.
            prompts: tokens of each row's prompt.
            columns: tokens of each row.
        """
        if not self._now:
            yield
            return
        places_BS = torch.tensor(starts)[:, None] + torch.arange(columns)
        tags_BS = torch.tensor([self._tags[x] if x else 0 for x in names])[:, None].expand_as(places_BS)
        written_BS = places_BS >= torch.tensor(prompts)[:, None]
        with self._view.at(Tokens(places_BS.reshape(-1), written_BS.reshape(-1), tags_BS.reshape(-1))):
            yield

    def close(self) -> None:
        """Take all edits off the model."""
        self._stack.close()
        self._now = frozenset()
