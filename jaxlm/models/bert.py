"""BERT (Devlin, Chang, Lee and Toutanova 2018, arXiv:1810.04805, section 3).

A post-norm Transformer encoder (Vaswani et al. 2017) over the sum of token, position and
token-type embeddings. RoBERTa (Liu et al. 2019, arXiv:1907.11692) is the same network with one
token type, a byte-level vocabulary and other training: ``ROBERTA_BASE``, ``ROBERTA_LARGE``.

Deliberate deviations: no pooler and no next-sentence head, which RoBERTa (section 4.2) found to
be no loss; heads live in ``heads.py``. RoBERTa's position table has no two unused rows in front.
"""

from dataclasses import dataclass, replace
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxlm.errors import InputError
from jaxlm.models.heads import MlmHead
from jaxlm.models.model import check_numbers
from jaxlm.nn import choose
from jaxlm.nn.attention import MultiHeadAttention
from jaxlm.nn.choose import Attends, Attention
from jaxlm.nn.dropout import Dropout
from jaxlm.nn.embed import Embed
from jaxlm.nn.feedforward import Mlp
from jaxlm.nn.masks import Visibility
from jaxlm.nn.norms import LayerNorm
from jaxlm.nn.stack import Remat, apply_stack
from jaxlm.sharding import constrain
from jaxlm.typing import Hidden, Tokens


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """Sizes are BERT-base's (section 3)."""

    vocab_size: int | None = None
    """Rows of the token table; None: the tokenizer's size, rounded up to a multiple of 64 and of
    the shards into which the mesh splits the table."""
    num_layers: int = 12
    hidden_dim: int = 768
    num_heads: int = 12
    mlp_dim: int = 3072
    max_length: int = 512
    """Rows of the position table, and so the longest input, in tokens."""
    num_token_types: int = 2
    dropout_rate: float = 0.1
    """Dropout rate of embeddings and of what each sub-layer adds."""
    attention_dropout_rate: float = 0.1
    epsilon: float = 1e-12
    """Added to the variance by layer normalisation."""
    initializer_std: float = 0.02
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of matrix products and activations; None: float32, and in a training run bfloat16 on
    GPUs and TPUs."""
    attention: Attention | None = None
    """How attention is computed; None: plainly, and in a run as its --attention says."""
    unroll: int | None = None
    """Blocks compiled as one iteration of a loop over layers; None = no loop (see nn.stack)."""
    remat: Remat | None = None
    """What the backward pass recomputes: full, dots (all but matrix products), or None: nothing."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "hidden_dim", "mlp_dim", "max_length"):
            if vars(self)[name] < 1:
                raise InputError(f"{name}={vars(self)[name]} is not above 0")
        if self.hidden_dim % self.num_heads:
            raise InputError(
                f"hidden_dim={self.hidden_dim} is not divisible by num_heads={self.num_heads}"
            )
        check_numbers(self)

    def forward_flops(self, length: int, num_predicted: int) -> float:
        """FLOPs of one row through encoder and masked-language-model head, a multiply-add as two.

        The products alone: projections, attention over ``length`` positions, and the vocabulary at
        ``num_predicted`` of them. A training step is three times that.
        """
        h, m = self.hidden_dim, self.mlp_dim
        layer = 2 * (4 * h * h + 2 * h * m) + 4 * length * h
        head = 2 * h * h + 2 * h * (self.vocab_size or 0)
        return float(length * self.num_layers * layer + num_predicted * head)

    @property
    def unrolls_layers(self) -> bool:
        """Whether the blocks are computed without a loop."""
        return self.unroll is None

    @property
    def attends(self) -> Attends:
        """What its attention is like."""
        return Attends(self.hidden_dim // self.num_heads, self.attention_dropout_rate)

    @property
    def is_causal(self) -> bool:
        """It sees all of a row."""
        return False

    def with_dropout(self, rate: float) -> "BertConfig":
        """The same with that rate in both places."""
        return replace(self, dropout_rate=rate, attention_dropout_rate=rate)

    def with_vocab_size(self, rows: int) -> "BertConfig":
        """The same with a token table of so many rows; the head's bias makes those added rare."""
        return replace(self, vocab_size=rows)

    def make_lm_head(self) -> MlmHead:
        """The head of masked language modelling (appendix A.2)."""
        return MlmHead(self.epsilon, jnp.dtype(self.dtype or "float32"), self.initializer_std)

    def make(self) -> "Bert":
        """The encoder. ``vocab_size`` must be known by now."""
        if self.vocab_size is None:
            raise InputError("vocab_size=None: set it to the size of the tokenizer's vocabulary")
        return Bert(config=self)


TINY = BertConfig(num_layers=2, hidden_dim=128, num_heads=2, mlp_dim=512)
MINI = BertConfig(num_layers=4, hidden_dim=256, num_heads=4, mlp_dim=1024)
SMALL = BertConfig(num_layers=4, hidden_dim=512, num_heads=8, mlp_dim=2048)
MEDIUM = BertConfig(num_layers=8, hidden_dim=512, num_heads=8, mlp_dim=2048)
BASE = BertConfig()
LARGE = BertConfig(num_layers=24, hidden_dim=1024, num_heads=16, mlp_dim=4096)
ROBERTA_BASE = replace(BASE, num_token_types=1, epsilon=1e-5)
ROBERTA_LARGE = replace(LARGE, num_token_types=1, epsilon=1e-5)


class BertBlock(nn.Module):
    """Post-norm: ``x = norm(x + attention(x)); x = norm(x + mlp(x))``."""

    config: BertConfig

    @nn.compact
    def __call__(
        self,
        x: Hidden,
        mask: Visibility | None,
        segment_ids: Int[Array, "batch length"] | None,
        deterministic: bool,
    ) -> Hidden:
        c = self.config
        dtype = jnp.dtype(c.dtype or "float32")
        init = nn.initializers.truncated_normal(c.initializer_std)
        attention = MultiHeadAttention(
            c.num_heads,
            c.hidden_dim // c.num_heads,
            dropout_rate=c.attention_dropout_rate,
            dtype=dtype,
            kernel_init=init,
            attend=choose.named(c.attention),
            name="attention",
        )
        y = attention(x, mask=mask, segment_ids=segment_ids, deterministic=deterministic)
        y = Dropout(c.dropout_rate)(y, deterministic=deterministic)
        x = LayerNorm(c.epsilon, dtype, name="attention_norm")(x + y)
        y = Mlp(c.mlp_dim, dtype=dtype, kernel_init=init, name="mlp")(x)
        y = Dropout(c.dropout_rate)(y, deterministic=deterministic)
        x = LayerNorm(c.epsilon, dtype, name="mlp_norm")(x + y)
        return constrain(x, ("batch", "length", "embed"))


class Bert(nn.Module):
    """Tokens to hidden states ``[batch, length, embed]``."""

    config: BertConfig

    def setup(self) -> None:
        c = self.config
        assert c.vocab_size is not None  # make() has seen to it
        init = nn.initializers.truncated_normal(c.initializer_std)
        dtype = jnp.dtype(c.dtype or "float32")
        self.token_embed = Embed(c.vocab_size, c.hidden_dim, dtype, init, axis="vocab")
        self.position_embed = Embed(c.max_length, c.hidden_dim, dtype, init)
        self.token_type_embed = Embed(c.num_token_types, c.hidden_dim, dtype, init)
        self.embed_norm = LayerNorm(c.epsilon, dtype)
        self.embed_dropout = Dropout(c.dropout_rate)
        self.layers = BertBlock(c)

    def __call__(
        self,
        tokens: Tokens,
        *,
        token_type_ids: Int[Array, "batch length"] | None = None,
        positions: Int[Array, "#batch length"] | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
        mask: Visibility | None = None,
        deterministic: bool = True,
    ) -> Hidden:
        """Encode rows.

        Args:
            tokens: ids below ``vocab_size``.
            token_type_ids: 0 for the first text of a pair, 1 for the second; ``None``, all 0.
            positions: below ``max_length``; ``None``, counted from 0 in each row.
            segment_ids: positions of equal id attend to each other; ``None``, no restriction.
            mask: further restriction of attention, such as ``masks.padding``.
            deterministic: no dropout; otherwise pass ``rngs={"dropout": key}`` to ``apply``.
        """
        c = self.config
        length = tokens.shape[1]
        if length > c.max_length:
            raise InputError(f"rows of {length} tokens do not fit max_length={c.max_length}")
        if positions is None:
            positions = jnp.arange(length)[None, :]
        if token_type_ids is None:
            token_type_ids = jnp.zeros((1, 1), jnp.int32)
        x = self.token_embed(tokens) + self.position_embed(positions)
        x = x + self.token_type_embed(token_type_ids)
        x = self.embed_dropout(self.embed_norm(x), deterministic=deterministic)
        x = constrain(x, ("batch", "length", "embed"))
        return apply_stack(
            self.layers,
            c.num_layers,
            x,
            mask,
            segment_ids,
            deterministic,
            unroll=c.unroll,
            remat=c.remat,
        )
