"""A recipe: everything that a compression run is made of, as YAML that a person writes and that every output carries.

    model: refmoe                   # a folder, a hub id, or refmoe
    data: {python: texts/python}    # calibration text by domain
    domain: python                  # whose statistics count; left out: all
    method: easy-ep
    keep: 0.5                       # share of the experts of a layer, or their number; or a list of `steps`
    out: refmoe-python

Paths count from the recipe's own folder. An unknown key, a wrong type or an impossible value is a `RecipeError` that
names the line. Which methods and options there are is checked where methods are known (`moekit.methods`).
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_serializer
from pydantic_core import PydanticCustomError

from moekit.errors import RecipeError, did_you_mean

_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgtp])(i?))?b?\s*", re.IGNORECASE)


def parse_bytes(size: str | int) -> int:
    """Bytes of a size as people write it: `5GB` is 5 * 10^9, `5GiB` is 5 * 2^30, a bare number is bytes.

    Raises:
        RecipeError: not a size.
    """
    found = _SIZE.fullmatch(str(size)) if type(size) in (str, int) else None
    if not found:
        raise RecipeError("this is not a size", expected="a number and a unit, as 5GB or 512MiB", got=repr(size))
    number, unit, binary = found.groups()
    return round(float(number) * (1024 if binary else 1000) ** _UNITS[(unit or "").lower()])


def format_bytes(count: float) -> str:
    """A number of bytes for people, in decimal units with three digits: `16.2 GB`."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} PB"


def parse_budget(budget: str | int | float) -> int | float:
    """A budget as people write it: bytes (`8GB`, an int), or a share of the source's (`50%`, 0.5, a float).

    Raises:
        RecipeError: neither.
    """
    text = str(budget).strip()
    share = text.endswith("%") or isinstance(budget, float) or (text.startswith("0.") and text[2:].isdigit())
    if not share:
        return parse_bytes(budget if isinstance(budget, int) else text)
    try:
        value = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise RecipeError("this is no budget", expected="a size, as 8GB, or a share, as 50%", got=repr(budget))
    return value


def _keep(value: object) -> object:
    """Text from a command line, `0.5`, `50%` or `64`, as the number that it means."""
    if isinstance(value, str):
        try:
            value = int(value) if value.isdigit() else float(value.rstrip("%")) / (100 if value.endswith("%") else 1)
        except ValueError:
            value = None
    if (type(value) is int and value >= 1) or (type(value) is float and 0 < value <= 1):
        return value
    raise RecipeError("keep is not possible", expected="a share in (0, 1], as 0.5 or 50%, or a number of experts")


def _checked(parse: Callable[[Any], object]) -> BeforeValidator:
    """A parser for pydantic: its RecipeError becomes the field's, which knows the line."""

    def run(value: object) -> object:
        try:
            return parse(value)
        except RecipeError as error:
            raise PydanticCustomError("recipe", "recipe", {"error": error}) from None

    return BeforeValidator(run)


Positive = Annotated[int, Field(ge=1)]
Size = Annotated[int, Field(ge=1_000_000), _checked(parse_bytes)]
Keep = Annotated[int | float, _checked(_keep)]
Budget = Annotated[int | float, _checked(parse_budget)]
Spread = Literal["uniform", "global"]
Protect = Literal["super", "none"]
Padding = Literal["none", "exact"]
Names = Annotated[list[str], Field(min_length=1), BeforeValidator(lambda x: [x] if isinstance(x, str) else x)]

_NOT_OPTIONS = {key: f"write {key} beside options" for key in ("keep", "domain", "spread", "padding", "protect")} | {
    "seed": "write it in calibration"
}


class Part(BaseModel):
    """A mapping of the recipe: no other keys, no guessed types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Calibration(Part):
    """How much of the text is measured.

    Attributes:
        tokens: of each domain, at most; None: all.
        sequence_length: tokens of a sequence, at most.
        batch_tokens: tokens (padding counted) that go through a layer together.
        seed: of every draw: which text a budget takes, methods that draw.
    """

    tokens: Positive | None = 65_536
    sequence_length: Positive = 512
    batch_tokens: Positive = 8_192
    seed: int = 0


class Evaluation(Part):
    """Text that the result is compared with its source on; not the calibration text.

    Attributes:
        data: path or dataset by domain.
        tokens: of each domain, at most; None: all.
        sequence_length: tokens of a sequence, at most.
    """

    data: Annotated[dict[str, str], Field(min_length=1)]
    tokens: Positive | None = 16_384
    sequence_length: Positive = 512


class Step(Part):
    """One change of the model; a recipe is a list of them.

    Attributes:
        method: name in the registry of methods.
        keep: share (float) or number (int) of the experts that are there before it which a layer keeps; None: the
            method needs none.
        domain: the domains whose statistics count; None: the recipe's.
        spread: the same number in every layer, or as many in all, where they are worth most.
        padding: "exact": a model whose layers keep different numbers is written, with experts of zeros that are never
            chosen where a layer has fewer.
        protect: what stays whatever its score: super experts, or nothing.
        options: of the method.
        remeasure: take statistics of the model that the steps before have made, instead of carrying the source's over.
    """

    method: str
    keep: Keep | None = None
    domain: Names | None = None
    spread: Spread = "uniform"
    padding: Padding = "none"
    protect: Protect = "super"
    options: dict[str, Any] = {}
    remeasure: bool = False


SHORT = ("method", "keep", "spread", "padding", "protect", "options")  # a recipe with these is one step


class Recipe(Part):
    """A compression run.

    Attributes:
        model: a folder, a hub id, or "refmoe".
        data: calibration text, path or dataset by domain.
        domain: the domains whose statistics count; None: all.
        method: of a single step, as `keep`, `spread`, `padding`, `protect`, `options`: see `Step`.
        steps: instead of these: what is done, one after the other.
        keep_steps: do not remove the models between the steps.
        budget: bytes of the result, or share of the source's, at most; instead of `method` and `steps`, which the
            planner chooses then (`options` may say the `format` of quantised weights). With `steps`: they were chosen
            for it, nothing is searched.
        calibration: how much of the text is measured.
        evaluation: what the result is compared on; None: it is not.
        out: folder of the result.
        shard_size: bytes of an output file, at most.
        dtype: in which layers are run; "auto": as they are on disk.
        verify: reload the result in stock transformers and compare.
    """

    model: str
    data: Annotated[dict[str, str], Field(min_length=1)]
    domain: Names | None = None
    method: str = "easy-ep"
    keep: Keep | None = None
    spread: Spread = "uniform"
    padding: Padding = "none"
    protect: Protect = "super"
    options: dict[str, Any] = {}
    steps: Annotated[list[Step], Field(min_length=1)] | None = None
    keep_steps: bool = False
    budget: Budget | None = None
    calibration: Calibration = Calibration()
    evaluation: Evaluation | None = None
    out: str
    shard_size: Size = 5_000_000_000
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    verify: bool = True

    @property
    def steps_(self) -> list[Step]:
        """What is done, one after the other: `steps`, or the one step that the short form says; domains filled in.

        Nothing where a budget is still to be planned for.
        """
        if self.steps is None and self.budget is not None:
            return []
        short = Step(**{key: getattr(self, key) for key in SHORT})
        steps = [short] if self.steps is None else self.steps
        return [x.model_copy(update={"domain": x.domain or self.domain}) for x in steps]

    @field_serializer("shard_size", "budget")
    def _size_for_people(self, size: int | float | None) -> str | int | float | None:
        if not isinstance(size, int):
            return size
        text = format_bytes(size)
        return text if parse_bytes(text) == size else size

    @classmethod
    def load(cls, file: str | Path) -> Self:
        """Read a recipe; its paths become absolute.

        Raises:
            RecipeError: no such file, not YAML, an unknown key, a wrong type or an impossible value.
        """
        path = Path(os.path.expanduser(file))
        try:
            text = path.read_text(encoding="utf-8")
            node, raw = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
        except (OSError, UnicodeDecodeError) as error:
            got = error.strerror if isinstance(error, OSError) else error
            raise RecipeError(
                "the recipe cannot be read", where=path, got=got, fix="give the path of a recipe"
            ) from None
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: the 32nd of a month
            raise RecipeError("the recipe is not YAML", where=path, got=str(error)[:300]) from None
        lines = _key_lines(node, path)
        return cls._build(raw, lambda key: _place(path, lines, key)).resolved(path.absolute().parent)

    @classmethod
    def from_flags(cls, **flags: Any) -> Self:
        """A recipe from a flat list of settings; those that are None were not given. Paths count from here.

        Args:
            flags: keys of a recipe; keys of `calibration`; keys of `evaluation` as `evaluation_data`, ...; `options`
                may be a list of NAME=VALUE, each of `steps` text as `man keep=0.5 squared=true`.

        Raises:
            RecipeError: as for `load`.
        """
        raw = {key: value for key, value in flags.items() if value is not None}
        if isinstance(raw.get("options"), list):
            raw["options"] = dict(map(_option, raw["options"]))
        if isinstance(raw.get("steps"), list):
            raw["steps"] = [_step(x) if isinstance(x, str) else x for x in raw["steps"]]
        calibration = {key: raw.pop(key) for key in Calibration.model_fields if key in raw}
        prefix = "evaluation_"
        evaluation = {key.removeprefix(prefix): raw.pop(key) for key in list(raw) if key.startswith(prefix)}
        raw |= {"calibration": calibration} if calibration else {}
        raw |= {"evaluation": evaluation} if evaluation else {}
        return cls._build(raw, ".".join).resolved(Path.cwd())

    @classmethod
    def _build(cls, raw: object, where: Callable[[tuple[str, ...]], str]) -> Self:
        try:
            recipe = cls.model_validate(raw)
        except ValidationError as error:
            raise _explained(error, where) from None
        if recipe.steps is not None and (short := recipe.model_fields_set.intersection(SHORT)):
            raise RecipeError(
                "a recipe is one step or a list of steps, not both",
                where=where(("steps",)),
                got=f"steps and {', '.join(sorted(short))}",
                fix="write what belongs to a step inside it",
            )
        if recipe.budget is not None and (short := recipe.model_fields_set.intersection(SHORT) - {"options"}):
            raise RecipeError(
                "a recipe says what to do, or a budget to choose it for, not both",
                where=where(("budget",)),
                got=f"budget and {', '.join(sorted(short))}",
                fix="leave budget out, or the others",
            )
        parts: list[tuple[tuple[str, ...], Recipe | Step]] = [((), recipe)]
        parts += [(("steps", str(number)), step) for number, step in enumerate(recipe.steps or (), 1)]
        for place, part in parts:
            for domain in part.domain or ():
                if domain not in recipe.data:
                    fix = did_you_mean(domain, recipe.data)
                    raise RecipeError(f"the data have no domain {domain!r}", where=where((*place, "domain")), fix=fix)
            for key, fix in _NOT_OPTIONS.items():
                if key in part.options:
                    at = where((*place, "options", key))
                    raise RecipeError(f"{key!r} is no option of a method", where=at, fix=fix)
        return recipe

    def resolved(self, folder: Path) -> Self:
        """The same with paths made absolute, counted from `folder`; names (hub ids, refmoe, datasets) stay."""
        data = {name: _located(path, folder) for name, path in self.data.items()}
        recipe = self.model_copy(update={"model": _located(self.model, folder), "data": data}, deep=True)
        recipe.out = os.path.abspath(folder / os.path.expanduser(self.out))
        for options in (recipe.options, *(step.options for step in recipe.steps or ())):
            if isinstance(teacher := options.get("teacher"), str) and teacher:
                options["teacher"] = _located(teacher, folder)
        if recipe.evaluation:
            recipe.evaluation.data = {name: _located(path, folder) for name, path in recipe.evaluation.data.items()}
        return recipe

    def to_yaml(self) -> str:
        """YAML that `load` reads back as the same recipe, defaults spelt out."""
        unused = {"steps", "keep_steps"} if self.steps is None else set(SHORT)
        unused |= {"budget"} if self.budget is None else set(SHORT) - {"options"}
        return yaml.safe_dump(self.model_dump(exclude=unused), sort_keys=False, allow_unicode=True, width=120)


def _place(path: Path, lines: Mapping[tuple[str, ...], int], key: tuple[str, ...]) -> str:
    """File, line and dotted key; the line is that of the nearest key above which is written there."""
    known = next((key[:n] for n in range(len(key), 0, -1) if key[:n] in lines), None)
    file = f"{path}:{lines[known]}" if known else str(path)
    return f"{file}: {'.'.join(key)}" if key else file


def _located(value: str, folder: Path) -> str:
    """The absolute path of `value`, unless it can only be the name of a model or a dataset."""
    path = os.path.expanduser(value)
    found = os.path.exists(folder / path) or os.path.exists(path)  # what is here but not there is a path, and missed
    if value == "refmoe" or (not found and value.count("/") < 2 and not value.startswith((".", "~", "/"))):
        return value
    return os.path.abspath(folder / path)


def _step(text: str) -> dict[str, Any]:
    """A step as it is written on a command line: the method, then NAME=VALUE; what is no key of a step is an option."""
    try:
        method, *settings = shlex.split(text)
        if "=" in method:
            raise ValueError
    except ValueError:
        raise RecipeError(
            "this is no step",
            where="steps",
            expected="a method and its settings, as 'easy-ep keep=0.5'",
            got=repr(text),
        ) from None
    given = dict(map(_option, settings))
    keys = {name: value for name, value in given.items() if name in Step.model_fields}
    options = {name: value for name, value in given.items() if name not in keys}
    return {"method": method} | keys | ({"options": options} if options else {})


def _option(item: str) -> tuple[str, Any]:
    name, equals, value = item.partition("=")
    if not equals:
        raise RecipeError("an option of the method has no value", where="options", expected="NAME=VALUE", got=item)
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError:
        return name, value


def _key_lines(node: yaml.Node | None, file: Path, above: tuple[str, ...] = ()) -> dict[tuple[str, ...], int]:
    """The line of every key; YAML itself would take the last of two equal ones."""
    lines: dict[tuple[str, ...], int] = {}
    if isinstance(node, yaml.SequenceNode) and above == ("steps",):
        for number, item in enumerate(node.value, 1):
            lines |= {(*above, str(number)): item.start_mark.line + 1} | _key_lines(item, file, (*above, str(number)))
    if not isinstance(node, yaml.MappingNode) or len(above) > 3:
        return lines
    for key, value in node.value:
        place, line = (*above, str(key.value)), key.start_mark.line + 1
        if place in lines:
            raise RecipeError(
                f"{'.'.join(place)!r} is given twice", where=f"{file}:{line}", got=f"line {lines[place]} too"
            )
        lines |= {place: line} | _key_lines(value, file, place)
    return lines


def _explained(error: ValidationError, where: Callable[[tuple[str, ...]], str]) -> RecipeError:
    """The first of pydantic's complaints in our form; an unknown key first, as it may be the misspelt missing one."""
    first = min(error.errors(), key=lambda x: x["type"] != "extra_forbidden")
    key = tuple(str(part) for part in first["loc"] if part != "[key]")
    if key[:1] == ("steps",) and len(key) > 1:
        key = ("steps", str(int(key[1]) + 1), *key[2:])
    name, got = ".".join(key), repr(first["input"])[:200]
    parts: dict[str, type[Part]] = {"calibration": Calibration, "evaluation": Evaluation, "steps": Step}
    match first["type"]:
        case "extra_forbidden":
            part = parts[key[0]] if len(key) > 1 else Recipe
            fix = did_you_mean(key[-1], part.model_fields)
            return RecipeError(f"a recipe has no key {name!r}", where=where(key), fix=fix)
        case "missing":
            return RecipeError(f"the recipe lacks {name!r}", where=where(key[:-1]), fix=f"add {name}")
        case "recipe":
            cause = first["ctx"]["error"]
            return RecipeError(cause.problem, where=where(key), expected=cause.expected, got=got, fix=cause.fix)
        case "model_type" if not key:
            return RecipeError("this is not a recipe", where=where(key), expected="keys and values", got=got)
    expected = re.sub("^Input should be | or instance of .*", "", first["msg"])
    return RecipeError(f"{name!r} has a wrong value", where=where(key), expected=expected, got=got)
