import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.train.checksum import _checksum, checksums, host_checksums


def only(x):
    return checksums({"x": x})["x"]


def by_hand(x):
    """The definition, one element at a time, in Python's own integers."""
    word = 2**32

    def mix(h):
        h = (h ^ (h >> 16)) * 0x85EBCA6B % word
        h = (h ^ (h >> 13)) * 0xC2B2AE35 % word
        return h ^ (h >> 16)

    words = np.asarray(x).view(f"u{x.dtype.itemsize}").ravel()
    return sum(mix((int(w) + i * 0x9E3779B1) % word) for i, w in enumerate(words)) % word


def random_bits(dtype, shape):
    return jax.random.bits(jax.random.key(0), shape, f"uint{8 * dtype.itemsize}").view(dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "int32", "uint32"])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4, 5)])
def test_is_what_the_definition_says(dtype, shape):
    x = random_bits(jnp.dtype(dtype), shape)
    assert only(x) == by_hand(x)
    assert host_checksums({"x": np.asarray(x)})["x"] == by_hand(x)


def test_is_the_same_on_the_host_whatever_fits_into_a_chunk(monkeypatch):
    x = np.random.default_rng(0).normal(size=(7, 5, 3)).astype(np.float32)
    monkeypatch.setattr("jaxlm.train.checksum._CHUNK", 8)
    assert host_checksums({"x": x}) == {"x": by_hand(x)}


def test_is_the_same_on_every_sharding_and_mesh():
    x = random_bits(jnp.dtype("float32"), (8, 16, 4))
    for shape in ((8, 1), (4, 2), (2, 4)):
        mesh = jax.make_mesh(shape, ("a", "b"), axis_types=(AxisType.Auto,) * 2)
        for spec in (P(), P("a"), P("a", "b"), P(None, "a", None), P(("a", "b"))):
            assert only(jax.device_put(x, NamedSharding(mesh, spec))) == only(x)


def test_is_computed_where_the_shards_lie():
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    x = jax.device_put(jnp.ones((512, 1024)), NamedSharding(mesh, P("a")))
    text = _checksum.lower(x).compile().as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool"])
def test_one_changed_element_is_always_found(dtype):
    x = jnp.zeros((5, 6), dtype)
    one = jnp.ones((), dtype)
    others = {only(x.at[i, j].set(one)) for i in range(5) for j in range(6)}
    assert len(others) == 30
    assert only(x) not in others


def test_changes_that_cancel_in_a_plain_sum_are_found():
    x = jax.random.normal(jax.random.key(1), (4, 6))
    assert only(-x) != only(x)  # an even number of sign bits
    assert only(x[::-1]) != only(x)
    assert only(x.reshape(6, 4)) == only(x)  # the shape is checked apart
    assert only(x.at[0, 0].multiply(-1).at[2, 3].multiply(-1)) != only(x)
    assert only(jnp.array([0.0])) != only(jnp.array([-0.0]))
    assert only(jnp.array([jnp.nan])) == only(jnp.array([jnp.nan]))


def test_paths_name_the_leaves_and_empty_collections_vanish():
    found = checksums({"trainable": {"params": {"kernel": jnp.ones(3)}}, "frozen": {}})
    assert list(found) == ["trainable/params/kernel"]
