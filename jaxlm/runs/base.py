"""The encoder that fine-tuning starts from: of a run of ours, or published."""

import hashlib
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from jaxlm.convert import huggingface
from jaxlm.models.bert import BertConfig
from jaxlm.runs import run
from jaxlm.runtime.storage import locate
from jaxlm.train.checksum import checksums


@dataclass(frozen=True, kw_only=True)
class Base:
    """A pretrained encoder and its tokenizer."""

    name: str
    config: BertConfig
    encoder: dict[str, Any]
    """Its parameters."""
    pooler: dict[str, Any] | None
    """``kernel`` and ``bias`` of the layer on the first token's hidden state, where published."""
    tokenizer: Tokenizer
    fingerprint: str
    """Hash of the parameters."""


def load(name: str) -> Base:
    """A pretraining run's best checkpoint, a folder in Hugging Face's layout, or a name on the hub.

    Raises :class:`InputError` where it is none of them.
    """
    if run.is_run(locate(name)):
        loaded = run.open_run(name)
        config, tokenizer, pooler = loaded.config.model, loaded.tokenizer, None
        encoder = loaded.variables["params"]["encoder"]
    else:
        published = huggingface.load(name)
        config, tokenizer, pooler = published.config, published.tokenizer, published.pooler
        encoder = published.params["encoder"]
    digest = hashlib.sha256(repr(sorted(checksums(encoder).items())).encode())
    return Base(
        name=name,
        config=config,
        encoder=encoder,
        pooler=pooler,
        tokenizer=tokenizer,
        fingerprint=digest.hexdigest(),
    )
