"""The classic baseline: embeddings and a bidirectional LSTM (Graves and Schmidhuber 2005).

Called like :class:`jaxlm.models.bert.Bert`, so that heads and objectives are the same. Token types
have embeddings of their own, as there; positions need none.
"""

from dataclasses import dataclass, replace
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxlm.errors import InputError
from jaxlm.models.heads import MlmHead
from jaxlm.models.model import check_numbers
from jaxlm.nn.dropout import Dropout
from jaxlm.nn.embed import Embed
from jaxlm.nn.recurrent import BiLstm
from jaxlm.sharding import constrain
from jaxlm.typing import Hidden, Tokens


@dataclass(frozen=True, kw_only=True)
class BilstmConfig:
    """One layer, as in most published baselines."""

    vocab_size: int | None = None
    """Rows of the token table; None: the tokenizer's size, rounded up to a multiple of 64 and of
    the shards into which the mesh splits the table."""
    embed_dim: int = 256
    num_layers: int = 1
    hidden_dim: int = 512
    """Channels of the hidden states: half of them from each direction."""
    max_length: int | None = None
    """The longest input; None = no limit."""
    num_token_types: int = 2
    dropout_rate: float = 0.3
    """Dropout rate of embeddings and between layers."""
    initializer_std: float = 0.1
    """Standard deviation of initial embeddings: with no norm behind them, 0.02 is too small."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of matrix products and activations; None: float32, and in a training run bfloat16 on
    GPUs and TPUs."""

    def __post_init__(self) -> None:
        for name in ("embed_dim", "num_layers", "hidden_dim", "num_token_types"):
            if vars(self)[name] < 1:
                raise InputError(f"{name}={vars(self)[name]} is not above 0")
        if self.max_length is not None and self.max_length < 1:
            raise InputError(f"max_length={self.max_length} is not above 0; None = no limit")
        if self.hidden_dim % 2:
            raise InputError(f"hidden_dim={self.hidden_dim} is odd: each direction gives half")
        check_numbers(self)

    @property
    def unrolls_layers(self) -> bool:
        """Its layers are not stacked."""
        return False

    def forward_flops(self, length: int, num_predicted: int) -> float:
        """Operations for one row: the maps of inputs and states, and the head's at some positions.

        A multiply-add counts as two.
        """
        state = self.hidden_dim // 2
        inputs = self.embed_dim + (self.num_layers - 1) * self.hidden_dim
        cells = 2 * 2 * 4 * state * (inputs + self.num_layers * state)
        head = 2 * self.hidden_dim * self.embed_dim + 2 * self.embed_dim * (self.vocab_size or 0)
        return float(length * cells + num_predicted * head)

    @property
    def is_causal(self) -> bool:
        """It reads backwards, too."""
        return False

    def with_dropout(self, rate: float) -> "BilstmConfig":
        """The same with that rate."""
        return replace(self, dropout_rate=rate)

    def with_vocab_size(self, rows: int) -> "BilstmConfig":
        """The same with a token table of so many rows; the head's bias makes those added rare."""
        return replace(self, vocab_size=rows)

    def make_lm_head(self) -> MlmHead:
        """BERT's, in the width of the token table."""
        dtype = jnp.dtype(self.dtype or "float32")
        return MlmHead(dtype=dtype, initializer_std=0.02, features=self.embed_dim)

    def make(self) -> "Bilstm":
        """The encoder. ``vocab_size`` must be known by now."""
        if self.vocab_size is None:
            raise InputError("vocab_size=None: set it to the size of the tokenizer's vocabulary")
        return Bilstm(config=self)


class Bilstm(nn.Module):
    """Tokens to hidden states ``[batch, length, hidden_dim]``."""

    config: BilstmConfig

    def setup(self) -> None:
        c = self.config
        assert c.vocab_size is not None  # make() has seen to it
        init = nn.initializers.normal(c.initializer_std)
        dtype = jnp.dtype(c.dtype or "float32")
        self.token_embed = Embed(c.vocab_size, c.embed_dim, dtype, init, axis="vocab")
        self.token_type_embed = Embed(c.num_token_types, c.embed_dim, dtype, init)
        self.dropout = Dropout(c.dropout_rate)
        self.layers = [BiLstm(c.hidden_dim // 2, dtype) for _ in range(c.num_layers)]

    def __call__(
        self,
        tokens: Tokens,
        *,
        token_type_ids: Int[Array, "batch length"] | None = None,
        positions: Int[Array, "#batch length"] | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
        deterministic: bool = True,
    ) -> Hidden:
        """Encode rows.

        Args:
            tokens: ids below ``vocab_size``.
            token_type_ids: 0 for the first text of a pair, 1 for the second; ``None``, all 0.
            positions: not used: a recurrence knows the order.
            segment_ids: both directions start afresh where the id changes, such as from the real
                tokens to padding; ``None``, nowhere.
            deterministic: no dropout; otherwise pass ``rngs={"dropout": key}`` to ``apply``.
        """
        c = self.config
        if c.max_length is not None and tokens.shape[1] > c.max_length:
            raise InputError(
                f"rows of {tokens.shape[1]} tokens do not fit max_length={c.max_length}"
            )
        if token_type_ids is None:
            token_type_ids = jnp.zeros((1, 1), jnp.int32)
        x = self.token_embed(tokens) + self.token_type_embed(token_type_ids)
        for layer in self.layers:
            x = layer(self.dropout(x, deterministic=deterministic), segment_ids)
            x = constrain(x, ("batch", "length", "embed"))
        return x
