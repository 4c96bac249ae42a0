"""A run's configuration: frozen dataclasses, written in Python, overridden on the command line.

    python scripts/pretrain.py configs/bert_base.py --optimizer.peak-lr 3e-4

A config file ends in ``config = RunConfig(...)``; a variant imports its parent's and uses
``dataclasses.replace``. Each part lives beside what it configures.
"""

import dataclasses
import json
import runpy
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from jaxlm.data.loader import DataConfig
from jaxlm.data.prepare import PrepareConfig
from jaxlm.errors import InputError
from jaxlm.models.bert import BertConfig
from jaxlm.objectives.masked_lm import MaskedLmConfig
from jaxlm.optim import OptimizerConfig
from jaxlm.sharding import MeshConfig
from jaxlm.train.loop import TrainConfig

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Pretraining: what is read, what is learned by which model, how, and where."""

    name: str
    """Of the run's folder, below `runs`."""
    runs: Path = Path("runs")
    """Where run folders are."""
    data: DataConfig
    prepare: PrepareConfig | None = None
    """How to make the first of `data.paths` where it is missing; None: it must be there."""
    model: BertConfig = field(default_factory=BertConfig)
    objective: MaskedLmConfig = field(default_factory=MaskedLmConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    placement: Literal["jit", "pmap"] = "jit"
    """pmap is data parallel only, for code that still needs it."""
    resume: bool = True
    """Go on where the run folder's newest checkpoint ends; --no-resume refuses a used folder."""
    wandb: str | None = None
    """A Weights & Biases project to report to as well."""

    @property
    def directory(self) -> Path:
        """The run folder."""
        return self.runs / self.name


def load(argv: list[str] | None = None) -> RunConfig:
    """The config file that the first argument names, with the other arguments' changes.

    Exits, with a list of what there is, on ``--help`` and on an option that does not exist.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0].startswith("-"):
        raise InputError(
            "the first argument is a config file, such as configs/quickstart.py; "
            "put --help behind it to see what can be changed"
        )
    config = read_file(Path(argv[0]))
    return tyro.cli(
        RunConfig,
        prog=f"{Path(sys.argv[0]).name} {argv[0]}",
        default=config,
        args=argv[1:],
        config=(tyro.conf.AvoidSubcommands,),
    )


def read_file(path: Path) -> RunConfig:
    """``config`` as a Python file defines it, or as a run folder's ``config.json`` holds it."""
    if not path.is_file():
        raise InputError(f"there is no config file {path}")
    try:
        if path.suffix == ".json":
            return from_json(path.read_text(encoding="utf-8"))
        config = runpy.run_path(str(path)).get("config")
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except Exception as error:  # a config file is a program: it may fail in any way
        raise InputError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, RunConfig):
        raise InputError(f"{path} does not end in `config = RunConfig(...)`")
    return config


def to_json(config: RunConfig) -> str:
    """All fields; a dataclass that is one of several carries its name under ``type``."""

    def encode(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            fields = {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
            return {"type": type(value).__name__, **fields}
        if isinstance(value, tuple):
            return [encode(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return json.dumps(encode(config), indent=2) + "\n"


def from_json(text: str) -> RunConfig:
    """The inverse of :func:`to_json`; unknown fields and wrong types raise."""
    try:
        return _decode(RunConfig, json.loads(text), "config")
    except json.JSONDecodeError as error:
        raise InputError(f"the config is not JSON: {error}") from error


def _decode(hint: Any, value: Any, where: str) -> Any:
    """``value``, from JSON, as the type ``hint``."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        if dataclasses.is_dataclass(option) and isinstance(value, dict):
            if value.get("type") == option.__name__:  # pyright: ignore[reportAttributeAccessIssue]
                hints = get_type_hints(option)
                fields = {k: v for k, v in value.items() if k != "type"}
                if unknown := fields.keys() - hints.keys():
                    raise InputError(f"{where} has no field {sorted(unknown)[0]}")
                parts = {k: _decode(hints[k], v, f"{where}.{k}") for k, v in fields.items()}
                try:
                    return option(**parts)  # pyright: ignore[reportCallIssue]
                except TypeError as error:
                    raise InputError(f"{where}: {error}") from error
        elif get_origin(option) is tuple and isinstance(value, list):
            return tuple(_decode(get_args(option)[0], v, where) for v in value)
        elif get_origin(option) is Literal and value in get_args(option):
            return value
        elif option is Path and isinstance(value, str):
            return Path(value)
        elif option is float and type(value) is int:
            return float(value)
        elif isinstance(option, type) and type(value) is option:
            return value
    raise InputError(f"{where}={value!r} is not of type {hint}")
