"""(IA)³: learned scales of activations (Liu et al. 2022, arXiv:2205.05638, section 3.3).

    y = l ⊙ (x W + c)    where outputs are scaled: keys and values
    y = (l ⊙ x) W + c    where inputs are scaled: the last map of the feed-forward block

Scales start at one and live in the collection ``ia3``, beside the kernels they belong to.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jaxtyping import Array

from jaxlm import tree
from jaxlm.errors import InputError
from jaxlm.nn.intercept import (
    Call,
    Found,
    Leaves,
    Sites,
    find_sites,
    flatten,
    intercept,
    match,
)
from jaxlm.nn.products import multiply
from jaxlm.typing import Apply, Params, Variables


@dataclass(frozen=True, kw_only=True)
class Ia3Config:
    """Regular expressions, matched with the end of a parameter's path; defaults are the paper's."""

    outputs: tuple[str, ...] = (r"(key|value)/kernel",)
    """Linear maps whose outputs are scaled."""
    inputs: tuple[str, ...] = (r"mlp/down/kernel",)
    """Linear maps whose inputs are scaled."""


def init(variables: Variables, config: Ia3Config, call: Callable[[Variables], Any]) -> Params:
    """The collection ``ia3`` for the linear maps that ``config`` names.

    ``call(variables)`` calls the model, to find them: nothing is computed.
    """
    return init_at(variables["params"], find_sites(call, variables), config)


def init_at(params: Params, sites: Sites, config: Ia3Config) -> Params:
    """:func:`init` for sites that are known, from ``find_sites``.

    ``output`` [*stack, *outputs] or ``input`` [*stack, *inputs], ones.
    """
    if not config.outputs and not config.inputs:
        raise InputError("(IA)³ has no targets: name linear maps in outputs or inputs")
    kernels = flatten(params)
    refused = dict(sites.refused) if isinstance(sites, Found) else {}
    linear = Found(
        {path: site for path, site in sites.items() if path.rpartition("/")[2] == "kernel"},
        dict.fromkeys(sites, "it is a table") | refused,
    )
    scales = {}
    for name, patterns in (("output", config.outputs), ("input", config.inputs)):
        for path in match(patterns, linear, params):
            stack, inputs, outputs = linear[path].split(kernels[path].shape)
            shape = stack + (outputs if name == "output" else inputs)
            scales[path.removesuffix("kernel") + name] = jnp.ones(shape, jnp.float32)
    return unflatten_dict(scales, sep="/")


def adapt(apply: Apply) -> Apply:
    """``apply`` that reads the collection ``ia3`` of its variables, on any linen module."""

    def rewrite(call: Call, scales: Leaves) -> Array:
        x = call.x
        if "input" in scales:
            if call.kind == "conv":
                raise InputError(
                    f"(IA)³ scales no inputs of a convolution: name {call.path}/kernel in outputs"
                )
            axes = [axis for axis in range(x.ndim) if axis not in call.axes]
            x = multiply(x, jnp.expand_dims(scales["input"], axes))
        y = call.run(x)
        if "output" in scales:
            scale = scales["output"]
            y = multiply(y, jnp.expand_dims(scale, tuple(range(y.ndim - scale.ndim))))
        return y

    return intercept(apply, "ia3", rewrite)


def merge(params: Params, ia3: Params, sites: Sites) -> Params:
    """The same model without ``ia3``; what the scales are multiplied into stays in float32."""
    merged = flatten(params)

    def scaled(path: str, scale: Array) -> None:
        merged[path] = merged[path].astype(jnp.float32) * scale

    for path, scale in flatten(ia3).items():
        parent, slash, name = path.rpartition("/")
        kernel, bias = f"{parent}{slash}kernel", f"{parent}{slash}bias"
        if kernel not in sites or kernel not in merged:
            raise InputError(f"(IA)³ scales {kernel}, which is not a linear map of this model")
        first, ndim = sites[kernel].num_stack, merged[kernel].ndim
        split = first + sites[kernel].num_inputs
        others = range(first, split) if name == "output" else range(split, ndim)
        scaled(kernel, jnp.expand_dims(scale, tuple(others)))
        if name == "output" and bias in merged:
            scaled(bias, scale)
    return tree.replace(params, merged)
