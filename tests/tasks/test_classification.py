"""Classes, labels and numbers."""

import json

import numpy as np
import pytest

from jaxlm.data.labelled.classification import TextFields
from jaxlm.errors import InputError
from jaxlm.tasks.classification import Classification

FILLERS = ["", " a", " a b", " a b c", " a b c d e", " f", " f g", " b b", " e", " c c d"]


def test_a_run_tells_two_words_apart(train, write, records, eval_metrics):
    rows = [
        {"text": f"{word}{filler} {end}", "label": label}
        for word, label in (("good", "up"), ("bad", "down"))
        for filler in FILLERS
        for end in ("x", "y", "z")
    ]
    run = train(Classification(pooling="mean"), write(rows))
    assert run.labels == ("down", "up")
    assert eval_metrics()["accuracy"] == 1.0
    # More than one batch, of texts that batches sort by length: answers come in the order asked.
    asked = [f"{('good', 'bad')[i % 3 % 2]}{FILLERS[i % 10]} x" for i in range(20)]
    answers = list(run.answer(records(*({"text": text} for text in asked)), chunk=18))
    assert [answer["text"] for answer in answers] == asked
    assert [answer["label"] for answer in answers] == [
        "up" if text.startswith("good") else "down" for text in asked
    ]
    for answer in answers:
        assert answer["probability"] == max(answer["probabilities"].values()) > 0.5
        assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-5)


def test_labels_and_numbers(records):
    several = Classification(fields=TextFields(target="labels"))
    examples = several.read(records({"text": "a", "label": "x|y"}, {"text": "b", "label": "z"}))
    labels = several.labels(examples)
    outputs = {"probabilities": np.array([[0.9, 0.8, 0.1], [0.2, 0.6, 0.7]], np.float32)}
    answers = several.answers(examples, labels, outputs)
    assert [answer["labels"] for answer in answers] == [["x", "y"], ["y", "z"]]
    assert several.metrics(examples, labels, outputs)["exact_match"] == 0.5

    number = Classification(fields=TextFields(pair="other", target="number"))
    examples = number.read(records(*({"text": "a", "other": "b", "label": x} for x in (1, 2, 4))))
    outputs = {"values": np.array([1, 3, 4], np.float32)}
    assert number.labels(examples) == ()
    assert number.answers(examples, (), outputs)[1] == {"text": "a", "pair": "b", "value": 3.0}
    assert number.metrics(examples, (), outputs)["mse"] == pytest.approx(1 / 3)


def test_bad_input(framer, records):
    task = Classification()
    examples = task.read(records({"text": "a", "label": "x"}, {"text": "b", "label": "y"}))
    with pytest.raises(InputError, match=r"x\.jsonl:1: label 'x' is not among .* \(y, z\)"):
        task.encode(framer, examples, ("y", "z"))
    with pytest.raises(InputError, match="the only label is 'x'"):
        task.labels(examples[:1])
    with pytest.raises(InputError, match=r"x\.jsonl:1: no field 'text' among 'txt'"):
        task.read(records({"txt": "a", "label": "x"}))
    with pytest.raises(InputError, match=r"label_smoothing=0\.1.*are for classes"):
        Classification(fields=TextFields(target="number"), label_smoothing=0.1)
    with pytest.raises(InputError, match=r"task\.class_weights: 'x=-1' is no label and its number"):
        Classification(class_weights=("x=-1",))
    with pytest.raises(InputError, match=r"task\.thresholds=.* is for fields\.target=labels"):
        Classification(thresholds=("chosen",))
    with pytest.raises(InputError, match=r"task\.class_weights: 'z' is none of the labels x, y"):
        Classification(class_weights=("z=2",)).labels(examples)
    with pytest.raises(InputError, match=r"task\.fields\.separator is empty"):
        TextFields(target="labels", separator="")


@pytest.mark.parametrize(
    ("class_weights", "expected"),
    [
        ((), [1, 1, 1, 1]),
        (("balanced",), [4 / 6, 4 / 6, 4 / 6, 2]),
        (("y=5",), [1, 1, 1, 5]),
    ],
)
def test_classes_weigh_in_training_alone(framer, records, class_weights, expected):
    task = Classification(class_weights=class_weights)
    examples = task.read(records(*({"text": "a", "label": label} for label in "xxxy")))
    labels = task.labels(examples)
    for used, weights in ((task, expected), (task.for_evaluation(), [1, 1, 1, 1])):
        rows = used.encode(framer, examples, labels).rows
        assert [float(row["weights"]) for row in rows] == pytest.approx(weights)
        assert {row["weights"].dtype for row in rows} == {np.dtype(np.float32)}


def test_a_threshold_for_each_label(records):
    task = Classification(fields=TextFields(target="labels"), thresholds=("x=0.95", "z=0.05"))
    examples = task.read(records({"text": "a", "label": "x|y"}, {"text": "b", "label": "z"}))
    labels = task.labels(examples)
    outputs = {"probabilities": np.array([[0.9, 0.8, 0.1], [0.2, 0.6, 0.7]], np.float32)}
    answers = task.answers(examples, labels, outputs)
    assert [answer["labels"] for answer in answers] == [["y", "z"], ["y", "z"]]
    assert task.metrics(examples, labels, outputs)["micro_f1"] == pytest.approx(4 / 7)


def test_chosen_thresholds_are_kept_with_the_run(train, write, records, tmp_path):
    rows = [
        {"text": f"{word}{filler} {end}", "up": int(word == "good"), "odd": int(end == "x")}
        for word in ("good", "bad")
        for filler in FILLERS
        for end in ("x", "y", "z")
    ]
    fields = TextFields(target="labels", label="up,odd")
    run = train(Classification(fields=fields, thresholds=("chosen",), pooling="mean"), write(rows))
    assert run.labels == ("odd", "up")
    kept = json.loads((run.config.directory / "thresholds.json").read_text())
    assert run.task.thresholds == tuple(f"{name}={kept[name]!r}" for name in ("odd", "up"))
    answers = list(run.answer(records({"text": "good a x"}, {"text": "bad b y"})))
    for answer in answers:
        above = [name for name, value in answer["probabilities"].items() if value > kept[name]]
        assert answer["labels"] == above
