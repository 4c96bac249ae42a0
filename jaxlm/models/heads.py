"""Heads: from hidden states to logits, and the models that join an encoder with one.

The heads of fine-tuning are called as ``head(hidden, segment_ids, deterministic=…)``; positions
whose segment id is below 0 are padding, and without segment ids there is none. Where examples share
rows, ``num_segments`` is how many may be in one, and there is a vector for each. What is as wide as
the encoder is computed in the type of its hidden states; what comes out is float32.
"""

from collections.abc import Callable
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.models.pooling import Pool, bert_pooler, mean_pool, pooled
from jaxlm.nn.cache import AnyCache, DecoderCache
from jaxlm.nn.dropout import Dropout
from jaxlm.nn.embed import Embed
from jaxlm.nn.feedforward import gelu
from jaxlm.nn.linear import Linear
from jaxlm.nn.masks import NEGATIVE
from jaxlm.nn.norms import LayerNorm
from jaxlm.typing import Before, Dtype, Hidden, Mask, Tokens


@dataclass(frozen=True, kw_only=True)
class Transform:
    """``norm(activation(x W + b))``, as hidden states enter a head.

    Only inside a module's ``nn.compact``, which gets layers called ``transform`` and ``norm``.

    Attributes:
        features: width of the result, where it is not that of ``x``.
        use_bias: adds ``b``.
        norm_bias: the norm's.
    """

    activation: Callable[..., Array] = gelu
    epsilon: float = 1e-12
    dtype: Dtype = jnp.float32
    initializer_std: float = 0.02
    features: int | None = None
    use_bias: bool = True
    norm_bias: bool = True

    def __call__(self, hidden: Float[Array, "*batch embed"]) -> Float[Array, "*batch features"]:
        dense = Linear(
            self.features or hidden.shape[-1],
            use_bias=self.use_bias,
            dtype=self.dtype,
            kernel_init=nn.initializers.truncated_normal(self.initializer_std),
            name="transform",
        )
        norm = LayerNorm(self.epsilon, self.dtype, self.norm_bias, name="norm")
        return norm(self.activation(dense(hidden)))


class MlmHead(nn.Module):
    """``norm(gelu(x W + b)) Eᵀ + c`` with the encoder's token table E (Devlin et al. 2018, A.2).

    Attributes:
        features: width of the table, where it is not that of the hidden states.
    """

    epsilon: float = 1e-12
    dtype: Dtype = jnp.float32
    initializer_std: float = 0.02
    features: int | None = None

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "*batch embed"], table: Embed
    ) -> Float[Array, "*batch vocab"]:
        transform = Transform(
            epsilon=self.epsilon,
            dtype=self.dtype,
            initializer_std=self.initializer_std,
            features=self.features,
        )
        bias = self.param("bias", nn.initializers.zeros, (table.num_embeddings,), jnp.float32)
        return table.attend(transform(hidden), bias)


class TiedLmHead(nn.Module):
    """``E x`` with the encoder's token table E: float32 logits without a kernel of their own.

    Attributes:
        num_tokens: of the table's rows; the others, which stand for no token, are never likely.
        scale: what hidden states are multiplied by.
        use_bias: adds one for each row.
        transform: what hidden states go through first.
    """

    num_tokens: int | None = None
    scale: float = 1.0
    use_bias: bool = False
    transform: Transform | None = None

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "*batch embed"], table: Embed
    ) -> Float[Array, "*batch vocab"]:
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (table.num_embeddings,), jnp.float32)
        x = hidden if self.transform is None else self.transform(hidden)
        logits = table.attend(_times(x, self.scale), bias)
        return _only_tokens(logits, self.num_tokens)


class UntiedLmHead(nn.Module):
    """``x W``: float32 logits by a kernel of its own; of the table only the size is used."""

    dtype: Dtype = jnp.float32
    initializer_std: float = 0.02
    num_tokens: int | None = None
    scale: float = 1.0

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "*batch embed"], table: Embed
    ) -> Float[Array, "*batch vocab"]:
        unembed = Linear(
            table.num_embeddings,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=nn.initializers.normal(self.initializer_std),
            result_dtype=jnp.float32,
            name="unembed",
        )
        return _only_tokens(unembed(_times(hidden, self.scale)), self.num_tokens)


def _times(hidden: Float[Array, "*batch embed"], scale: float) -> Float[Array, "*batch embed"]:
    return hidden if scale == 1 else hidden * scale


def _only_tokens(
    logits: Float[Array, "*batch vocab"], num_tokens: int | None
) -> Float[Array, "*batch vocab"]:
    if num_tokens is None or num_tokens == logits.shape[-1]:
        return logits
    is_token = jnp.arange(logits.shape[-1]) < num_tokens
    return jnp.where(jnp.expand_dims(is_token, range(logits.ndim - 1)), logits, NEGATIVE)


class WithLmHead(nn.Module):
    """An encoder and a head that scores the vocabulary, such as :class:`MlmHead`.

    ``encoder`` is any module with a ``token_embed`` that maps tokens to hidden states; ``head`` is
    called as ``head(hidden, token_embed)``. One that has a name keeps it: its parameters' path.
    """

    preserve_adopted_names = True

    encoder: nn.Module
    head: nn.Module

    def __call__(
        self,
        tokens: Tokens,
        predicted: Int[Array, "batch masked"] | None = None,
        *,
        positions: Int[Array, "#batch length"] | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch predicted vocab"]:
        """Float32 logits at the positions ``predicted`` of each row, or at all of them.

        Only predicted positions reach the vocabulary: at 15 % a BERT-mini step takes 0.4 times
        as long as with all logits.
        """
        hidden = self.encoder(
            tokens,
            positions=positions,
            segment_ids=segment_ids,
            deterministic=deterministic,
        )
        if predicted is not None:
            hidden = jnp.take_along_axis(hidden, predicted[:, :, None], axis=1)
        return self.head(hidden, self.encoder.token_embed)

    def predict(
        self,
        tokens: Tokens,
        predicted: Int[Array, "batch masked"],
        *,
        mask: Mask,
        segment_ids: Int[Array, "batch length"] | None = None,
        before: Before | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch masked vocab"]:
        """Float32 logits at the positions ``predicted``, by what ``mask`` shows them alone, and by
        the tokens ``before`` the row. Of an encoder with a ``predict``, such as
        :class:`jaxlm.models.xlnet.Xlnet`.
        """
        options = {"segment_ids": segment_ids, "before": before, "deterministic": deterministic}
        hidden = self.encoder.predict(tokens, predicted, mask=mask, **options)
        return self.head(hidden, self.encoder.token_embed)

    def extend(
        self,
        tokens: Tokens,
        cache: AnyCache,
        *,
        positions: Int[Array, "batch length"],
        segment_ids: Int[Array, "batch length"] | None = None,
    ) -> tuple[Float[Array, "batch vocab"], AnyCache]:
        """Float32 logits for what follows each row's last position, and the longer cache.

        Of a model with an ``extend``, such as :class:`jaxlm.models.gpt2.Gpt2`.
        """
        hidden, cache = self.encoder.extend(
            tokens, cache, positions=positions, segment_ids=segment_ids
        )
        return self.head(hidden[:, -1], self.encoder.token_embed), cache


class EncoderDecoderLm(nn.Module):
    """:class:`WithLmHead` of a model with a decoder, such as :class:`jaxlm.models.t5.T5`."""

    preserve_adopted_names = True

    encoder: nn.Module
    head: nn.Module

    def __call__(
        self,
        tokens: Int[Array, "batch source_length"],
        decoder_tokens: Tokens,
        predicted: Int[Array, "batch masked"] | None = None,
        *,
        positions: Int[Array, "#batch source_length"] | None = None,
        segment_ids: Int[Array, "batch source_length"] | None = None,
        decoder_positions: Int[Array, "#batch length"] | None = None,
        decoder_segment_ids: Int[Array, "batch length"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch predicted vocab"]:
        """Float32 logits at the positions ``predicted`` of each target, or at all of them."""
        hidden = self.encoder(
            tokens,
            decoder_tokens,
            positions=positions,
            segment_ids=segment_ids,
            decoder_positions=decoder_positions,
            decoder_segment_ids=decoder_segment_ids,
            deterministic=deterministic,
        )
        if predicted is not None:
            hidden = jnp.take_along_axis(hidden, predicted[:, :, None], axis=1)
        return self.head(hidden, self.encoder.token_embed)

    def start(
        self,
        tokens: Int[Array, "sources source_length"],
        cache: DecoderCache,
        *,
        segment_ids: Int[Array, "sources source_length"] | None = None,
    ) -> DecoderCache:
        """The cache with what its rows continue: sources, each for as many consecutive rows."""
        encoded = self.encoder.encode(tokens, segment_ids=segment_ids)
        return self.encoder.start(encoded, segment_ids, cache)

    extend = WithLmHead.extend


def unit_length(vectors: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
    """Scaled to length 1; a vector of zeros, as of a row without tokens, stays one."""
    square = jnp.square(vectors).sum(-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(square, 1e-12))


def as_it_is(vectors: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
    """The vectors."""
    return vectors


class WithHead(nn.Module):
    """An encoder and a head on its hidden states; what comes out is the head's."""

    encoder: nn.Module
    head: nn.Module

    def __call__(
        self,
        tokens: Tokens,
        *,
        token_type_ids: Int[Array, "batch length"] | None = None,
        positions: Int[Array, "#batch length"] | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
        num_segments: int | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch ..."]:
        hidden = self.encoder(
            tokens,
            token_type_ids=token_type_ids,
            positions=positions,
            segment_ids=segment_ids,
            deterministic=deterministic,
        )
        sharing = {} if num_segments is None else {"num_segments": num_segments}
        return self.head(hidden, segment_ids, **sharing, deterministic=deterministic)


class ClassificationHead(nn.Module):
    """Pool, drop out, classify each row (Devlin et al. 2018, section 4.1).

    Multiple choice is ``num_labels=1`` over all choices (section 4.4); so is regression.

    Attributes:
        pool: one of ``pooling.POOLS``, or any function of hidden states and segment ids.
        transform: what the vector goes through first.
        use_bias: adds one in the last layer.
    """

    num_labels: int
    dropout_rate: float = 0.1
    pool: Pool = bert_pooler
    initializer_std: float = 0.02
    transform: Transform | None = None
    use_bias: bool = True

    @nn.compact
    def __call__(
        self,
        hidden: Hidden,
        segment_ids: Int[Array, "batch length"] | None = None,
        *,
        num_segments: int | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch *segments labels"]:
        x = pooled(self.pool, hidden, segment_ids, num_segments)
        x = x if self.transform is None else self.transform(x)
        x = Dropout(self.dropout_rate)(x, deterministic=deterministic)
        return _classifier(self.num_labels, self.initializer_std, self.use_bias)(x)


class TokenHead(nn.Module):
    """Drop out, classify each position: tags (Devlin et al. 2018, section 5.3).

    Extractive question answering is ``num_labels=2``: start and end of the answer (section 4.2).

    Attributes:
        transform: what each position goes through first.
    """

    num_labels: int
    dropout_rate: float = 0.1
    initializer_std: float = 0.02
    transform: Transform | None = None

    @nn.compact
    def __call__(
        self,
        hidden: Hidden,
        segment_ids: Int[Array, "batch length"] | None = None,
        *,
        num_segments: int | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch length labels"]:
        x = hidden if self.transform is None else self.transform(hidden)
        x = Dropout(self.dropout_rate)(x, deterministic=deterministic)
        return _classifier(self.num_labels, self.initializer_std)(x)


class EmbeddingHead(nn.Module):
    """Pool, and scale to length 1 (Reimers and Gurevych 2019).

    Attributes:
        pool: ``pooling.mean_pool``, or any function of hidden states and segment ids.
        scale: :func:`unit_length`, or :func:`as_it_is`.
    """

    pool: Pool = mean_pool
    scale: Callable[..., Float[Array, "*batch features"]] = unit_length

    @nn.compact
    def __call__(
        self,
        hidden: Hidden,
        segment_ids: Int[Array, "batch length"] | None = None,
        *,
        num_segments: int | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch *segments features"]:
        return self.scale(pooled(self.pool, hidden, segment_ids, num_segments))


def _classifier(num_labels: int, initializer_std: float, use_bias: bool = True) -> Linear:
    # In float32: it is narrow, and a bfloat16 logit has three digits.
    # As transformers draws it; truncated, it would be an eighth narrower.
    init = nn.initializers.normal(initializer_std)
    return Linear(num_labels, use_bias=use_bias, kernel_init=init, name="classifier")
