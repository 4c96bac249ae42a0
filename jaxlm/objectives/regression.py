"""A number for each row: ``labels`` float32 [batch]; the model has one output."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.objectives import supervised
from jaxlm.objectives.supervised import Predict
from jaxlm.sums import Sums
from jaxlm.typing import Apply, Batch, Loss


def score(values: Float[Array, "*batch 1"], batch: Batch) -> Sums:
    """The summed squared error."""
    weights = jnp.asarray(batch["weights"], jnp.float32)
    losses = jnp.square(values[..., 0] - jnp.asarray(batch["labels"], jnp.float32))
    return Sums(totals={"loss": (losses * weights).sum()}, weight=weights.sum())


def make_loss(apply: Apply) -> Loss:
    """The :func:`score` of the model's outputs."""
    return supervised.make_loss(apply, score)


def make_predict(apply: Apply) -> Predict:
    """``values`` [batch]."""

    def outputs(values: Array, batch: Batch) -> Mapping[str, Array]:
        return {"values": values[..., 0]}

    return supervised.make_predict(apply, outputs)
