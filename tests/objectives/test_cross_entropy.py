import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxlm.nn import custom_vjp
from jaxlm.nn.masks import NEGATIVE
from jaxlm.objectives.cross_entropy import cross_entropy, smoothed_cross_entropy

RNG = np.random.default_rng(0)
LOGITS = jnp.float32(5 * RNG.normal(size=(3, 4, 17)))
LABELS = jnp.asarray(RNG.integers(0, 17, (3, 4)))
WEIGHTS = jnp.float32(RNG.normal(size=(3, 4)))  # another cotangent for every position


def value_and_gradient(function, logits, labels, weights):
    def total(logits):
        losses, correct = function(logits, labels)
        return jnp.sum(jnp.square(losses) * weights), (losses, correct)

    gradient, (losses, correct) = jax.jit(jax.grad(total, has_aux=True))(logits)
    return losses, gradient, correct


@pytest.fixture(params=["cpu", "elsewhere"])
def platform(request, monkeypatch):
    """Both ways to compute: the one for CPUs, and the one for every other platform."""
    if request.param == "elsewhere":
        monkeypatch.setattr(lax, "platform_dependent", lambda *args, default, cpu: default(*args))


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_equals_log_softmax(shift, platform):
    # A large shift cancels: the loss must not be a small difference of large numbers.
    logits = LOGITS + shift
    ours = value_and_gradient(cross_entropy, logits, LABELS, WEIGHTS)
    exact = value_and_gradient(cross_entropy.plain, logits, LABELS, WEIGHTS)
    np.testing.assert_allclose(ours[0], exact[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours[1], exact[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(ours[2], exact[2])
    assert np.abs(exact[1]).max() > 1


def test_by_hand():
    logits = jnp.float32(np.log([[1, 2, 5], [1, 1, 2]]))
    losses, gradient, correct = value_and_gradient(
        lambda *args: cross_entropy(*args), logits, jnp.asarray(np.array([2, 0])), jnp.ones(2)
    )
    np.testing.assert_allclose(losses, -np.log([5 / 8, 1 / 4]), atol=1e-6)
    softmax = np.array([[1 / 8, 2 / 8, 5 / 8 - 1], [1 / 4 - 1, 1 / 4, 1 / 2]])
    np.testing.assert_allclose(gradient, softmax * 2 * np.asarray(losses)[:, None], atol=1e-6)
    assert correct.tolist() == [True, False]


def test_extreme_logits_are_finite(platform):
    logits = jnp.float32(np.array([[1e30, 0.0, -1e30], [-np.inf, 0.0, 1.0]]))
    labels = jnp.asarray(np.array([0, 2]))
    losses, gradient, correct = value_and_gradient(cross_entropy, logits, labels, jnp.ones(2))
    np.testing.assert_allclose(losses, [0, np.log1p(np.exp(-1))], atol=1e-6)
    assert np.isfinite(gradient).all()
    assert correct.tolist() == [True, True]


def test_one_array_of_the_logits_size_is_kept():
    @jax.jit
    def saved(logits):
        _, backward, _ = jax.vjp(lambda x: cross_entropy(x, LABELS), logits, has_aux=True)
        return sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(backward))

    assert saved(LOGITS) < 1.5 * LOGITS.size


def test_a_sharded_vocabulary(platform):
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    logits = jnp.float32(RNG.normal(size=(2, 3, 16)))
    labels = jnp.asarray(RNG.integers(0, 16, (2, 3)))
    weights = jnp.float32(RNG.normal(size=(2, 3)))
    sharded = jax.device_put(logits, NamedSharding(mesh, PartitionSpec("data", None, "tensor")))
    ours = value_and_gradient(cross_entropy, sharded, labels, weights)
    exact = value_and_gradient(cross_entropy.plain, logits, labels, weights)
    for a, b in zip(ours, exact, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("rows", [17, 20])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_smoothing_equals_soft_labels(smoothing, rows):
    """Over the tokens: the table's other rows have no share."""

    def soft(logits, labels):
        target = (1 - smoothing) * jax.nn.one_hot(labels, 17) + smoothing / 17
        losses = -(target * jax.nn.log_softmax(logits[..., :17])).sum(-1)
        return losses, logits.argmax(-1) == labels

    def ours(logits, labels, plain=contextlib.nullcontext):
        with plain():
            losses, _, correct = smoothed_cross_entropy(logits, labels, smoothing)
        return losses, correct

    logits = jnp.pad(
        LOGITS, (*[(0, 0)] * (LOGITS.ndim - 1), (0, rows - 17)), constant_values=NEGATIVE
    )
    exact = value_and_gradient(soft, logits, LABELS, WEIGHTS)
    for plain in (contextlib.nullcontext, custom_vjp.plain):
        found = value_and_gradient(partial(ours, plain=plain), logits, LABELS, WEIGHTS)
        for a, b in zip(found, exact, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    hard = value_and_gradient(cross_entropy, LOGITS, LABELS, WEIGHTS)
    assert (np.abs(found[0] - hard[0]).max() > 0.1) == (smoothing > 0)


def test_the_loss_without_smoothing_is_given_as_well():
    unsmoothed = lambda logits, labels: smoothed_cross_entropy(logits, labels, 0.3)[1:]
    found = value_and_gradient(unsmoothed, LOGITS, LABELS, WEIGHTS)
    exact = value_and_gradient(cross_entropy, LOGITS, LABELS, WEIGHTS)
    for a, b in zip(found, exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
