"""A toy architecture: each position adds a map of the mean of the positions before it."""

from dataclasses import dataclass, replace
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxlm.models.heads import MlmHead
from jaxlm.nn import masks
from jaxlm.nn.dropout import Dropout
from jaxlm.nn.embed import Embed
from jaxlm.nn.linear import Linear
from jaxlm.typing import Hidden, Tokens


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    vocab_size: int | None = None
    hidden_dim: int = 32
    max_length: int | None = 64
    dropout_rate: float = 0.0
    dtype: Literal["float32", "bfloat16"] | None = None

    @property
    def is_causal(self) -> bool:
        """It sees all of a row."""
        return False

    @property
    def unrolls_layers(self) -> bool:
        return False

    def make(self) -> nn.Module:
        return Toy(self)

    def with_vocab_size(self, rows: int) -> "ToyConfig":
        return replace(self, vocab_size=rows)

    def make_lm_head(self) -> nn.Module:
        return MlmHead()

    def forward_flops(self, length: int, num_predicted: int) -> float:
        return 2.0 * length * self.hidden_dim**2

    def with_dropout(self, rate: float) -> "ToyConfig":
        return replace(self, dropout_rate=rate)


class Toy(nn.Module):
    config: ToyConfig

    def setup(self) -> None:
        assert self.config.vocab_size is not None
        self.token_embed = Embed(self.config.vocab_size, self.config.hidden_dim, axis="vocab")
        self.blend = Linear(self.config.hidden_dim)
        self.dropout = Dropout(self.config.dropout_rate)

    def __call__(
        self,
        tokens: Tokens,
        *,
        token_type_ids: Int[Array, "batch length"] | None = None,
        positions: Int[Array, "#batch length"] | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
        deterministic: bool = True,
    ) -> Hidden:
        x = self.token_embed(tokens)
        before = jnp.tril(jnp.ones((tokens.shape[1], tokens.shape[1])))[None]
        if segment_ids is not None:
            before = before * masks.segments(segment_ids, segment_ids)[:, 0]
        mean = jnp.einsum("bqk,bke->bqe", before, x) / before.sum(-1, keepdims=True)
        return x + self.dropout(self.blend(mean), deterministic=deterministic)
