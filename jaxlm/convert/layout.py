"""Which architectures are known in Hugging Face's layout, and what of one a folder holds."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxlm.convert import bert, folder, gpt2, llama, modernbert, t5, xlnet
from jaxlm.convert.architecture import Architecture, Fields, TaskHead, names_task
from jaxlm.convert.table import Row, Sizes, Tensors
from jaxlm.errors import InputError, note
from jaxlm.models.bert import BertConfig
from jaxlm.models.gpt2 import Gpt2Config
from jaxlm.models.llama import LlamaConfig
from jaxlm.models.modernbert import ModernBertConfig
from jaxlm.models.pooling import Pooling
from jaxlm.models.t5 import T5Config
from jaxlm.models.xlnet import XlnetConfig

Known = BertConfig | Gpt2Config | LlamaConfig | ModernBertConfig | T5Config | XlnetConfig


def read_task_head(path: Path) -> TaskHead | None:
    """What a folder's configuration says of the head of a task, if it has one that is known."""
    architecture, _ = describe(path)
    fields = Fields(folder.read_config(path), str(path / folder.CONFIG))
    head, problem = task_head_of(fields, architecture)
    if problem:
        raise InputError(f"{problem}: correct it, or fine-tune from it, without this head (--base)")
    return head


def task_head_of(fields: Fields, architecture: Architecture) -> tuple[TaskHead | None, str]:
    """The same, and why it cannot be read, if so: all else of the folder can."""
    try:
        return TaskHead.read(fields, architecture), ""
    except InputError as error:
        return None, str(error)


def describe(path: Path) -> tuple[Architecture, Known]:
    """How the model in a folder is written, and its configuration."""
    raw, source = folder.read_config(path), str(path / folder.CONFIG)
    match Fields(raw, source).get("model_type", str):
        case "bert" | "roberta" | "xlm-roberta" | "camembert" | "electra" | "distilbert":
            return bert.read_config(raw, source)
        case "gpt2":
            return gpt2.read_config(raw, source)
        case "llama":
            return llama.read_config(raw, source)
        case "modernbert":
            return modernbert.read_config(raw, source, _names(path))
        case "t5":
            return t5.read_config(raw, source, _names(path))
        case "xlnet":
            return xlnet.read_config(raw, source, _names(path))
        case other:
            raise InputError(
                f"{source}: model_type={other!r} is not supported; bert, distilbert, electra, "
                "roberta, xlm-roberta, camembert, modernbert, gpt2, llama, t5 and xlnet are"
            )


def _names(path: Path) -> Tensors:
    return folder.open_tensors(path) if folder.has_weights(path) else {}


def architecture_of(config: Known, pooling: Pooling | None = None) -> Architecture:
    """How one of ours is written, whose head pools like that."""
    match config:
        case BertConfig():
            return bert.architecture(pooling)
        case Gpt2Config():
            return gpt2.architecture(tied=config.tied)
        case LlamaConfig():
            return llama.architecture(config)
        case ModernBertConfig():
            return modernbert.architecture(config)
        case T5Config():
            return t5.architecture(config)
        case XlnetConfig():
            return xlnet.XLNET


def sizes_of(config: Known, head: TaskHead | None = None) -> Sizes:
    """The size of each axis that tables name; of labels, with the head of a task."""
    more = {} if head is None else {"labels": head.size}
    return {**_own_sizes(config), **more}


def _own_sizes(config: Known) -> Sizes:
    match config:
        case BertConfig():
            return bert.sizes(config)
        case Gpt2Config():
            return gpt2.sizes(config)
        case LlamaConfig():
            return llama.sizes(config)
        case ModernBertConfig():
            return modernbert.sizes(config)
        case T5Config():
            return t5.sizes(config)
        case XlnetConfig():
            return xlnet.sizes(config)


def all_rows(architecture: Architecture) -> list[Row]:
    """Those of the encoder, the pooler and the language model's head."""
    return [*architecture.encoder, *(row for head in architecture.heads for row in head)]


class Found(NamedTuple):
    """What of a model a folder holds."""

    rows: list[Row]
    """Those of the encoder, and of the heads that are there."""
    tensors: Tensors
    """By the names that these look up."""
    sizes: Sizes
    task_head: TaskHead | None
    """What ``config.json`` says of it, whether or not it is there."""


def find(path: Path, architecture: Architecture, config: Known) -> Found:
    """The rows of the model in a folder; raises where it holds anything else.

    But for the head of a task that is not computed here, which is left out, and said to be.
    """
    raw, source = folder.open_tensors(path), str(path)
    fields = Fields(folder.read_config(path), str(path / folder.CONFIG))
    architecture = architecture.of(names_task(fields))
    task_head, problem = task_head_of(fields, architecture)
    sizes, names = sizes_of(config, task_head), names_of(raw, architecture, task_head)
    for copy, original in architecture.copies.items():
        if copy in names:
            old = names.pop(copy)
            first = names.setdefault(original, old)
            if first != old and not np.array_equal(raw[first], raw[old]):
                raise InputError(f"{source}: {old} differs from {first}; {architecture.untied}")
    rows = rows_of(names, architecture, task_head, sizes)
    unknown = names.keys() - {name for row in rows for name in row.names(sizes)}
    other = of_other_head(unknown, architecture, fields)
    if problem:
        note(f"{problem}: the head is left out, and the rest is read")
    elif other:
        note(
            f"{source}: the head of a {fields.raw['architectures'][0]} ({len(other)} tensors) is "
            "computed in another way than any here: it is left out, and the rest is read"
        )
    unknown -= other
    if unknown:
        raise InputError(
            f"{source}: the tensor {names[min(unknown)]} does not belong to this architecture of "
            f"{config.num_layers} layers, or to the head of a task that {folder.CONFIG} names"
        )
    return Found(rows, folder.Renamed(raw, names), sizes, task_head)


def other_head(path: Path) -> str | None:
    """The class that a folder names, where it is that of a task, and its head not known here."""
    fields = Fields(folder.read_config(path), str(path / folder.CONFIG))
    is_other = names_task(fields) is not None and read_task_head(path) is None
    return str(fields.raw["architectures"][0]) if is_other else None


def of_other_head(unknown: Iterable[str], architecture: Architecture, fields: Fields) -> set[str]:
    """Those of tensors without a place that make up the head of a task which is not known here."""
    if names_task(fields) is None or task_head_of(fields, architecture)[0] is not None:
        return set()
    inside = {row.theirs.partition(".")[0] for row in architecture.encoder}
    return {name for name in unknown if name.partition(".")[0] not in inside}


def names_of(
    raw: Tensors, architecture: Architecture, task_head: TaskHead | None
) -> dict[str, str]:
    """The names that rows look up -> those of a file, but for what holds nothing to read."""
    outside = _outside(architecture, task_head)
    bare = not any(name.startswith(architecture.prefix) for name in raw)

    def full(name: str) -> str:
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)  # in the oldest files
        name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
        inside = bare and not name.startswith("lm_head.") and name not in outside
        return f"{architecture.prefix}{name}" if inside else name

    names = {full(name): name for name in raw}
    return {
        name: old
        for name, old in names.items()
        if name in outside or not re.match(architecture.ignored, name)
    }


def rows_of(
    names: Iterable[str], architecture: Architecture, task_head: TaskHead | None, sizes: Sizes
) -> list[Row]:
    """The rows of the encoder and of those heads of which any tensor is there."""
    names, rows = set(names), list(architecture.encoder)
    if task_head is not None and not _outside(architecture, task_head).isdisjoint(names):
        rows += architecture.task_heads[task_head.task]
    for head in architecture.heads:
        if any(name in names for row in head for name in row.names(sizes)):
            rows += [row for row in head if row not in rows]
    return rows


def _outside(architecture: Architecture, task_head: TaskHead | None) -> set[str]:
    """Tensors of the task's head that are no part of the encoder."""
    rows = () if task_head is None else architecture.task_heads[task_head.task]
    return {row.theirs for row in rows if not row.theirs.startswith(architecture.prefix)}
