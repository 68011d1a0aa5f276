"""Router rows by least squares: the student's router inputs and the source's logits, added up a layer at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from moekit import methods
from moekit.errors import PlanError
from moekit.families.model import Model
from moekit.families.seam import RouterTap
from moekit.fitting.decide import Fit
from moekit.fitting.heal.folder import FitFolder
from moekit.fitting.heal.learner import put, teacher_of, text_of, to_tune
from moekit.fitting.heal.lineage import Groups, follow, origins
from moekit.fitting.heal.lockstep import Pair, side_by_side
from moekit.layout import MoELayer
from moekit.methods.heal.router_lstsq import RowSums, together
from moekit.plans import Plan

METHOD = "router-lstsq"
RELATIVE = 0.02  # how closely rows must give the logits that were seen, of the largest: bfloat16 rounds


def plan(fit: Fit, *, name: str, options: Mapping[str, Any], domain: str | list[str] | None, **_: Any) -> Plan:
    """New router rows for a model whose experts were dropped or merged.

    Args:
        fit: what it may use.
        name: "router-lstsq".
        options: of the method.
        domain: whose text counts.

    Raises:
        PlanError: it is not known which experts of the source the model's are, or its routers have no rows.
        UserError: see `moekit.fitting.heal.learner`.
    """
    settings = methods.check_options(name, options)[2]
    teacher = teacher_of(fit, settings)
    made = Plan(layout_hash=fit.model.layout.hash, method=name, settings={"domain": domain, **settings})
    made.made_from = {"model": fit.model.name, "teacher": teacher.name, "data": fit.data.describe()}
    return _solved(fit, teacher, made, None, origins(teacher, fit.model), settings, domain)


def repaired(fit: Fit, merge: Plan, domain: str | list[str] | None) -> Plan:
    """A plan that merges experts, with router rows for the merged ones solved on the model as it is with them.

    Args:
        fit: what it may use.
        merge: the plan; its rows are those of the dominant experts.
        domain: whose text counts.
    """
    made = merge.model_copy(update={"ops": list(merge.ops), "notes": list(merge.notes)})
    made.settings = {**merge.settings, "router": "least-squares"}
    groups = follow(fit.model.layout, [merge])
    return _solved(fit, fit.model, made, merge, groups, methods.get(METHOD).settings({}), domain)


def _solved(
    fit: Fit,
    teacher: Model,
    made: Plan,
    live: Plan | None,
    groups: Groups,
    settings: Mapping[str, Any],
    domain: str | list[str] | None,
) -> Plan:
    """`made`, with new rows; the student runs under the plan `live`."""
    folder = FitFolder(fit, teacher.fingerprint, {**made.settings, "method": made.method, "domain": domain})
    batches = text_of(fit, domain)
    errors: dict[int, list[float]] = {}
    pairs = side_by_side(
        teacher,
        fit.model,
        batches,
        frozenset({"logits"}),
        plan=live,
        dtype=fit.dtype,
        device=fit.device,
        progress=fit.progress,
    )
    for pair in pairs:
        index = pair.layer.index
        if (found := folder.found(index)) is None:
            kept = live.kept(pair.layer) if live else tuple(range(pair.layer.num_experts))
            tensors, record = _layer(pair, [x.mask.reshape(-1) for x in batches], kept, groups[index], settings)
            found = folder.finish(index, tensors, record)
        put(pair.loader.model, found[0])
        errors[index] = found[1]["errors"]
    folder.add_values(made, sorted(errors))
    made.measured |= {"router_error": {str(index): x for index, x in errors.items()}}
    made.notes.append(
        "mean squared error of the router logits by layer, before and after: "
        + ", ".join(f"{index}: {before:.3g} -> {after:.3g}" for index, (before, after) in errors.items())
    )
    return made


def _layer(
    pair: Pair,
    masks: Sequence[torch.Tensor],
    kept: Sequence[int],
    groups: Sequence[Sequence[int]],
    settings: Mapping[str, Any],
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(new tensors of a layer's router as the disk will hold them, or none; what is to be told)."""
    layer, model = pair.layer, pair.loader.model
    sums: RowSums | None = None
    keys: tuple[str, str | None] = ("", None)
    for number, mask in enumerate(masks):
        inputs_TD, logits_TE = _router_call(pair, number)
        if sums is None:
            keys = _rows_and_bias(pair, inputs_TD, logits_TE)
            sums = methods.get(METHOD)(keys[1] is not None, **settings)
        real = mask.to(logits_TE.device)
        wanted_TG = together(pair.seen.logits[number][real], groups, layer.router.score, settings["target"])
        sums.add(inputs_TD[real], logits_TE[real][:, list(kept)], wanted_TG)
    assert sums is not None, "a dataset has batches"
    change_GD = sums.solve()
    before, after = sums.errors(change_GD)
    if not change_GD.any():
        return {}, {"errors": [before, after]}
    out = {}
    for key, part in ((keys[0], change_GD[:, : inputs_TD.shape[1]]), (keys[1], change_GD[:, -1])):
        if key is not None:
            value = model.get_parameter(key).detach().double()
            rows = value if value.shape[0] == layer.router_width else value.movedim(-1, 0)
            rows[list(kept)] += part
            name = pair.loader.placements(layer.index)[key][0].name
            out[key] = value.to(pair.loader.on_disk(name)).cpu()
    return out, {"errors": [before, after]}


class _Enough(BaseException):
    """The router's map has run, nothing else of the layer is needed; not an Exception, so that no family catches it."""


class _InputTap(RouterTap):
    """Notes what the router's linear map was given, too."""

    inputs: torch.Tensor

    def __torch_function__(self, func, types, args=(), kwargs=None):
        waiting = self.logits is None
        out = super().__torch_function__(func, types, args, kwargs)
        if waiting and self.logits is not None:
            self.inputs = args[1] if func is torch.addmm else args[0]
            raise _Enough
        return out


@contextmanager
def _tapped(router: torch.nn.Module, tap: _InputTap) -> Iterator[None]:
    """Run the router's forward, with whatever is done to it, under a tap."""
    before, now = vars(router).get("forward"), router.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with tap:
            return now(*args, **kwargs)

    router.forward = forward
    try:
        yield
    finally:
        del router.forward
        if before is not None:
            router.forward = before


@torch.inference_mode()
def _router_call(pair: Pair, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(inputs [T, D] of the student's router map on a batch, its raw logits [T, E])."""
    tap = _InputTap(pair.layer.router_width)
    try:
        with _tapped(pair.view.router(pair.layer.index), tap):
            pair.stop.run(number)
    except _Enough:
        assert tap.logits is not None
        logits = tap.logits.reshape(-1, tap.logits.shape[-1])
        return tap.inputs.reshape(len(logits), -1), logits[:, : pair.layer.num_experts]
    raise _no_rows(pair.layer)


@torch.no_grad()
def _rows_and_bias(pair: Pair, inputs_TD: torch.Tensor, logits_TE: torch.Tensor) -> tuple[str, str | None]:
    """The parameters that make these logits of these inputs: (rows, bias or None)."""
    width, depth = pair.layer.router_width, inputs_TD.shape[1]
    model, keys = pair.loader.model, to_tune(pair.loader, pair.layer, "routers")
    shapes = {key: tuple(model.get_parameter(key).shape) for key in keys}
    biases = [key for key in keys if shapes[key] == (width,)] if pair.layer.router.logit_bias else []
    for key in keys:
        if shapes[key] not in ((width, depth), (depth, width)):
            continue
        rows = model.get_parameter(key).float()
        product = inputs_TD.float() @ (rows.T if shapes[key] == (width, depth) else rows)
        for bias in (*biases, None):
            made = product + model.get_parameter(bias).float() if bias else product
            difference = (made[:, : logits_TE.shape[1]] - logits_TE.float()).abs().max()
            if difference <= RELATIVE * logits_TE.float().abs().max():
                return key, bias
    raise _no_rows(pair.layer)


def _no_rows(layer: MoELayer) -> PlanError:
    return PlanError(
        "this router's logits are not its rows times its input",
        where=layer.router_path,
        fix="use router-distill, which follows whatever a router computes",
    )
