"""What must be true of files and config together, checked from headers before anything is loaded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

from transformers import PreTrainedModel

from moekit.checkpoint.reader import DTYPES, Checkpoint
from moekit.errors import CheckpointError, ModelError
from moekit.families.names import SCALES, Placement


def check_complete(checkpoint: Checkpoint, model: PreTrainedModel, placed: dict[str, Placement]) -> None:
    """CheckpointError when the stock model has parameters that no tensor on disk fills (tied ones are free)."""
    filled = {key for x in placed.values() for key in x.keys} | set(getattr(model, "all_tied_weights_keys", {}))
    absent = sorted(name for name, _ in model.named_parameters() if name not in filled)
    if absent:
        raise CheckpointError(
            f"{len(absent)} parameters of the model are not on disk",
            where=checkpoint.path,
            got=f"no tensor for {absent[0]!r}",
            fix="the checkpoint is incomplete; download it again",
        )


def check_numbers(checkpoint: Checkpoint, model: PreTrainedModel, placed: dict[str, Placement]) -> None:
    """Hold tensors that are only renamed to the model's shapes, and weights to known ways of quantisation.

    Raises:
        CheckpointError: config.json asks for another shape.
        ModelError: a weight is quantised in a way that the config does not tell and moekit does not know.
    """
    scaled = {x.weight for x in placed.values() if x.suffix in SCALES}
    state = model.state_dict()
    for placement in placed.values():
        info, target = checkpoint.tensors[placement.name], state[placement.key]
        packed = not DTYPES[info.dtype].is_floating_point and target.is_floating_point()
        bare = info.dtype.startswith("F8") and placement.name not in scaled
        if not placement.suffix and (packed or bare):
            raise ModelError(
                "this weight is quantised in a way that is not supported",
                where=f"{checkpoint.path}: {placement.name}",
                expected="floating-point numbers, fp8 with block scales, mxfp4 blocks and scales, or packed integers",
                got=f"{info.dtype} {list(info.shape)}" + (" without scales" if bare else ""),
                fix="use the unquantised checkpoint and quantise the result",
            )
        whole = placement.converter is None and placement.expert is None and not placement.suffix
        if whole and tuple(info.shape) != tuple(target.shape):
            raise CheckpointError(
                "a tensor has not the shape that config.json asks for",
                where=f"{checkpoint.path}: {placement.name}",
                expected=list(target.shape),
                got=list(info.shape),
                fix="config.json and weights belong to different models",
            )


def check_experts(
    checkpoint: Checkpoint,
    placements: list[Placement],
    count: int,
    of_own_width: bool = False,
    constants: Collection[int] = (),
) -> None:
    """Refuse a layer of which not every one of `count` experts has every tensor, or which has more.

    Args:
        checkpoint: for the message.
        placements: of the layer's tensors.
        count: number of experts.
        of_own_width: experts may be packed or not, one by one.
        constants: experts that have none of these tensors.

    Raises:
        CheckpointError: see above.
    """
    found = defaultdict(set)
    for placement in placements:
        if placement.expert is not None:
            suffix = "" if of_own_width else placement.suffix
            found[placement.key, placement.pattern, suffix].add(placement.expert)
    for (key, pattern, suffix), experts in found.items():
        expected = set(range(count)) - set(constants)
        if experts != expected:
            absent, extra = sorted(expected - experts), sorted(experts - expected)
            raise CheckpointError(
                f"a layer has not the {count} experts on disk that config.json asks for",
                where=f"{checkpoint.path}: {key}",
                expected=f"{pattern}{suffix} for experts 0 to {count - 1}",
                got=f"none for expert {absent[0]}" if absent else f"one for expert {extra[0]} too",
                fix="the checkpoint is incomplete, or config.json belongs to another model",
            )
