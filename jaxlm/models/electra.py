"""ELECTRA (Clark, Luong, Le and Manning 2020, arXiv:2003.10555, section 2).

Not an architecture of its own, but two encoders of any: a small generator, which fills in what is
hidden, and a discriminator, which says of each token whether it is the generator's. Afterwards the
discriminator's encoder alone is used.

Deliberate deviation: the generator is shallower than the discriminator and not narrower (section
3.2), so that they share all tables of embeddings as they are.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.models.heads import WithLmHead
from jaxlm.models.model import ModelConfig
from jaxlm.nn.feedforward import gelu
from jaxlm.nn.linear import Linear
from jaxlm.typing import Hidden, Params, PRNGKey, Tokens

_SHARED = "_embed"  # how names of embeddings end


class DetectionHead(nn.Module):
    """``w gelu(x W + b) + c``: above 0 where a token seems to be the generator's; in float32."""

    initializer_std: float = 0.02

    @nn.compact
    def __call__(self, hidden: Hidden) -> Float[Array, "batch length"]:
        init = nn.initializers.truncated_normal(self.initializer_std)
        linear = Linear(hidden.shape[-1], dtype=hidden.dtype, kernel_init=init, name="transform")
        return Linear(1, kernel_init=init, name="classifier")(gelu(linear(hidden)))[..., 0]


class Electra(nn.Module):
    """A discriminator, ``encoder`` and ``head``, and the parameters of its ``generator``.

    Attributes:
        init_generator: that of a :class:`jaxlm.models.heads.WithLmHead`, as is ``apply_generator``;
            its embeddings are left out, and taken from ``encoder``.
    """

    encoder: nn.Module
    head: nn.Module
    init_generator: Callable[..., Any]
    apply_generator: Callable[..., Any]

    def setup(self) -> None:
        def init(key: PRNGKey) -> Params:
            params = self.init_generator(key, jnp.zeros((1, 8), jnp.int32))["params"]
            own = {n: x for n, x in params["encoder"].items() if not n.endswith(_SHARED)}
            return {**params, "encoder": own}

        if self.has_variable("params", "generator"):
            # Linen would trace what draws it, whose single row no mesh can split.
            self.generator = self.get_variable("params", "generator")
        else:
            self.generator = self.param("generator", init)

    def __call__(
        self,
        tokens: Tokens,
        *,
        positions: Int[Array, "#batch length"] | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch length"]:
        """Logits of each token's being the generator's."""
        hidden = self.encoder(
            tokens, positions=positions, segment_ids=segment_ids, deterministic=deterministic
        )
        return self.head(hidden)

    def generate(
        self,
        tokens: Tokens,
        predicted: Int[Array, "batch masked"],
        *,
        positions: Int[Array, "#batch length"] | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch masked vocab"]:
        """The generator's logits over the vocabulary at the positions ``predicted``."""
        tables = self.encoder.variables["params"]
        shared = {name: table for name, table in tables.items() if name.endswith(_SHARED)}
        encoder = {**self.generator["encoder"], **shared}
        return self.apply_generator(
            {"params": {**self.generator, "encoder": encoder}},
            tokens,
            predicted,
            positions=positions,
            segment_ids=segment_ids,
            deterministic=deterministic,
            rngs=None if deterministic else {"dropout": self.make_rng("dropout")},
        )


def make(config: ModelConfig, generator: ModelConfig) -> Electra:
    """A discriminator of one configuration, and a generator of another, of equal width."""
    small = WithLmHead(generator.make(), generator.make_lm_head())
    return Electra(config.make(), DetectionHead(), small.init, small.apply)
