"""The pretrained model that a run starts from: of a run of ours, or published."""

import hashlib
from dataclasses import dataclass
from typing import Any

import jax
from tokenizers import Tokenizer

from jaxlm.convert import huggingface
from jaxlm.models.model import ModelConfig
from jaxlm.runs import pretrained
from jaxlm.runs.folder import TOKENIZER, is_run
from jaxlm.runtime.storage import StoragePath, locate
from jaxlm.train.checksum import checksums


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
    tokenizer: Tokenizer
    tokenizer_path: StoragePath
    """A file or a folder that holds the tokenizer."""
    fingerprint: str
    """A hash of the encoder's parameters."""


def load(name: str) -> Base:
    """A pretraining run's best checkpoint, a folder in Hugging Face's layout, or a name on the hub.

    Raises :class:`InputError` where it is none of them.
    """
    directory = locate(name)
    if is_run(directory):
        loaded = pretrained.open_pretrained(directory)
        assert loaded.config.model is not None  # resolved
        config, tokenizer, pooler = loaded.config.model, loaded.tokenizer, None
        tokenizer_path = directory / TOKENIZER
        params = jax.device_get(loaded.variables["params"])  # devices have the run's own as well
        encoder, head = params["encoder"], params.get("head")
    else:
        published = huggingface.load(name)
        config, tokenizer, pooler = published.config, published.tokenizer, published.pooler
        tokenizer_path = published.path
        encoder, head = published.params["encoder"], published.mlm_head
    digest = hashlib.sha256(repr(sorted(checksums(encoder).items())).encode())
    return Base(
        name=name,
        config=config,
        encoder=encoder,
        pooler=pooler,
        lm_head=head,
        tokenizer=tokenizer,
        tokenizer_path=tokenizer_path,
        fingerprint=digest.hexdigest(),
    )
