import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn.embed import Embed

TABLE = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
VARIABLES = {"params": {"embedding": jnp.asarray(TABLE)}}
IDS = jnp.asarray(np.array([[0, 6, 3], [3, 3, 1]]))


def test_looks_up_rows():
    np.testing.assert_array_equal(Embed(7, 4).apply(VARIABLES, IDS), TABLE[np.asarray(IDS)])
    np.testing.assert_array_equal(Embed(7, 4).apply(VARIABLES, IDS[0, 0]), TABLE[0])


def test_an_id_seen_twice_gets_both_gradients():
    def total(variables):
        return jnp.sum(Embed(7, 4).apply(variables, IDS))

    gradient = jax.jit(jax.grad(total))(VARIABLES)["params"]["embedding"]
    counts = np.bincount(np.asarray(IDS).ravel(), minlength=7)
    np.testing.assert_array_equal(gradient, np.broadcast_to(counts[:, None], (7, 4)))


def test_ids_beyond_the_table_are_clamped():
    out = Embed(7, 4).apply(VARIABLES, jnp.asarray(np.array([7, 100])))
    np.testing.assert_array_equal(out, TABLE[[6, 6]])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_attend_scores_every_row_in_float32(dtype):
    x = np.random.default_rng(1).normal(size=(2, 3, 4)).astype(np.float32)
    embed = Embed(7, 4, dtype)
    bias = np.arange(7, dtype=np.float32) / 4
    logits = embed.apply(VARIABLES, jnp.asarray(x), jnp.asarray(bias), method="attend")
    low = [a.astype(dtype).astype(np.float32) for a in (x, TABLE)]
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, low[0] @ low[1].T + bias, atol=1e-5)
    assert embed.apply(VARIABLES, IDS).dtype == dtype


def test_the_table_is_float32():
    shapes = jax.eval_shape(Embed(7, 4, jnp.bfloat16).init, jax.random.key(0), IDS)
    assert shapes["params"]["embedding"].dtype == jnp.float32


def test_attend_without_a_bias():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 4)), jnp.float32)
    logits = Embed(7, 4).apply(VARIABLES, x, method="attend")
    np.testing.assert_allclose(logits, np.asarray(x) @ TABLE.T, atol=1e-6)
