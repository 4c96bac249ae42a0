"""Reading adapters in PEFT's format, which are for a base that is here; nothing is unpickled."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from jaxlm.convert import folder, table
from jaxlm.convert import peft_tensors as tensors_of
from jaxlm.convert.architecture import NUMBER, Fields
from jaxlm.convert.peft_save import CONFIG, ROOT, WEIGHTS, Adapter
from jaxlm.convert.peft_tensors import Ours, Theirs
from jaxlm.convert.table import Row, Tensors
from jaxlm.convert.task_model import TaskModel
from jaxlm.errors import InputError
from jaxlm.nn.intercept import flatten
from jaxlm.peft.ia3 import Ia3Config
from jaxlm.peft.lora import LoraConfig
from jaxlm.peft.tuning import is_bias, learns

PICKLE = "adapter_model.bin"
# What changes nothing once an adapter is trained, or is read below.
_HARMLESS = (
    r"task_type|auto_mapping|peft_version|base_model_name_or_path|revision|inference_mode"
    r"|target_modules|exclude_modules|fan_in_fan_out|modules_to_save|peft_type|r|lora_alpha"
    r"|lora_dropout|bias|use_rslora|use_dora|rank_pattern|alpha_pattern|layers_to_transform"
    r"|layers_pattern|init_lora_weights|init_ia3_weights|feedforward_modules|qalora_group_size"
    r"|megatron_core|runtime_config|eva_config|corda_config|lora_ga_config|loftq_config"
)
_ARE_NAMES = "a pattern, or a list of names", lambda *x: all(map(_is_pattern, x))
_ARE_WHOLE = lambda *x: all(type(one) is int for one in x)
_KINDS: dict[str, tuple[str, Callable[..., bool]]] = {
    "target_modules": _ARE_NAMES,
    "exclude_modules": _ARE_NAMES,
    "modules_to_save": _ARE_NAMES,
    "feedforward_modules": _ARE_NAMES,
    "layers_pattern": _ARE_NAMES,
    "layers_to_transform": ("a number, or a list of them", _ARE_WHOLE),
    "rank_pattern": ("an object of whole numbers by pattern", _ARE_WHOLE),
    "alpha_pattern": (
        "an object of finite numbers by pattern",
        lambda *x: all(type(one) in NUMBER and math.isfinite(one) for one in x),
    ),
}
_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
_PARTS = re.compile(
    r"(.*)\.(lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector|ia3_l)"
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """An ``adapter_config.json``."""

    fields: Fields

    @property
    def base(self) -> str:
        """What it calls the model that it adapts."""
        return self.fields.get("base_model_name_or_path", str)

    @property
    def task_type(self) -> str | None:
        """As PEFT calls it."""
        return self.fields.maybe("task_type", str)


def read_settings(path: Path) -> Settings:
    """The configuration of an adapter; raises where it changes what is computed in other ways."""
    if not (path / CONFIG).is_file():
        raise InputError(f"{path} holds no adapter in PEFT's format: it has no {CONFIG}")
    raw, source = folder.read_json(path / CONFIG), str(path / CONFIG)
    fields = Fields(raw, source)
    kind = fields.get("peft_type", str)
    if kind not in ("LORA", "IA3"):
        raise InputError(f"{source}: peft_type={kind!r} is not supported; LORA and IA3 are")
    for key, value in raw.items():
        if value and not re.fullmatch(_HARMLESS, key):
            raise InputError(
                f"{source}: {key}={json.dumps(value)} changes what is computed and is not "
                "supported: merge it with PEFT (merge_and_unload().save_pretrained(FOLDER)), and "
                "take that folder for a base"
            )
    _check_kinds(raw, source)
    how = raw.get("init_lora_weights")
    if isinstance(how, str) and how.lower().startswith(_CHANGES_BASE):
        raise InputError(
            f"{source}: init_lora_weights={how!r} stands for a base that was changed: save the "
            "adapter again with PEFT's path_initial_model_for_weight_conversion, as a plain LoRA"
        )
    if not (path / WEIGHTS).is_file():
        has = (
            f"{PICKLE}, which could run any code and is not read"
            if (path / PICKLE).is_file()
            else "no weights"
        )
        raise InputError(
            f"{path} has {has}: save the adapter with PEFT as {WEIGHTS} "
            "(save_pretrained with safe_serialization=True)"
        )
    return Settings(fields=fields)


def _check_kinds(raw: Mapping[str, Any], source: str) -> None:
    """That what is read below as it stands is names, patterns, or numbers, and dicts of these."""
    for key, (what, fits) in _KINDS.items():
        value = raw.get(key)
        if key.endswith("_pattern") and key != "layers_pattern":
            good = value is None or (
                isinstance(value, dict) and all(map(_is_pattern, value)) and fits(*value.values())
            )
        else:
            good = fits(*(value if isinstance(value, list) else [] if value is None else [value]))
        if not good:
            raise InputError(f"{source}: {key}={value!r:.80} is not {what}: correct it")


def _is_pattern(value: Any) -> bool:
    try:
        return bool(re.compile(value))
    except (TypeError, re.error):
        return False


def load(path: Path, params: Ours, model: TaskModel) -> Adapter:
    """The adapter in a folder, for the model that has these ``params``.

    ``saved`` has what the folder has: a head that is not whole there lacks leaves. Raises where it
    is of another base, or holds what has no place in ours.
    """
    fields, source = read_settings(path).fields, str(path / WEIGHTS)
    raw = folder.Tensors(path, WEIGHTS)
    found: dict[str, dict[str, np.ndarray]] = {}
    plain: dict[str, np.ndarray] = {}
    for name in raw:
        inside = name.removeprefix(ROOT).replace(
            "lora_magnitude_vector.weight", "lora_magnitude_vector"
        )
        if ".original_module." in inside or ".modules_to_save." in inside:
            continue  # copies of what is there under its own name
        if parts := _PARTS.fullmatch(inside):
            end = parts[2].removesuffix(".weight")
            found.setdefault(parts[1], {})[end] = raw[name].astype(np.float32)
        else:
            plain[inside.replace(".base_layer.", ".")] = raw[name]
    known = list(tensors_of.all_modules(model))
    _check_targets(found, known, fields, source)
    if fields.get("peft_type", str) == "LORA":
        tuning, collection = _read_lora(found, fields, params, model, source)
    else:
        ends = fields.raw.get("feedforward_modules") or ()
        of_end = lambda name: _matches(name, ends) or name.endswith(tuple(ends))
        inputs = {
            name: _matches(name, ends) if isinstance(ends, str) else of_end(name) for name in found
        }
        collection, targets = tensors_of.read_ia3(found, inputs, params, model)
        tuning = Ia3Config(**targets)
    saved = _read_saved(plain, params, model, source)
    bias = [p for p in saved if not p.startswith("head/")]
    if isinstance(tuning, LoraConfig) and tuning.bias == "none" and bias:
        raise InputError(f"{source} holds {model.rows[bias[0]].theirs}, and bias='none'")
    if isinstance(tuning, LoraConfig) and not all(learns(tuning, f"params/{p}") for p in bias):
        tuning = replace(tuning, bias="all")  # a part of a map has a bias, and no adapter
    return Adapter(tuning=tuning, collection=collection, saved=unflatten_dict(saved, sep="/"))


def _read_lora(
    found: dict[str, dict[str, np.ndarray]],
    fields: Fields,
    params: Ours,
    model: TaskModel,
    source: str,
) -> tuple[LoraConfig, Ours]:
    rslora = fields.get("use_rslora", bool, False)
    scales = {}
    for module, parts in found.items():
        rank = _by_pattern(module, fields.raw.get("rank_pattern"), fields.get("r", int, 8))
        alpha = _by_pattern(
            module, fields.raw.get("alpha_pattern"), fields.get("lora_alpha", NUMBER, 8)
        )
        first = parts.get("lora_A", parts.get("lora_embedding_A"))
        second = parts.get("lora_B", parts.get("lora_embedding_B"))
        if first is None or second is None:
            raise InputError(f"{source}: one of the two factors of {module} is missing")
        if first.shape[0] != rank:
            raise InputError(
                f"{source}: the adapter of {module} has the rank {first.shape[0]}, but {CONFIG} "
                f"says {rank}"
            )
        scales[module] = alpha / (math.sqrt(rank) if rslora else rank)
    collection, settings = tensors_of.read_lora(found, scales, rslora, params, model)
    tuning = LoraConfig(
        **settings,
        scaling="rslora" if rslora else "lora",
        dropout_rate=float(fields.get("lora_dropout", NUMBER, 0.0)),
        kind="dora" if fields.get("use_dora", bool, False) else "lora",
        bias=fields.name("bias", {x: x for x in ("none", "all", "lora_only")}, "none"),  # pyright: ignore[reportArgumentType]
    )
    return tuning, collection


def _by_pattern(module: str, patterns: Mapping[str, Any] | None, usual: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return usual


def _matches(module: str, targets: Any) -> bool:
    """Whether a module is meant by a regular expression for its whole name, or a list of ends."""
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets or ())


def _is_target(module: str, fields: Fields) -> bool:
    """As PEFT decides it."""
    raw = fields.raw
    if raw.get("exclude_modules") and _matches(module, raw["exclude_modules"]):
        return False
    saved = raw.get("modules_to_save") or ()
    if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in saved):
        return False
    targets, layers = raw.get("target_modules"), raw.get("layers_to_transform")
    if not _matches(module, targets):
        return False
    if isinstance(targets, str) or layers is None or layers == []:
        return True
    names = raw.get("layers_pattern") or [r"[^.]*"]
    for name in [names] if isinstance(names, str) else names:
        if number := re.match(rf"(?:^|.*?\.){name}\.(\d+)\.", module):
            return int(number[1]) in ([layers] if isinstance(layers, int) else layers)
    return False


def _check_targets(found: Mapping[str, Any], known: list[str], fields: Fields, source: str) -> None:
    """What the file adapts must be what the configuration names, and what the base has."""
    if not found:
        raise InputError(f"{source} holds no adapter of {fields.get('peft_type', str)}")
    for module in found:
        if module not in known:
            raise InputError(
                f"{source} adapts {module}, which this base has not, or which is no linear map or "
                "table of ours: the adapter is of another base"
            )
    if fields.raw.get("target_modules") == "all-linear":
        return
    wanted = {module for module in known if _is_target(module, fields)}
    if more := sorted(found.keys() - wanted):
        raise InputError(
            f"{source} adapts {more[0]}, which target_modules in {CONFIG} do not name: PEFT would "
            "leave it out without a word, so one of the two is not this adapter's"
        )
    if less := sorted(wanted - found.keys()):
        raise InputError(
            f"{source} has no adapter for {less[0]}, which target_modules in {CONFIG} name: the "
            "file is not whole"
        )


def _read_saved(
    plain: Tensors, params: Ours, model: TaskModel, source: str
) -> dict[str, np.ndarray]:
    """Head and biases by our path; whatever else is saved must be as in the base."""
    weights, sizes, saved = flatten(params), dict(model.sizes), {}
    rest = set(plain)
    for row in model.rows.values():
        names = row.names(sizes)
        there = [name for name in names if name in plain]
        if not there:
            continue
        rest -= set(there)
        if row.ours == "head/classifier/kernel":
            sizes["labels"] = len(plain[names[0]])
        if row.ours.startswith("head/"):
            saved[row.ours] = row.read(plain, sizes, source)
        elif is_bias(row.ours):
            base = _write(row, weights, model)
            saved[row.ours] = row.read({**base, **plain}, sizes, source)
        else:
            for name, own in _write(row, weights, model).items():
                if name in plain and not np.array_equal(own, plain[name].astype(np.float32)):
                    raise InputError(
                        f"{source} holds {name}, trained as a whole, which is frozen here: merge "
                        "it with PEFT (merge_and_unload().save_pretrained(FOLDER)), and take that "
                        "folder for a base"
                    )
    if rest:
        raise InputError(f"{source} holds {min(rest)}, which has no place in {model.auto} of ours")
    return saved


def _write(row: Row, weights: Mapping[str, Any], model: TaskModel) -> Theirs:
    """The tensors that hold a row, from the base's parameters."""
    rows = [other for other in model.rows.values() if other.theirs == row.theirs]
    values = {}
    for other in rows:
        shape = other.shape(model.sizes)
        value = np.asarray(weights[other.ours], np.float32)[tuple(slice(n) for n in shape)]
        if other.factors is not None:
            value = value / np.array(other.factors, np.float32).reshape(-1, *[1] * (value.ndim - 1))
        values[other.ours] = value
    return table.write(rows, unflatten_dict(values, sep="/"), model.sizes)


def num_labels(path: Path, model: TaskModel) -> int | None:
    """Outputs of the last layer of the head in a folder; None where there is none."""
    raw = folder.Tensors(path, WEIGHTS)
    rows = [row for row in model.head if row.ours == "head/classifier/kernel"]
    names = [f"{ROOT}{row.theirs}" for row in rows]
    return next((len(raw[name]) for name in names if name in raw), None)
