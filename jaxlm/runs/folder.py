"""A run folder: its configuration, tokenizer and checkpoints."""

from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from jaxlm import config as configs
from jaxlm.config import C, Config
from jaxlm.convert.folder import ADAPTER
from jaxlm.data import tokenizers
from jaxlm.data.tabular import parse_json
from jaxlm.errors import InputError
from jaxlm.runtime.storage import StoragePath, whole, write_whole
from jaxlm.train.restore import Cursor, list_steps

CONFIG, TOKENIZER, CHECKPOINTS = "config.json", "tokenizer.json", "checkpoints"
SOURCE_TOKENIZER = "source_tokenizer.json"  # where sources have one of their own


def is_run(directory: StoragePath) -> bool:
    """Whether it is a run folder of ours: other frameworks, too, write a ``config.json``."""
    path = directory / CONFIG
    return path.is_file() and '"type":' in path.read_bytes()[:40].decode(errors="replace")


def read_any_config(directory: StoragePath) -> Config:
    """The config in a run folder, of pretraining or of fine-tuning."""
    if (directory / ADAPTER).is_file():
        raise InputError(
            f"{directory} holds an adapter in PEFT's format, not a run: make one of it "
            f"(scripts/adapter.py import {directory} CONFIG)"
        )
    if not (directory / CONFIG).is_file():
        raise InputError(f"{directory} is not a run folder: it has no {CONFIG}")
    if not is_run(directory):
        raise InputError(
            f"{directory} is not a run folder: its {CONFIG} is of another kind; a published or "
            "merged model is something to fine-tune from, with --base"
        )
    return configs.read_file(directory / CONFIG)


def read_config(directory: StoragePath, kind: type[C]) -> C:
    """The config in a run folder of that kind."""
    config = read_any_config(directory)
    if not isinstance(config, kind):
        raise InputError(
            f"{directory} holds the run of a {type(config).__name__}, where one of a "
            f"{kind.__name__} is expected"
        )
    return config


def begun(config: C) -> C | None:
    """The config of the run that its folder holds already, if one has begun there."""
    is_there = list_steps(config.directory / CHECKPOINTS)
    return read_config(config.directory, type(config)) if is_there else None


def read_json(path: StoragePath) -> Any:
    """What a file in a run folder holds."""
    try:
        return parse_json(path.read_text("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def read_tokenizer(directory: StoragePath, name: str = TOKENIZER) -> Tokenizer:
    """The run folder's own."""
    if not (directory / name).is_file():
        raise InputError(f"{directory} is not a run folder: it has no {name}")
    return tokenizers.load(directory / name)


def check_tokenizer(
    directory: StoragePath, saved: Cursor, tokenizer: Tokenizer, name: str = TOKENIZER
) -> None:
    """The run folder's tokenizer must be the one it was trained with."""
    found, trained = tokenizers.fingerprint(tokenizer), saved[cursor_name(name)]
    if found != trained:
        raise InputError(
            f"{directory / name} (sha256 {found[:12]}) is not the tokenizer that the "
            f"checkpoint was trained with ({trained[:12]}): restore it"
        )


def cursor_name(name: str) -> str:
    """Under which a cursor has the fingerprint of a tokenizer."""
    return f"{name.removesuffix('.json')}_sha256"


def write_folder(
    directory: StoragePath, config: Config, tokenizer: Tokenizer, files: Mapping[str, str]
) -> None:
    """Start a run folder: the resolved config, the tokenizer, and other files with their texts."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in {CONFIG: configs.to_json(config), **files}.items():
            write_whole(directory / name, text)
        with whole(directory / TOKENIZER) as unfinished:
            tokenizers.save(tokenizer, unfinished)
    except OSError as error:
        raise InputError(f"the run folder {directory} cannot be written: {error}") from error
