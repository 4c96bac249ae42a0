import jax.numpy as jnp
import numpy as np

from jaxlm.nn import masks


def test_segments():
    ids = jnp.asarray(np.array([[0, 0, 1, -1], [2, 3, 3, 2]]))
    mask = np.asarray(masks.segments(ids, ids))
    assert mask.shape == (2, 1, 4, 4)
    assert mask[0, 0].astype(int).tolist() == [
        [1, 1, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 0, 1],
    ]
    assert mask[1, 0].astype(int).tolist() == [
        [1, 0, 0, 1],
        [0, 1, 1, 0],
        [0, 1, 1, 0],
        [1, 0, 0, 1],
    ]


def test_segments_of_queries_and_keys():
    q, kv = jnp.asarray(np.array([[0, 1]])), jnp.asarray(np.array([[1, 1, 0]]))
    assert np.asarray(masks.segments(q, kv))[0, 0].astype(int).tolist() == [[0, 0, 1], [1, 1, 0]]


def test_padding():
    mask = np.asarray(masks.padding(jnp.asarray(np.array([0, 2, 4])), 4))
    assert mask.shape == (3, 1, 1, 4)
    assert mask[:, 0, 0].astype(int).tolist() == [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]


def test_causal():
    ids = jnp.asarray(np.array([[0, 0, 1, -1]] * 2))
    assert np.asarray(masks.causal(3))[0, 0].astype(int).tolist() == [
        [1, 0, 0],
        [1, 1, 0],
        [1, 1, 1],
    ]
    both = masks.causal(4, ids, masks.padding(jnp.array([1, 4]), 4))
    assert np.asarray(both)[0, 0].astype(int).tolist() == [
        [1, 0, 0, 0],
        [1, 0, 0, 0],
        [0, 0, 0, 0],
        [0, 0, 0, 0],
    ]
    assert np.asarray(both)[1, 0].astype(int).tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 0, 1],
    ]


def test_ids_that_are_not_given_are_zero():
    q, kv = jnp.asarray([[0, -1, 2]]), jnp.asarray([[2, 0, 0, -1]])
    cross = lambda a, b: np.asarray(masks.cross(a, b) & np.ones((1, 1, 3, 4), bool))
    np.testing.assert_array_equal(cross(q, kv), masks.segments(q, kv))
    np.testing.assert_array_equal(cross(q, None), masks.segments(q, 0 * kv))
    np.testing.assert_array_equal(cross(None, kv), masks.segments(0 * q, kv))
    assert masks.cross(None, None) is None
