"""Writing adapters in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``.

Names are those of the base's table, so that what is adapted here is adapted
there: LoRA (rsLoRA, DoRA, PiSSA as the LoRA that it is on the unchanged base) and (IA)³.
"""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from jaxlm.convert import folder, table
from jaxlm.convert import peft_tensors as tensors_of
from jaxlm.convert.peft_tensors import Ours, Placed, Theirs
from jaxlm.convert.table import Row
from jaxlm.convert.task_model import TaskModel
from jaxlm.errors import InputError
from jaxlm.nn.intercept import flatten
from jaxlm.peft.ia3 import Ia3Config
from jaxlm.peft.lora import LoraConfig

CONFIG, WEIGHTS = folder.ADAPTER, "adapter_model.safetensors"
ROOT = "base_model.model."
TASK_TYPES = {
    "SequenceClassification": "SEQ_CLS",
    "TokenClassification": "TOKEN_CLS",
    "QuestionAnswering": "QUESTION_ANS",
    "CausalLM": "CAUSAL_LM",
    "Seq2SeqLM": "SEQ_2_SEQ_LM",
    "FeatureExtraction": "FEATURE_EXTRACTION",
}


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What a run has learned, beside its base."""

    tuning: LoraConfig | Ia3Config
    collection: Ours
    """``lora`` or ``ia3``."""
    saved: Ours
    """What of ``params`` is trained, too: the head, biases."""


def save(
    path: Path,
    adapter: Adapter,
    params: Ours,
    model: TaskModel,
    base: str,
    *,
    start: Ours | None = None,
) -> None:
    """Write both files into a folder, which is made.

    ``params`` are all of the adapted model, ``base`` is what PEFT will call the model that it
    adapts, and ``start`` are the factors that PiSSA took out of it. Raises where PEFT has no such
    adapter.
    """
    tuning = adapter.tuning
    settings: dict[str, Any] = {
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "revision": None,
        "task_type": TASK_TYPES.get(model.kind),
    }
    if isinstance(tuning, LoraConfig):
        written, placed = tensors_of.write_lora(adapter.collection, tuning, params, model, start)
        settings |= _lora_settings(tuning, placed, model)
        rows = [one.row for one in placed]
    else:
        written, outputs, inputs = tensors_of.write_ia3(adapter.collection, model)
        rows = [*outputs, *inputs]
        settings |= {
            "peft_type": "IA3",
            "target_modules": _pattern(rows),
            "feedforward_modules": _pattern(inputs) if inputs else [],
            "init_ia3_weights": True,
        }
    kinds = {row.inputs_first for row in rows if row.ours.endswith("/kernel")}
    settings["fan_in_fan_out"] = kinds == {True}
    adapted = {name for row in rows for name in tensors_of.modules(row, model.sizes)}
    saved, whole = _saved(adapter.saved, params, model, adapted)
    settings["modules_to_save"] = whole or None
    written = {f"{ROOT}{name}": x for name, x in (written | saved).items()}
    try:
        path.mkdir(parents=True, exist_ok=True)
        text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
        (path / CONFIG).write_text(text, encoding="utf-8")
        folder.write_tensors(path / WEIGHTS, written)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error}") from error


def _lora_settings(tuning: LoraConfig, placed: list[Placed], model: TaskModel) -> dict[str, Any]:
    def alpha(one: Placed) -> float | int:
        root = math.sqrt(one.rank) if tuning.scaling == "rslora" else one.rank
        value = tuning.alpha if one.scale == tuning.scale(one.rank) else one.scale * root
        near = math.isclose(value, round(value), rel_tol=1e-12)
        return round(value) if near else value

    settings = [(one.rank, alpha(one)) for one in placed]
    rank, usual = Counter(settings).most_common(1)[0][0]
    others = [(_module_pattern(x.row), *pair) for x, pair in zip(placed, settings, strict=True)]
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": usual,
        "rank_pattern": {name: r for name, r, _ in others if r != rank},
        "alpha_pattern": {name: a for name, _, a in others if a != usual},
        "target_modules": _pattern([one.row for one in placed]),
        "lora_dropout": tuning.dropout_rate,
        "bias": tuning.bias,
        "use_rslora": tuning.scaling == "rslora",
        "use_dora": tuning.kind == "dora",
        "init_lora_weights": True,
    }


def _module_pattern(row: Row) -> str:
    module = row.theirs.removesuffix(".weight")
    return re.escape(module).replace(r"\{layer\}", r"\d+")


def _pattern(rows: list[Row]) -> str:
    """A regular expression for exactly these modules: a suffix may be that of others, too."""
    return "|".join(_module_pattern(row) for row in rows)


def _saved(
    saved: Ours, params: Ours, model: TaskModel, adapted: set[str]
) -> tuple[Theirs, list[str]]:
    """Tensors that are trained as they are, and the modules that they make up."""
    rows, every = model.rows, flatten(params)
    chosen, heads = {}, []
    # A head is written whole: what of it an adapter left as it was, such as ModernBERT's, too.
    trained = flatten(saved)
    whole = {row.ours for row in model.head} & (every.keys() - trained.keys())
    for path, leaf in (trained | {path: every[path] for path in sorted(whole)}).items():
        if path == "head/classifier/bias" and path not in rows and model.head:
            if np.asarray(leaf).any():
                raise InputError(
                    f"{model.auto} of {type(model.config).__name__} has no bias in its last layer, "
                    "and this head has learned one: merge_lora.py writes the encoder without it"
                )
            continue
        if path not in rows:
            raise InputError(f"{path} is trained, and has no place in {model.auto}")
        row = rows[path]
        same = [other for other in rows.values() if other.theirs == row.theirs]
        chosen |= {other.ours: other for other in same}
        if path.startswith("head/"):
            inside = row.theirs.removeprefix(model.prefix).rpartition(".")[0]
            # PEFT names the classifier itself, too, and of other containers it cannot merge.
            first = inside.partition(".")[0]
            heads.append(first if first == "classifier" else inside)
    for row in model.head:
        if row.ours not in chosen:
            raise InputError(
                f"{model.auto} has {row.theirs}, and this run has no {row.ours} for it: its head "
                "is another"
            )
    values = {path: np.asarray(every[path], np.float32) for path in chosen}
    for path, row in chosen.items():
        if row.factors is not None:
            shape = (-1, *[1] * (values[path].ndim - 1))
            values[path] = values[path] / np.array(row.factors, np.float32).reshape(shape)
    tree = unflatten_dict(values, sep="/")
    written = table.write(chosen.values(), tree, model.sizes)
    return {_inner(name, adapted): x for name, x in written.items()}, [*dict.fromkeys(heads)]


def _inner(name: str, adapted: set[str]) -> str:
    """A bias beside an adapter is that of the layer inside of the adapter."""
    module, _, end = name.rpartition(".")
    return f"{module}.base_layer.{end}" if module in adapted else name
