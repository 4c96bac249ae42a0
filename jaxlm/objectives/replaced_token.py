"""Replaced-token detection (Clark et al. 2020, arXiv:2003.10555, section 2).

A generator fills in what is hidden by sampling; a discriminator says of every token whether it is
the one that stood there. What it learns is from all tokens, and not from the hidden ones alone.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm.objectives import packing
from jaxlm.objectives.cross_entropy import cross_entropy
from jaxlm.objectives.masking import Corrupted, MaskingConfig, Vocabulary, corrupt
from jaxlm.sums import Sums
from jaxlm.typing import Apply, Batch, Loss, PRNGKey, Scalar, Tokens, Variables


def make_loss(
    apply: Apply,
    vocabulary: Vocabulary,
    masking: MaskingConfig,
    *,
    detection_weight: float,
    isolate_documents: bool = False,
) -> Loss:
    """``mean cross-entropy of the generator + detection_weight * mean of the discriminator's``.

    As sums over one weight, the number of tokens: each hidden one counts ``1 / rate`` times, which
    makes of the first a mean over these as far as they are that share. No gradient passes through
    what is sampled. ``apply(variables, tokens, *, positions, segment_ids, deterministic, rngs)``
    gives logits [batch, length], above 0 where a token seems to be sampled; with ``predicted`` and
    the method ``generate`` the generator's at these positions. The batch is that of
    :mod:`jaxlm.objectives.masked_lm`.
    """
    masking.check(vocabulary)

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
        masking_key, sampling_key, *dropout_keys = jax.random.split(key, 4)
        corrupted = corrupt(
            masking_key, tokens, lengths, index, vocabulary, masking, progress=progress
        )
        packed = packing.documents if isolate_documents else packing.whole_rows
        segments, positions = packed(tokens, lengths, vocabulary)

        def told(dropout_key: PRNGKey) -> dict[str, Any]:
            # Devices under pmap and micro-batches hold different rows, and so drop differently.
            rngs = {"dropout": jax.random.fold_in(dropout_key, index[0])}
            return {
                "positions": positions,
                "segment_ids": segments,
                "deterministic": deterministic,
                "rngs": None if deterministic else rngs,
            }

        first, second = map(told, dropout_keys)
        logits = apply(variables, corrupted.tokens, corrupted.predicted, method="generate", **first)
        drawn = sample(sampling_key, logits, index, vocabulary)
        shown, replaced = put(tokens, corrupted, drawn)
        scores = apply(variables, shown, **second)
        real = segments >= 0
        # -log sigmoid of the score, or of its negative.
        detection = jnp.where(real, jax.nn.softplus(jnp.where(replaced, -scores, scores)), 0).sum()
        losses, _ = cross_entropy(logits, corrupted.labels)
        generation = (losses * corrupted.weights).sum() / masking.rate_at(progress)
        total = generation + detection_weight * detection
        sums = Sums(
            totals={
                "loss": total,
                "accuracy": (((scores > 0) == replaced) & real).sum().astype(jnp.float32),
                "generator": generation,
                "discriminator": detection,
                "replaced": replaced.sum().astype(jnp.float32),
            },
            weight=real.sum().astype(jnp.float32),
            counts={
                "tokens": lengths.sum().astype(jnp.float32),
                "overflow": corrupted.overflow,
            },
        )
        return total, sums

    return loss


def sample(
    key: PRNGKey,
    logits: Float[Array, "batch masked vocab"],
    index: Int[Array, "batch"],
    vocabulary: Vocabulary,
) -> Int[Array, "batch masked"]:
    """Ordinary tokens, each as likely as the generator has it: the largest logit with Gumbel noise.

    The noise is a row's own, as its masks are.
    """
    more = logits.shape[-1] - vocabulary.is_ordinary.size  # rows that stand for no token
    ordinary = jnp.pad(vocabulary.is_ordinary, (0, more))
    logits = jnp.where(ordinary[None, None], logits, -jnp.inf)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
    return jax.vmap(jax.random.categorical)(keys, logits)


def put(
    tokens: Tokens, corrupted: Corrupted, drawn: Int[Array, "batch masked"]
) -> tuple[Tokens, Bool[Array, "batch length"]]:
    """The row with what was drawn in the places that were hidden, and where that is another token.

    What is drawn right counts as not replaced (section 2).
    """

    def row(tokens: Array, predicted: Array, drawn: Array, labels: Array, weights: Array) -> Array:
        return tokens.at[predicted].set(jnp.where(weights > 0, drawn, labels))

    shown = jax.vmap(row)(tokens, corrupted.predicted, drawn, corrupted.labels, corrupted.weights)
    return shown, shown != tokens
