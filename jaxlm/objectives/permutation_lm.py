"""Permutation language modelling (Yang et al. 2019, arXiv:1906.08237, sections 2.2 and 2.3).

Predict the last tokens of a random order of the row from those before them in that order. As in
the published code, all that come before the predicted ones see each other.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxlm.nn import masks
from jaxlm.objectives import packing
from jaxlm.objectives.masking import ChoiceConfig, Chosen, Vocabulary, choose, score
from jaxlm.sums import Sums
from jaxlm.typing import Apply, Batch, Before, Loss, PRNGKey, Scalar, Tokens, Variables


def make_loss(
    apply: Apply, vocabulary: Vocabulary, choice: ChoiceConfig, *, isolate_documents: bool = False
) -> Loss:
    """The summed cross-entropy of the predicted tokens.

    ``apply(variables, tokens, predicted, *, mask, segment_ids, deterministic, rngs, method)`` with
    the method ``predict`` gives the logits at the positions ``predicted``, which have seen what the
    mask shows them. The batch is that of :mod:`jaxlm.objectives.masked_lm`. If it has tokens of the
    text ``before`` each row [batch, memory], these and ``before_lengths`` [batch], how many of them
    are real, are given as ``before``.
    """
    choice.check(vocabulary)

    def loss(
        variables: Variables,
        batch: Batch,
        key: PRNGKey,
        *,
        progress: Scalar,
        deterministic: bool,
    ) -> tuple[Scalar, Sums]:
        tokens = jnp.asarray(batch["tokens"], jnp.int32)
        lengths, index = jnp.asarray(batch["lengths"]), jnp.asarray(batch["index"])
        choice_key, order_key, dropout_key = jax.random.split(key, 3)
        # Devices under pmap and micro-batches hold different rows, and so drop differently.
        dropout_key = jax.random.fold_in(dropout_key, index[0])
        chosen = choose(choice_key, tokens, lengths, index, vocabulary, choice, progress=progress)
        pack = packing.documents if isolate_documents else packing.whole_rows
        logits = apply(
            variables,
            tokens,
            chosen.predicted,
            mask=masks.permutation(draw_order(order_key, tokens, index, chosen)),
            segment_ids=pack(tokens, lengths, vocabulary).segment_ids,
            deterministic=deterministic,
            rngs=None if deterministic else {"dropout": dropout_key},
            method="predict",
            **_before(batch),
        )
        return score(logits, chosen, lengths)

    return loss


def _before(batch: Batch) -> dict[str, Before]:
    if "before" not in batch:
        return {}
    tokens, lengths = (jnp.asarray(batch[x], jnp.int32) for x in ("before", "before_lengths"))
    return {"before": (tokens, lengths)}


def draw_order(
    key: PRNGKey, tokens: Tokens, index: Int[Array, "batch"], chosen: Chosen
) -> Int[Array, "batch length"]:
    """Of each position: 0, or where it comes among those that are predicted, from 1, at random.

    The order of ``chosen`` would not do: inside a span it goes from left to right.
    """

    def row(tokens: Array, index: Array, predicted: Array, weights: Array) -> Array:
        drawn = jax.random.permutation(jax.random.fold_in(key, index), predicted.size) + 1
        rank = jnp.where(weights > 0, drawn, 0)
        return jnp.zeros_like(tokens).at[predicted].set(rank.astype(tokens.dtype))

    return jax.vmap(row)(tokens, index, chosen.predicted, chosen.weights)
