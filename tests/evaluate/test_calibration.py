import numpy as np
import pytest

from jaxlm.evaluate.calibration import reliability


def test_error_by_hand():
    # (0.5, 1]: 0.6 wrong, 0.9 right, 0.9 right; (0, 0.5]: 0.5 right.
    probabilities = np.array([[0.6, 0.4], [0.1, 0.9], [0.9, 0.1], [0.5, 0.5]])
    result = reliability(np.array([1, 1, 0, 0]), probabilities, num_bins=2)
    assert result.counts.tolist() == [1, 3]
    assert result.confidence == pytest.approx([0.5, 0.8])
    assert result.accuracy == pytest.approx([1, 2 / 3])
    assert result.error == pytest.approx(0.25 * 0.5 + 0.75 * (0.8 - 2 / 3))


def test_extremes_stay_inside_the_bins():
    result = reliability(np.array([0, 0]), np.array([[1.0, 0.0], [0.0, 0.0]]), num_bins=10)
    assert result.counts.tolist() == [1] + [0] * 8 + [1]


def test_who_says_what_is_has_no_error():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([1, 1, 1], size=20_000)
    labels = (probabilities.cumsum(axis=1) < rng.random((20_000, 1))).sum(axis=1)
    assert reliability(labels, probabilities).error < 0.02
    too_sure = probabilities**3 / (probabilities**3).sum(axis=1, keepdims=True)
    assert reliability(labels, too_sure).error > 0.1
