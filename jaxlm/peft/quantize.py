"""Eight-bit weights: symmetric, one scale for each output channel.

For a frozen base ``dequantize`` belongs inside the step, so that only the bytes and their scales
are kept. Where nothing learns, ``adapt`` computes with the bytes themselves.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax import lax
from jaxtyping import Array, Float, Int8, PyTree

from jaxlm import tree
from jaxlm.errors import InputError
from jaxlm.nn.intercept import Call, Leaves, Sites, flatten, intercept
from jaxlm.nn.products import add_bias
from jaxlm.typing import Apply, Dtype, Params, Variables


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
        ndim, split = weights[path].ndim, site.num_stack + site.num_inputs
        shared = range(site.num_stack, split)
        if path.rpartition("/")[2] == "embedding":
            shared = range(split, ndim)
        weights[path] = quantize_weight(weights[path], tuple(axis - ndim for axis in shared))
    return tree.replace(params, weights)


def quantize_weight(weight: Float[Array, "..."], axes: tuple[int, ...]) -> Quantized:
    """One weight, of which ``axes`` share a scale: see :class:`Quantized`."""
    weight = jnp.asarray(weight, jnp.float32)
    scale = jnp.abs(weight).max(axes, keepdims=True) / 127
    values = jnp.round(weight / jnp.where(scale > 0, scale, 1)).astype(jnp.int8)
    return Quantized(values, jnp.squeeze(scale, axes), axes)


def dequantize(tree: PyTree, dtype: Dtype = jnp.float32) -> PyTree:
    """The tree with arrays of ``dtype`` for what is :class:`Quantized`; other leaves stay."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Quantized):
            return leaf
        scale = jnp.expand_dims(leaf.scale, leaf.axes)
        return (leaf.values.astype(jnp.float32) * scale).astype(dtype)

    return jax.tree.map(one, tree, is_leaf=lambda leaf: isinstance(leaf, Quantized))


def adapt(apply: Apply) -> Apply:
    """``apply`` in which what is :class:`Quantized` is multiplied as bytes.

    So are the vectors that it multiplies, each with a scale of its own (Dettmers et al. 2022,
    arXiv:2208.07339, section 2: vector-wise quantization). Without anything quantized, ``apply``.
    """
    adapted = intercept(apply, "int8", _multiply, needs_use=False)

    def of_bytes(variables: Variables, *args: Any, **kwargs: Any) -> Any:
        flat: dict[str, Any] = flatten(variables["params"])
        found = {path: leaf for path, leaf in flat.items() if isinstance(leaf, Quantized)}
        if not found:
            return apply(variables, *args, **kwargs)
        parts = {
            f"{path}_{part}": getattr(leaf, part)
            for path, leaf in found.items()
            for part in ("values", "scale")
        }
        # Weights that only a rewritten call would read are never computed.
        variables = {**variables, "params": dequantize(variables["params"])}
        variables["int8"] = unflatten_dict(parts, sep="/")
        return adapted(variables, *args, **kwargs)

    return of_bytes


def _multiply(call: Call, leaves: Leaves) -> Array:
    (bias,) = call.arguments or (None,)
    if call.kind == "conv":
        return call.run(call.x)  # by the weight as it is read from bytes
    if call.kind == "look_up":
        values, scale = leaves["embedding_values"], leaves["embedding_scale"]
        rows = jnp.take(values, call.x, axis=0, mode="clip")
        return (rows * jnp.take(scale, call.x, mode="clip")[..., None]).astype(call.module.dtype)
    if call.kind == "attend":
        y = int8_product(call.x, leaves["embedding_values"], leaves["embedding_scale"], axis=1)
        return y if bias is None else add_bias(y, bias)
    values, scale, module = leaves["kernel_values"], leaves["kernel_scale"], call.module
    inputs, outputs = values.shape[: len(call.axes)], values.shape[len(call.axes) :]
    x = jnp.moveaxis(call.x, call.axes, range(-len(inputs), 0))
    x = x.reshape(*x.shape[: x.ndim - len(inputs)], -1)
    y = int8_product(x, values.reshape(x.shape[-1], -1), scale.reshape(-1))
    if module.has_variable("params", "bias"):
        y = add_bias(y, module.get_variable("params", "bias").reshape(-1))
    return y.astype(jax.eval_shape(call.run, call.x).dtype).reshape(*x.shape[:-1], *outputs)


def int8_product(
    x: Float[Array, "*batch inputs"],
    values: Int8[Array, "_ _"],
    scale: Float[Array, " outputs"],
    *,
    axis: int = 0,
) -> Float[Array, "*batch outputs"]:
    """``x @ (values * scale)`` in float32, of ``x`` rounded to 255 steps of each of its vectors.

    ``axis`` is that of the inputs in ``values``.
    """
    x = x.astype(jnp.float32)
    size = jnp.abs(x).max(-1, keepdims=True) / 127
    rounded = jnp.round(x / jnp.where(size > 0, size, 1)).astype(jnp.int8)

    def plain(rows: Array, values: Array) -> Array:
        axes = ((rows.ndim - 1,), (axis,)), ((), ())
        return lax.dot_general(rows, values, axes, preferred_element_type=jnp.int32)

    def repeated(rows: Array, values: Array) -> Array:
        # XLA:CPU multiplies one row of bytes in 15 times the time that it takes for four.
        rows = lax.optimization_barrier(jnp.concatenate([rows.reshape(1, -1)] * 4))
        return plain(rows, values)[:1].reshape(*x.shape[:-1], -1)

    several = plain if x.size > x.shape[-1] else repeated
    y = lax.platform_dependent(rounded, values, cpu=several, default=plain)
    return y.astype(jnp.float32) * size * jnp.expand_dims(scale, tuple(range(x.ndim - 1)))
