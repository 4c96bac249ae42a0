"""Arrays that stay where they are until devices take their parts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.sharding import MeshConfig, make_mesh
from jaxlm.train import stored
from jaxlm.train.stored import Stored

ARRAY = np.arange(48, dtype=np.float32).reshape(8, 6)
MESH = make_mesh(MeshConfig(fsdp=2))
HALVES = NamedSharding(MESH, PartitionSpec("fsdp"))


class Files:
    """Counts what is read."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def stored(self, name: str, array: np.ndarray, at_once: int) -> Stored:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            self.read.append(name)
            return array[index or ...].copy()

        return stored.of_parts(array.shape, array.dtype, part, at_once)


def test_each_part_is_read_once_and_the_largest_pieces_first():
    files = Files()
    tree = {name: files.stored(name, ARRAY * n, n) for n, name in enumerate(("a", "b", "c"))}
    assert files.read == []
    laid = stored.lay_out(tree, jax.tree.map(lambda _: HALVES, tree))
    assert files.read == ["c", "c", "b", "b", "a", "a"]  # for eight devices
    for n, name in enumerate(("a", "b", "c")):
        assert laid[name].sharding == HALVES
        np.testing.assert_array_equal(laid[name], ARRAY * n)
    assert list(stored.read(tree)) == ["a", "b", "c"]
    np.testing.assert_array_equal(tree["c"], ARRAY * 2)


@pytest.mark.parametrize("leaf", [ARRAY, jnp.asarray(ARRAY), Files().stored("x", ARRAY, 0)])
def test_what_is_changed_is_changed_on_every_way(leaf):
    longer = stored.changed(leaf, lambda x: np.pad(x, ((0, 2), (0, 0))), (10, 6))
    assert longer.shape == (10, 6)
    laid = stored.lay_out({"x": longer}, {"x": HALVES}, lambda path, x: {path: x + 1})
    np.testing.assert_array_equal(laid["x"]["x"], np.pad(ARRAY, ((0, 2), (0, 0))) + 1)
    np.testing.assert_array_equal(stored.on_one_device({"x": longer})["x"][:8], ARRAY)


@pytest.mark.parametrize("offset", [0, 4])
def test_a_step_may_take_what_was_laid_out(offset):
    """Without copying it, which would be all parameters at once, wherever numpy had put it."""
    shape = 2**10, 2**8

    def part(index):
        room = np.ones(4 * math.prod(shape) + 128, np.uint8)
        start = -room.ctypes.data % 64 + offset
        return room[start:][: 4 * math.prod(shape)].view(np.float32).reshape(shape)

    tree = {name: stored.of_parts(shape, np.float32, part, 0) for name in ("x", "y")}
    laid = stored.on_one_device(tree)
    places = {name: x.unsafe_buffer_pointer() for name, x in laid.items()}
    given = jax.jit(lambda tree: tree, donate_argnums=0)(laid)
    assert {name: x.unsafe_buffer_pointer() for name, x in given.items()} == places


def test_what_is_spread_is_split_where_it_can_be():
    shapes = {"a": jnp.ones((3, 16)), "b": jnp.ones((3, 5)), "c": jnp.ones(())}
    found = stored.spread(shapes)
    parts = {name: x.sharding.shard_shape(x.shape) for name, x in found.items()}
    assert parts == {"a": (3, 2), "b": (3, 5), "c": ()}
