"""R-Drop (Liang et al. 2021, arXiv:2106.14448): two draws of dropout shall agree."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.errors import InputError
from jaxlm.objectives import supervised
from jaxlm.objectives.supervised import Score
from jaxlm.sums import Sums
from jaxlm.typing import Apply, Batch, Loss, PRNGKey, Scalar, Variables


def make_loss(apply: Apply, score: Score, *, alpha: float) -> Loss:
    """Half of equation 4, so that without dropout it is the plain loss.

    ``(score(z1) + score(z2)) / 2 + alpha / 2 * (KL(p1 ‖ p2) + KL(p2 ‖ p1)) / 2`` for two draws of
    logits z and their softmax p; the total ``kl`` is the last fraction. Every row is computed
    twice, in one call. In evaluation it is the plain loss, computed once.

    Args:
        score: of logits, one distribution for each of the batch's ``weights``, such as
            ``classification.score``.
        alpha: weight of the divergence; the paper uses 0.1 to 1 on GLUE, up to 5 elsewhere.
    """
    if alpha < 0:
        raise InputError(f"alpha={alpha} is below 0; 1 is usual, 0 is off")
    plain, members = supervised.make_loss(apply, score), supervised.over_members(apply)

    def double(x: Array | None) -> Array | None:
        # Neighbours in the model's batch: each device's rows stay with it.
        return None if x is None else jnp.stack([x, x], axis=1)

    def twice(
        variables: Variables,
        tokens: Array,
        *,
        token_type_ids: Array | None,
        segment_ids: Array,
        positions: Array | None = None,
        **options: Any,
    ) -> Array:
        return members(
            variables,
            double(tokens),
            token_type_ids=double(token_type_ids),
            segment_ids=double(segment_ids),
            positions=double(positions),
            **options,
        )

    def score_both(logits: Array, batch: Batch) -> Sums:
        first, second = logits[:, 0], logits[:, 1]
        sums, other = score(first, batch), score(second, batch)
        kl = (symmetric_kl(first, second) * jnp.asarray(batch["weights"])).sum()
        totals = jax.tree.map(lambda a, b: (a + b) / 2, sums.totals, other.totals)
        loss = totals["loss"] + alpha / 2 * kl
        return replace(sums, totals=totals | {"loss": loss, "kl": kl})

    dropped = supervised.make_loss(twice, score_both)

    def loss(
        variables: Variables,
        batch: Batch,
        key: PRNGKey,
        *,
        progress: Scalar,
        deterministic: bool,
    ) -> tuple[Scalar, Sums]:
        chosen = plain if deterministic else dropped
        return chosen(variables, batch, key, progress=progress, deterministic=deterministic)

    return loss


def symmetric_kl(
    first: Float[Array, "*batch labels"], second: Float[Array, "*batch labels"]
) -> Float[Array, "*batch"]:
    """``(KL(p ‖ q) + KL(q ‖ p)) / 2 = Σ (p - q) log(p / q) / 2``; p, q are softmax of logits."""
    log_p, log_q = jax.nn.log_softmax(first), jax.nn.log_softmax(second)
    return ((jnp.exp(log_p) - jnp.exp(log_q)) * (log_p - log_q)).sum(-1) / 2
