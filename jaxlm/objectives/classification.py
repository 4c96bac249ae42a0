"""One label for each row, for each position (tagging), or one of several rows (choice).

``labels`` and ``weights`` are [batch]; for tagging [batch, length], weighted 1 at the first token
of each word. For multiple choice (Zellers et al. 2018) ``tokens`` and ``token_type_ids`` are
[batch, choices, length], ``lengths`` [batch, choices]: give ``choices(apply)`` for ``apply``.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.errors import InputError
from jaxlm.objectives import supervised
from jaxlm.objectives.cross_entropy import smoothed_cross_entropy
from jaxlm.objectives.supervised import Predict, weighted_sums
from jaxlm.sums import Sums
from jaxlm.typing import Apply, Batch, Loss


def score(
    logits: Float[Array, "*batch labels"], batch: Batch, *, label_smoothing: float = 0.0
) -> Sums:
    """The summed cross-entropy, and hits as ``accuracy``."""
    labels = jnp.asarray(batch["labels"], jnp.int32)
    losses, _, correct = smoothed_cross_entropy(logits, labels, label_smoothing)
    return weighted_sums(batch, losses, correct)


def make_loss(apply: Apply, *, label_smoothing: float = 0.0) -> Loss:
    """The :func:`score` of the model's logits. For evaluation leave ``label_smoothing`` out."""
    if not 0 <= label_smoothing < 1:
        raise InputError(f"label_smoothing={label_smoothing} is not inside [0, 1); 0.1 is usual")
    return supervised.make_loss(apply, partial(score, label_smoothing=label_smoothing))


def make_predict(apply: Apply) -> Predict:
    """``logits`` and ``probabilities``, [..., labels]."""

    def outputs(logits: Array, batch: Batch) -> Mapping[str, Array]:
        return {"logits": logits, "probabilities": jax.nn.softmax(logits)}

    return supervised.make_predict(apply, outputs)


def choices(apply: Apply) -> Apply:
    """A model that gives each row one number, as one of logits over the choices of an example."""
    members = supervised.over_members(apply)

    def applied(*args: Any, **options: Any) -> Float[Array, "batch choices"]:
        return members(*args, **options)[..., 0]

    return applied
