"""What steps will leave, as far as it is known before anything is measured: refused here is what cannot be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from moekit import methods
from moekit.errors import PlanError, RecipeError, UserError
from moekit.families.packings import MIXED, OWN
from moekit.layout import Layout, Part
from moekit.methods import factor
from moekit.methods import replace as replacing
from moekit.methods.budget import fewest, uniform
from moekit.methods.quantize import ways
from moekit.plans import Drop, Merge, Plan, QuantizeDense, Replace, check_stand_ins
from moekit.plans.padding import check_paddable
from moekit.recipe import Step
from moekit.stats import NOT_CARRIED

LIVE = ("steer", "live")  # kinds of methods whose plans are not written


def label(number: int, step: Step) -> str:
    """How a step of several is called: `step 2 (m-smoe)`."""
    return f"step {number} ({step.method})"


@contextmanager
def of_step(number: int, steps: Sequence[Step]) -> Iterator[None]:
    """Let a user's mistake say in which of several steps it is."""
    try:
        yield
    except UserError as error:
        said = f"{label(number, steps[number - 1])}: "
        if len(steps) > 1 and not error.problem.startswith(said):
            raise type(error)(
                said + error.problem, where=error.where, expected=error.expected, got=error.got, fix=error.fix
            ) from error
        raise


def check_steps(steps: Sequence[Step], plan_only: bool = False) -> None:
    """Refuse what is wrong with steps whatever the model.

    Args:
        steps: of a recipe.
        plan_only: no model is to be written: a single step may be one that acts on a running model.

    Raises:
        RecipeError: no such method, option or `keep`; a step after quantising that would change experts; a model
            between two steps that cannot be written; statistics that cannot be carried over the steps before.
    """
    quantised, fewer = 0, ""
    for number, step in enumerate(steps, 1):
        with of_step(number, steps):
            method, *_ = methods.check_options(step.method, step.options)
            methods.check_keep(method, step.keep)
            if method.kind in LIVE and not (plan_only and method.kind == "live" and len(steps) == 1):
                raise RecipeError(
                    f"{step.method!r} acts on a running model and writes none",
                    where="method",
                    expected="a method that prunes, merges, replaces, factors, quantises or heals",
                    fix="make its plan with moekit steer find"
                    if method.kind == "steer"
                    else "let --plan FILE write its plan, alone, and apply that with moekit eval or run",
                )
            if quantised and method.kind != "heal":
                before = steps[quantised - 1].method
                done = "factored" if methods.get(before).kind == "factor" else "quantised"
                raise RecipeError(
                    f"the experts are {done} already",
                    where=f"steps.{number}",
                    expected="what changes experts before what keeps them in another form",
                    got=f"{step.method} after {before}",
                    fix="leave one out" if method.kind == "quantize" else f"write {step.method} before {before}",
                )
            fewer = "" if step.remeasure else fewer
            if fewer and (missing := NOT_CARRIED.intersection(method.needs)):
                raise RecipeError(
                    "what this method reads is not known of a model with fewer experts",
                    where=f"steps.{number}",
                    got=f"{', '.join(sorted(missing))} after {fewer}",
                    fix="add remeasure: true to this step",
                )
            fewer = step.method if method.kind in ("prune", "merge") else fewer
            if method.kind == "quantize" or (method.kind == "factor" and step.options.get("format") != "dense"):
                quantised = number
            if step.spread == "global" and number < len(steps):
                raise RecipeError(
                    "layers would keep different numbers of experts, and the next step needs a model that is written",
                    where=f"steps.{number}.spread",
                    expected="uniform, but in the last step",
                    fix="leave spread out",
                )


def check_written(layout: Layout, steps: Sequence[Step]) -> None:
    """Refuse a last step whose model cannot be written, before anything is measured for it.

    Raises:
        PlanError: layers that would keep different numbers of experts, in a model that stock transformers would then
            not load; layers that cannot be filled up.
    """
    with of_step(len(steps), steps):
        step = steps[-1]
        before = [layout, *expected_layouts(layout, steps)][-2]
        if step.padding == "exact":
            check_paddable(before)
        removes = methods.get(step.method).kind in ("prune", "merge") and len(before.routed) > 1
        if not removes or step.spread != "global" or step.padding == "exact" or step.keep is None:
            return
        counts = uniform(before, step.keep)
        if all(counts[x.index] in (x.num_experts, fewest(x)) for x in before.routed):
            return  # there is nothing to give or to take
        raise PlanError(
            "layers would keep different numbers of experts, which stock transformers cannot load",
            where="spread",
            got="global",
            fix="use spread: uniform, padding: exact where the router has a bias, or plan only and apply it live",
        )


def expected_layouts(layout: Layout, steps: Sequence[Step]) -> list[Layout]:
    """The layout that each step leaves (without lists of tensors): numbers of experts, bytes, bits.

    Raises:
        PlanError: fewer experts than a router needs, or a model that cannot be changed so.
        RecipeError: a spread that the method does not know.
    """
    layouts = []
    for number, step in enumerate(steps, 1):
        with of_step(number, steps):
            layout = layout_after(layout, _supposed(layout, step))
        layouts.append(layout)
    return layouts


def _supposed(layout: Layout, step: Step) -> Plan:
    """A plan as large as the one that the step will make."""
    method = methods.get(step.method)
    plan = Plan(layout_hash=layout.hash)
    methods.check_layout(method, layout, step.spread)
    if method.kind == "quantize":
        plan.ops = [*ways(method, layout, method.settings(step.options))]
        plan.check(layout)
    elif method.kind == "factor":
        plan.ops = [*factor.ways(method, layout, method.settings(step.options))]
        plan.check(layout)
    elif method.kind == "replace" and step.keep is not None:
        plan.ops = [*replacing.supposed(layout, step.keep, method.settings(step.options))]
        check_stand_ins(plan.ops, layout)
    elif step.keep is not None:
        counts = uniform(layout, step.keep)
        if step.padding == "exact" and step.spread == "global":
            return plan  # how large the largest layer stays is not known
        gone = {x.index: tuple(range(counts[x.index], x.num_experts)) for x in layout.routed}
        plan.ops = [Drop(layer=index, experts=experts) for index, experts in gone.items() if experts]
    return plan


def layout_after(layout: Layout, plan: Plan) -> Layout:
    """The layout (without lists of tensors) of the model that a plan makes of one with this layout."""
    layers, parts, gone, replaced = [], dict(layout.parts), 0, plan.replaced()
    for layer in layout.routed:
        ops = [op for op in plan.ops if op.layer == layer.index and not isinstance(op, QuantizeDense)]
        saved, left = _saved(plan, ops, layout), len(plan.kept(layer))
        stands_in = replaced.get(layer.index)
        constant = {*layer.constants, *(stands_in.experts if stands_in and stands_in.format == OWN else ())}
        constants = tuple(new for new, old in enumerate(plan.kept(layer)) if old in constant)
        removing = [op for op in ops if isinstance(op, Drop | Merge | Replace)]
        expert_bytes = layer.expert_bytes - (saved - _saved(plan, removing, layout)) // left
        layers.append(replace(layer, num_experts=left, expert_bytes=expert_bytes, constants=constants, tensors=()))
        share = (layer.num_experts - left) / sum(x.num_experts for x in layout.routed)
        parts["experts"] += Part(-saved, -round(share * layout.parts["experts"].params))
        gone += layer.num_experts - left
    for dense in plan.quantised_dense().values():
        for name, bits in dense.bits.items():
            saved = _saved(plan, [dense.model_copy(update={"bits": {name: bits}})], layout)
            parts[name if name in parts else "embeddings"] += Part(-saved)
    if gone:
        parts["mtp"] = Part()
    else:
        layers += [layer for layer in layout.layers if layer.mtp]
    return replace(layout, layers=tuple(layers), parts=parts, quantisation=_form(plan) or layout.quantisation)


def _saved(plan: Plan, ops: list, layout: Layout) -> int:
    return plan.model_copy(update={"ops": ops}).saved_bytes(layout)


def _form(plan: Plan) -> str | None:
    """What a layout calls the form of a quantised model."""
    if plan.own_form or plan.packed_form is None:
        return OWN if plan.own_form else None
    bits = {op.bits for op in plan.quantised().values()} | {
        x for op in plan.quantised_dense().values() for x in op.bits.values()
    }
    return f"int{bits.pop()}" if len(bits) == 1 else MIXED
