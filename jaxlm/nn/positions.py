"""Positions as angles: rotations of queries and keys, and sinusoids.

Rotary position embeddings (Su et al. 2021, arXiv:2104.09864, section 3.4): each pair of channels
of queries and keys is turned by an angle that grows with the position, so that scores depend on
distances alone. Channel i is paired with i + head_dim / 2 ("half-split", as published weights of
Llama, ModernBERT and others are arranged), not with its neighbour.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int


class Rotary(NamedTuple):
    """Cosine and sine of each position's angles, in float32; one row may serve all."""

    cos: Float[Array, "#batch length half"]
    sin: Float[Array, "#batch length half"]


def frequencies(head_dim: int, base: float) -> Float32[np.ndarray, "half"]:
    """Radians by position of each pair of channels: ``base ** (-2 i / head_dim)``."""
    return (base ** -(np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Positions divided by a factor, for rows longer than those of pretraining."""

    factor: float

    def __call__(self, frequencies: Float32[np.ndarray, "half"]) -> Float32[np.ndarray, "half"]:
        """The scaled frequencies."""
        return frequencies / np.float32(self.factor)


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Low frequencies alone are divided by a factor, as in Llama 3.1's published code.

    Those in between are divided by a part of it.
    """

    factor: float
    low_freq_factor: float
    """Frequencies of fewer periods than this in `original_length` are divided by all of it."""
    high_freq_factor: float
    """Frequencies of more periods than this are kept."""
    original_length: int
    """Length of the rows of pretraining."""

    def __call__(self, frequencies: Float32[np.ndarray, "half"]) -> Float32[np.ndarray, "half"]:
        """The scaled frequencies."""
        periods = self.original_length * frequencies / (2 * np.pi)
        kept = (periods - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(kept, 0, 1)
        return (frequencies * (kept + (1 - kept) / self.factor)).astype(np.float32)


Scaling = LinearScaling | Llama3Scaling


def rotary(
    positions: Int[Array, "#batch length"], frequencies: Float32[np.ndarray, "half"]
) -> Rotary:
    """The tables for the positions of some rows."""
    angles = positions.astype(jnp.float32)[..., None] * frequencies[None, None]
    return Rotary(jnp.cos(angles), jnp.sin(angles))


def rotate(
    x: Float[Array, "batch length heads head_dim"], rotary: Rotary
) -> Float[Array, "batch length heads head_dim"]:
    """Each head of ``x`` turned by the angles of its position; computed in float32."""
    cos, sin = (table[:, :, None] for table in rotary)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def sinusoids(
    positions: Int[Array, "#batch length"], features: int
) -> Float[Array, "#batch length embed"]:
    """``sin(p f_i), cos(p f_i)`` by turns (Vaswani et al. 2017, section 3.5); in float32.

    ``f`` are the :func:`frequencies` of base 10,000. To be added to the embeddings.
    """
    cos, sin = rotary(positions, frequencies(features, 10_000.0))[:2]
    return jnp.stack([sin, cos], axis=-1).reshape(*sin.shape[:2], features)
