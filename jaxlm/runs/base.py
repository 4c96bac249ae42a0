"""The pretrained model that a run starts from: of a run of ours, or published."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from tokenizers import Tokenizer

from jaxlm.config import FinetuneConfig, PretrainConfig
from jaxlm.convert import huggingface
from jaxlm.convert.sentence_encoder import SentenceEncoder
from jaxlm.errors import InputError
from jaxlm.models.model import ModelConfig
from jaxlm.runs import folder, pretrained
from jaxlm.runs.folder import TOKENIZER, is_run
from jaxlm.runtime.storage import StoragePath, locate
from jaxlm.train.checksum import host_checksums


@dataclass(frozen=True, kw_only=True)
class Base:
    """A pretrained encoder and its tokenizer."""

    name: str
    config: ModelConfig
    encoder: dict[str, Any]
    """Its parameters, on the host."""
    pooler: dict[str, Any] | None
    """``kernel`` and ``bias`` of the layer on the first token's hidden state, where published."""
    lm_head: dict[str, Any] | None
    """Parameters of the head that scores the vocabulary, where there is one."""
    sentence_encoder: SentenceEncoder | None = None
    """What a published one's folder says that follows the hidden states."""
    tokenizer: Tokenizer
    tokenizer_path: StoragePath
    """A file or a folder that holds the tokenizer."""
    fingerprint: str
    """A hash of the encoder's parameters."""
    step: int | None = None
    """Of a run, the newest checkpoint that they are from."""


def lasting(name: str) -> str:
    """The name of a base as it is found from any folder: that of a local one is absolute."""
    directory = locate(name)
    return str(directory.resolve()) if isinstance(directory, Path) and directory.is_dir() else name


def read_model(name: str) -> ModelConfig | None:
    """The model of a local base, without its weights; None where there is no such folder."""
    directory = locate(name)
    if is_run(directory):
        return folder.read_config(directory, PretrainConfig).model
    if isinstance(directory, Path) and directory.is_dir():
        return huggingface.read_config(directory)
    return None


def load(name: str, *, step: int | None = None) -> Base:
    """A pretraining run's best checkpoint, a folder in Hugging Face's layout, or a name on the hub.

    ``step`` names another checkpoint of a run.

    Raises :class:`InputError` where it is none of them.
    """
    directory = locate(name)
    if is_run(directory):
        if isinstance(folder.read_any_config(directory), FinetuneConfig):
            raise InputError(
                f"base={name!r} is a fine-tuned run, and a base is pretrained: train that run "
                "further (more --train.steps, and --accept-changes for other data), or write its "
                f"model as a base (scripts/merge_lora.py {name} FOLDER)"
            )
        loaded = pretrained.open_pretrained(directory, step)
        assert loaded.config.model is not None  # resolved
        config, tokenizer = loaded.config.model, loaded.tokenizer
        pooler = sentence_encoder = None
        tokenizer_path = directory / TOKENIZER
        params = jax.device_get(loaded.variables["params"])  # devices have the run's own as well
        encoder, head, step = params["encoder"], params.get("head"), loaded.step
    else:
        published = huggingface.load(name)
        config, tokenizer, pooler = published.config, published.tokenizer, published.pooler
        tokenizer_path, sentence_encoder = published.path, published.sentence_encoder
        encoder, head, step = published.params["encoder"], published.lm_head, None
    digest = hashlib.sha256(repr(sorted(host_checksums(encoder).items())).encode())
    return Base(
        name=name,
        config=config,
        encoder=encoder,
        pooler=pooler,
        lm_head=head,
        sentence_encoder=sentence_encoder,
        tokenizer=tokenizer,
        tokenizer_path=tokenizer_path,
        fingerprint=digest.hexdigest(),
        step=step,
    )
