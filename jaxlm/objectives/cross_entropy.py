"""Cross-entropy of each position, in nats."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxlm.nn import custom_vjp
from jaxlm.nn.masks import NEGATIVE


def _is_label(logits: Array, labels: Array) -> Array:
    # A comparison with an iota instead of a gather: it stays local when `vocab` is sharded.
    return lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1) == labels[..., None]


def _gather(logits: Array, labels: Array) -> Array:
    return jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]


def _select(logits: Array, labels: Array) -> Array:
    # Stays local to each device when `vocab` is sharded; fused where it is read, but not on CPUs.
    return jnp.where(_is_label(logits, labels), logits, 0).sum(-1)


def _forward(logits: Array, labels: Array) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    top = logits.max(-1)
    exp = jnp.exp(logits - top[..., None])
    total = exp.sum(-1)
    label_logit = lax.platform_dependent(logits, labels, cpu=_gather, default=_select)
    loss = jnp.log(total) + (top - label_logit)  # the large numbers first: they cancel exactly
    return (loss, label_logit >= top), (exp, 1 / total, labels)


def _backward(residuals: tuple[Array, ...], gradients: tuple[Array, Any]) -> tuple[Array, None]:
    exp, scale, labels = residuals
    g = gradients[0][..., None]
    softmax = exp * scale[..., None]
    return (softmax - _is_label(softmax, labels)) * g, None


@custom_vjp.gradient(_forward, _backward)
def cross_entropy(
    logits: Float[Array, "*batch vocab"], labels: Int[Array, "*batch"]
) -> tuple[Float[Array, "*batch"], Bool[Array, "*batch"]]:
    """``-log softmax(logits)[label]`` and whether no logit is above the label's.

    The gradient, ``softmax(logits) - onehot(label)``, is written out so that one array of the
    logits' size is kept for it (a BERT-mini step on a CPU: 0.9 times as long); forward mode only
    inside :func:`custom_vjp.plain`.
    """
    loss = -_gather(jax.nn.log_softmax(logits), labels)
    return loss, _gather(logits, labels) >= logits.max(-1)


def _are_tokens(logits: Array) -> Array:
    """Which logits are of tokens: a head makes those of other rows of its table very unlikely."""
    first = lax.slice(logits, (0,) * logits.ndim, (*(1,) * (logits.ndim - 1), logits.shape[-1]))
    return first > NEGATIVE / 2


def _smoothed_forward(
    logits: Array, labels: Array, smoothing: float
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    (losses, correct), (exp, scale, _) = _forward(logits, labels)
    tokens = _are_tokens(logits)
    share = tokens / tokens.sum().astype(losses.dtype)
    mean = jnp.where(tokens, logits, 0).sum(-1) / tokens.sum().astype(losses.dtype)
    uniform = losses + (_gather(logits, labels) - mean)
    smoothed = losses + smoothing * (uniform - losses)
    return (smoothed, losses, correct), (exp, scale, labels, share)


def _smoothed_backward(
    smoothing: float, residuals: tuple[Array, ...], gradients: tuple[Array, Array, Any]
) -> tuple[Array, None]:
    exp, scale, labels, share = residuals
    smoothed, unsmoothed = (g[..., None] for g in gradients[:2])
    at_label = (1 - smoothing) * smoothed + unsmoothed
    softmax = exp * (scale[..., None] * (smoothed + unsmoothed))
    label = jnp.where(_is_label(softmax, labels), at_label, 0)
    return softmax - label - (smoothing * smoothed) * share, None


@custom_vjp.gradient(_smoothed_forward, _smoothed_backward, static=(2,))
def _smoothed(logits: Array, labels: Array, smoothing: float) -> tuple[Array, Array, Array]:
    losses, correct = cross_entropy(logits, labels)
    tokens = _are_tokens(logits)
    mean = jnp.where(tokens, logits, 0).sum(-1) / tokens.sum().astype(losses.dtype)
    uniform = jax.nn.logsumexp(logits, axis=-1) - mean
    return losses + smoothing * (uniform - losses), losses, correct


def smoothed_cross_entropy(
    logits: Float[Array, "*batch vocab"], labels: Int[Array, "*batch"], smoothing: float
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"], Bool[Array, "*batch"]]:
    """:func:`cross_entropy` with the share ``smoothing`` of each label spread over all of them.

    Szegedy et al. (2016), section 7: ``(1 - ε) H(label, p) + ε H(uniform, p)``. Then the loss
    without smoothing, and whether no logit is above the label's. Rows of a token table that stand
    for no token (``NEGATIVE`` logits) get no share.
    """
    if smoothing:
        return _smoothed(logits, labels, smoothing)
    losses, correct = cross_entropy(logits, labels)
    return losses, losses, correct
