"""Any number of labels for each row: ``labels`` float32 [batch, labels] of 0 and 1."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.objectives import supervised
from jaxlm.objectives.supervised import Predict
from jaxlm.sums import Sums
from jaxlm.typing import Apply, Batch, Loss


def score(logits: Float[Array, "*batch labels"], batch: Batch) -> Sums:
    """The binary cross-entropy of each row, and its share of right labels: means over labels."""
    labels = jnp.asarray(batch["labels"], jnp.float32)
    losses = (jax.nn.softplus(logits) - labels * logits).mean(-1)
    hits = ((logits > 0) == (labels > 0.5)).mean(-1)
    return supervised.weighted_sums(batch, losses, hits)


def make_loss(apply: Apply) -> Loss:
    """The :func:`score` of the model's logits."""
    return supervised.make_loss(apply, score)


def make_predict(apply: Apply) -> Predict:
    """``logits`` and ``probabilities``, each label's own, [batch, labels]."""

    def outputs(logits: Array, batch: Batch) -> Mapping[str, Array]:
        return {"logits": logits, "probabilities": jax.nn.sigmoid(logits)}

    return supervised.make_predict(apply, outputs)
