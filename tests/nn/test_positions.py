import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn.positions import (
    LinearScaling,
    Llama3Scaling,
    frequencies,
    rotary,
    rotate,
    sinusoids,
)

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 2, 4)), jnp.float32)
POSITIONS = jnp.asarray(np.array([[0, 1, 7], [5, 5, 2]]))


def test_pairs_are_turned_by_their_angles():
    turned = np.asarray(rotate(X, rotary(POSITIONS, frequencies(4, 100.0))))
    # As complex numbers: channel i and i + 2, at 1 and 1/10 radians by position.
    numbers = np.asarray(X[..., :2]) + 1j * np.asarray(X[..., 2:])
    angles = np.asarray(POSITIONS)[..., None, None] * np.array([1, 0.1])
    expected = numbers * np.exp(1j * angles)
    np.testing.assert_allclose(turned[..., :2] + 1j * turned[..., 2:], expected, atol=1e-6)
    # The control: not channel i and its neighbour.
    neighbours = np.asarray(X)[..., ::2] + 1j * np.asarray(X)[..., 1::2]
    other = neighbours * np.exp(1j * angles)
    assert np.abs(turned[..., ::2] + 1j * turned[..., 1::2] - other).max() > 0.1


def test_scores_depend_on_distances():
    def scores(shift):
        tables = rotary(POSITIONS + shift, frequencies(4, 100.0))
        query, key = rotate(X, tables), rotate(X[:, ::-1], tables)
        return jnp.einsum("bqhd,bkhd->bhqk", query, key)

    np.testing.assert_allclose(scores(0), scores(1000), atol=1e-3)
    far = rotary(POSITIONS * 2, frequencies(4, 100.0))
    query, key = rotate(X, far), rotate(X[:, ::-1], far)
    assert np.abs(jnp.einsum("bqhd,bkhd->bhqk", query, key) - scores(0)).max() > 0.1


def test_rotations_of_bfloat16_are_computed_in_float32():
    tables = rotary(POSITIONS + 2000, frequencies(4, 100.0))
    low = rotate(X.astype(jnp.bfloat16), tables)
    exact = rotate(X.astype(jnp.bfloat16).astype(jnp.float32), tables)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(low, np.float32), exact, rtol=2**-8)


def test_scaling():
    plain = frequencies(8, 10_000.0)
    np.testing.assert_allclose(LinearScaling(factor=4.0)(plain), plain / 4)
    llama3 = Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=200
    )
    # Periods in 200 positions: 31.8, 3.18, 0.318, 0.0318.
    share = (200 * 0.1 / (2 * math.pi) - 1) / 3
    assert 0 < share < 1
    expected = plain * np.array([1, share + (1 - share) / 8, 1 / 8, 1 / 8])
    np.testing.assert_allclose(llama3(plain), expected, rtol=1e-6)
    assert llama3(plain).dtype == np.float32


@pytest.mark.parametrize("base", [10.0, 500_000.0])
def test_wavelengths_go_from_two_pi_to_the_base(base):
    found = frequencies(64, base)
    assert found[0] == 1
    assert found[-1] == pytest.approx(base ** (-62 / 64))
    np.testing.assert_allclose(found[1:] / found[:-1], base ** (-2 / 64), rtol=1e-6)


def test_sinusoids_by_hand():
    made = np.asarray(sinusoids(POSITIONS, 6))
    for row, positions in zip(made, POSITIONS.tolist(), strict=True):
        for channels, position in zip(row, positions, strict=True):
            for i in range(3):  # even channels are sines, odd ones cosines
                angle = position / 10_000 ** (2 * i / 6)
                expected = math.sin(angle), math.cos(angle)
                np.testing.assert_allclose(channels[2 * i : 2 * i + 2], expected, atol=1e-5)
