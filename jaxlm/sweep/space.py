"""What a sweep varies: fields of a config, by their dotted names, and the values they may take."""

import contextlib
import dataclasses
import itertools
import math
import re
import shlex
import types
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any, get_origin, get_type_hints

import numpy as np
import tyro

from jaxlm.config import Config
from jaxlm.errors import InputError
from jaxlm.runs import command_line

Settings = dict[str, Any]  # dotted field -> value

NOT_SWEPT = {
    "train.seed": "--seeds says how many there are",
    "name": "--name is that of the sweep, and trials are named by their settings",
    "monitor": "--metric sets it, for all trials alike",
    "runs": "all trials are in one folder",
    "resume": "an unfinished trial is always resumed",
    "train.average": "trials are compared by single checkpoints",
    "accept_changes": "a trial has the settings that its name says",
}


@dataclass(frozen=True)
class Range:
    """Numbers between two, both possible; evenly, or evenly in the logarithm."""

    low: float
    high: float
    is_log: bool
    is_whole: bool

    def draw(self, rng: np.random.Generator) -> float | int:
        """One number, with four digits that count."""
        margin = 0.5 if self.is_whole else 0.0  # so that the ends are as likely as the others
        low, high = self.low - margin, self.high + margin
        if self.is_log:
            number = math.exp(rng.uniform(math.log(low), math.log(high)))
        else:
            number = rng.uniform(low, high)
        number = round(number) if self.is_whole else float(f"{number:.4g}")
        number = min(max(number, self.low), self.high)
        return int(number) if self.is_whole else number


Space = dict[str, tuple[Any, ...] | Range]


def read_space(config: Config, texts: Sequence[str]) -> Space:
    """Fields and their values, from texts such as ``optimizer.peak_lr=1e-3,3e-3``.

    Names and values are checked against the config: as it is, or as an earlier choice makes it,
    such as another ``tuning``.
    """
    space: Space = {}
    variants = [config]
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not values:
            raise InputError(
                f"--set {text} names no values: write it as --set optimizer.peak_lr=1e-3,3e-3"
            )
        if name in NOT_SWEPT:
            raise InputError(f"{name} cannot be swept: {NOT_SWEPT[name]}")
        if name in space:
            raise InputError(f"--set {name} is given twice: put all values into one")
        space[name] = _read_values(name, *_find_in_any(variants, name), values)
        choices = space[name]
        if isinstance(choices, tuple) and any(map(dataclasses.is_dataclass, choices)):
            variants = [
                variant
                for base in variants
                for choice in choices
                if (variant := _attempt(base, {name: choice})) is not None
            ]
    return space


def candidates(
    config: Config, space: Space, *, num_random: int | None, seed: int
) -> list[Settings]:
    """All combinations, or ``num_random`` of them, each once; a longer draw begins with a shorter.

    Fields that another choice leaves without a place, such as the rank of no adapter, are left out.
    """
    found: dict[str, Settings] = {}
    if num_random is None:
        choices: list[tuple[Any, ...]] = []
        for name, values in space.items():
            if isinstance(values, Range):
                raise InputError(
                    f"{name} is a range, which a grid cannot cover: add --random 20, or list "
                    "its values"
                )
            choices.append(values)
        for row in itertools.product(*choices):
            settings = _fitting(config, dict(zip(space, row, strict=True)))
            found.setdefault(label(settings), settings)
        return list(found.values())
    if not space:
        raise InputError("--random has nothing to draw: add --set optimizer.peak_lr=1e-5..1e-3:log")
    for i in range(100 * num_random):  # choices alone may have fewer combinations
        rng = np.random.default_rng((seed, i))
        drawn = {
            name: values.draw(rng)
            if isinstance(values, Range)
            else values[rng.integers(len(values))]
            for name, values in space.items()
        }
        settings = _fitting(config, drawn)
        found.setdefault(label(settings), settings)
        if len(found) == num_random:
            break
    return list(found.values())


def replaced(part: Any, settings: Mapping[str, Any]) -> Any:
    """The dataclass with other values at dotted names, all put in at once."""
    inner: dict[str, Settings] = {}
    changes: Settings = {}
    for name, value in settings.items():
        head, _, rest = name.partition(".")
        if rest:
            inner.setdefault(head, {})[rest] = value
        else:
            changes[head] = value
    for head, rest in inner.items():
        changes[head] = replaced(changes.get(head, vars(part)[head]), rest)
    return dataclasses.replace(part, **changes)


def shown(value: Any) -> str | int | float | bool | None:
    """A value for messages and JSON: a dataclass by its name."""
    if dataclasses.is_dataclass(value):
        return type(value).__name__
    if isinstance(value, tuple):
        return " ".join(str(item) for item in value)
    return value if isinstance(value, str | int | float | None) else str(value)


def label(settings: Settings) -> str:
    """``optimizer.peak_lr=0.001, tuning.rank=4``."""
    return ", ".join(f"{name}={shown(value)}" for name, value in settings.items())


def short_label(settings: Settings) -> list[str]:
    """``["peak_lr=0.001", "rank=4"]``; with the whole name where two end alike."""
    ends = Counter(name.rpartition(".")[2] for name in settings)
    parts = []
    for name, value in settings.items():
        end = name.rpartition(".")[2]
        parts.append(f"{end if ends[end] == 1 else name}={shown(value)}")
    return parts


def _find_in_any(variants: Sequence[Config], name: str) -> tuple[Any, Any]:
    """The type of a field, and its value, in the first variant that has it."""
    errors = []
    for variant in variants:
        try:
            return _find(variant, name)
        except InputError as error:
            errors.append(error)
    raise errors[0]


def _find(config: Config, name: str) -> tuple[Any, Any]:
    part, where = config, "the config"
    hint: Any = None
    for head in name.split("."):
        if not dataclasses.is_dataclass(part):
            kinds = command_line.classes(hint)
            others = " or ".join(f"-- --{name.partition(f'.{head}')[0]} {kind}" for kind in kinds)
            raise InputError(
                f"--set {name}: {where} is {part!r}, which has no fields"
                + (f"; put {others} behind all options" if kinds else "")
            )
        known = [field.name for field in dataclasses.fields(part)]
        if head not in known:
            raise InputError(
                f"--set {name}: {where} has no field {head}; it has {', '.join(known)}"
            )
        hint = get_type_hints(type(part))[head]
        part, where = vars(part)[head], head
    return hint, part


def _read_values(name: str, hint: Any, now: Any, text: str) -> tuple[Any, ...] | Range:
    """Choices, or a range where the field is a number."""
    options = command_line.alternatives(hint)
    ends = re.fullmatch(r"(.+?)\.\.(.+?)(:log)?", text)
    if ends and {int, float} & set(options):
        is_whole = float not in options
        low, high = (
            _read_value(name, int if is_whole else float, now, end) for end in ends.group(1, 2)
        )
        finite = all(abs(end) < 1e300 for end in (low, high))  # their difference is, too
        if not low < high or not finite or (ends[3] and low <= 0):
            above = ", above 0" if ends[3] else ""
            raise InputError(
                f"--set {name}={text} is not a range: its ends must be finite and ascending{above}"
            )
        return Range(float(low), float(high), bool(ends[3]), is_whole)
    return tuple(
        dict.fromkeys(_read_value(name, hint, now, part.strip()) for part in text.split(","))
    )


def _read_value(name: str, hint: Any, now: Any, text: str) -> Any:
    """One value by the field's type; a dataclass by its name, as on the command line."""
    options = command_line.alternatives(hint)
    if text == "None" and types.NoneType in options:
        return None
    if command_line.classes(hint):
        kind = command_line.find_class(f"--set {name}=", hint, text)
        if kind is types.NoneType or kind is type(now):
            return None if kind is types.NoneType else now
        made = command_line.fresh(kind, now)
        if tyro.MISSING in vars(made).values():
            raise InputError(
                f"--set {name}={text}: {kind.__name__} needs more than its name; put "
                f"-- --{name} {kind.__name__} behind all options, with the fields that it needs"
            )
        return dataclasses.replace(made)  # now its class checks it
    is_tuple = any(get_origin(option) is tuple for option in options)
    try:
        words = shlex.split(text) if is_tuple else [text.capitalize() if bool in options else text]
        with redirect_stderr(StringIO()), redirect_stdout(StringIO()):
            return tyro.cli(hint, args=words)
    except (SystemExit, ValueError):  # ValueError: a quotation without an end
        kind = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
        raise InputError(f"--set {name}={text}: {text!r} is not of type {kind}") from None


def _fitting(config: Config, settings: Settings) -> Settings:
    """Those settings that have a place in the config that the others make."""
    kept: Settings = {}
    # What a field is, before what is in it.
    for name, value in sorted(settings.items(), key=lambda item: item[0].count(".")):
        variant = _attempt(config, kept)
        with contextlib.suppress(InputError):
            _find(variant or config, name)
            kept[name] = value
    return {name: value for name, value in settings.items() if name in kept}


def _attempt(config: Config, settings: Settings) -> Config | None:
    """The config with other values, or None where they are impossible together."""
    try:
        return replaced(config, settings)
    except InputError:
        return None
