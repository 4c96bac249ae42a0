"""What the rest of the library may ask of an architecture: its configuration, and how it is called.

An architecture is one file with a frozen dataclass, a block and a model. The dataclass satisfies
:class:`ModelConfig`; nothing outside ``models`` and ``convert`` asks which one it is.
"""

import math
from typing import Any, Literal, Protocol, TypeGuard, runtime_checkable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Int32

from jaxlm.errors import InputError
from jaxlm.models.heads import Transform
from jaxlm.nn.cache import Cache, DecoderCache
from jaxlm.nn.choose import Attends, Attention
from jaxlm.typing import Dtype


@runtime_checkable
class ModelConfig(Protocol):
    """The configuration of an encoder, a frozen dataclass; ``dataclasses.replace`` changes it.

    The module that :meth:`make` returns has a ``token_embed`` and is called as ``encoder(tokens, *,
    token_type_ids, positions, segment_ids, deterministic)``, all but the tokens optional. It
    returns hidden states ``[batch, length, hidden_dim]``. Positions with a segment id below 0 are
    padding, and only equal ids see each other.
    """

    @property
    def vocab_size(self) -> int | None:
        """Rows of the token table; None until the tokenizer is known."""
        ...

    @property
    def hidden_dim(self) -> int:
        """Channels of the hidden states."""
        ...

    @property
    def max_length(self) -> int | None:
        """The longest row of tokens; None = any."""
        ...

    @property
    def dtype(self) -> Literal["float32", "bfloat16"] | None:
        """Of matrix products and activations; None = decided by the platform."""
        ...

    @property
    def dropout_rate(self) -> float:
        """In training, of embeddings and of what layers add."""
        ...

    @property
    def unrolls_layers(self) -> bool:
        """Whether stacked layers are computed without a loop (:mod:`jaxlm.nn.stack`)."""
        ...

    @property
    def is_causal(self) -> bool:
        """Whether a position's hidden state has seen no later one, of anything that it sees."""
        ...

    def make(self) -> nn.Module:
        """The encoder."""
        ...

    def make_lm_head(self) -> nn.Module:
        """From hidden states to logits over the vocabulary: ``head(hidden, token_embed)``."""
        ...

    def forward_flops(self, length: int, num_predicted: int) -> float:
        """Operations for a row of ``length`` tokens, ``num_predicted`` through the head.

        A multiply-add counts as two; only matrix products count.
        """
        ...

    def with_vocab_size(self, rows: int) -> "ModelConfig":
        """The same with a token table of so many rows, of which those added stand for no token."""
        ...

    def with_dropout(self, rate: float) -> "ModelConfig":
        """The same with that rate wherever the model drops out."""
        ...


@runtime_checkable
class Attentive(ModelConfig, Protocol):
    """The configuration of a model whose attention can be computed in several ways.

    It is a field ``attention``, which its blocks give to :func:`jaxlm.nn.choose.named`.
    """

    @property
    def attention(self) -> Attention | None:
        """How; None = decided by platform and rows, in a run."""
        ...

    @property
    def attends(self) -> Attends:
        """What an implementation must be able to do."""
        ...


@runtime_checkable
class CausalConfig(ModelConfig, Protocol):
    """The configuration of a model in which no position sees a later one: it can generate.

    Its module has a second method, ``extend(tokens, cache, *, positions, segment_ids) -> (hidden,
    cache)``, which goes on from what is in the cache. Rows that are shorter are padded on their
    left, with a segment id of -1.
    """

    def make_cache(self, batch: int, kv_length: int, dtype: Dtype | None = None) -> Cache:
        """An empty cache of ``kv_length`` slots a row; of the model's dtype unless told."""
        ...


@runtime_checkable
class TransformConfig(ModelConfig, Protocol):
    """The configuration of a model whose tasks' heads begin as its language model's head does.

    What comes before the last layer, :meth:`make_transform`, has learned in pretraining.
    """

    @property
    def pooling(self) -> Literal["cls", "mean"]:
        """How a head makes one vector of a row, unless it is told."""
        ...

    def make_transform(self) -> Transform:
        """What hidden states, or that vector, go through first."""
        ...


@runtime_checkable
class EncoderDecoderConfig(ModelConfig, Protocol):
    """The configuration of an encoder of a source and a decoder of a target, which sees both.

    Its module is called as ``model(tokens, decoder_tokens, *, positions, segment_ids,
    decoder_positions, decoder_segment_ids, deterministic)`` and returns hidden states of the
    target, of which none depends on later tokens of it: ``decoder_tokens`` are the target moved by
    one, behind a start. All but the tokens are optional. Equal segment ids see each other, within
    each side and from the target to the source; below 0 is padding; those not given are all 0.
    Methods:

    - ``encode(tokens, *, positions, segment_ids, deterministic)``: hidden states of the source.
    - ``decode(decoder_tokens, encoded, *, encoded_segment_ids, positions, segment_ids,
      deterministic)``: hidden states of the target.
    - ``start(encoded, segment_ids, cache)``: the cache of :meth:`make_cache` with each layer's keys
      and values of the source, computed once. Each n consecutive rows of the cache share one of
      ``encoded``, if it has n times as many.
    - ``extend(decoder_tokens, cache, *, positions, segment_ids)``: hidden states of what follows
      and the longer cache, as of a :class:`CausalConfig`. ``cache.take(rows)`` selects rows.

    Its blocks are stacked as ``encoder_layers`` and ``decoder_layers``. For
    :meth:`forward_flops` the source has ``length`` tokens, and the target ``num_predicted``.
    :class:`jaxlm.models.heads.EncoderDecoderLm` joins it with its head.
    """

    @property
    def num_decoder_layers(self) -> int | None:
        """Blocks of the decoder; None: as many as of the encoder."""
        ...

    def make_cache(
        self, batch: int, kv_length: int, source_length: int, dtype: Dtype | None = None
    ) -> DecoderCache:
        """An empty cache of ``kv_length`` slots a row for sources of ``source_length`` tokens.

        Of the model's dtype unless told.
        """
        ...


@runtime_checkable
class SourceVocabConfig(EncoderDecoderConfig, Protocol):
    """The configuration of such a model whose sources may have a vocabulary of their own."""

    @property
    def source_vocab_size(self) -> int | None:
        """Rows of the encoder's own token table; None: it has none."""
        ...


@runtime_checkable
class TwoStreamConfig(ModelConfig, Protocol):
    """The configuration of a model that predicts tokens in any order (Yang et al. 2019).

    Its module has a second method, ``predict(tokens, predicted, *, mask, token_type_ids,
    segment_ids, before, deterministic)``, which gives hidden states ``[batch, masked, hidden_dim]``
    of the positions ``predicted`` that have seen what ``mask`` shows them, and nothing of a token
    that it does not; and the tokens ``before`` the row, if there are any.
    """

    def query_flops(self, length: int, num_predicted: int) -> float:
        """Operations of ``predict`` for a row, beside those of ``forward_flops``.

        Below 0 where it spares more of them than it adds.
        """
        ...

    def memory_flops(self, memory: int, length: int) -> float:
        """Those of reading so many tokens before, and of ``length`` positions that see them."""
        ...


def is_attentive(config: ModelConfig) -> TypeGuard[Attentive]:
    """Whether its attention can be computed in several ways."""
    return isinstance(config, Attentive)


def has_transform(config: ModelConfig) -> TypeGuard[TransformConfig]:
    """Whether its tasks' heads begin as its language model's head does."""
    return isinstance(config, TransformConfig)


def is_two_sided(config: ModelConfig) -> TypeGuard[EncoderDecoderConfig]:
    """Whether it reads a source with an encoder and writes a target with a decoder."""
    return isinstance(config, EncoderDecoderConfig)


def has_source_vocab(config: ModelConfig) -> TypeGuard[SourceVocabConfig]:
    """Whether its sources may have a vocabulary of their own."""
    return isinstance(config, SourceVocabConfig)


def is_two_stream(config: ModelConfig) -> TypeGuard[TwoStreamConfig]:
    """Whether it predicts positions that it does not see, in any order."""
    return isinstance(config, TwoStreamConfig)


def example_inputs(config: ModelConfig) -> tuple[Int32[Array, "1 8"], ...]:
    """A row of tokens to initialise a model and to trace it with; one for each side it has."""
    tokens = jnp.zeros((1, 8), jnp.int32)
    return (tokens, tokens) if is_two_sided(config) else (tokens,)


_USUAL = {"epsilon": "; 1e-5 is usual", "base": "; 10000 is usual", "factor": ""}


def check_numbers(config: Any) -> None:
    """Raises for a number that gives no finite activations; the ends of names say what each is."""
    for name, value in vars(config).items():
        end = name.rpartition("_")[2]
        if end == "rate" and not 0 <= value < 1:
            raise InputError(f"{name}={value} is not inside [0, 1); 0.1 is usual, 0 is off")
        if end in _USUAL and not 0 < value < math.inf:
            raise InputError(f"{name}={value} is not a finite number above 0{_USUAL[end]}")
        if end == "std" and not 0 <= value < math.inf:
            raise InputError(f"{name}={value} is not a finite number from 0 up; 0.02 is usual")
