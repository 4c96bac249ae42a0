"""The pretrained model that a run starts from: of a run of ours, or published."""

import gc
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Sharding
from jaxtyping import Array, PyTree
from tokenizers import Tokenizer

from jaxlm import tree
from jaxlm.config import FinetuneConfig, PretrainConfig
from jaxlm.convert import huggingface
from jaxlm.convert.sentence_encoder import SentenceEncoder
from jaxlm.errors import InputError
from jaxlm.models.heads import EncoderDecoderLm, WithLmHead
from jaxlm.models.model import ModelConfig, example_inputs, is_two_sided
from jaxlm.runs import folder, pretrained
from jaxlm.runs.folder import CHECKPOINTS, TOKENIZER, is_run
from jaxlm.runtime.storage import StoragePath, locate
from jaxlm.train import restore
from jaxlm.train.checksum import checksums, host_checksums
from jaxlm.train.stored import Stored


@dataclass(frozen=True, kw_only=True)
class Base:
    """A pretrained encoder and its tokenizer."""

    name: str
    config: ModelConfig
    encoder: dict[str, Any]
    """Its parameters: arrays, or yet to be read (:mod:`jaxlm.train.stored`), as those of heads."""
    pooler: dict[str, Any] | None
    """``kernel`` and ``bias`` of the layer on the first token's hidden state, where published."""
    lm_head: dict[str, Any] | None
    """Parameters of the head that scores the vocabulary, where there is one."""
    others: dict[str, Any] = field(default_factory=dict)
    """What else a run has trained for its task, such as a head that does not score the vocabulary:
    a further phase of that task goes on from it."""
    sentence_encoder: SentenceEncoder | None = None
    """What a published one's folder says that follows the hidden states."""
    tokenizer: Tokenizer
    tokenizer_path: StoragePath
    """A file or a folder that holds the tokenizer."""
    fingerprint: str
    """A hash of the encoder's parameters."""
    step: int | None = None
    """Of a run, the newest checkpoint that they are from."""

    @property
    def left_behind(self) -> str:
        """What :func:`save` does not write, as the end of a line on it; empty: nothing."""
        left = " and ".join(self.others)
        return f"; its {left}, which have no place there, stay behind" if left else ""


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
        loaded = pretrained.open_pretrained(directory, step, spread=True)
        assert loaded.config.model is not None  # resolved
        config, tokenizer = loaded.config.model, loaded.tokenizer
        pooler = sentence_encoder = head = None
        tokenizer_path = directory / TOKENIZER
        shapes = loaded.placement.abstract_state.trainable["params"]
        others = _stored(shapes, directory / CHECKPOINTS, loaded.averaged)
        encoder, step = others.pop("encoder"), loaded.step
        if _scores_vocabulary(others.get("head", {}), config):
            head = others.pop("head", None)
        sums = checksums(loaded.variables["params"]["encoder"])
    else:
        published = huggingface.unread(name)
        config, tokenizer, pooler = published.config, published.tokenizer, published.pooler
        tokenizer_path, sentence_encoder = published.path, published.sentence_encoder
        encoder, head, step = published.params["encoder"], published.lm_head, None
        others = {}
        sums = host_checksums(encoder)
    digest = hashlib.sha256(repr(sorted(sums.items())).encode())
    return Base(
        name=name,
        config=config,
        encoder=encoder,
        pooler=pooler,
        lm_head=head,
        others=others,
        sentence_encoder=sentence_encoder,
        tokenizer=tokenizer,
        tokenizer_path=tokenizer_path,
        fingerprint=digest.hexdigest(),
        step=step,
    )


def save(base: Base, path: Path) -> None:
    """A new folder in Hugging Face's layout; of heads it has the one that scores the vocabulary."""
    head = {} if base.lm_head is None else {"head": base.lm_head}
    params = {"encoder": base.encoder, **head}
    huggingface.save(path, params, base.config, base.tokenizer)


def _scores_vocabulary(head: PyTree, config: ModelConfig) -> bool:
    """Whether a head has the parameters of the one that the architecture has for its vocabulary."""
    join = EncoderDecoderLm if is_two_sided(config) else WithLmHead
    model = join(config.make(), config.make_lm_head())
    own = jax.eval_shape(model.init, jax.random.key(0), *example_inputs(config))["params"]
    return tree.shapes(head) == tree.shapes(own.get("head", {}))


def _stored(shapes: PyTree, checkpoints: StoragePath, steps: Sequence[int]) -> dict[str, Any]:
    """The parameters of a run, each of which is read again, and verified, when it is laid out.

    ``shapes`` say where each is whole on every device.
    """

    def one(path: str, leaf: jax.ShapeDtypeStruct) -> Stored:
        def lay(to: Sharding) -> Array:
            wanted = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to)
            target = unflatten_dict({f"trainable/params/{path}": wanted}, sep="/")
            (x,) = jax.tree.leaves(restore.restore_mean(checkpoints, target, steps).state)
            if x.nbytes > 2**20:  # what Orbax read it into would stay for a while
                gc.collect()
            return x

        assert leaf.sharding is not None
        everywhere = leaf.sharding
        return Stored(leaf.shape, leaf.dtype, lay, lambda: np.asarray(lay(everywhere)), 0)

    return tree.map_with_path(one, dict(shapes))
