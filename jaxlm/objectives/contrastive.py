"""Sentence embeddings from pairs: each text's partner against all others' in the batch.

InfoNCE (van den Oord et al. 2018, equation 4) as in SimCSE (Gao et al. 2021, equations 1 and 5)
and Sentence-BERT's MultipleNegativesRankingLoss. ``tokens`` are [batch, 2, length], ``lengths``
[batch, 2]. The same text twice is unsupervised SimCSE: dropout tells the members apart.

The negatives of a row are the partners of the whole global batch under ``jit``; with micro-batches
or under ``pmap`` only those of its own part, which is an easier task: use neither here.
"""

from collections.abc import Mapping
from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.errors import InputError
from jaxlm.objectives import supervised
from jaxlm.objectives.cross_entropy import cross_entropy
from jaxlm.objectives.supervised import Predict, weighted_sums
from jaxlm.sums import Sums
from jaxlm.typing import Apply, Batch, Loss


def score(
    embeddings: Float[Array, "batch 2 embed"], batch: Batch, *, temperature: float = 0.05
) -> Sums:
    """The summed cross-entropy of finding the partner; ``accuracy``: it is the nearest.

    ``-log(exp(a_i · b_i / T) / Σ_j exp(a_i · b_j / T))`` over rows j of weight above 0.
    """
    similarity = jnp.einsum(
        "qe,ke->qk",
        embeddings[:, 0],
        embeddings[:, 1],
        precision="highest",  # a low temperature makes small errors large
        preferred_element_type=jnp.float32,
    )
    counts = jnp.asarray(batch["weights"]) > 0
    logits = jnp.where(counts[None, :], similarity / temperature, -1e9)
    return weighted_sums(batch, *cross_entropy(logits, jnp.arange(counts.size)))


def make_loss(apply: Apply, *, temperature: float = 0.05) -> Loss:
    """The :func:`score` of embeddings of length 1 that ``apply`` gives for rows [batch, length]."""
    if temperature <= 0:
        raise InputError(f"temperature={temperature} is not above 0; 0.05 is usual")
    return supervised.make_loss(
        supervised.over_members(apply), partial(score, temperature=temperature)
    )


def make_predict(apply: Apply) -> Predict:
    """``embeddings`` [batch, embed] of single texts: ``tokens`` [batch, length]."""

    def outputs(embeddings: Array, batch: Batch) -> Mapping[str, Array]:
        return {"embeddings": embeddings}

    return supervised.make_predict(apply, outputs)
