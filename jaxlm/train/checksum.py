"""One number per leaf that changes when any element changes, computed on the leaf's devices."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, Shaped, UInt32

from jaxlm import tree

_ODD = 0x9E3779B1
_CHUNK = 2**16  # elements that stay in a processor's cache


def checksums(state: PyTree) -> dict[str, int]:
    """A 32-bit checksum of each array, by path; the same on every mesh, process and device kind.

    ``sum_i mix(bits_i + i * odd) mod 2**32``, where i counts elements in row-major order and mix is
    a bijection: one changed element of up to 32 bits is found with certainty, several with
    probability 1 - 2**-32. Integer sums are exact in any order, so shards are added as they come.
    """
    # A program for each shape: many leaves have the same, and other trees, too. One after the
    # other, or on CPUs the sums over devices of several programs would wait for each other.
    return {
        path: int(jax.device_get(_checksum(leaf))) for path, leaf in tree.leaves_with_path(state)
    }


def host_checksums(state: PyTree) -> dict[str, int]:
    """The same numbers by numpy: leaf after leaf, without a copy, or a program for its shape."""
    return {path: _host_checksum(np.asarray(leaf)) for path, leaf in tree.leaves_with_path(state)}


def _host_checksum(x: Shaped[np.ndarray, "..."]) -> int:
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize]
    bits, total = np.ascontiguousarray(x).reshape(-1).view(unsigned), 0
    steps = np.arange(min(bits.size, _CHUNK), dtype=np.uint32)
    for start in range(0, bits.size, _CHUNK):
        h = bits[start : start + _CHUNK].astype(np.uint32)
        h += (steps[: h.size] + np.uint32(start % 2**32)) * np.uint32(_ODD)
        total += int(_mix(h).sum(dtype=np.uint32))
    return total % 2**32


@jax.jit
def _checksum(x: Array) -> UInt32[Array, ""]:
    # Each axis contributes its own iota, so that the index is split as the leaf is.
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        stride = math.prod(x.shape[axis + 1 :]) % 2**32
        index += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride)
    # Multipliers alone would miss two flipped signs: 2**31 * odd + 2**31 * odd is 0 mod 2**32.
    return jnp.sum(_mix(_bits(x) + index * jnp.uint32(_ODD)), dtype=jnp.uint32)


def _bits(x: Array) -> Array:
    if x.dtype == jnp.bool:
        return x.astype(jnp.uint32)
    if x.dtype.itemsize == 8:  # only with x64: two words become one
        words = jax.lax.bitcast_convert_type(x, jnp.uint32)
        return _mix(words[..., 0]) + words[..., 1]
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _mix(h: Any) -> Any:
    """The finalizer of MurmurHash3 (Appleby, 2011), a bijection of 32 bits."""
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
