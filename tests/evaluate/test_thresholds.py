import numpy as np
import pytest

from jaxlm.evaluate import metrics
from jaxlm.evaluate.thresholds import best_thresholds


def f1(labels, probabilities, threshold) -> float:
    return metrics.multilabel(labels, probabilities, threshold=threshold)["macro_f1"]


def test_no_threshold_is_better_than_the_best():
    generator = np.random.default_rng(0)
    labels = generator.random((40, 3)) < [0.1, 0.5, 0.8]
    probabilities = np.round(0.3 * labels + 0.6 * generator.random((40, 3)), 2).astype(np.float32)
    best = best_thresholds(labels.astype(int), probabilities)
    for column in range(3):
        own, scores = labels[:, [column]].astype(int), probabilities[:, [column]]
        found = f1(own, scores, best[[column]])
        assert found == max(f1(own, scores, t) for t in np.linspace(0, 1, 1001)) > 0.3
    assert f1(labels.astype(int), probabilities, best) > f1(labels.astype(int), probabilities, 0.5)


@pytest.mark.parametrize("labels", [[[0], [0]], [[1], [0]]])
def test_half_stays_where_no_other_is_better(labels):
    scores = np.array([[0.9], [0.2]], np.float32)
    assert best_thresholds(np.array(labels), scores).tolist() == [0.5]
