import numpy as np
import pytest

from jaxlm.evaluate import retrieval


def test_equals_ranks_counted_one_by_one():
    rng = np.random.default_rng(0)
    candidates = rng.normal(size=(30, 4)).astype(np.float32)
    wanted = rng.integers(0, 30, 2000)  # more than are compared at a time
    queries = candidates[wanted] + rng.normal(size=(2000, 4)).astype(np.float32)
    ranks = []
    for query, own in zip(queries, wanted, strict=True):
        cosines = [query @ x / np.linalg.norm(x) for x in candidates]
        ranks.append(1 + sum(cosine > cosines[own] for cosine in cosines))
    ranks = np.array(ranks)
    found = retrieval.retrieval(queries, candidates, wanted)
    assert tuple(found) == retrieval.NAMES
    for k in (1, 5, 10):
        assert found[f"recall@{k}"] == pytest.approx(np.mean(ranks <= k))
    assert found["mrr"] == pytest.approx(np.mean(1 / ranks))
    assert found["candidates"] == 30


def test_nearest_by_cosine_and_not_by_length():
    candidates = np.array([[0.0, 1], [9, 9], [0.1, 0], [0, 0], [2, 0]])
    best = retrieval.nearest(np.array([3.0, 0]), candidates, 3)
    assert [i for i, _ in best] == [2, 4, 1]
    assert [score for _, score in best] == pytest.approx([1, 1, np.sqrt(0.5)])
    assert len(retrieval.nearest(np.array([3.0, 0]), candidates, 99)) == 5
