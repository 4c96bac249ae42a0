"""Tables of vectors."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.nn import custom_vjp
from jaxlm.nn.products import add_bias, product
from jaxlm.sharding import constrain
from jaxlm.typing import Dtype


@custom_vjp.attend
def attend(
    x: Float[Array, "*batch embed"],
    table: Float[Array, "vocab embed"],
    bias: Float[Array, "vocab"] | None = None,
) -> Float[Array, "*batch vocab"]:
    """``x @ tableᵀ + bias``, in float32: logits from a tied embedding.

    Hand-written gradient: forward mode only inside :func:`custom_vjp.plain`.
    """
    logits = product("...e,ve->...v", x, table)
    return logits if bias is None else add_bias(logits, bias)


class Embed(nn.Module):
    """A learned vector for each of ``num_embeddings`` ids; ``attend`` scores against all of them.

    Ids at or above ``num_embeddings`` are clamped by the gather: check them where data enters.

    Attributes:
        axis: the name of the table's first axis in the sharding rules.
    """

    num_embeddings: int
    features: int
    dtype: Dtype = jnp.float32
    embedding_init: Callable[..., Array] = nn.initializers.normal(0.02)
    axis: str = "table"

    def setup(self) -> None:
        self.embedding = self.param(
            "embedding", self.embedding_init, (self.num_embeddings, self.features), jnp.float32
        )

    def __call__(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch embed"]:
        # Whole vectors on every device, as FSDP does before use: the gather would replicate all.
        table = constrain(self.embedding, (self.axis, "embed"))
        return jnp.take(table, ids, axis=0, mode="clip").astype(self.dtype)

    def attend(
        self, x: Float[Array, "*batch embed"], bias: Float[Array, "vocab"] | None = None
    ) -> Float[Array, "*batch vocab"]:
        """Logits in float32: the inner products with every row of the table, plus ``bias``."""
        return attend(x.astype(self.dtype), self.embedding.astype(self.dtype), bias)
