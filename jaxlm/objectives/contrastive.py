"""Sentence embeddings from pairs: each text's partner against all others' in the batch.

InfoNCE (van den Oord et al. 2018, equation 4) as in SimCSE (Gao et al. 2021, equations 1 and 5)
and Sentence-BERT's MultipleNegativesRankingLoss. ``tokens`` are [batch, 2, length], ``lengths``
[batch, 2]; where pairs share rows, the two texts are neighbours there. The same text twice is
unsupervised SimCSE: dropout tells the members apart.

The negatives of a row are the partners of the whole global batch under ``jit``; with micro-batches
or under ``pmap`` only those of its own part, which is an easier task: use neither here.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from jaxlm.errors import InputError
from jaxlm.objectives import supervised
from jaxlm.objectives.cross_entropy import cross_entropy
from jaxlm.objectives.supervised import Predict, weighted_sums
from jaxlm.sums import Sums
from jaxlm.typing import Apply, Batch, Loss, Variables


def score(
    embeddings: Float[Array, "*batch 2 embed"], batch: Batch, *, temperature: float = 0.05
) -> Sums:
    """The summed cross-entropy of finding the partner; ``accuracy``: it is the nearest.

    ``-log(exp(a_i · b_i / T) / Σ_j exp(a_i · b_j / T))`` over rows j of weight above 0.
    """
    first, second = rearrange(embeddings, "... members embed -> members (...) embed")
    similarity = jnp.einsum(
        "qe,ke->qk",
        first,
        second,
        precision="highest",  # a low temperature makes small errors large
        preferred_element_type=jnp.float32,
    )
    weights = jnp.asarray(batch["weights"]).ravel()
    logits = jnp.where(weights[None, :] > 0, similarity / temperature, -1e9)
    losses, hits = cross_entropy(logits, jnp.arange(weights.size))
    return weighted_sums({"weights": weights}, losses, hits)


def make_loss(apply: Apply, *, temperature: float = 0.05) -> Loss:
    """The :func:`score` of embeddings of length 1 that ``apply`` gives for rows [batch, length]."""
    if temperature <= 0:
        raise InputError(f"temperature={temperature} is not above 0; 0.05 is usual")
    return supervised.make_loss(of_pairs(apply), partial(score, temperature=temperature))


def of_pairs(apply: Apply) -> Apply:
    """A model of texts as one of pairs: embeddings [batch, 2, embed]."""
    members = supervised.over_members(apply)

    def applied(variables: Variables, tokens: Array, **options: Any) -> Float[Array, "..."]:
        if tokens.ndim == 3:
            return members(variables, tokens, **options)
        embeddings = apply(variables, tokens, **options)
        return rearrange(
            embeddings, "batch (pairs members) embed -> batch pairs members embed", members=2
        )

    return applied


def make_predict(apply: Apply) -> Predict:
    """``embeddings`` [batch, embed] of single texts: ``tokens`` [batch, length]."""

    def outputs(embeddings: Array, batch: Batch) -> Mapping[str, Array]:
        return {"embeddings": embeddings}

    return supervised.make_predict(apply, outputs)
