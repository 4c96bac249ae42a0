"""Published encoders: a model of Hugging Face's, as our configuration, parameters and tokenizer."""

import hashlib
import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float, Float32, PyTree
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from jaxlm.convert import bert, folder, hub, sentence_encoder, table
from jaxlm.convert.bert import Architecture
from jaxlm.convert.sentence_encoder import SentenceEncoder
from jaxlm.convert.table import Tensors, Weights
from jaxlm.data import tokenizers
from jaxlm.errors import InputError
from jaxlm.models.bert import BertConfig
from jaxlm.models.heads import Pooling
from jaxlm.models.model import ModelConfig
from jaxlm.runtime.storage import on_disk


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published model; all its weights are float32 arrays on the host."""

    path: Path
    """The folder it was read from."""
    config: BertConfig
    params: Weights
    """``{"encoder": …}``."""
    pooler: Weights | None
    """``{"kernel", "bias"}`` of ``tanh(W hidden[:, 0] + b)``, if the file has it."""
    mlm_head: Weights | None
    """Weights of a ``models.heads.MlmHead`` with the config's epsilon, if the file has them."""
    tokenizer: Tokenizer
    sentence_encoder: SentenceEncoder | None
    """What follows the hidden states, if it is one."""
    fingerprint: str
    """A sha256 of all that was read and decides what is computed; the file's layout does not."""


def load(name_or_path: str | Path, *, cache: str | Path | None = None) -> Published:
    """The BERT or RoBERTa in a folder of Hugging Face's layout, or of that name on the hub.

    The folder holds ``config.json``, ``model.safetensors`` (or its shards and their index), and
    ``tokenizer.json`` or ``vocab.txt``. Heads of tasks are not read, and a file with one is
    refused, as is whatever else is unknown, missing or of another shape. ``cache`` is the folder
    that keeps downloads; None, the one of ``huggingface_hub``.
    """
    path = hub.find(name_or_path, cache)
    source = str(path / folder.CONFIG)
    architecture, config = bert.read_config(folder.read_config(path), source)
    says = sentence_encoder.read(path)
    tokenizer = tokenizers.load(path)
    if says is not None and says.lowered:
        tokenizers.lower(tokenizer)
    num_tokens, vocab_size = tokenizers.vocab_size(tokenizer), bert.sizes(config)["vocab"]
    if num_tokens > vocab_size:
        raise InputError(
            f"{path}: the tokenizer's vocabulary of {num_tokens} is larger than the model's "
            f"vocab_size={vocab_size}"
        )
    tree = _read(architecture, config, folder.read_tensors(path), str(path))
    head = dict(tree.get("head", {}))
    return Published(
        path=path,
        config=config,
        params={"encoder": tree["encoder"]},
        pooler=head.pop("pooler", None),
        mlm_head=head or None,
        tokenizer=tokenizer,
        sentence_encoder=says,
        fingerprint=_fingerprint(config, tree),
    )


def read_config(path: Path) -> ModelConfig:
    """The model that a folder in Hugging Face's layout describes, without its weights."""
    return bert.read_config(folder.read_config(path), str(path / folder.CONFIG))[1]


def to_huggingface(
    params: PyTree[Float[Array | np.ndarray, "..."]], config: BertConfig
) -> dict[str, Float32[np.ndarray, "..."]]:
    """The tensors of a ``BertForPreTraining``, or the part of it that ``params`` holds.

    The paths are those of a run: ``encoder/…``, ``head/pooler/…`` and, of the masked-language-model
    head, ``head/{transform,norm,bias}``.
    """
    rows = [*bert.BERT.encoder, *(row for head in bert.BERT.heads for row in head)]
    return table.write(rows, params, bert.sizes(config))


def save(
    path: str | Path,
    params: PyTree[Float[Array | np.ndarray, "..."]],
    config: ModelConfig,
    tokenizer: Tokenizer,
    *,
    pooling: Pooling | None = None,
) -> None:
    """A new folder that :func:`load`, and other libraries, read; it appears when it is complete.

    With ``pooling`` it is a sentence encoder's, whose vectors have length 1.
    """
    path = on_disk(path)
    if not isinstance(config, BertConfig):
        raise InputError(
            f"a {type(config).__name__} cannot be saved for other libraries, which have no such "
            "model: use it from its run folder"
        )
    if path.exists():
        raise InputError(f"{path} exists: name a new folder")
    special = asdict(tokenizers.SpecialTokens.of(tokenizer))
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    configs = {
        folder.CONFIG: bert.write_config(config, special["pad"]),
        # Without it, other libraries take every BERT's tokenizer for WordPiece.
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.max_length,
            "model_input_names": inputs if config.num_token_types > 1 else inputs[::2],
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
            sentence_encoder.write(unfinished, pooling, config.hidden_dim, config.max_length)
        save_file(tensors, unfinished / folder.WEIGHTS, metadata={"format": "pt"})
        unfinished.rename(path)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise InputError(f"{path} cannot be written: {error}") from error


def _read(architecture: Architecture, config: BertConfig, raw: Tensors, source: str) -> Weights:
    sizes = bert.sizes(config)
    bare = not any(name.startswith(architecture.prefix) for name in raw)

    def full(name: str) -> str:
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)  # in the oldest files
        name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
        return f"{architecture.prefix}{name}" if bare else name

    names = {full(name): name for name in raw}  # ours to look up -> the file's, for messages
    tensors = {
        name: raw[names[name]] for name in names if not name.startswith(architecture.ignored)
    }
    for copy, original in architecture.copies.items():
        if copy in tensors:
            value = tensors.pop(copy)
            if not np.array_equal(tensors.setdefault(original, value), value):
                raise InputError(
                    f"{source}: {copy} differs from {original}; untied weights are not supported"
                )
    rows = list(architecture.encoder)
    for head in architecture.heads:
        if any(name in tensors for row in head for name in row.names(sizes)):
            rows += head
    unknown = tensors.keys() - {name for row in rows for name in row.names(sizes)}
    if unknown:
        raise InputError(
            f"{source}: the tensor {names[min(unknown)]} does not belong to this architecture of "
            f"{config.num_layers} layers (heads of tasks are not read)"
        )
    return table.read(rows, tensors, sizes, source)


def _fingerprint(config: BertConfig, tree: Weights) -> str:
    digest = hashlib.sha256(repr(config.epsilon).encode())  # all else shows in the shapes
    for path, leaf in sorted(flatten_dict(tree, sep="/").items()):
        digest.update(f"{path} {leaf.shape}\n".encode())
        digest.update(leaf)
    return digest.hexdigest()
