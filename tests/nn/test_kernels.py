"""Kernels equal the plain definition where they can run without their devices."""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import InputError
from jaxlm.nn import hopper, masks
from jaxlm.nn.attention import dot_product_attention, grouped_attention
from jaxlm.nn.kernels import ranges
from jaxlm.nn.masks import Visible, visible
from jaxlm.nn.splash import splash_attention
from jaxlm.sharding import MeshConfig, make_mesh, use_mesh


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def segments(length, batch=2):
    ids = np.sort(np.random.default_rng(0).integers(0, 4, (batch, length)), axis=1)
    return jnp.asarray(np.where(ids == 3, -1, ids), jnp.int32)


def padded(length):
    return jnp.where(jnp.arange(length)[None, :] < jnp.array([[length], [9]]), 0, -1)


def gradients(attend, mask, length, kv_heads, mesh=None):
    """Of a sum over what is no padding, with the outputs there."""
    query, weights = normal(2, length, 4, 64), normal(2, length, 4, 64, seed=3)
    key, value = (normal(2, length, kv_heads, 64, seed=seed) for seed in (1, 2))
    if mask.q_segment_ids is not None:
        weights *= (mask.q_segment_ids >= 0)[:, :, None, None]

    def total(*operands):
        out = grouped_attention(attend, *operands, mask=mask)
        return jnp.sum(out * weights), out * weights

    def run(*operands):
        if mesh is None:
            return jax.grad(total, (0, 1, 2), has_aux=True)(*operands)
        with use_mesh(mesh):
            return jax.grad(total, (0, 1, 2), has_aux=True)(*operands)

    return jax.jit(run)(query, key, value)


def assert_equal_plain(attend, mask, *, length, kv_heads=4, mesh=None):
    ours = gradients(attend, mask, length, kv_heads, mesh)
    plain = gradients(dot_product_attention, mask, length, kv_heads)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6 * float(jnp.abs(b).max()), rtol=0)


interpreted = partial(splash_attention, interpret=True)


def test_splash_on_a_mesh_with_documents_and_a_window():
    # 300 positions are filled up to 384; two devices share the rows, two the heads.
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    mask = visible(segments(300), before=20, after=20)
    assert_equal_plain(interpreted, mask, length=300, mesh=mesh)


def test_splash_with_shared_heads_and_no_later_position():
    assert_equal_plain(interpreted, visible(after=0), length=256, kv_heads=2)


def test_what_reads_another_row_as_long_needs_no_kernel():
    ids = segments(256)
    assert_equal_plain(interpreted, Visible(ids, ids[:, ::-1]), length=256)


SEEN = {
    "all": visible(),
    "causal": visible(after=0),
    "documents": visible(segments(40)),
    "a window": visible(segments(40), before=3, after=5),
}


@pytest.mark.parametrize("name", SEEN)
def test_ranges_say_what_masks_say(name):
    mask = SEEN[name]
    start, end = ranges(mask.kv_segment_ids, mask, 40)
    places = np.arange(40)
    start, end = (np.asarray(x)[..., None] for x in (start, end))
    seen = (places >= start) & (places < end)
    expected = masks.dense(mask, 40, 40)
    expected = True if expected is None else expected[:, 0]
    np.testing.assert_array_equal(seen, np.broadcast_to(expected, seen.shape))


cudnn = partial(hopper.cudnn_attention, implementation="xla")


@pytest.mark.parametrize("mask", [visible(after=0), visible(padded(256))], ids=["causal", "padded"])
def test_cudnn_by_the_lengths_of_rows(mask):
    assert_equal_plain(cudnn, mask, length=256, kv_heads=2)


def test_cudnn_does_not_take_several_documents_for_one():
    x = normal(2, 256, 2, 8)
    ids = jnp.concatenate([padded(256)[:1], segments(256)[:1]])
    out = np.asarray(cudnn(x, x, x, mask=visible(ids)))
    assert list(np.isnan(out).all(axis=(1, 2, 3))) == [False, True]
    assert list(np.isnan(out).any(axis=(1, 2, 3))) == [False, True]


def kernels():
    yield pytest.param(interpreted, id="splash")
    yield pytest.param(cudnn, id="cudnn")
    base = "tokamax._src.ops.attention.base"
    try:
        plain = importlib.import_module(base).DotProductAttention()
    except ModuleNotFoundError:
        return
    yield pytest.param(partial(hopper.tokamax_attention, implementation=plain), id="tokamax")


@pytest.mark.parametrize("attend", list(kernels()))
def test_rows_of_padding_alone_are_numbers(attend):
    """Such rows fill the last batch of an evaluation: their weight is 0, but 0 times NaN is not."""
    x = normal(2, 256, 2, 64)
    mask = visible(padded(256).at[1].set(-1))
    run = lambda x: jnp.sum(attend(x, x, x, mask=mask)[0])
    out, gradient = jax.jit(lambda x: (attend(x, x, x, mask=mask), jax.grad(run)(x)))(x)
    assert np.isfinite(out).all()
    assert np.isfinite(gradient).all()


def test_tokamax_by_ranges_of_keys():
    base = pytest.importorskip("tokamax._src.ops.attention.base")
    attend = partial(hopper.tokamax_attention, implementation=base.DotProductAttention())
    mask = visible(segments(256), before=20, after=20)
    assert_equal_plain(attend, mask, length=256, kv_heads=2)


KERNELS = [splash_attention, hopper.tokamax_attention, hopper.cudnn_attention]


@pytest.mark.parametrize("attend", KERNELS)
def test_dropped_weights_are_refused(attend):
    x = normal(1, 256, 1, 8)
    with pytest.raises(InputError, match="attention=blockwise"):
        attend(x, x, x, dropout_rate=0.1, dropout_key=jax.random.key(0))


def test_rows_that_are_split_are_refused():
    x = normal(2, 256, 1, 8)
    with (
        use_mesh(make_mesh(MeshConfig(sequence=2), jax.devices()[:2])),
        pytest.raises(InputError, match=r"mesh\.sequence"),
    ):
        splash_attention(x, x, x)


def test_what_reads_a_cache_needs_no_kernel():
    query, key = normal(2, 3, 4, 8), normal(2, 300, 4, 8, seed=1)
    mask = masks.padding(jnp.array([300, 8]), 300)
    ours = interpreted(query, key, key, mask=mask)
    plain = dot_product_attention(query, key, key, mask=mask)
    np.testing.assert_allclose(ours, plain, atol=1e-6)
