from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn.relative_bias import RelativeBias, buckets_around, buckets_before


def test_buckets_by_hand():
    # Of eight: one each for 0 to 3, and then up to 4 * 2, 4 * 4, 4 * 8 and 64 by the factor 2.
    distances = jnp.asarray([-5, 0, 1, 3, 4, 7, 8, 15, 16, 31, 32, 63, 64, 1000])
    expected = [0, 0, 1, 3, 4, 4, 5, 5, 6, 6, 7, 7, 7, 7]
    assert buckets_before(distances, 8, 64).tolist() == expected
    # Half of sixteen for either side; what is at its own place is of the first.
    both = jnp.concatenate([distances[1:], -distances[2:]])
    assert buckets_around(both, 16, 64).tolist() == [*expected[1:], *(8 + x for x in expected[2:])]


@pytest.mark.parametrize("num_buckets", [4, 6, 32, 128])
@pytest.mark.parametrize("max_distance", [70, 100, 128, 300])
def test_buckets_are_those_of_transformers_at_their_edges_too(num_buckets, max_distance):
    torch = pytest.importorskip("torch")
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distances = np.arange(-400, 400)
    for ours, both_sides in ((buckets_before, False), (buckets_around, True)):
        theirs = t5.T5Attention._relative_position_bucket(
            torch.tensor(-distances), both_sides, num_buckets, max_distance
        )
        made = ours(jnp.asarray(distances), num_buckets, max_distance)
        np.testing.assert_array_equal(made, theirs)


def test_a_bias_by_distance():
    module = RelativeBias(3, 4, 5)
    places, variables = jnp.arange(4), {"params": {"relative_embed": {"embedding": jnp.eye(4, 3)}}}
    shapes = jax.eval_shape(partial(module.init, method="around"), jax.random.key(0), places)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, shapes)
    around = module.apply(variables, places, method="around")
    # What is before is the second bucket, and what is behind the fourth, where this table has 0.
    expected = [[0, 3, 3, 3], [1, 0, 3, 3], [1, 1, 0, 3], [1, 1, 1, 0]]
    np.testing.assert_array_equal(around[0], np.moveaxis(np.eye(4, 3)[expected], -1, 0))
    # The places of queries within those of keys, as where a cache is filled.
    whole = module.apply(variables, places, places, method="before")
    later = module.apply(variables, places[2:], places, method="before")
    np.testing.assert_array_equal(later, whole[:, :, 2:])
