from itertools import combinations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.nn.dropout import Dropout, dropout, hash_bits
from jaxlm.nn.stack import apply_stack

RATE, SHAPE = 0.3, (64, 32, 128)
ONES = jnp.asarray(np.ones(SHAPE, np.float32))


@jax.jit
def kept(key):
    return dropout(ONES, RATE, key) > 0


def masks_of(keys):
    return [np.asarray(kept(key)) for key in keys]


def correlation(a, b):
    """In standard errors of two independent masks."""
    a, b = (x.ravel() - x.mean() for x in (a, b))
    return float(a @ b / (a.std() * b.std()) / np.sqrt(a.size))


def test_share_and_mean():
    size = ONES.size
    for seed in range(3):
        out = np.asarray(jax.jit(dropout, static_argnums=1)(ONES, RATE, jax.random.key(seed)))
        assert set(np.unique(out)) == {0, np.float32(1 / (1 - RATE))}
        standard_error = (RATE * (1 - RATE) / size) ** 0.5
        assert abs((out == 0).mean() - RATE) < 4 * standard_error
        assert abs(out.mean() - 1) < 4 * standard_error / (1 - RATE)


def test_share_of_every_row_and_column():
    mask = masks_of([jax.random.key(0)])[0]
    for axes in ((1, 2), (0, 2), (0, 1)):
        shares = 1 - mask.mean(axes)
        deviation = np.abs(shares - RATE) * (mask.size / shares.size / RATE / (1 - RATE)) ** 0.5
        assert deviation.max() < 4.5


def test_masks_of_different_keys_are_uncorrelated():
    # Neighbouring seeds and folded keys: what a run really uses.
    keys = [jax.random.key(seed) for seed in (0, 1, 2)]
    keys += [jax.random.fold_in(jax.random.key(0), step) for step in range(4)]
    words = ((7, 1), (8, 1), (8, 2))  # both words of a key count
    keys += [jax.random.wrap_key_data(jnp.asarray(np.uint32(pair))) for pair in words]
    pairs = list(combinations(masks_of(keys), 2))
    assert max(abs(correlation(a, b)) for a, b in pairs) < 4.5
    a = pairs[0][0]
    assert correlation(a, a) > 100  # the control: this is what a repeated mask looks like


def test_rows_and_columns_are_uncorrelated():
    bits = np.asarray(jax.jit(lambda key: hash_bits(key, (2**18,)))(jax.random.key(3)))
    mask = (bits >= np.uint32(round(RATE * 2**32))).astype(np.float64)
    mask = (mask - mask.mean()) / mask.std()
    # The correlation with itself at every distance, by the Wiener-Khinchin theorem.
    spectrum = np.fft.rfft(mask, 2 * mask.size)
    correlations = np.fft.irfft(np.abs(spectrum) ** 2) / np.sqrt(mask.size)
    assert correlations[0] > 500
    assert np.abs(correlations[1 : mask.size // 2]).max() < 5.5
    for distance in (1, 2, 32, 64, 128, 512, 768, 4096, 128 * 128):  # usual row lengths
        assert abs(correlations[distance]) < 4


@pytest.mark.parametrize(
    ("within", "first", "second"),
    [
        ((512, 12, 1024, 1024), (0, 0, 0, 0), (341, 4, 0, 0)),
        ((8, 16, 8192, 8192), (0, 0, 0, 0), (4, 0, 0, 0)),
        ((2048, 12, 512, 512), (0, 0, 0, 0), (1365, 4, 0, 0)),
        ((2, 2, 65536, 65536), (0, 0, 0, 0), (0, 1, 0, 0)),
        ((2, 2, 65536, 65536 * 2), (0, 0, 0, 0), (0, 0, 32768, 0)),
    ],
)
def test_no_mask_repeats_in_an_array_of_more_elements_than_32_bits_count(within, first, second):
    a, b = (
        np.asarray(hash_bits(jax.random.key(0), (1, 1, 64, 64), within, at))
        for at in (first, second)
    )
    assert len(np.unique([a, b])) > 0.99 * 2 * a.size
    assert abs(correlation(a < 2**31, b < 2**31)) < 4.5


def test_masks_are_those_of_earlier_versions():
    whole = [[710047597, 870108672, 1381982466], [3654406376, 1170314280, 2794192275]]
    assert np.asarray(hash_bits(jax.random.key(3), (2, 3))).tolist() == whole
    block = hash_bits(jax.random.key(3), (1, 2), (2, 3), (1, 1))
    assert np.asarray(block).tolist() == [whole[1][1:]]


def test_backward_uses_the_same_mask_and_keeps_none():
    x = jnp.asarray(np.random.default_rng(0).normal(size=SHAPE), jnp.float32)
    key = jax.random.key(5)

    @jax.jit
    def both(x):
        out, backward = jax.vjp(lambda x: dropout(x, RATE, key), x)
        saved = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(backward))
        return out, backward(x)[0], saved

    out, gradient, saved = both(x)
    np.testing.assert_array_equal(out, gradient)  # the map is linear and symmetric
    assert float((out == 0).mean()) == pytest.approx(RATE, abs=0.01)
    assert saved < 8  # the key alone
    again = jax.jit(jax.grad(lambda x: dropout(x, RATE, jax.random.key(6)).sum()))(x)
    assert abs(correlation(np.asarray(out) != 0, np.asarray(again) != 0)) < 4.5


def test_the_mask_does_not_depend_on_the_sharding():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    key = jax.random.key(0)
    plain = np.asarray(kept(key))

    for spec in (PartitionSpec(("a", "b")), PartitionSpec(None, "b", "a")):
        place = NamedSharding(mesh, spec)
        sharded = jax.jit(
            lambda x: dropout(x, RATE, key) > 0, in_shardings=place, out_shardings=place
        )(ONES)
        assert len({shard.data.shape for shard in sharded.addressable_shards}) == 1
        assert sharded.addressable_shards[0].data.size == ONES.size // 8
        np.testing.assert_array_equal(plain, sharded)

    # The control: positions counted within each shard give another mask, the same on all shards.
    spec = PartitionSpec(("a", "b"))
    local = jax.jit(
        jax.shard_map(lambda x: dropout(x, RATE, key) > 0, mesh=mesh, in_specs=spec, out_specs=spec)
    )(ONES)
    assert not np.array_equal(plain, local)
    np.testing.assert_array_equal(local[:8], local[8:16])


class TwoDropouts(nn.Module):
    """Keeps both masks where the test can see them."""

    @nn.compact
    def __call__(self, x, deterministic):
        for _ in range(2):
            masked = Dropout(RATE)(ONES, deterministic=deterministic)
            self.sow("intermediates", "mask", masked > 0)
        return x


class Stacked(nn.Module):
    unroll: int | None = None

    @nn.compact
    def __call__(self, x):
        return apply_stack(TwoDropouts(name="layers"), 3, x, False, unroll=self.unroll)


@pytest.mark.parametrize("unroll", [None, 1])
def test_layers_and_places_within_a_layer_are_uncorrelated(unroll):
    x = jnp.zeros((1, 1, 1))

    @jax.jit
    def run(key):
        return Stacked(unroll).apply({}, x, rngs={"dropout": key}, mutable="intermediates")[1]

    masks = []
    for seed in (0, 1):
        found = run(jax.random.key(seed))["intermediates"]["layers"]["mask"]
        assert [mask.shape for mask in found] == [(3, *SHAPE)] * 2
        masks += [np.asarray(layer) for mask in found for layer in mask]
    assert max(abs(correlation(a, b)) for a, b in combinations(masks, 2)) < 4.5


def test_identity_when_deterministic_or_off():
    x = jnp.ones((2, 3))
    assert Dropout(RATE).apply({}, x, deterministic=True) is x
    assert Dropout(0.0).apply({}, x, deterministic=False) is x  # and needs no key
    with pytest.raises(Exception, match="dropout"):
        Dropout(RATE).apply({}, x, deterministic=False)


def test_dtype_is_kept():
    out = dropout(jnp.ones((4, 4), jnp.bfloat16), 0.5, jax.random.key(0))
    assert out.dtype == jnp.bfloat16
    assert set(np.unique(np.asarray(out, np.float32))) == {0, 2}


@pytest.mark.parametrize(("rate", "off"), [(0.1, 7e-4), (0.003, 2**-8)])
def test_the_mean_is_kept_in_bfloat16(rate, off):
    x = jnp.ones((2000, 2000), jnp.bfloat16)
    out = dropout(x, rate, jax.random.key(0)).astype(jnp.float32)
    assert float(out.mean()) == pytest.approx(1, abs=off)  # if 1 - 0.1 were kept: 0.9984
    # The factor of a rate of 0.003 is 1 in bfloat16; it drops all the same.
    assert float((out == 0).mean()) == pytest.approx(rate, rel=0.05)
