"""A model's folder in Hugging Face's layout: JSON and safetensors, read whole or in shards."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxlm.convert import flax_msgpack
from jaxlm.data.tabular import parse_json
from jaxlm.errors import InputError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
_OTHERS = ("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file."""
    try:
        value = parse_json(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not JSON, because it is not UTF-8") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """Its ``config.json``."""
    if not (folder / CONFIG).is_file() and (folder / ADAPTER).is_file():
        base = read_json(folder / ADAPTER).get("base_model_name_or_path")
        raise InputError(
            f"{folder} holds an adapter of PEFT for {base}, not a model: make a run of it "
            f"(scripts/adapter.py import {folder} CONFIG), or give the folder that PEFT's "
            "merge_and_unload().save_pretrained(FOLDER) writes"
        )
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder} is not a model's folder in Hugging Face's layout: no {CONFIG}")
    return read_json(folder / CONFIG)


def has_weights(folder: Path) -> bool:
    """Whether there is a file that :class:`Tensors` reads."""
    return any((folder / name).is_file() for name in (WEIGHTS, INDEX, flax_msgpack.WEIGHTS))


def open_tensors(folder: Path) -> Mapping[str, Shaped[np.ndarray, "..."]]:
    """All of a folder; those of the old Flax classes where there are no others."""
    old = folder / flax_msgpack.WEIGHTS
    if old.is_file() and not (folder / WEIGHTS).is_file() and not (folder / INDEX).is_file():
        return flax_msgpack.FlaxTensors(old)
    return Tensors(folder)


class Tensors(Mapping[str, Shaped[np.ndarray, "..."]]):
    """The tensors of a folder by name, in the dtype of their file; each is read when asked for."""

    def __init__(self, folder: Path, name: str | None = None) -> None:
        """Those of the model; with a ``name`` of that file alone."""
        self._folder = folder
        self._files: dict[str, Path] = {}
        for path in _shards(folder) if name is None else [folder / name]:
            try:
                with safe_open(path, framework="np") as file:
                    self._files |= dict.fromkeys(file.keys(), path)
            except OSError as error:
                raise InputError(f"{path} cannot be read: {error}") from error
            except SafetensorError as error:
                raise InputError(
                    f"{path} is not a complete safetensors file ({error}); download it again"
                ) from error

    def __getitem__(self, name: str) -> Shaped[np.ndarray, "..."]:
        # Opened anew: pages of an open file count as memory until it is closed.
        try:
            with safe_open(self._files[name], framework="np") as file:
                return file.get_tensor(name)
        except (AttributeError, TypeError) as error:  # numpy has no such dtype
            raise InputError(
                f"{self._folder} holds numbers of a kind that is not supported ({error}), such as "
                "8-bit floats: take a copy of the model in float32, float16 or bfloat16"
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class Renamed(Mapping[str, Shaped[np.ndarray, "..."]]):
    """Tensors under other names."""

    def __init__(self, tensors: Mapping[str, Any], names: Mapping[str, str]) -> None:
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> Shaped[np.ndarray, "..."]:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def write_tensors(path: Path, tensors: Mapping[str, Shaped[np.ndarray, "..."]]) -> None:
    """Write a safetensors file; raises ``OSError`` where that fails, as all other writing does."""
    try:
        named = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
        save_file(named, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def _shards(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX).get("weight_map")
        names = list(index.values()) if isinstance(index, dict) else []
        if not names or not all(isinstance(name, str) and "/" not in name for name in names):
            raise InputError(f"{folder / INDEX} has no weight_map from tensors to files beside it")
        paths = [folder / name for name in sorted(set(names))]
        for path in paths:
            if not path.is_file():
                raise InputError(f"{folder / INDEX} names {path.name}, which is not there")
        return paths
    for name in _OTHERS:
        if (folder / name).is_file():
            raise InputError(
                f"{folder} holds {name} but no {WEIGHTS}: load it with transformers and write it "
                "again with save_pretrained"
            )
    raise InputError(f"{folder} holds neither {WEIGHTS} nor {INDEX}")
