"""A config file, and the changes that the command line makes to it.

    python scripts/finetune.py configs/csv_classifier.py --tuning Ia3Config --train.epochs 3

``--part.field VALUE`` sets a field. ``--part Class`` makes a part one of the other classes that its
type allows, or None: fields get that class's defaults, except that one without a default, such as a
path, stays where the old class had it too. Naming the class that is there changes nothing. A field
of a part that is None makes the part first: like its sibling (``data.validation`` like
``data.train``), or by its only class. The order of options does not matter.
"""

import ast
import contextlib
import dataclasses
import difflib
import os
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from jaxlm import config as configs
from jaxlm.config import C, Config, FinetuneConfig, PretrainConfig, RunConfig
from jaxlm.errors import InputError, note
from jaxlm.runs import base as bases
from jaxlm.runs import misspelt
from jaxlm.runs.idle import idle

SYNTAX = (
    "An option with classes in braces takes the name of one: --{path} {other} puts it in the place "
    "of what is there, with its defaults, and --{path}.FIELD VALUE changes its fields, before or "
    "behind. To see them: --{path} {other} --help."
)
FOLDER = Path(__file__).resolve().parents[2] / "configs"  # not there where only jaxlm is installed


def load(kind: type[C], argv: Sequence[str] | None = None) -> C:
    """The config that the first argument names, with the changes that the others make.

    Exits on ``--help``, on no argument at all, and on an option that does not exist.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(overview(kind), file=sys.stdout if argv else sys.stderr)
        raise SystemExit(0 if argv else 2)
    if argv[0].startswith("-"):
        raise InputError(
            f"{argv[0]} stands before the config file: write "
            f"{Path(sys.argv[0]).name} CONFIG {argv[0]}"
        )
    config = read(Path(argv[0]))
    if not isinstance(config, kind):
        script = "finetune" if isinstance(config, FinetuneConfig) else "pretrain"
        raise InputError(f"{argv[0]} holds a {type(config).__name__}: use scripts/{script}.py")
    return changed(config, argv[1:], prog=f"{Path(sys.argv[0]).name} {argv[0]}")


def read(path: Path) -> Config:
    """The config of a file; where there is none, :class:`InputError` with names that are near."""
    if path.suffix in (".py", "") and not path.is_file():
        near = [path / "config.json"] if (path / "config.json").is_file() else []
        known = {file.stem: file for file in sorted(FOLDER.glob("*.py"))}
        near += [known[stem] for stem in difflib.get_close_matches(path.stem, known)]
        if near:
            names = " or ".join(os.path.relpath(file) for file in near)
            raise InputError(f"there is no config file {path}; did you mean {names}?")
    try:
        return configs.read_file(path)
    except InputError as error:
        cause = error.__cause__
        raise InputError(f"{error}{misspelt.hint(cause) if cause else ''}") from cause


def overview(kind: type[RunConfig]) -> str:
    """What to write behind a script's name, and the config files that there are."""
    script = Path(sys.argv[0]).name
    lines = [
        f"usage: {script} CONFIG [--FIELD VALUE ...]",
        "",
        f"CONFIG is a Python file that ends in `config = {kind.__name__}(...)`, or the config.json",
        "of a run folder. Every field of it can be changed behind it:",
        f"{script} CONFIG --help lists them.",
        "",
    ]
    found = []
    for path in sorted(FOLDER.glob("*.py")):
        with contextlib.suppress(InputError):
            if isinstance(configs.read_file(path), kind):
                found.append((os.path.relpath(path), ast.parse(path.read_text(encoding="utf-8"))))
    width = max((len(name) for name, _ in found), default=0)
    for name, tree in found:
        lines.append(f"  {name:{width}}  {(ast.get_docstring(tree) or '').partition(chr(10))[0]}")
    example = next((name for name, _ in found if "quickstart" in name), "CONFIG")
    return "\n".join([*lines, "", f"Try: {script} {example} --name second --train.seed 1"])


@dataclass(frozen=True)
class _Option:
    name: str  # such as data.few_shot
    words: list[str]
    tokens: list[str]  # as they were typed


def changed(config: C, argv: Sequence[str], *, prog: str) -> C:
    """The config with the changes of a command line; says on stderr what they switch off."""
    options = _split(argv)
    given = {option.name: option.words for option in options}
    config, options = _with_model(config, options, given)
    draft = _draft(config, options)
    _check_base(config, draft, given)
    # tyro learns of the classes, which are settled by now, for its help and its suggestions.
    fields, tokens, chosen = [], [], {}
    for path, hint, value in choices(draft):
        chosen[path] = "None" if value is None else type(value).__name__
        names = [*classes(hint), *(["None"] if types.NoneType in alternatives(hint) else [])]
        argument = tyro.conf.arg(name=path.replace("_", "-"), help=f"Fields: {_flag(path)}.FIELD")
        fields.append((f"choice_{len(fields)}", Annotated[Literal[*names], argument], chosen[path]))
    for option in options:
        is_class = option.name in chosen and option.words
        first = [_flag(option.name), chosen[option.name]] if is_class else option.tokens
        tokens += [*first, *option.words[1:]] if is_class else first
    path, hint, _ = max(choices(draft), key=lambda choice: len(classes(choice[1])))
    other = next((name for name in classes(hint) if name != chosen[path]), "None")
    settled: Any = dataclasses.make_dataclass("Choices", fields)
    plain = tyro.conf.arg(name="")
    parts = [("config", Annotated[type(config), plain]), ("choices", Annotated[settled, plain])]
    both: Any = dataclasses.make_dataclass("Both", parts)
    parsed = tyro.cli(
        both,
        prog=prog,
        description=f"{type(config).__doc__}\n\n{SYNTAX.format(path=path, other=other)}",
        default=both(config=draft, choices=settled()),
        args=tokens,
        config=(tyro.conf.AvoidSubcommands,),
    )
    return _settle(parsed.config, config, given)


def _with_model(
    config: C, options: list[_Option], given: Mapping[str, list[str]]
) -> tuple[C, list[_Option]]:
    """Pretraining with the model of its base, where fields of it are to be others.

    Instead of a model that the config has, if ``--model None`` is among the options.
    """
    if not isinstance(config, PretrainConfig):
        return config, options
    first = next((name for name in given if name.startswith("model.")), None)
    base = _base(config, given)
    has_none = given["model"] == ["None"] if "model" in given else config.model is None
    if first is None or base is None or not has_none:
        return config, options
    model: Any = bases.read_model(base)
    if model is None:
        raise InputError(
            f"{_flag(first)} is of the model of base={base}, which is no folder here: download it "
            "first (hf download), and name its folder"
        )
    model = dataclasses.replace(model, dtype=None)  # which that run's devices decided
    return dataclasses.replace(config, model=model), [x for x in options if x.name != "model"]


def _base(config: RunConfig, given: Mapping[str, list[str]]) -> str | None:
    base = (given.get("base") or [config.base])[0]
    return None if base == "None" else base


def _check_base(config: RunConfig, draft: Any, given: Mapping[str, list[str]]) -> None:
    """Where one option calls for others, which the config's own check would name one by one."""
    names = ("model", "tokenizer", "source_tokenizer")
    if not given.keys() & {"base", *names}:
        return
    base = _base(draft, given)
    own = [name for name in names if vars(draft).get(name) is not None]
    # In pretraining the model may be the base's with other fields, unless it was made for no base.
    of_base = "model" in given or config.base is not None or draft.model is None
    if isinstance(config, PretrainConfig) and of_base:
        return
    if base is not None and own:
        raise InputError(
            f"base={base!r} brings a model and a tokenizer of its own: add "
            f"{' '.join(f'{_flag(name)} None' for name in own)}, or --base None"
        )


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The parts of a union, or the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def is_choice(hint: Any) -> bool:
    """Whether a field's type lets one choose: several classes, or one and None."""
    return bool(classes(hint)) and len(alternatives(hint)) > 1


def classes(hint: Any) -> dict[str, type]:
    """The dataclasses that a field's type allows, by name."""
    kinds = [kind for kind in alternatives(hint) if isinstance(kind, type)]
    return {kind.__name__: kind for kind in kinds if dataclasses.is_dataclass(kind)}


def find_class(write: str, hint: Any, text: str) -> type:
    """The class that a text names, in any case and with any hyphens; NoneType for ``None``.

    ``write`` is what stands before it, for errors: ``--tuning`` and a space.
    """
    known = classes(hint)
    if types.NoneType in alternatives(hint):
        known["None"] = types.NoneType
    for name, kind in known.items():
        if _plain(name) == _plain(text):
            return kind
    near = difflib.get_close_matches(_plain(text), {_plain(name): name for name in known}, 1, 0.4)
    example = next((name for name in known if _plain(name) in near), next(iter(known)))
    raise InputError(
        f"{write}{text} is not one of {', '.join(known)}; write {write}{example}, and its fields "
        f"as {write.rstrip(' =')}.FIELD"
    )


def fresh(kind: type, old: Any) -> Any:
    """A ``kind`` with its defaults; a field without a default is that of ``old``, or missing.

    Not checked by its class, since it may be incomplete.
    """
    values, hints, old_hints = {}, get_type_hints(kind), get_type_hints(type(old))
    for field in dataclasses.fields(kind):
        name = field.name
        if field.default is not dataclasses.MISSING:
            values[name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            values[name] = field.default_factory()
        else:
            values[name] = vars(old)[name] if old_hints.get(name) == hints[name] else tyro.MISSING
    return _unchecked(kind, values)


def _split(argv: Sequence[str]) -> list[_Option]:
    """The first has no name: it is what stands before all options, and is not allowed."""
    groups: list[list[str]] = [[]]
    for token in argv:
        if token.startswith("--"):
            groups.append([])
        groups[-1].append(token)
    options = [_Option("", [], groups[0])]
    for tokens in groups[1:]:
        name, equals, word = tokens[0][2:].partition("=")
        words = [word, *tokens[1:]] if equals else tokens[1:]
        options.append(_Option(name.replace("-", "_"), words, tokens))
    return options


def _draft(part: Any, options: list[_Option], where: str = "") -> Any:
    """``part`` with the classes that the options ask for, not checked yet.

    To a part that is made like its sibling, the sibling's options apply too, before its own.
    """
    hints, values = get_type_hints(type(part)), dict(vars(part))
    for name, value in vars(part).items():
        path, hint, kinds = where + name, hints[name], classes(hints[name])
        inner = [option for option in options if option.name.startswith(f"{path}.")]
        words = [option.words[0] for option in options if option.name == path and option.words]
        if not kinds or not (inner or words):
            continue
        alike = [
            (other, like)
            for other, like in values.items()
            if classes(hints[other]) == kinds and other != name and like is not None
        ]
        if words and is_choice(hint):
            kind = find_class(f"{_flag(path)} ", hint, words[-1])
        elif value is None and len(kinds) == 1:
            (kind,) = kinds.values()
        else:
            kind = type(alike[0][1] if value is None and alike else value)
        for option in inner:
            _check_field(path, kind, kinds, option)
        if kind is types.NoneType:
            value = None
        elif value is None and alike and type(alike[0][1]) is kind:
            sibling, value = alike[0]
            if not inner:
                field = _flag(f"{path}.{next(iter(vars(value)), '')}")
                raise InputError(
                    f"{_flag(path)} {kind.__name__} alone is {where}{sibling} once more: "
                    f"say what differs, such as {field}"
                )
            options[1:1] = [
                _moved(option, f"{where}{sibling}.", f"{path}.")
                for option in options
                if option.name.startswith(f"{where}{sibling}.")
            ]
        elif type(value) is not kind:
            value = fresh(kind, value)
        values[name] = value if value is None else _draft(value, options, f"{path}.")
    return _unchecked(type(part), values)


def _check_field(path: str, kind: type, kinds: dict[str, type], option: _Option) -> None:
    """Where another class has the field, say so; where none has, tyro suggests what is near."""
    field = option.name.removeprefix(f"{path}.").partition(".")[0]
    names = {field, field.removeprefix("no_")}
    having = [name for name, other in kinds.items() if names & get_type_hints(other).keys()]
    if having and not names & get_type_hints(kind).keys():
        now = "None" if kind is types.NoneType else kind.__name__
        raise InputError(
            f"{_flag(option.name)}: {path} is {now}, which has no {field}; "
            f"add {' or '.join(f'{_flag(path)} {name}' for name in having)}"
        )


def _moved(option: _Option, start: str, to: str) -> _Option:
    tokens = [f"--{to}{option.tokens[0][2 + len(start) :]}", *option.tokens[1:]]
    return _Option(to + option.name.removeprefix(start), option.words, tokens)


def choices(part: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The fields where one chooses a class: path, type and value."""
    hints = get_type_hints(type(part))
    for name, value in vars(part).items():
        if is_choice(hints[name]):
            yield where + name, hints[name], value
        if dataclasses.is_dataclass(value):
            yield from choices(value, f"{where}{name}.")


def _settle(config: C, before: RunConfig, given: Mapping[str, list[str]]) -> C:
    """Where an option and the config contradict each other, say on stderr which one counts."""
    if isinstance(config, PretrainConfig) and config.prepare is not None:
        assert isinstance(before, PretrainConfig)
        is_theirs = any(name.partition(".")[0] == "prepare" for name in given)
        if config.data.paths[:1] != before.data.paths[:1] and not is_theirs:
            note(
                f"{' '.join(config.data.paths)} is read as it is, since what the config prepares "
                f"is {before.data.paths[0]} (to prepare this in the same way: "
                "--prepare PrepareConfig)"
            )
            config = dataclasses.replace(config, prepare=None)
    ends = {name: vars(config.train)[name] for name in ("steps", "epochs", "minutes")}
    ends = {f"train.{name}": value for name, value in ends.items() if value is not None}
    if len(ends) > 1 and given.keys() & ends.keys():
        values = " and ".join(f"{name}={value:g}" for name, value in ends.items())
        off = next((name for name in ends if name not in given), next(iter(ends)))
        note(f"{values}: the first of them that is reached ends the run ({_flag(off)} None)")
    idle_fields = idle(config) if isinstance(config, PretrainConfig | FinetuneConfig) else {}
    for name, why in idle_fields.items():
        if name in given:
            note(f"{name} has no effect: {why}")
    return config


def _flag(path: str) -> str:
    return "--" + path.replace("_", "-")


def _plain(name: str) -> str:
    return name.replace("-", "").replace("_", "").lower()


def _unchecked(kind: type, values: dict[str, Any]) -> Any:
    """A frozen dataclass of these values, without its own check of them."""
    new = object.__new__(kind)
    for name, value in values.items():
        object.__setattr__(new, name, value)
    return new
