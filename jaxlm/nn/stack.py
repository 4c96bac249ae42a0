"""A stack of equal blocks, with one parameter tree however it is computed."""

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from jaxlm.nn.cache import AnyCache
from jaxlm.typing import Hidden

Remat = Literal["full", "dots"]
T = TypeVar("T")


def apply_stack(
    block: nn.Module,
    num_layers: int,
    x: Hidden,
    *args: Any,
    unroll: int | None = None,
    remat: Remat | None = None,
) -> Hidden:
    """``x = block(x, *args)``, ``num_layers`` times, each time with other parameters.

    Call it inside the parent's ``nn.compact``. Every parameter of ``block`` gets a leading
    ``layers`` axis; ``unroll`` and ``remat`` change compile time and memory, nothing else.

    Args:
        unroll: blocks compiled as one iteration of the loop; ``None``, all of them: no loop. With
            1 the compile time no longer grows with depth; a CPU's step is 1.3 times as long.
        remat: what the backward pass computes again instead of keeping: ``"full"``, all but each
            block's input; ``"dots"``, all but the results of matrix products. On CPUs it takes
            effect inside a loop alone (``unroll``): XLA:CPU merges what it sees computed twice.
    """
    body = lambda block, x, _: (block(x, *args), None)
    return scan_stack(body, block, num_layers, x, None, unroll=unroll, remat=remat)[0]


def scan_stack(
    body: Callable[..., tuple[Any, Any]],
    block: nn.Module,
    num_layers: int,
    carry: PyTree,
    inputs: PyTree,
    *,
    unroll: int | None = None,
    remat: Remat | None = None,
) -> tuple[PyTree, PyTree]:
    """``carry, outputs[i] = body(block, carry, inputs[i])``, as :func:`apply_stack` computes it.

    Inputs and outputs are pytrees of arrays ``[layers, ...]``, or None.
    """
    if remat is not None:
        dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        body = nn.remat(
            body,
            # Inside a loop XLA cannot undo the recomputation; what stands outside needs barriers.
            prevent_cse=unroll is None or unroll >= num_layers or num_layers % unroll > 0,
            policy=dots if remat == "dots" else None,
        )
    scan = nn.scan(
        body,
        variable_axes={True: 0},  # every collection: adapters beside the parameters, too
        split_rngs={True: True},
        length=num_layers,
        # Drawing the parameters of one layer is compiled once; a step's time does not matter there.
        unroll=1 if block.is_initializing() else unroll or num_layers,
    )
    return scan(block, carry, inputs)


def extend_stack(
    block: nn.Module, num_layers: int, x: Hidden, cache: AnyCache, *args: Any
) -> tuple[Hidden, AnyCache]:
    """``x, layer_cache = block.extend(x, layer_cache, *args)`` for each layer of the cache.

    With the parameters of :func:`apply_stack`, and without a loop: each layer reads its own slice
    of them, which XLA copies every time unless they are :class:`Layers` under :func:`join`.
    """
    layers: list[Any] = []
    for number in range(num_layers):
        run = lambda block, *inputs: block.extend(*inputs)
        x, layer = _with_layer(block, number, run, x, cache.layer(number), *args)
        layers.append(layer)
    return x, cache.advance(layers, x.shape[1])


def project_stack(
    block: nn.Module, num_layers: int, source: Hidden
) -> list[tuple[Float[Array, "..."], Float[Array, "..."]]]:
    """``block.project(source)`` by each layer: keys and values of what all of them attend to."""
    run = lambda block, source: block.project(source)
    return [_with_layer(block, number, run, source) for number in range(num_layers)]


def _with_layer(block: nn.Module, number: int, run: Callable[..., T], *args: Any) -> T:
    """``run(block, *args)`` with the parameters of one layer of :func:`apply_stack`."""
    take = lambda stacked: jax.tree.map(
        lambda leaf: lax.index_in_dim(leaf, number, keepdims=False), stacked
    )
    return nn.map_variables(run, mapped_collections=True, trans_in_fn=take)(block, *args)


@flax.struct.dataclass
class Layers:
    """A stacked parameter as an array for each layer: XLA copies each slice that it takes of one.

    Under :func:`join` inside the compiled step, where all layers are unrolled, nothing is copied;
    in a loop it would hold the whole stack a second time. For parameters that do not learn.

    Attributes:
        layers: of equal shapes, or of equal pytrees.
    """

    layers: tuple[Any, ...]


def split(stacked: PyTree) -> Layers:
    """A pytree of arrays ``[layers, ...]``, layer by layer."""
    num_layers = jax.tree.leaves(stacked)[0].shape[0]
    return Layers(tuple(jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(num_layers)))


def join(tree: PyTree) -> PyTree:
    """The tree with stacked arrays for what is :class:`Layers`; other leaves stay."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Layers):
            return leaf
        return jax.tree.map(lambda *layers: jnp.stack(layers), *leaf.layers)

    return jax.tree.map(one, tree, is_leaf=lambda leaf: isinstance(leaf, Layers))
