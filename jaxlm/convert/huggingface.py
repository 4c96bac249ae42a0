"""Published models: one of Hugging Face's, as our configuration, parameters and tokenizer."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jaxtyping import Float32, PyTree
from tokenizers import Tokenizer

from jaxlm import sharding
from jaxlm.convert import (
    bert,
    folder,
    gpt2,
    hub,
    layout,
    llama,
    modernbert,
    sentence_encoder,
    t5,
    table,
    xlnet,
)
from jaxlm.convert.architecture import TaskHead, TaskName
from jaxlm.convert.layout import Known
from jaxlm.convert.sentence_encoder import SentenceEncoder
from jaxlm.convert.table import LAST
from jaxlm.data import tokenizers
from jaxlm.data.special_tokens import SpecialTokens
from jaxlm.data.workspace import building
from jaxlm.errors import InputError
from jaxlm.models.bert import BertConfig
from jaxlm.models.gpt2 import Gpt2Config
from jaxlm.models.llama import LlamaConfig
from jaxlm.models.model import ModelConfig
from jaxlm.models.modernbert import ModernBertConfig
from jaxlm.models.pooling import DENSE, Pooling
from jaxlm.models.t5 import T5Config
from jaxlm.models.xlnet import XlnetConfig
from jaxlm.runtime.storage import on_disk, write_whole
from jaxlm.sharding import AxisTable, Rules
from jaxlm.train.stored import lay_out, read
from jaxlm.typing import Params


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published model; its weights are float32 arrays on the host, or are yet to be read."""

    path: Path
    """The folder it was read from."""
    config: Known
    params: PyTree
    """``{"encoder": …}``."""
    pooler: PyTree | None
    """``{"kernel", "bias"}`` of ``tanh(W hidden[:, 0] + b)``, if the file has it."""
    lm_head: PyTree | None
    """Weights of the config's ``make_lm_head()``, if it has any and the file has them."""
    task_head: TaskHead | None
    """What the head of a task is, if the file has one that is known."""
    head: PyTree | None
    """Its weights, a pooler among them."""
    tokenizer: Tokenizer
    sentence_encoder: SentenceEncoder | None
    """What follows the hidden states, if it is one."""

    @cached_property
    def fingerprint(self) -> str:
        """A sha256 of all weights and what else decides what is computed; no file's layout does."""
        config, pooler = self.config, {} if self.pooler is None else {"pooler": self.pooler}
        head = {**(self.lm_head or {}), **pooler, **(self.head or {})}
        # Of a BERT, all else shows in the shapes.
        said = config.epsilon if isinstance(config, BertConfig) else config.with_dropout(0.0)
        digest = hashlib.sha256(repr(said).encode())
        flat: Any = flatten_dict({**self.params, "head": head}, sep="/")
        for path, leaf in sorted(flat.items()):
            digest.update(f"{path} {leaf.shape}\n".encode())
            read_now: Any = np.asarray(leaf)
            digest.update(read_now)
        return digest.hexdigest()


def load(name_or_path: str | Path, *, cache: str | Path | None = None) -> Published:
    """The BERT or its kin, ModernBERT, GPT-2, Llama, T5 or XLNet in a folder, or on the hub.

    The folder holds ``config.json``, ``model.safetensors`` (or its shards and their index), and
    ``tokenizer.json``, ``vocab.txt``, or ``vocab.json`` and ``merges.txt``. Of heads of tasks those
    are read that are the same here; one that is computed otherwise is left out, which is said.
    Whatever else is unknown, missing or of another shape is refused.
    ``cache`` is the folder that keeps downloads; None, the one of ``huggingface_hub``.
    """
    found = unread(name_or_path, cache=cache)
    weights = {name: vars(found)[name] for name in ("params", "pooler", "lm_head", "head")}
    return replace(found, **read(weights))


def unread(name_or_path: str | Path, *, cache: str | Path | None = None) -> Published:
    """As :func:`load`, with weights that stay in their files (:mod:`jaxlm.train.stored`)."""
    path = hub.find(name_or_path, cache)
    architecture, config = layout.describe(path)
    says = sentence_encoder.read(path)
    tokenizer = tokenizers.load(path)
    if isinstance(config, T5Config):
        raw, start = folder.read_config(path), SpecialTokens.of(tokenizer).cls
        t5.check_start(raw, str(path / folder.CONFIG), start)
    num_tokens, vocab_size = tokenizers.vocab_size(tokenizer), layout.sizes_of(config)["vocab"]
    if num_tokens > vocab_size:
        raise InputError(
            f"{path}: the tokenizer's vocabulary of {num_tokens} is larger than the model's "
            f"vocab_size={vocab_size}"
        )
    found = layout.find(path, architecture, config)
    tree = table.stored(found.rows, found.tensors, found.sizes, str(path))
    head = dict(tree.get("head", {}))
    classifier = head.pop("classifier", None)
    whole = None if classifier is None else {**head, "classifier": classifier}
    return Published(
        path=path,
        config=config,
        params={"encoder": tree["encoder"]},
        pooler=head.pop("pooler", None),
        lm_head=head or None,
        task_head=None if whole is None else found.task_head,
        head=whole,
        tokenizer=tokenizer,
        sentence_encoder=says,
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
    architecture, config = layout.describe(path)
    rows, tensors, sizes, _ = layout.find(path, architecture, config)
    tree = table.stored(rows, tensors, sizes, str(path))
    return config, lay_out(tree, sharding.tree_shardings(tree, mesh, axes, rules))


def read_config(path: Path) -> ModelConfig:
    """The model that a folder in Hugging Face's layout describes, without its weights."""
    return layout.describe(path)[1]


def to_huggingface(
    params: PyTree,
    config: Known,
    task_head: TaskHead | None = None,
) -> dict[str, Float32[np.ndarray, "..."]]:
    """The tensors of a ``BertForPreTraining`` or of another's model with its language model's head.

    Or the part of it that ``params`` holds. The paths are those of a run: ``encoder/…``,
    ``head/pooler/…`` and, of the head that scores the vocabulary, ``head/{transform,norm,bias}`` or
    ``head/unembed``; or of the head of a task.
    """
    sizes = layout.sizes_of(config)
    tokens = None if isinstance(config, BertConfig | XlnetConfig) else config.num_tokens
    if tokens is not None:
        sizes = {**sizes, "vocab": tokens}
        first = (slice(tokens),)
        cut = {"token_embed/embedding": first, "head/bias": first, "unembed/kernel": (..., *first)}
        flat: Any = flatten_dict(params, sep="/")
        ends = {path: "/".join(path.split("/")[-2:]) for path in flat}
        flat = {
            path: np.asarray(x)[cut[ends[path]]] if ends[path] in cut else x
            for path, x in flat.items()
        }
        params = unflatten_dict(flat, sep="/")
    if task_head is None:
        return table.write(layout.all_rows(layout.architecture_of(config)), params, sizes)
    architecture = layout.architecture_of(config, task_head.pooling).of(task_head.task)
    if isinstance(config, BertConfig):
        params = bert.as_written(params, task_head.pooling)
    head = architecture.task_heads[task_head.task]
    zeros = {"bias": np.zeros(task_head.size, np.float32)}  # where a head has none
    last = {"classifier": zeros | params["head"]["classifier"]}
    rows = dict.fromkeys([*layout.all_rows(architecture), *head])
    written = params | {"head": params["head"] | last}
    return table.write(rows, written, {**sizes, "labels": task_head.size})


def poolings(config: ModelConfig, task: TaskName) -> tuple[Pooling, ...] | None:
    """How the head of a task may pool in the folder of such a model; None: it can hold none."""
    if not isinstance(config, Known) or task not in layout.architecture_of(config).task_heads:
        return None
    found: dict[Pooling, None] = dict.fromkeys(layout.architecture_of(config).poolings)
    for pool in DENSE:
        found |= dict.fromkeys(layout.architecture_of(config, pool).poolings)
    return tuple(found)


def keeps_bias(config: ModelConfig, head: TaskHead) -> bool:
    """Whether the folder of such a model can hold a bias of the last layer of that head."""
    rows = (
        layout.architecture_of(config, head.pooling).task_heads if isinstance(config, Known) else {}
    )
    return any(row.theirs and row.ours == f"{LAST[0]}/bias" for row in rows.get(head.task, ()))


def keeps_pooler(config: ModelConfig) -> bool:
    """Whether the folder of such a model can hold the layer on the first token's hidden state."""
    rows = layout.all_rows(layout.architecture_of(config)) if isinstance(config, Known) else []
    return any(row.ours.startswith("head/pooler/") for row in rows)


def save(
    path: str | Path,
    params: PyTree,
    config: ModelConfig,
    tokenizer: Tokenizer,
    *,
    pooling: Pooling | None = None,
    prompts: Mapping[str, str] | None = None,
    default_prompt_name: str | None = None,
    max_length: int | None = None,
    truncate_dim: int | None = None,
    task_head: TaskHead | None = None,
    card: str | None = None,
) -> None:
    """A new folder that :func:`load`, and other libraries, read; it appears when it is complete.

    With ``pooling`` it is a sentence encoder's, whose vectors have length 1, and of which
    ``truncate_dim`` numbers are kept; ``max_length`` is how many tokens of a text it reads, None:
    all that the model can. With a ``task_head``, ``params["head"]`` is one. ``card`` is its README.
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
        written = bert.write_config(config, found.pad, task_head and task_head.pooling)
        inputs = inputs if written.get("type_vocab_size", 1) > 1 else inputs[::2]
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
        architecture = layout.architecture_of(config, task_head.pooling)
        written |= task_head.write_config(architecture)
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
    named = to_huggingface(params, config, task_head)
    for name, x in named.items():
        if not np.isfinite(x).all():
            raise InputError(
                f"{path}: {name} would hold numbers that are not finite: copy or download the "
                "model again, or take an earlier step"
            )
    with building(path) as unfinished:
        for name, values in configs.items():
            text = json.dumps(values, indent=2) + "\n"
            (unfinished / name).write_text(text, encoding="utf-8")
        if card is not None:
            write_whole(unfinished / "README.md", card)
        tokenizers.save(tokenizer, unfinished / "tokenizer.json")
        if pooling is not None:
            lengths = [length for length in (max_length, config.max_length) if length is not None]
            sentence_encoder.write(
                unfinished,
                pooling,
                config.hidden_dim,
                min(lengths, default=None),
                prompts,
                default_prompt_name,
                truncate_dim,
            )
        folder.write_tensors(unfinished / folder.WEIGHTS, named)
