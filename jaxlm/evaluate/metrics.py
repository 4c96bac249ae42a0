"""Metrics of tasks: plain floats by name, shares of one.

A ratio that is undefined is 0, such as the F1 of a label that is neither given nor predicted; a
correlation that is undefined, as with a constant, is NaN. Neither warns.
"""

import math
import re
import string
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Int, Num, Shaped

from jaxlm.errors import InputError
from jaxlm.evaluate.calibration import reliability
from jaxlm.evaluate.tagging import read_entities

HIGHER_IS_BETTER = {
    "accuracy": True,
    "macro_f1": True,
    "micro_f1": True,
    "mcc": True,
    "f1": True,
    "precision": True,
    "recall": True,
    "exact_match": True,
    "pearson": True,
    "spearman": True,
    "best_exact_match": True,
    "best_f1": True,
    "has_answer_exact_match": True,
    "has_answer_f1": True,
    "no_answer_exact_match": True,
    "no_answer_f1": True,
    "recall@1": True,
    "recall@5": True,
    "recall@10": True,
    "mrr": True,
    "bleu": True,
    "chrf": True,
    "mse": False,
    "rmse": False,
    "calibration_error": False,
    "loss": False,
    "perplexity": False,
}


CORRELATIONS = ("pearson", "spearman")


def higher_is_better(name: str) -> bool:
    """Which way a metric is to go; ``f1/person``, of one type of entity, goes as ``f1`` does."""
    base, slash, kind = name.partition("/")
    if base not in HIGHER_IS_BETTER or (slash and not kind):
        raise InputError(
            f"no metric is called {name!r}: it is one of {', '.join(HIGHER_IS_BETTER)}"
        )
    return HIGHER_IS_BETTER[base]


def perplexity(loss: float) -> float:
    """exp(mean cross-entropy of a token, in nats); none is above e^700."""
    return math.exp(min(loss, 700.0))


def classification_names(
    kind: Literal["class", "labels", "number"], label_names: Sequence[str]
) -> tuple[str, ...]:
    """What is measured of texts with a class, with labels, or with a number."""
    if kind == "labels":
        return "micro_f1", "macro_f1", "exact_match"
    if kind == "number":
        return *CORRELATIONS, "mse", "rmse"
    binary = (f"f1/{label_names[1]}",) if len(label_names) == 2 else ()
    return "accuracy", "macro_f1", "mcc", *binary, "calibration_error"


def classification(
    labels: Int[np.ndarray, "examples"],
    probabilities: Float[np.ndarray, "predictions labels"],
    label_names: Sequence[str],
) -> dict[str, float]:
    """Metrics for one label per text; where there are two, ``f1/name`` is that of the second.

    There is no ``micro_f1``: of one label per text it is the accuracy. The mean of ``macro_f1`` is
    over the labels that are given or predicted. ``mcc`` is Matthews' correlation,
    ``calibration_error`` the expected one (Guo et al., 2017).
    """
    from sklearn.metrics import matthews_corrcoef  # slow to import

    _check_lengths("labels", labels, "probabilities", probabilities)
    num_labels = len(label_names)
    if probabilities.shape[1] != num_labels or not 0 <= labels.min() <= labels.max() < num_labels:
        raise InputError(
            f"labels from {labels.min()} to {labels.max()} and {probabilities.shape[1]} "
            f"probabilities for each text do not fit num_labels={num_labels}"
        )
    _check_finite(probabilities)
    predicted = probabilities.argmax(axis=1)
    f1 = _f1s(labels, predicted, labels=range(num_labels))
    seen = np.union1d(labels, predicted)
    return {
        "accuracy": float(np.mean(labels == predicted)),
        "macro_f1": float(f1[seen].mean()),
        "mcc": float(matthews_corrcoef(labels, predicted)) if seen.size > 1 else 0.0,
        **({f"f1/{label_names[1]}": float(f1[1])} if num_labels == 2 else {}),
        "calibration_error": reliability(labels, probabilities).error,
    }


def multilabel(
    labels: Num[np.ndarray, "examples labels"],
    probabilities: Float[np.ndarray, "predictions columns"],
    *,
    threshold: float | Float[np.ndarray, "columns"] = 0.5,
) -> dict[str, float]:
    """Metrics for any number of labels per text: those with a probability above the threshold.

    ``threshold`` is one for all, or one for each label.

    ``exact_match`` is the share of texts with every label right.
    """
    _check_lengths("labels", labels, "probabilities", probabilities)
    _check_finite(probabilities)
    if labels.shape != probabilities.shape:
        raise InputError(
            f"{labels.shape[1]} labels for each text are compared with {probabilities.shape[1]} "
            "probabilities: there is one for each label"
        )
    true, predicted = labels > 0.5, probabilities > threshold
    both = int(np.sum(true & predicted))
    return {
        "micro_f1": _precision_recall_f1(both, int(np.sum(predicted)), int(np.sum(true)))["f1"],
        "macro_f1": float(_f1s(true.astype(int), predicted.astype(int)).mean()),
        "exact_match": float(np.all(true == predicted, axis=1).mean()),
    }


def regression(
    labels: Num[np.ndarray, "examples"], predictions: Float[np.ndarray, "predictions"]
) -> dict[str, float]:
    """Correlations, the mean squared error, and its root, which is in the unit of the labels."""
    _check_lengths("labels", labels, "predictions", predictions)
    labels, predictions = labels.astype(np.float64), predictions.astype(np.float64)
    mse = float(np.mean(np.square(labels - predictions)))
    return {**_correlations(labels, predictions), "mse": mse, "rmse": math.sqrt(mse)}


def choice(
    labels: Int[np.ndarray, "examples"], scores: Float[np.ndarray, "predictions choices"]
) -> dict[str, float]:
    """How often the right choice has the highest score; choices that are not there score -inf."""
    _check_lengths("labels", labels, "scores", scores)
    return {"accuracy": float(np.mean(scores.argmax(axis=1) == labels))}


def embeddings(
    labels: Num[np.ndarray, "examples"],
    first: Float[np.ndarray, "pairs embed"],
    second: Float[np.ndarray, "pairs embed"],
) -> dict[str, float]:
    """Correlations of given similarities with the cosines of embeddings."""
    _check_lengths("labels", labels, "pairs of embeddings", first)
    first, second = first.astype(np.float64), second.astype(np.float64)
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    cosines = np.sum(first * second, axis=1) / np.maximum(norms, 1e-12)
    return _correlations(labels.astype(np.float64), cosines)


def entities(
    true_tags: Sequence[Sequence[str]], predicted_tags: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Precision, recall and F1 of entities, in all and by type (``f1/person``).

    As in conlleval (Tjong Kim Sang and Buchholz, 2000): one is right if its type, its first and its
    last word are; counts are summed over sentences.
    """
    if len(true_tags) != len(predicted_tags):
        raise InputError(
            f"tags of {len(true_tags)} sentences are compared with those of {len(predicted_tags)}"
        )
    given, predicted, right = Counter(), Counter(), Counter()
    for number, (true, guess) in enumerate(zip(true_tags, predicted_tags, strict=True), start=1):
        if len(true) != len(guess):
            raise InputError(
                f"sentence {number} has {len(true)} tags and {len(guess)} predicted ones: there is "
                "one for each word"
            )
        truth, found = set(read_entities(true)), set(read_entities(guess))
        given.update(entity.type for entity in truth)
        predicted.update(entity.type for entity in found)
        right.update(entity.type for entity in truth & found)
    result = _precision_recall_f1(right.total(), predicted.total(), given.total())
    for type in sorted(given | predicted):
        of_type = _precision_recall_f1(right[type], predicted[type], given[type])
        result |= {f"{name}/{type}": value for name, value in of_type.items()}
    return result


def squad(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    null_scores: Mapping[str, float] | None = None,
    *,
    threshold: float = 0.0,
) -> dict[str, float]:
    """Exact match and F1 of answers, as SQuAD 1.1 and 2.0 count them (Rajpurkar et al., 2018).

    The best of an example's right answers counts. Where some have none, there are also the means
    over those with an answer (``has_answer_…``) and without (``no_answer_…``); with
    ``null_scores``, the best value that any threshold would give, and that threshold
    (``best_f1_threshold``).

    Args:
        predictions: by example; '' is no answer.
        references: the right answers of each example; none if it cannot be answered.
        null_scores: by how much no answer is ahead; above the threshold, the prediction becomes ''.
    """
    _check_any(len(references))
    for name, given in (("prediction", predictions), ("null score", null_scores)):
        missing = [key for key in references if given is not None and key not in given]
        if missing:
            raise InputError(f"{len(missing)} examples have no {name}, the first is {missing[0]!r}")
    has_answer = np.array([bool(answers) for answers in references.values()])
    rights = [_rights(answers) for answers in references.values()]
    guesses = [_normalize(predictions[key]) for key in references]
    pairs = list(zip(guesses, rights, strict=True))
    score = {
        "exact_match": np.array([float(guess in right) for guess, right in pairs]),
        "f1": np.array([max(_token_f1(guess, r) for r in right) for guess, right in pairs]),
    }
    unanswered = 1.0 - has_answer
    result = {}
    if null_scores is not None:
        null = np.array([null_scores[key] for key in references])
        for name, values in score.items():
            best, best_threshold = _best_threshold(values, unanswered, null)
            result |= {f"best_{name}": best, f"best_{name}_threshold": best_threshold}
        score = {name: np.where(null > threshold, unanswered, x) for name, x in score.items()}
    if not has_answer.all():
        for part, rows in (("has_answer", has_answer), ("no_answer", ~has_answer)):
            if rows.any():
                result |= {f"{part}_{name}": float(x[rows].mean()) for name, x in score.items()}
    return {name: float(values.mean()) for name, values in score.items()} | result


def is_exact(guess: str, answers: Sequence[str]) -> bool:
    """Whether :func:`squad` counts it as one of the right answers; '' is right where none is."""
    return _normalize(guess) in _rights(answers)


def _rights(answers: Sequence[str]) -> set[str]:
    # Answers of which nothing is left when normalized do not count, as in the official script.
    return {_normalize(answer) for answer in answers} - {""} or {""}


def squad_names(has_answer: Sequence[bool], *, thresholds: bool) -> tuple[str, ...]:
    """What :func:`squad` measures where some examples have answers, with null scores or without."""
    names, scores = ["exact_match", "f1"], ("exact_match", "f1")
    if thresholds:
        names += [f"best_{name}{end}" for name in scores for end in ("", "_threshold")]
    if not all(has_answer):
        parts = ["has_answer"] * any(has_answer) + ["no_answer"]
        names += [f"{part}_{name}" for part in parts for name in scores]
    return tuple(names)


def _best_threshold(
    values: Float[np.ndarray, "examples"],
    unanswered: Float[np.ndarray, "examples"],
    null_scores: Float[np.ndarray, "examples"],
) -> tuple[float, float]:
    """The best mean over all thresholds, and the lowest threshold that gives it."""
    order = np.argsort(null_scores, kind="stable")
    ordered = null_scores[order]
    totals = unanswered.sum() + np.cumsum((values - unanswered)[order])
    # Examples of one null score are answered together, and none at all is a choice as well.
    last = np.append(ordered[1:] != ordered[:-1], True)
    totals = np.append(unanswered.sum(), totals[last])
    thresholds = np.append(np.nextafter(ordered[0], -np.inf), ordered[last])
    best = totals.argmax()
    return float(totals[best] / len(values)), float(thresholds[best])


def _normalize(answer: str) -> str:
    """Lower case, no punctuation, no articles, single spaces; in this order."""
    answer = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", answer).split())


def _token_f1(guess: str, right: str) -> float:
    """F1 of the words that two normalized answers share; no answer matches only no answer."""
    if not guess or not right:
        return float(guess == right)
    guessed, given = Counter(guess.split()), Counter(right.split())
    shared = (guessed & given).total()
    return _precision_recall_f1(shared, guessed.total(), given.total())["f1"]


def _precision_recall_f1(right: int, predicted: int, given: int) -> dict[str, float]:
    """From counts; 2 * right / (predicted + given) is the harmonic mean of the other two."""
    return {
        "precision": right / predicted if predicted else 0.0,
        "recall": right / given if given else 0.0,
        "f1": 2 * right / (predicted + given) if predicted + given else 0.0,
    }


def _f1s(
    true: Int[np.ndarray, "..."],
    predicted: Int[np.ndarray, "..."],
    labels: Sequence[int] | None = None,
) -> Float[np.ndarray, "labels"]:
    """One for each label."""
    from sklearn.metrics import multilabel_confusion_matrix  # slow to import

    counts = multilabel_confusion_matrix(true, predicted, labels=labels)
    whole = counts.astype(int).tolist()  # scikit-learn gives floats where none is right
    return np.array(
        [
            _precision_recall_f1(right, right + extra, right + missed)["f1"]
            for (_, extra), (missed, right) in whole
        ]
    )


def _correlations(
    first: Float[np.ndarray, "examples"], second: Float[np.ndarray, "examples"]
) -> dict[str, float]:
    from scipy import stats  # slow to import

    if len(first) < 2:
        return {"pearson": math.nan, "spearman": math.nan}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = {
            "pearson": stats.pearsonr(first, second),
            "spearman": stats.spearmanr(first, second),
        }
    return {name: float(r.statistic) for name, r in found.items()}  # pyright: ignore[reportAttributeAccessIssue]


def _check_finite(probabilities: Float[np.ndarray, "..."]) -> None:
    (broken,) = np.nonzero(~np.all(np.isfinite(probabilities), axis=1))
    if broken.size:
        raise InputError(
            f"the probabilities of {broken.size} of {len(probabilities)} texts are not finite, "
            f"first those of text {broken[0] + 1}: the model has diverged, or is damaged"
        )


def _check_lengths(
    name: str, given: Shaped[np.ndarray, "..."], other: str, values: Shaped[np.ndarray, "..."]
) -> None:
    if len(given) != len(values):
        raise InputError(f"{len(given)} {name} are compared with {len(values)} {other}")
    _check_any(len(given))


def _check_any(number: int) -> None:
    if not number:
        raise InputError("there is nothing to evaluate: the data hold no examples")
