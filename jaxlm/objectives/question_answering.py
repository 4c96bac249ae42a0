"""Extractive question answering (Devlin et al. 2018, sections 4.2 and 4.3): start and end.

``starts`` and ``ends`` [batch] are positions, 0, the first token, where there is no answer;
``allowed`` [batch, length] is True at the positions that may be either.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.objectives import supervised
from jaxlm.objectives.cross_entropy import cross_entropy
from jaxlm.objectives.supervised import Predict, weighted_sums
from jaxlm.sums import Sums
from jaxlm.typing import Apply, Batch, Loss

FORBIDDEN = -1e9  # a logit: no probability, and yet finite when two are added


def score(logits: Float[Array, "batch length 2"], batch: Batch) -> Sums:
    """Half the summed cross-entropy of starts and ends; ``accuracy``: both are right."""
    masked = outputs(logits, batch)
    start_losses, start_hits = cross_entropy(
        masked["start_logits"], jnp.asarray(batch["starts"], jnp.int32)
    )
    end_losses, end_hits = cross_entropy(
        masked["end_logits"], jnp.asarray(batch["ends"], jnp.int32)
    )
    return weighted_sums(batch, (start_losses + end_losses) / 2, start_hits & end_hits)


def outputs(logits: Float[Array, "batch length 2"], batch: Batch) -> Mapping[str, Array]:
    """``start_logits`` and ``end_logits`` [batch, length], -1e9 where no answer may lie."""
    allowed = jnp.asarray(batch["allowed"], bool)
    return {
        "start_logits": jnp.where(allowed, logits[..., 0], FORBIDDEN),
        "end_logits": jnp.where(allowed, logits[..., 1], FORBIDDEN),
    }


def make_loss(apply: Apply) -> Loss:
    """The :func:`score` of the model's logits."""
    return supervised.make_loss(apply, score)


def make_predict(apply: Apply) -> Predict:
    """:func:`outputs`: logits, because those of one text's windows are compared."""
    return supervised.make_predict(apply, outputs)
