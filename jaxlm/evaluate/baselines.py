"""What is reached without a network, in seconds on a CPU: so that one sees what the network adds.

TF-IDF weighs the words of a text (Salton and Buckley, 1988); a linear model learns from them.
scikit-learn is imported where it is used: it takes as long to import as JAX.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int, Shaped

MAX_TEXTS, MAX_CHARACTERS, MAX_CELLS = 10_000, 10_000_000, 40_000

Baselines = dict[str, dict[str, float]]  # metrics by what was done


def takes_seconds(texts: Sequence[str], num_outputs: int = 1) -> bool:
    """Whether a linear model of these training texts does, on one core."""
    return (
        len(texts) <= MAX_TEXTS
        and len(texts) * num_outputs <= MAX_CELLS
        and sum(map(len, texts)) <= MAX_CHARACTERS
    )


def classes(
    train: Sequence[str],
    labels: Int[np.ndarray, "train"],
    texts: Sequence[str],
    num_labels: int,
) -> Float[np.ndarray, "texts labels"]:
    """Probabilities by logistic regression on TF-IDF."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    known, new = _tf_idf(train, texts)
    probabilities = np.zeros((len(texts), num_labels))
    seen = np.unique(labels)
    probabilities[:, seen] = 1 / len(seen)
    if known is not None and len(seen) > 1:
        model = LogisticRegression(C=10.0, tol=1e-4, max_iter=100)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # nearly there is enough
            probabilities[:, seen] = model.fit(known, labels).predict_proba(new)
    return probabilities


def label_sets(
    train: Sequence[str], labels: Float[np.ndarray, "train labels"], texts: Sequence[str]
) -> Float[np.ndarray, "texts labels"]:
    """The probability of each label, by a logistic regression of its own."""
    columns = [classes(train, column.astype(int), texts, 2)[:, 1] for column in labels.T]
    return np.stack(columns, axis=1)


def numbers(
    train: Sequence[str], targets: Float[np.ndarray, "train"], texts: Sequence[str]
) -> Float[np.ndarray, "texts"]:
    """By ridge regression on TF-IDF."""
    from sklearn.linear_model import Ridge

    known, new = _tf_idf(train, texts)
    if known is None:
        return np.full(len(texts), targets.mean())
    return Ridge(solver="sparse_cg", random_state=0).fit(known, targets).predict(new)


def vectors(texts: Sequence[str]) -> Float32[np.ndarray, "texts words"]:
    """TF-IDF of the most frequent words, of length 1."""
    known, _ = _tf_idf(texts, texts[:1], max_features=2048)
    if known is None:
        return np.zeros((len(texts), 1), np.float32)
    return known.toarray().astype(np.float32)


def _tf_idf(
    train: Sequence[str], texts: Sequence[str], max_features: int = 20_000
) -> tuple[Any, Any]:
    """Sparse matrices, or None and None where there are no words."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = TfidfVectorizer(
        sublinear_tf=True, max_features=max_features, token_pattern=r"\w+", lowercase=True
    )
    try:
        return words.fit_transform(train), words.transform(texts)
    except ValueError:
        return None, None


def most_frequent(values: Shaped[np.ndarray, "values"]) -> int:
    """The most frequent of small whole numbers, the least of several."""
    return int(np.bincount(values).argmax())
