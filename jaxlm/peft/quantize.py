"""Eight-bit weights for a frozen base: symmetric, one scale for each output channel.

``dequantize`` belongs inside the step, so that only the bytes and their scales are kept.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxlm import tree
from jaxlm.errors import InputError
from jaxlm.nn.intercept import Sites, flatten
from jaxlm.typing import Dtype, Params


@flax.struct.dataclass
class Quantized:
    """``values * scale``; the leaves may also be shapes or shardings, hence no array types here.

    Attributes:
        values: int8, of the weight's shape.
        scale: float32, of that shape without ``axes``.
        axes: those that share a scale, counted from the end: a kernel's inputs; of a table, the
            vectors' channels.
    """

    values: Any
    scale: Any
    axes: tuple[int, ...] = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's."""
        return self.values.shape


def quantize(params: Params, sites: Sites) -> PyTree:
    """``params`` with the weights of ``sites`` as :class:`Quantized`: off by half a scale at most.

    Scales are float32: the largest size of a channel's weights, over 127. Leave out of ``sites``
    what must stay exact. Its bytes are those of ``tree.num_bytes``.
    """
    weights = flatten(params)
    for path, site in sites.items():
        if path not in weights:
            raise InputError(f"there is no {path} to quantize: the sites are of another model")
        weight = jnp.asarray(weights[path], jnp.float32)
        split = site.num_stack + site.num_inputs
        shared = range(site.num_stack, split)
        if path.rpartition("/")[2] == "embedding":
            shared = range(split, weight.ndim)
        axes = tuple(axis - weight.ndim for axis in shared)
        scale = jnp.abs(weight).max(axes, keepdims=True) / 127
        values = jnp.round(weight / jnp.where(scale > 0, scale, 1)).astype(jnp.int8)
        weights[path] = Quantized(values, jnp.squeeze(scale, axes), axes)
    return tree.replace(params, weights)


def dequantize(tree: PyTree, dtype: Dtype = jnp.float32) -> PyTree:
    """The tree with arrays of ``dtype`` for what is :class:`Quantized`; other leaves stay."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Quantized):
            return leaf
        scale = jnp.expand_dims(leaf.scale, leaf.axes)
        return (leaf.values.astype(jnp.float32) * scale).astype(dtype)

    return jax.tree.map(one, tree, is_leaf=lambda leaf: isinstance(leaf, Quantized))
