"""Published models: one of Hugging Face's, as our configuration, parameters and tokenizer."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, PyTree, Shaped
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from jaxlm import sharding
from jaxlm.convert import (
    bert,
    folder,
    gpt2,
    hub,
    llama,
    modernbert,
    sentence_encoder,
    t5,
    table,
    xlnet,
)
from jaxlm.convert.architecture import Architecture, Fields, TaskHead
from jaxlm.convert.sentence_encoder import SentenceEncoder
from jaxlm.convert.table import Row, Sizes, Tensors, Weights
from jaxlm.data import tokenizers
from jaxlm.data.special_tokens import SpecialTokens
from jaxlm.errors import InputError
from jaxlm.models.bert import BertConfig
from jaxlm.models.gpt2 import Gpt2Config
from jaxlm.models.llama import LlamaConfig
from jaxlm.models.model import ModelConfig
from jaxlm.models.modernbert import ModernBertConfig
from jaxlm.models.pooling import Pooling
from jaxlm.models.t5 import T5Config
from jaxlm.models.xlnet import XlnetConfig
from jaxlm.runtime.storage import on_disk
from jaxlm.sharding import AxisTable, Rules
from jaxlm.typing import Params

Known = BertConfig | Gpt2Config | LlamaConfig | ModernBertConfig | T5Config | XlnetConfig


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published model; all its weights are float32 arrays on the host."""

    path: Path
    """The folder it was read from."""
    config: Known
    params: Weights
    """``{"encoder": …}``."""
    pooler: Weights | None
    """``{"kernel", "bias"}`` of ``tanh(W hidden[:, 0] + b)``, if the file has it."""
    lm_head: Weights | None
    """Weights of the config's ``make_lm_head()``, if it has any and the file has them."""
    tokenizer: Tokenizer
    sentence_encoder: SentenceEncoder | None
    """What follows the hidden states, if it is one."""
    fingerprint: str
    """A sha256 of all that was read and decides what is computed; the file's layout does not."""


def load(name_or_path: str | Path, *, cache: str | Path | None = None) -> Published:
    """The BERT, RoBERTa, ModernBERT, GPT-2, Llama, T5 or XLNet in a folder, or on the hub.

    The folder holds ``config.json``, ``model.safetensors`` (or its shards and their index), and
    ``tokenizer.json``, ``vocab.txt``, or ``vocab.json`` and ``merges.txt``. Heads of tasks are not
    read, and a file with one is refused (but a ModernBERT's, whose head shares all but its last
    layer with the language model's), as is whatever else is unknown, missing or of another shape.
    ``cache`` is the folder that keeps downloads; None, the one of ``huggingface_hub``.
    """
    path = hub.find(name_or_path, cache)
    architecture, config = _describe(path)
    says = sentence_encoder.read(path)
    tokenizer = tokenizers.load(path)
    if says is not None and says.lowered:
        tokenizers.lower(tokenizer)
    if isinstance(config, T5Config):
        raw, start = folder.read_config(path), SpecialTokens.of(tokenizer).cls
        t5.check_start(raw, str(path / folder.CONFIG), start)
    num_tokens, vocab_size = tokenizers.vocab_size(tokenizer), _sizes(config)["vocab"]
    if num_tokens > vocab_size:
        raise InputError(
            f"{path}: the tokenizer's vocabulary of {num_tokens} is larger than the model's "
            f"vocab_size={vocab_size}"
        )
    rows, tensors = _find(architecture, config, folder.Tensors(path), str(path))
    tree = table.read(rows, tensors, _sizes(config), str(path))
    head = dict(tree.get("head", {}))
    return Published(
        path=path,
        config=config,
        params={"encoder": tree["encoder"]},
        pooler=head.pop("pooler", None),
        lm_head=head or None,
        tokenizer=tokenizer,
        sentence_encoder=says,
        fingerprint=_fingerprint(config, tree),
    )


def place(
    name_or_path: str | Path,
    mesh: Mesh,
    *,
    cache: str | Path | None = None,
    axes: AxisTable = sharding.AXES,
    rules: Rules = sharding.RULES,
) -> tuple[Known, Params]:
    """The configuration, and the parameters ``{"encoder": …, "head": …}`` laid out on a mesh.

    For models that do not fit into a host's memory twice, or at all: each process reads tensor
    after tensor, and keeps of each what its own devices hold.
    """
    path = hub.find(name_or_path, cache)
    architecture, config = _describe(path)
    rows, tensors = _find(architecture, config, folder.Tensors(path), str(path))
    sizes = _sizes(config)
    shapes = {row.ours: jax.ShapeDtypeStruct(row.shape(sizes), np.float32) for row in rows}
    places = sharding.tree_shardings(shapes, mesh, axes, rules)

    def put(row: Row) -> Array:
        def part(index: tuple[slice, ...] | None) -> Float32[np.ndarray, "..."]:
            return row.read(tensors, sizes, str(path), index)

        return jax.make_array_from_callback(row.shape(sizes), places[row.ours], part)

    return config, unflatten_dict({row.ours: put(row) for row in rows}, sep="/")


def read_config(path: Path) -> ModelConfig:
    """The model that a folder in Hugging Face's layout describes, without its weights."""
    return _describe(path)[1]


def read_layout(path: Path) -> tuple[Architecture, Known, Sizes]:
    """How the model in a folder is written, its configuration, and the sizes of its axes."""
    architecture, config = _describe(path)
    return architecture, config, _sizes(config)


def to_huggingface(
    params: PyTree[Float[Array | np.ndarray, "..."]], config: Known
) -> dict[str, Float32[np.ndarray, "..."]]:
    """The tensors of a ``BertForPreTraining`` or of another's model with its language model's head.

    Or the part of it that ``params`` holds. The paths are those of a run: ``encoder/…``,
    ``head/pooler/…`` and, of the head that scores the vocabulary, ``head/{transform,norm,bias}`` or
    ``head/unembed``.
    """
    sizes = _sizes(config)
    tokens = None if isinstance(config, BertConfig | XlnetConfig) else config.num_tokens
    if tokens is not None:
        sizes = {**sizes, "vocab": tokens}
        first = (slice(tokens),)
        cut = {"token_embed/embedding": first, "head/bias": first, "unembed/kernel": (..., *first)}
        flat: Any = flatten_dict(params, sep="/")
        ends = {path: "/".join(path.split("/")[-2:]) for path in flat}
        flat = {path: x[cut.get(ends[path], ...)] for path, x in flat.items()}
        params = unflatten_dict(flat, sep="/")
    labels = params.get("head", {}).get("classifier", {}).get("bias", ())
    return table.write(_all_rows(_architecture(config)), params, {**sizes, "labels": len(labels)})


def keeps_task_head(config: ModelConfig) -> bool:
    """Whether the folder of such a model can hold the head of a task."""
    return isinstance(config, Known) and bool(_architecture(config).task_head)


def keeps_pooler(config: ModelConfig) -> bool:
    """Whether the folder of such a model can hold the layer on the first token's hidden state."""
    rows = _all_rows(_architecture(config)) if isinstance(config, Known) else []
    return any(row.ours.startswith("head/pooler/") for row in rows)


def save(
    path: str | Path,
    params: PyTree[Float[Array | np.ndarray, "..."]],
    config: ModelConfig,
    tokenizer: Tokenizer,
    *,
    pooling: Pooling | None = None,
    prompts: Mapping[str, str] | None = None,
    task_head: TaskHead | None = None,
) -> None:
    """A new folder that :func:`load`, and other libraries, read; it appears when it is complete.

    With ``pooling`` it is a sentence encoder's, whose vectors have length 1. The first of its
    ``prompts`` is the default. With a ``task_head``, ``params["head"]`` is one.
    """
    path = on_disk(path)
    if not isinstance(config, Known):
        raise InputError(
            f"a {type(config).__name__} cannot be saved for other libraries, which have no such "
            "model: use it from its run folder"
        )
    if path.exists():
        raise InputError(f"{path} exists: name a new folder")
    found = SpecialTokens.of(tokenizer)
    inputs, side = ["input_ids", "token_type_ids", "attention_mask"], "right"
    if isinstance(config, BertConfig | ModernBertConfig | XlnetConfig):
        special = {name: i for name, i in asdict(found).items() if i is not None}
    if isinstance(config, BertConfig):
        written = bert.write_config(config, found.pad)
        inputs = inputs if config.num_token_types > 1 else inputs[::2]
    elif isinstance(config, ModernBertConfig):
        written, inputs = modernbert.write_config(config, special), inputs[::2]
    elif isinstance(config, XlnetConfig):
        written = xlnet.write_config(config) | {"pad_token_id": found.pad}
        side = "left"  # so that the last position of all rows is a token
    else:
        special = {"bos": found.cls, "eos": found.sep, "pad": found.pad}
        written = gpt2.write_config(config) if isinstance(config, Gpt2Config) else None
        written = llama.write_config(config) if isinstance(config, LlamaConfig) else written
        if isinstance(config, T5Config):
            special = {"eos": found.sep, "pad": found.pad}
            written = t5.write_config(config, found.cls)
        written = {**(written or {}), **{f"{name}_token_id": i for name, i in special.items()}}
        inputs = inputs[::2]
    if task_head is not None:
        written |= task_head.write_config(type(config).__name__.removesuffix("Config"))
    configs = {
        folder.CONFIG: written,
        # Without it, other libraries take every BERT's tokenizer for WordPiece.
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.max_length,
            "model_input_names": inputs,
            "padding_side": side,
            **{f"{name}_token": tokenizer.id_to_token(i) for name, i in special.items()},
        },
    }
    tensors = {name: np.ascontiguousarray(x) for name, x in to_huggingface(params, config).items()}
    unfinished = path.with_name(f".{path.name}")
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        for name, values in configs.items():
            text = json.dumps(values, indent=2) + "\n"
            (unfinished / name).write_text(text, encoding="utf-8")
        tokenizers.save(tokenizer, unfinished / "tokenizer.json")
        if pooling is not None:
            width, longest = config.hidden_dim, config.max_length
            sentence_encoder.write(unfinished, pooling, width, longest, prompts)
        save_file(tensors, unfinished / folder.WEIGHTS, metadata={"format": "pt"})
        unfinished.rename(path)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise InputError(f"{path} cannot be written: {error}") from error


def _describe(path: Path) -> tuple[Architecture, Known]:
    """How the model in a folder is written, and its configuration."""
    raw, source = folder.read_config(path), str(path / folder.CONFIG)
    match Fields(raw, source).get("model_type", str):
        case "bert" | "roberta":
            return bert.read_config(raw, source)
        case "gpt2":
            return gpt2.read_config(raw, source)
        case "llama":
            return llama.read_config(raw, source)
        case "modernbert":
            return modernbert.read_config(raw, source)
        case "t5":
            weights = folder.Tensors(path) if folder.has_weights(path) else {}
            return t5.read_config(raw, source, weights)
        case "xlnet":
            return xlnet.read_config(raw, source)
        case other:
            raise InputError(
                f"{source}: model_type={other!r} is not supported; bert, roberta, modernbert, "
                "gpt2, llama, t5 and xlnet are"
            )


def _architecture(config: Known) -> Architecture:
    """How one of ours is written."""
    match config:
        case BertConfig():
            return bert.BERT
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


def _sizes(config: Known) -> Sizes:
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


def _all_rows(architecture: Architecture) -> list[Row]:
    heads = (*architecture.heads, architecture.task_head)
    return [*architecture.encoder, *(row for head in heads for row in head)]


class _Renamed(Mapping[str, Shaped[np.ndarray, "..."]]):
    """Tensors under other names."""

    def __init__(self, tensors: Tensors, names: Mapping[str, str]) -> None:
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> Shaped[np.ndarray, "..."]:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _find(
    architecture: Architecture, config: Known, raw: Tensors, source: str
) -> tuple[list[Row], Tensors]:
    """The rows that the file has, and its tensors by the names that these look up."""
    sizes = _sizes(config)
    bare = not any(name.startswith(architecture.prefix) for name in raw)

    def full(name: str) -> str:
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)  # in the oldest files
        name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
        inside = bare and not name.startswith("lm_head.")
        return f"{architecture.prefix}{name}" if inside else name

    names = {full(name): name for name in raw}  # ours to look up -> the file's, for messages
    names = {name: old for name, old in names.items() if not re.match(architecture.ignored, name)}
    for copy, original in architecture.copies.items():
        if copy in names:
            old = names.pop(copy)
            first = names.setdefault(original, old)
            if first != old and not np.array_equal(raw[first], raw[old]):
                raise InputError(f"{source}: {old} differs from {first}; {architecture.untied}")
    rows = list(architecture.encoder)
    for head in architecture.heads:
        if any(name in names for row in head for name in row.names(sizes)):
            rows += head
    unknown = names.keys() - {name for row in rows for name in row.names(sizes)}
    if unknown:
        raise InputError(
            f"{source}: the tensor {names[min(unknown)]} does not belong to this architecture of "
            f"{config.num_layers} layers (heads of tasks are not read)"
        )
    return rows, _Renamed(raw, names)


def _fingerprint(config: Known, tree: Weights) -> str:
    # Of a BERT, all else shows in the shapes.
    said = config.epsilon if isinstance(config, BertConfig) else config.with_dropout(0.0)
    digest = hashlib.sha256(repr(said).encode())
    for path, leaf in sorted(flatten_dict(tree, sep="/").items()):
        digest.update(f"{path} {leaf.shape}\n".encode())
        digest.update(leaf)
    return digest.hexdigest()
