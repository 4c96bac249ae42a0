from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounding import DTYPES, tolerance

from jaxlm.nn.dropout import Dropout
from jaxlm.nn.feedforward import Mlp
from jaxlm.nn.stack import apply_stack, join, split

NUM_LAYERS = 4
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), jnp.float32)
WAYS = [
    {},
    {"unroll": 1},
    {"unroll": 2},
    {"unroll": 3},  # does not divide the number of layers
    {"unroll": 1, "remat": "full"},
    {"remat": "full"},
    {"unroll": 2, "remat": "dots"},
    {"remat": "dots"},
]


class Block(nn.Module):
    """A residual Mlp, scaled by a "lora" variable where there is one."""

    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, shift, deterministic):
        y = Mlp(5, dtype=jnp.dtype(self.dtype), name="mlp")(x)
        y = Dropout(0.5)(y, deterministic=deterministic)
        if self.has_variable("lora", "scale"):
            y = y * self.get_variable("lora", "scale")
        return x + y + shift.astype(x.dtype)


class Stacked(nn.Module):
    unroll: int | None = None
    remat: str | None = None
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, shift, deterministic=True):
        block, x = Block(self.dtype, name="layers"), x.astype(self.dtype)
        return apply_stack(
            block, NUM_LAYERS, x, shift, deterministic, unroll=self.unroll, remat=self.remat
        )


def make_params():
    shapes = jax.eval_shape(Stacked().init, jax.random.key(0), X, X)["params"]
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(1)
    return structure.unflatten([jnp.float32(rng.normal(size=leaf.shape) / 2) for leaf in leaves])


PARAMS = make_params()
SHIFT = 0.1 * X[:1]


def value_and_gradients(apply):
    """Of ``apply(params, x)``, in one compilation."""

    def total(params, x):
        out = apply(params, x).astype(jnp.float32)
        return jnp.sum(jnp.sin(out)), out

    gradients, out = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(PARAMS, X)
    return jax.tree.map(np.asarray, (out, gradients))


def differences(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return [float(np.abs(x - y).max()) for x, y in pairs]


def shares(found, expected):
    """Of the largest number of each array, the largest difference."""
    sizes = [np.abs(leaf).max() for leaf in jax.tree.leaves(expected)]
    return [x / size for x, size in zip(differences(found, expected), sizes, strict=True)]


def limit_of(dtype):
    # Five results a layer, and as many on the way back.
    return tolerance(dtype, depth=10 * NUM_LAYERS)


@cache
def by_hand(dtype="float32"):
    def apply(params, x):
        x = x.astype(dtype)
        for layer in range(NUM_LAYERS):
            one = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["layers"])
            x = Block(dtype).apply({"params": one}, x, SHIFT, True)
        return x

    return value_and_gradients(apply)


@pytest.mark.parametrize(
    ("unroll", "loops", "has_barrier"),
    [(None, 0, True), (1, 2, False), (2, 2, False), (3, 2, True), (4, 0, True), (5, 0, True)],
)
def test_what_is_computed_again_stays_apart_outside_of_a_loop(unroll, loops, has_barrier):
    """Where XLA would merge it with what it repeats, and keep all of it."""
    apply = Stacked(unroll=unroll, remat="full").apply
    gradient = jax.grad(lambda params: apply({"params": params}, X, SHIFT).sum())
    text = jax.jit(gradient).lower(PARAMS).as_text()
    assert text.count("stablehlo.while") == loops
    assert ("optimization_barrier" in text) == has_barrier


def test_every_parameter_has_a_leading_layer_axis():
    assert {leaf.shape[0] for leaf in jax.tree.leaves(PARAMS)} == {NUM_LAYERS}
    assert PARAMS["layers"]["mlp"]["up"]["kernel"].shape == (NUM_LAYERS, 4, 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_way_equals_a_loop_by_hand(way, dtype):
    apply = Stacked(**way, dtype=dtype).apply
    found = value_and_gradients(lambda p, x: apply({"params": p}, x, SHIFT))
    assert max(shares(found, by_hand(dtype))) < limit_of(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_layers_matters(dtype):
    # The control: layers in another order are seen.
    backwards = jax.tree.map(lambda leaf: leaf[::-1], PARAMS)
    found = value_and_gradients(
        lambda _, x: Stacked(unroll=1, dtype=dtype).apply({"params": backwards}, x, SHIFT)
    )
    assert shares(found, by_hand(dtype))[0] > 4 * limit_of(dtype)


def test_dropout_is_the_same_every_way():
    def run(way):
        def apply(params, x):
            variables, rngs = {"params": params}, {"dropout": jax.random.key(0)}
            return Stacked(**way).apply(variables, x, SHIFT, False, rngs=rngs)

        return value_and_gradients(apply)

    first = run({})
    for way in ({"unroll": 1, "remat": "full"}, {"unroll": 2, "remat": "dots"}):
        assert max(differences(run(way), first)) < 1e-5


def test_initial_layers_differ():
    params = jax.jit(Stacked(unroll=1).init)(jax.random.key(0), X, X)["params"]
    kernel = np.asarray(params["layers"]["mlp"]["up"]["kernel"])
    assert np.abs(kernel[0] - kernel[1]).max() > 0.1


@pytest.mark.parametrize("way", [{}, {"unroll": 1, "remat": "full"}], ids=str)
def test_other_collections_are_scanned_beside_the_parameters(way):
    def run(scales):
        variables = {"params": PARAMS}
        if scales is not None:
            variables["lora"] = {"layers": {"scale": jnp.float32(scales)}}
        return np.asarray(jax.jit(Stacked(**way).apply)(variables, X, SHIFT))

    # A scale of 0 leaves a layer's shift alone, so each layer reads its own.
    np.testing.assert_allclose(run([0] * NUM_LAYERS), X + NUM_LAYERS * SHIFT, atol=1e-5)
    np.testing.assert_allclose(run([1] * NUM_LAYERS), run(None), atol=1e-6)
    one = [run(np.arange(NUM_LAYERS) == layer) for layer in range(NUM_LAYERS)]
    for layer in range(1, NUM_LAYERS):
        assert np.abs(one[layer] - one[0]).max() > 1e-2


def test_a_scan_of_parameters_alone_would_drop_adapters():
    # The control: flax's usual `variable_axes` passes over a "lora" collection without a word.
    class Careless(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(
                lambda block, x, _: (block(x, SHIFT, True), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=NUM_LAYERS,
            )
            return scan(Block(name="layers"), x, None)[0]

    lora = {"layers": {"scale": jnp.zeros(NUM_LAYERS)}}
    out = Careless().apply({"params": PARAMS, "lora": lora}, X)
    assert np.abs(out - (X + NUM_LAYERS * SHIFT)).max() > 1e-2


def test_remat_computes_again_what_it_says():
    def num_products(**way):
        def total(params):
            return jnp.sum(jnp.sin(Stacked(unroll=1, **way).apply({"params": params}, X, SHIFT)))

        return str(jax.make_jaxpr(jax.grad(total))(PARAMS)).count("dot_general[")

    kept = num_products()
    assert num_products(remat="dots") == kept
    assert num_products(remat="full") > kept


def test_layers_of_their_own_compute_the_same():
    apply = jax.jit(Stacked().apply)
    apart = jax.tree.map(split, PARAMS)
    assert len(jax.tree.leaves(apart)) == NUM_LAYERS * len(jax.tree.leaves(PARAMS))
    jax.tree.map(np.testing.assert_array_equal, join(apart), PARAMS)
    joined = jax.jit(lambda params: Stacked().apply({"params": join(params)}, X, SHIFT))
    np.testing.assert_allclose(joined(apart), apply({"params": PARAMS}, X, SHIFT), rtol=1e-6)
