"""Classes, labels and numbers."""

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
    with pytest.raises(InputError, match=r"task\.fields\.separator is empty"):
        TextFields(target="labels", separator="")
