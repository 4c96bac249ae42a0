import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import InputError
from jaxlm.objectives import classification, rdrop


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_symmetric_kl():
    first, second = (
        jnp.float32(np.random.default_rng(seed).normal(size=(2, 5, 3))) for seed in (6, 7)
    )
    log_p, log_q = log_softmax(np.float64(first)), log_softmax(np.float64(second))
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1) + (np.exp(log_q) * (log_q - log_p)).sum(-1)
    np.testing.assert_allclose(rdrop.symmetric_kl(first, second), kl / 2, rtol=1e-4, atol=1e-6)
    assert np.abs(rdrop.symmetric_kl(first, first)).max() == 0


def test_alpha_must_not_be_negative():
    with pytest.raises(InputError, match=r"alpha=-1.0 is below 0"):
        rdrop.make_loss(lambda: None, classification.score, alpha=-1.0)
