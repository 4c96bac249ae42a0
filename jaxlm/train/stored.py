"""Parameters that stay where they were saved until devices take them, each its own part.

So that a host never holds a model, but one tensor at a time: what is :class:`Stored` is read when
it is laid out, and as often as it is.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array, PyTree, Shaped

from jaxlm import tree

Index = tuple[slice, ...]
Part = Callable[[Index | None], Shaped[np.ndarray, "..."]]


@dataclass(frozen=True)
class Stored:
    """An array that has not been read; ``numpy.asarray`` reads it whole.

    Attributes:
        lay: lays it out as a sharding says; all processes call it together.
        read: the whole of it, on the host; all processes call it together.
        at_once: how many of its numbers a process holds meanwhile, beside what it lays out.
    """

    shape: tuple[int, ...]
    dtype: Any
    lay: Callable[[Sharding], Array]
    read: Callable[[], Shaped[np.ndarray, "..."]]
    at_once: int

    @property
    def ndim(self) -> int:
        """Number of its axes."""
        return len(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.read(), dtype, copy=copy)


def of_parts(shape: tuple[int, ...], dtype: Any, part: Part, at_once: int) -> Stored:
    """What ``part(index)`` reads, and ``part(None)`` as a whole."""
    lay = lambda to: _lay_parts(shape, to, part)
    return Stored(shape, dtype, lay, lambda: part(None), at_once)


def changed(leaf: Any, function: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...]) -> Any:
    """``function`` of an array; of what is stored it is computed whenever that is read."""
    if not isinstance(leaf, Stored):
        return function(np.asarray(leaf))
    read = lambda: function(leaf.read())
    lay = lambda to: _lay_parts(shape, to, read().__getitem__)
    return Stored(shape, leaf.dtype, lay, read, 2 * math.prod(shape))


def read(params: PyTree) -> PyTree[Shaped[np.ndarray, "..."]]:
    """All of a tree on the host."""
    return _in_turn(params, lambda number, path, leaf: np.asarray(leaf))


def on_one_device(params: PyTree) -> PyTree[Array]:
    """All of a tree on this process's first device."""
    device = SingleDeviceSharding(jax.local_devices()[0])
    return lay_out(params, jax.tree.map(lambda _: device, params))


def lay_out(
    params: PyTree, shardings: PyTree, then: Callable[[str, Array], Any] = lambda _, x: x
) -> PyTree:
    """Arrays, and what is stored, on devices; ``then(path, array)`` is done to each in turn."""
    to = jax.tree.leaves(shardings)

    def one(number: int, path: str, leaf: Any) -> Any:
        if isinstance(leaf, Stored):
            laid = leaf.lay(to[number])
        else:
            laid = _lay_parts(leaf.shape, to[number], np.asarray(leaf).__getitem__)
        return jax.block_until_ready(then(path, laid))

    return _in_turn(params, one)


def _in_turn(params: PyTree, function: Callable[[int, str, Any], Any]) -> PyTree:
    """The tree of what is made of each leaf, of what takes most meanwhile first: others wait."""
    leaves = tree.leaves_with_path(params)
    made: list[Any] = [None] * len(leaves)
    at_once = lambda leaf: leaf.at_once if isinstance(leaf, Stored) else 0
    for number in sorted(range(len(leaves)), key=lambda i: -at_once(leaves[i][1])):
        made[number] = function(number, *leaves[number])
    return jax.tree.unflatten(jax.tree.structure(params), made)


def spread(shapes: PyTree) -> PyTree[jax.ShapeDtypeStruct]:
    """Shapes of which each has a sharding over all devices, where one of its axes can be split."""
    mesh = Mesh(np.asarray(jax.devices()), ("all",))

    def one(leaf: Any) -> jax.ShapeDtypeStruct:
        split = [axis for axis, size in enumerate(leaf.shape) if size % mesh.size == 0][:1]
        names = (None,) * split[0] + ("all",) if split else ()
        to = NamedSharding(mesh, PartitionSpec(*names))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to)

    return jax.tree.map(one, shapes)


def _lay_parts(shape: tuple[int, ...], sharding: Sharding, part: Part) -> Array:
    """The array of which each device of this process holds a part; equal ones are read once."""
    held: dict[str, Array] = {}
    arrays = []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        x = held.get(str(index))
        x = part(index) if x is None else x
        held[str(index)] = _owned(x, device)
        arrays.append(held[str(index)])
        del x  # before the next is read
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _owned(x: Any, device: Any) -> Array:
    """On a device, in memory of its own.

    A CPU uses numpy's where that happens to be aligned as XLA's is, and a step could not take it
    over: it would copy all parameters at once.
    """
    laid = jax.device_put(x, device).block_until_ready()
    is_lent = isinstance(x, np.ndarray) and device.platform == "cpu"
    if is_lent and laid.unsafe_buffer_pointer() == x.ctypes.data:
        laid = laid.copy()
    return laid.block_until_ready()
