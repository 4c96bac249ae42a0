import math
import random

import numpy as np
import pytest

from jaxlm.errors import InputError
from jaxlm.evaluate import metrics


def one_hot(predicted, num_labels):
    return np.eye(num_labels, dtype=np.float32)[predicted]


def test_binary_classification_by_hand():
    # Label 1: 3 right, 1 missed, 2 too many; label 0: 2 right.
    labels = np.array([1, 1, 1, 1, 0, 0, 0, 0])
    probabilities = one_hot([1, 1, 1, 0, 1, 1, 0, 0], 2)
    assert metrics.classification(labels, probabilities, ["no", "yes"]) == pytest.approx(
        {
            "accuracy": 5 / 8,
            "f1/yes": 6 / 9,
            "macro_f1": (6 / 9 + 4 / 7) / 2,
            "mcc": (3 * 2 - 2 * 1) / math.sqrt(5 * 4 * 4 * 3),
            "calibration_error": 3 / 8,
        }
    )


def test_labels_that_do_not_occur_do_not_count():
    result = metrics.classification(np.array([0, 0, 2, 2]), one_hot([0, 2, 2, 2], 4), "abcd")
    assert result["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert not any(name.startswith("f1") for name in result)


def test_undefined_ratios_are_zero():
    result = metrics.classification(np.array([0, 0]), one_hot([0, 0], 2), "ab")
    assert result["f1/b"] == result["mcc"] == 0.0
    assert result["accuracy"] == result["macro_f1"] == 1.0


def test_nothing_right():
    result = metrics.classification(np.array([0, 0]), one_hot([1, 1], 2), "ab")
    assert result["accuracy"] == result["macro_f1"] == 0.0


def test_multilabel_by_hand():
    labels = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0]], np.float32)
    probabilities = np.array([[0.9, 0.1, 0.2], [0.6, 0.5, 0.3], [0.7, 0.2, 0.4]])
    assert metrics.multilabel(labels, probabilities) == pytest.approx(
        {"micro_f1": 4 / 6, "macro_f1": (4 / 5 + 0 + 0) / 3, "exact_match": 1 / 3}
    )
    lower = metrics.multilabel(labels, probabilities, threshold=0.45)
    assert lower["micro_f1"] == pytest.approx(6 / 7)


def test_regression_by_hand():
    result = metrics.regression(np.array([1, 2, 3, 4]), np.array([1, 2, 3, 10], np.float32))
    assert result["spearman"] == pytest.approx(1)
    assert (result["mse"], result["rmse"]) == pytest.approx((9, 3))
    # Deviations -1.5, -0.5, 0.5, 1.5 and -3, -2, -1, 6.
    assert result["pearson"] == pytest.approx(14 / math.sqrt(5 * 50))
    assert metrics.regression(np.array([1.0, 2.0]), np.array([5.0, 4.0]))[
        "spearman"
    ] == pytest.approx(-1)


@pytest.mark.parametrize("predictions", [[0.3, 0.3, 0.3], [1, 1, 1 + 1e-15]])
def test_constants_have_no_correlation_and_no_warning(predictions):
    result = metrics.regression(np.array([1.0, 2.0, 4.0]), np.array(predictions))
    assert math.isnan(result["pearson"]) == (len(set(predictions)) == 1)
    assert math.isfinite(result["mse"])
    assert math.isnan(metrics.regression(np.array([1.0]), np.array([2.0]))["pearson"])


def test_choice():
    scores = np.array([[0.1, 0.9, -np.inf], [2.0, 1.0, 0.0]])
    assert metrics.choice(np.array([1, 2]), scores) == {"accuracy": 0.5}


def test_embeddings_are_compared_by_their_cosine():
    first = np.array([[1, 0], [2, 0], [0, 3], [1, 1]], np.float32)
    second = np.array([[9, 0], [1, 1], [3, 0], [-1, -1]], np.float32)  # 1, 0.71, 0, -1
    result = metrics.embeddings(np.array([5.0, 4.0, 1.0, 2.0]), first, second)
    assert result["spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert metrics.embeddings(np.array([5, 4, 2, 1]), first, second)["spearman"] == 1.0
    zeros = metrics.embeddings(np.array([5, 4, 2, 1]), first * 0, second)
    assert math.isnan(zeros["spearman"])


def test_entities_by_hand():
    true = [["B-per", "I-per", "O", "B-loc"], ["B-loc"], []]
    predicted = [["B-per", "O", "O", "I-loc"], ["B-org"], []]  # only a loc has both its ends
    result = metrics.entities(true, predicted)
    assert [result[name] for name in ("precision", "recall", "f1")] == pytest.approx([1 / 3] * 3)
    assert result["precision/loc"] == 1.0
    assert result["recall/loc"] == 0.5
    assert result["f1/loc"] == pytest.approx(2 / 3)
    assert result["f1/per"] == result["f1/org"] == result["recall/org"] == 0.0


def test_entities_agree_with_published_code():
    # Ill-formed tags on both sides; the numbers are those of seqeval 1.2.2.
    rng = random.Random(0)
    types = ("person", "creative-work", "loc")
    tags = ["O", "O"] + [f"{prefix}-{type}" for prefix in "BI" for type in types]
    true = [[rng.choice(tags) for _ in range(rng.randint(0, 9))] for _ in range(300)]
    predicted = [[t if rng.random() < 0.7 else rng.choice(tags) for t in row] for row in true]
    result = metrics.entities(true, predicted)
    assert result["precision"] == pytest.approx(0.7386759581881533, rel=1e-12)
    assert result["recall"] == pytest.approx(0.7327188940092166, rel=1e-12)
    assert result["f1"] == pytest.approx(0.7356853672643147, rel=1e-12)


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        ("The Cat!", ["cat"], 1, 1),
        ("  an   old\tcat ", ["old cat"], 1, 1),
        ("anthem", ["them"], 0, 0),  # an article inside a word stays
        ("U.S.", ["us"], 1, 1),
        ("a big black cat", ["black cat", "dog"], 0, 4 / 5),
        ("cat cat", ["cat"], 0, 2 / 3),  # a word counts as often as it stands
        ("", ["cat"], 0, 0),
        ("the", ["cat"], 0, 0),
        ("", [], 1, 1),
        ("cat", [], 0, 0),
        ("the", ["an", "!"], 1, 1),  # nothing is left of any of them
        ("the", ["!", "cat"], 0, 0),
    ],
)
def test_squad_answers_by_hand(prediction, answers, exact, f1):
    result = metrics.squad({"q": prediction}, {"q": answers})
    assert result["exact_match"] == exact
    assert result["f1"] == pytest.approx(f1)


REFERENCES = {"a": ["cat"], "b": ["black dog"], "c": [], "d": []}
PREDICTIONS = {"a": "cat", "b": "dog", "c": "cow", "d": "pig"}


def test_squad_splits_by_whether_there_is_an_answer():
    result = metrics.squad(PREDICTIONS | {"d": ""}, REFERENCES)
    assert result == pytest.approx(
        {
            "exact_match": 2 / 4,
            "f1": (1 + 2 / 3 + 0 + 1) / 4,
            "has_answer_exact_match": 1 / 2,
            "has_answer_f1": (1 + 2 / 3) / 2,
            "no_answer_exact_match": 1 / 2,
            "no_answer_f1": 1 / 2,
        }
    )
    assert set(metrics.squad({"a": "cat"}, {"a": ["cat"]})) == {"exact_match", "f1"}


def test_squad_finds_the_best_threshold():
    null_scores = {"a": -3.0, "b": 1.0, "c": 2.0, "d": -1.0}
    result = metrics.squad(PREDICTIONS, REFERENCES, null_scores)
    # At 0, "b" and "c" are not answered; "d" is, wrongly.
    assert result["exact_match"] == 2 / 4
    assert result["no_answer_f1"] == 1 / 2
    assert result["best_exact_match"] == 3 / 4  # with "a" alone
    assert result["best_exact_match_threshold"] == -3.0
    assert result["best_f1"] == 3 / 4
    at_best = metrics.squad(PREDICTIONS, REFERENCES, null_scores, threshold=-3.0)
    assert at_best["exact_match"] == 3 / 4


def test_squad_thresholds_answer_equal_scores_together_or_none():
    null_scores = dict.fromkeys(REFERENCES, 0.5)
    result = metrics.squad({"a": "cat", "b": "x", "c": "x", "d": "x"}, REFERENCES, null_scores)
    assert result["best_f1"] == 2 / 4
    threshold = result["best_f1_threshold"]
    assert threshold < 0.5
    again = metrics.squad(PREDICTIONS, REFERENCES, null_scores, threshold=threshold)
    assert again["f1"] == 2 / 4


def test_the_best_threshold_keeps_its_promise():
    rng = np.random.default_rng(0)
    words = ["cat", "dog", "black cat", ""]
    for _ in range(20):
        keys = [str(i) for i in range(12)]
        references = {key: [w] if (w := str(rng.choice(words))) else [] for key in keys}
        predictions = {key: str(rng.choice(words)) for key in keys}
        null_scores = {key: float(rng.integers(-4, 4)) for key in keys}

        def f1(threshold, r=references, p=predictions, n=null_scores):
            return metrics.squad(p, r, n, threshold=threshold)["f1"]

        result = metrics.squad(predictions, references, null_scores)
        assert result["best_f1"] == pytest.approx(max(f1(t - 4.5) for t in range(9)))
        assert result["best_f1"] == pytest.approx(f1(result["best_f1_threshold"]))


def test_which_way_is_better():
    assert metrics.higher_is_better("accuracy")
    assert metrics.higher_is_better("f1/creative-work")
    assert not metrics.higher_is_better("mse")
    assert not metrics.higher_is_better("loss")
    for name in ("acuracy", "f1/", "best_f1_threshold", ""):
        with pytest.raises(InputError, match=f"no metric is called '{name}': it is one of acc"):
            metrics.higher_is_better(name)


def test_every_metric_can_be_monitored():
    found = metrics.classification(np.array([0, 1]), one_hot([0, 1], 2), "ab")
    found |= metrics.multilabel(np.array([[0, 1]]), np.array([[0.2, 0.7]]))
    found |= metrics.regression(np.array([1.0, 2.0]), np.array([1.0, 3.0]))
    found |= metrics.entities([["B-x"]], [["B-x"]])
    found |= metrics.squad(PREDICTIONS, REFERENCES, dict.fromkeys(REFERENCES, 0.0))
    for name, value in found.items():
        assert type(value) is float
        if not name.endswith("_threshold"):
            metrics.higher_is_better(name)


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        (
            lambda: metrics.classification(np.array([0]), one_hot([0, 1], 2), "ab"),
            "1 labels .* 2 pro",
        ),
        (lambda: metrics.classification(np.array([3]), one_hot([0], 2), "ab"), "from 3 to 3"),
        (lambda: metrics.classification(np.array([0]), one_hot([0], 3), "ab"), "num_labels=2"),
        (lambda: metrics.classification(np.array([0]), np.array([[np.nan, 1]]), "ab"), "diverged"),
        (lambda: metrics.classification(np.zeros(0, int), np.zeros((0, 2)), "ab"), "no examples"),
        (lambda: metrics.multilabel(np.ones((1, 3)), np.ones((1, 2))), "3 labels for each"),
        (lambda: metrics.regression(np.ones(2), np.ones(3)), "2 labels .* 3 predictions"),
        (lambda: metrics.choice(np.ones(2, int), np.ones((3, 2))), "2 labels .* 3 scores"),
        (lambda: metrics.entities([["O"]], []), "1 sentences"),
        (lambda: metrics.entities([["O"], ["O"]], [["O"], []]), "sentence 2 has 1 tags and 0"),
        (lambda: metrics.squad({}, {"q7": ["x"]}), "1 examples have no prediction.*'q7'"),
        (lambda: metrics.squad({"q": ""}, {"q": []}, {}), "no null score"),
        (lambda: metrics.squad({}, {}), "no examples"),
    ],
)
def test_bad_input_is_named(compute, message):
    with pytest.raises(InputError, match=message):
        compute()
