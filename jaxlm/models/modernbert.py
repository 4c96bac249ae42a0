"""ModernBERT (Warner et al. 2024, arXiv:2412.13663, section 2).

BERT (``bert.py``) with what encoders have learned since: blocks normalise what goes into them
(pre-norm), positions turn queries and keys (``nn/positions.py``), feed-forward blocks are gated
(GeGLU), of every three layers two see a window alone, with rotations of their own, and there are
no biases, no token types and no dropout unless asked for. The first layer's attention gets the
embeddings as they are, because they are normalised already; so each block here ends with the norm
of what the next one's attention gets, and the last with that of the hidden states. All blocks are
equal then, and the model is the published one.

Deliberate deviation: a window counts places in the row, as the code does, not ``positions``.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxlm.errors import InputError
from jaxlm.models.heads import TiedLmHead, Transform
from jaxlm.models.model import check_numbers
from jaxlm.nn import choose, masks, positions
from jaxlm.nn.attention import MultiHeadAttention
from jaxlm.nn.choose import Attends, Attention
from jaxlm.nn.dropout import Dropout
from jaxlm.nn.embed import Embed
from jaxlm.nn.feedforward import ACTIVATIONS, Activation, GatedMlp
from jaxlm.nn.masks import Visibility
from jaxlm.nn.norms import LayerNorm
from jaxlm.nn.positions import Rotary
from jaxlm.nn.stack import Remat, scan_stack
from jaxlm.sharding import constrain
from jaxlm.typing import Hidden, Tokens


@dataclass(frozen=True, kw_only=True)
class ModernBertConfig:
    """Sizes are those of the published base model (table 4), of 149 million parameters."""

    vocab_size: int | None = None
    """Rows of the token table; None: the tokenizer's size, rounded up to a multiple of 64 and of
    the shards into which the mesh splits the table."""
    num_tokens: int | None = None
    """Tokens that there are, if the table has more rows, which then are never predicted; None: all
    rows are tokens."""
    num_layers: int = 22
    hidden_dim: int = 768
    num_heads: int = 12
    mlp_dim: int = 1152
    max_length: int = 8192
    """The longest input, in tokens."""
    global_every: int = 3
    """The first of so many layers sees all of a row, the others a window; 1: all see all."""
    window: int = 64
    """How many tokens a layer with a window sees on each side of one."""
    global_rope_base: float = 160_000.0
    """The largest wavelength of the rotations in layers that see all, in positions by 2π."""
    local_rope_base: float = 10_000.0
    """That in layers with a window."""
    activation: Activation = "gelu"
    """The gates' in the feed-forward blocks."""
    head_activation: Activation = "gelu"
    """That of the dense layer in the heads."""
    pooling: Literal["cls", "mean"] = "cls"
    """How a task's head makes one vector of a row: the first token's, or the mean."""
    attention_bias: bool = False
    """Biases in attention's four linear maps."""
    mlp_bias: bool = False
    """Biases in the feed-forward blocks' three linear maps."""
    norm_bias: bool = False
    """Biases in all norms."""
    head_bias: bool = False
    """A bias in the dense layer of the heads."""
    vocab_bias: bool = True
    """A bias for each token where the vocabulary is scored."""
    dropout_rate: float = 0.0
    """Dropout rate of embeddings."""
    attention_dropout_rate: float = 0.0
    """That of attention weights, and of what attention adds."""
    mlp_dropout_rate: float = 0.0
    """That inside the feed-forward blocks."""
    epsilon: float = 1e-5
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
        sizes = "num_heads", "hidden_dim", "mlp_dim", "max_length", "global_every", "window"
        for name in ("num_layers", *sizes):
            if vars(self)[name] < 1:
                raise InputError(f"{name}={vars(self)[name]} is not above 0")
        if self.hidden_dim % (2 * self.num_heads):
            raise InputError(
                f"hidden_dim={self.hidden_dim} is not divisible by twice num_heads="
                f"{self.num_heads}: each head's channels are turned in pairs"
            )
        check_numbers(self)

    @property
    def is_local(self) -> Bool[np.ndarray, "layers"]:
        """Which layers see a window."""
        return np.arange(self.num_layers) % self.global_every > 0

    def forward_flops(self, length: int, num_predicted: int) -> float:
        """FLOPs of one row through encoder and masked-language-model head, a multiply-add as two.

        The products alone: projections, attention over what a layer sees (where the window's ends
        cut it, too), and the vocabulary at ``num_predicted`` of ``length`` positions.
        """
        h, m = self.hidden_dim, self.mlp_dim
        num_local = int(self.is_local.sum())
        seen = (self.num_layers - num_local) * length
        seen += num_local * min(length, 2 * self.window + 1)
        layers = self.num_layers * 2 * (4 * h * h + 3 * h * m) + 4 * seen * h
        head = 2 * h * h + 2 * h * (self.vocab_size or 0)
        return float(length * layers + num_predicted * head)

    @property
    def unrolls_layers(self) -> bool:
        """Whether the blocks are computed without a loop."""
        return self.unroll is None

    @property
    def attends(self) -> Attends:
        """What its attention is like."""
        head_dim = self.hidden_dim // self.num_heads
        return Attends(head_dim, self.attention_dropout_rate, bool(self.is_local.any()))

    @property
    def is_causal(self) -> bool:
        """It sees both sides."""
        return False

    def with_dropout(self, rate: float) -> "ModernBertConfig":
        """The same with that rate in all places."""
        return replace(self, dropout_rate=rate, attention_dropout_rate=rate, mlp_dropout_rate=rate)

    def with_vocab_size(self, rows: int) -> "ModernBertConfig":
        """The same with a token table of so many rows; what is added is never predicted."""
        return replace(self, vocab_size=rows, num_tokens=self.num_tokens or self.vocab_size)

    def make_transform(self) -> Transform:
        """What the heads do with hidden states first, in pretraining and in every task."""
        return Transform(
            activation=ACTIVATIONS[self.head_activation],
            epsilon=self.epsilon,
            dtype=jnp.dtype(self.dtype or "float32"),
            initializer_std=self.out_std,
            use_bias=self.head_bias,
            norm_bias=self.norm_bias,
        )

    def make_lm_head(self) -> TiedLmHead:
        """The head of masked language modelling."""
        return TiedLmHead(
            self.num_tokens, use_bias=self.vocab_bias, transform=self.make_transform()
        )

    def make(self) -> "ModernBert":
        """The encoder. ``vocab_size`` must be known by now."""
        if self.vocab_size is None:
            raise InputError("vocab_size=None: set it to the size of the tokenizer's vocabulary")
        return ModernBert(config=self)

    @property
    def out_std(self) -> float:
        """Deviation of what adds to the residual stream, and of the heads (section 2.2)."""
        return self.initializer_std / (2 * self.num_layers) ** 0.5


# With a vocabulary of 50,368: 149 and 395 million parameters. TINY and MINI are for CPUs, as wide
# and deep as the BERT of configs/sotu.py and BERT-mini, and, but for tables, of as many parameters.
TINY = ModernBertConfig(num_layers=3, hidden_dim=192, num_heads=3, mlp_dim=512, max_length=1024)
MINI = ModernBertConfig(num_layers=4, hidden_dim=256, num_heads=4, mlp_dim=688, max_length=1024)
BASE = ModernBertConfig()
LARGE = ModernBertConfig(num_layers=28, hidden_dim=1024, num_heads=16, mlp_dim=2624)


class View(NamedTuple):
    """What a kind of layer may attend to, and how it turns queries and keys."""

    mask: Visibility
    rotary: Rotary


class Streams(NamedTuple):
    """The residual stream, and what the next block's attention gets of it."""

    x: Hidden
    normed: Hidden


def _by_kind(
    attend: Callable[..., Float[Array, "..."]], is_local: Bool[Array, ""], views: tuple[View, View]
) -> Callable[..., Float[Array, "..."]]:
    """``attend`` with the mask of a layer's kind, which is traced, while a window's size is not.

    Of a layer whose kind is a constant, which it is without a loop, XLA keeps one of the two.
    """

    def either(
        query: Float[Array, "..."], key: Float[Array, "..."], value: Float[Array, "..."], **options
    ) -> Float[Array, "..."]:
        far, near = (
            lambda *qkv, mask=view.mask: attend(*qkv, **(options | {"mask": mask}))
            for view in views
        )
        return lax.cond(is_local, near, far, query, key, value)

    return either


class ModernBertBlock(nn.Module):
    """``x = x + attention(normed); x = x + mlp(mlp_norm(x)); normed = next_norm(x)``."""

    config: ModernBertConfig

    @nn.compact
    def __call__(
        self,
        streams: Streams,
        is_local: Bool[Array, ""],
        views: tuple[View, View],
        deterministic: bool,
    ) -> Streams:
        c = self.config
        dtype = jnp.dtype(c.dtype or "float32")
        init = nn.initializers.truncated_normal(c.initializer_std)
        out_init = nn.initializers.truncated_normal(c.out_std)
        attention = MultiHeadAttention(
            c.num_heads,
            c.hidden_dim // c.num_heads,
            dropout_rate=c.attention_dropout_rate,
            use_bias=c.attention_bias,
            dtype=dtype,
            kernel_init=init,
            out_init=out_init,
            attend=_by_kind(choose.named(c.attention), is_local, views),
            name="attention",
        )
        activation = ACTIVATIONS[c.activation]
        mlp = GatedMlp(
            c.mlp_dim, activation, c.mlp_bias, dtype, init, out_init, c.mlp_dropout_rate, name="mlp"
        )
        far, near = (view.rotary for view in views)
        rotary = jax.tree.map(lambda far, near: jnp.where(is_local, near, far), far, near)
        y = attention(streams.normed, rotary=rotary, deterministic=deterministic)
        x = streams.x + Dropout(c.attention_dropout_rate)(y, deterministic=deterministic)
        y = LayerNorm(c.epsilon, dtype, c.norm_bias, name="mlp_norm")(x)
        x = x + mlp(y, deterministic=deterministic)
        x = constrain(x, ("batch", "length", "embed"))
        return Streams(x, LayerNorm(c.epsilon, dtype, c.norm_bias, name="next_norm")(x))


class ModernBert(nn.Module):
    """Tokens to hidden states ``[batch, length, embed]``."""

    config: ModernBertConfig

    def setup(self) -> None:
        c = self.config
        assert c.vocab_size is not None  # make() has seen to it
        init = nn.initializers.truncated_normal(c.initializer_std)
        dtype = jnp.dtype(c.dtype or "float32")
        self.token_embed = Embed(c.vocab_size, c.hidden_dim, dtype, init, axis="vocab")
        self.embed_norm = LayerNorm(c.epsilon, dtype, c.norm_bias)
        self.embed_dropout = Dropout(c.dropout_rate)
        self.layers = ModernBertBlock(c)

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
            token_type_ids: not used: there are no token types.
            positions: by which queries and keys are turned; ``None``, counted from 0 in each row.
            segment_ids: positions of equal id attend to each other; ``None``, no restriction.
            mask: further restriction of attention, such as ``masks.padding``.
            deterministic: no dropout; otherwise pass ``rngs={"dropout": key}`` to ``apply``.
        """
        c = self.config
        length = tokens.shape[1]
        if length > c.max_length:
            raise InputError(
                f"rows of {length} tokens do not fit max_length={c.max_length}: cut them, or raise "
                "it, since rotations have no end"
            )
        if positions is None:
            positions = jnp.arange(length)[None, :]
        views = self._views(length, positions, segment_ids, mask)
        x = self.embed_norm(self.token_embed(tokens))
        x = constrain(
            self.embed_dropout(x, deterministic=deterministic), ("batch", "length", "embed")
        )

        def body(block: nn.Module, streams: Streams, is_local: Array) -> tuple[Streams, None]:
            return block(streams, is_local, views, deterministic), None

        streams, _ = scan_stack(
            body,
            self.layers,
            c.num_layers,
            Streams(x, x),
            c.is_local,
            unroll=c.unroll,
            remat=c.remat,
        )
        return streams.normed

    def _views(
        self,
        length: int,
        at: Int[Array, "#batch length"],
        segment_ids: Int[Array, "batch length"] | None,
        mask: Visibility | None,
    ) -> tuple[View, View]:
        """Those of layers that see all of a row, and of layers that see a window."""
        c = self.config
        far = masks.visible(segment_ids, mask)
        near = masks.visible(segment_ids, mask, before=c.window, after=c.window)

        def rotary(base: float) -> Rotary:
            frequencies = positions.frequencies(c.hidden_dim // c.num_heads, base)
            return positions.rotary(at, frequencies)

        return View(far, rotary(c.global_rope_base)), View(near, rotary(c.local_rope_base))
