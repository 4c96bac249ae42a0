"""What needs no network learns what there is to learn from words, the same each time."""

import numpy as np
import pytest

from jaxlm.evaluate import baselines

TRAIN = [f"{word} x{i % 7}" for i in range(20) for word in ("good", "bad", "odd")]
LABELS = np.array([0, 1, 2] * 20)


def test_linear_models_learn_from_words():
    new = ["good x1", "bad x2", "odd film"]
    probabilities = baselines.classes(TRAIN, LABELS, new, 3)
    assert probabilities.argmax(axis=1).tolist() == [0, 1, 2]
    assert probabilities.sum(axis=1) == pytest.approx(np.ones(3))
    assert np.array_equal(probabilities, baselines.classes(TRAIN, LABELS, new, 3))
    sets = baselines.label_sets(TRAIN, np.eye(3)[LABELS], new)
    assert (sets > 0.5).tolist() == np.eye(3, dtype=bool).tolist()
    values = baselines.numbers(TRAIN, LABELS - 1.0, new)
    assert values.argsort().tolist() == [0, 1, 2]


def test_many_texts_are_learned_to_the_end():
    """The gradient is a mean over texts: with many of them, a coarse tolerance stops at once."""
    rng = np.random.default_rng(0)
    words = np.array([f"w{i}" for i in range(400)])
    chosen = rng.integers(0, 400, (4000, 12))
    labels = ((chosen < 200).sum(1) > 6).astype(int)
    texts = [" ".join(words[row]) for row in chosen]
    found = baselines.classes(texts[:3000], labels[:3000], texts[3000:], 2).argmax(1)
    assert (found == labels[3000:]).mean() > 0.85


def test_what_training_lacks_has_no_probability():
    two = baselines.classes(["a", "b"], np.array([0, 2]), ["b"], 3)
    assert two[0, 1] == 0
    one = baselines.classes(["a", "b"], np.array([1, 1]), ["c"], 3)
    assert one.tolist() == [[0, 1, 0]]
    assert baselines.classes(["!", "?"], np.array([0, 1]), ["."], 2).tolist() == [[0.5, 0.5]]
    assert baselines.numbers(["!", "?"], np.array([1.0, 3.0]), ["."]).tolist() == [2]


def test_what_takes_long_is_left_out():
    assert baselines.takes_seconds(["a"] * 10_000, 4)
    assert not baselines.takes_seconds(["a"] * 10_001)
    assert not baselines.takes_seconds(["a"] * 10_000, 5)
    assert not baselines.takes_seconds(["a" * 10_000_001])
