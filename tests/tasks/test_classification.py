"""Classes, labels and numbers."""

import json
from dataclasses import replace

import numpy as np
import pytest

from jaxlm.data.labelled import batches, batching
from jaxlm.data.labelled.classification import TextFields
from jaxlm.data.labelled.dataset import Splits
from jaxlm.errors import InputError
from jaxlm.runs import best, finetuned
from jaxlm.runs.folder import begun
from jaxlm.tasks.classification import Classification

FILLERS = ["", " a", " a b", " a b c", " a b c d e", " f", " f g", " b b", " e", " c c d"]


@pytest.mark.slow
def test_a_run_tells_two_words_apart(train, write, records, eval_metrics, monkeypatch):
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
    # Parts of a file of many texts have the same shapes, however long their own are.
    batchings = []
    monkeypatch.setattr(batches, "MANY", 2)
    monkeypatch.setattr(
        finetuned,
        "make_batching",
        lambda *a, **k: batchings.append(batching.make_batching(*a, **k)) or batchings[-1],
    )
    again = list(run.answer(records(*({"text": text} for text in asked)), chunk=18))
    assert [answer["label"] for answer in again] == [answer["label"] for answer in answers]
    assert len({one.buckets for one in batchings}) == 1 < len(batchings)


def test_labels_and_numbers(records):
    several = Classification(fields=TextFields(target="labels"))
    examples = several.read(records({"text": "a", "label": "x|y"}, {"text": "b", "label": "z"}))
    labels = several.labels(examples)
    outputs = {"probabilities": np.array([[0.9, 0.8, 0.1], [0.2, 0.6, 0.7]], np.float32)}
    answers = several.answers(examples, labels, outputs)
    assert [answer["labels"] for answer in answers] == [["x", "y"], ["y", "z"]]
    assert several.metrics(examples, labels, outputs)["exact_match"] == 0.5
    right, wrong = several.predictions(examples, labels, outputs)
    assert (right.right, right.gold, right.predicted) == (True, "x, y", "x, y")
    assert (wrong.right, wrong.gold, wrong.predicted) == (False, "z", "y, z")
    assert wrong.loss == pytest.approx(-np.log([0.8, 0.4, 0.7]).mean())
    assert wrong.probability == pytest.approx(0.8 * 0.6 * 0.7)

    number = Classification(fields=TextFields(pair="other", target="number"))
    examples = number.read(records(*({"text": "a", "other": "b", "label": x} for x in (1, 2, 4))))
    outputs = {"values": np.array([1, 3, 4], np.float32)}
    assert number.labels(examples) == ()
    assert number.answers(examples, (), outputs)[1] == {"text": "a", "pair": "b", "value": 3.0}
    assert number.metrics(examples, (), outputs)["mse"] == pytest.approx(1 / 3)
    found = number.predictions(examples, (), outputs)
    assert [(one.right, one.gold, one.predicted, one.loss) for one in found] == [
        (True, "1", "1", 0.0),
        (False, "2", "3", 1.0),
        (True, "4", "4", 0.0),
    ]


def test_numbers_are_learned_by_their_deviation_and_answered_in_their_unit(framer, records):
    prices = [90_000, 150_000, 250_000, 110_000]
    raw = Classification(fields=TextFields(target="number"))
    examples = raw.read(records(*({"text": "a", "label": price} for price in prices)))
    task = raw.settled(examples)
    assert task.scale == (np.mean(prices), np.std(prices))
    assert task.settled(examples[:2]) == task  # the scale that a run has stays
    learned = np.array([row["labels"] for row in task.encode(framer, examples, ()).rows])
    assert learned.dtype == np.float32
    assert (learned.mean(), learned.std()) == pytest.approx((0, 1), abs=1e-6)
    right = {"values": learned}
    assert [answer["value"] for answer in task.answers(examples, (), right)] == pytest.approx(
        prices
    )
    always = task.metrics(examples, (), {"values": np.array([1e-9, 0, 0, 0], np.float32)})
    assert always["rmse"] == pytest.approx(np.std(prices))
    assert task.reference(examples, examples).losses == {"always the mean": pytest.approx(1)}
    # Runs of before have no scale: their numbers are as they were.
    own = [row["labels"].item() for row in raw.encode(framer, examples, ()).rows]
    assert own == prices == [a["value"] for a in raw.answers(examples, (), {"values": prices})]
    constant = raw.settled(examples[:1])
    assert constant.scale == (90_000, 1)
    stamps = raw.read(records(*({"text": "a", "label": 1.7e9 + i} for i in range(3))))
    task = raw.settled(stamps)  # float32 has none of these differences
    values = {"values": [row["labels"] for row in task.encode(framer, stamps, ()).rows]}
    assert task.metrics(stamps, (), values)["rmse"] < 1e-3


def test_metrics_name_the_class_they_are_of(records):
    task = Classification()
    examples = task.read(records({"text": "a", "label": "ham"}, {"text": "b", "label": "spam"}))
    labels = task.labels(examples)
    outputs = {"probabilities": np.array([[0.1, 0.9], [0.2, 0.8]])}
    measured = task.metrics(examples, labels, outputs)
    assert measured["f1/spam"] == pytest.approx(2 / 3)
    assert tuple(measured) == task.metric_names(examples, labels)
    with pytest.raises(InputError, match=r"monitor=micro_f1 is not .*it is the accuracy\); there"):
        best.check_measured("micro_f1", measured)
    with pytest.raises(InputError, match=r"monitor=f1 is not measured here; .* f1/spam"):
        best.check_measured("f1", measured)


@pytest.mark.parametrize("target", ["class", "labels", "number"])
def test_baselines_are_measured_as_the_network_is(records, target):
    given = {"class": ("no", "yes"), "labels": ("no", "no|yes"), "number": (100, 300)}[target]
    fields = [{"text": f"{'fgh'[i % 3]} a", "label": given[i % 3 == 2]} for i in range(30)]
    task = Classification(fields=TextFields(target=target))
    examples = task.read(records(*fields))
    task, labels = task.settled(examples), task.labels(examples)
    dull, linear = task.baselines(examples, examples[:6], labels).values()
    name, values = {
        "class": ("accuracy", [2 / 3, 1]),
        "labels": ("exact_match", [2 / 3, 1]),
        "number": ("rmse", [np.std([100, 100, 300]), 0]),
    }[target]
    assert [dull[name], linear[name]] == pytest.approx(values, abs=15 * (target == "number"))
    assert linear[name] != dull[name]


@pytest.mark.slow
def test_a_run_learns_prices(train, write, records):
    """From the middle of their range, not from 0: untrained it is no worse than their mean."""
    rows = [
        {"text": f"{word}{filler} {end}", "label": 90_000 + 80_000 * i + 1000 * j}
        for i, word in enumerate("fgh")
        for j, filler in enumerate(FILLERS)
        for end in ("x", "y", "z")
    ]
    task = Classification(fields=TextFields(target="number"), pooling="mean")
    run = train(task, write(rows))
    assert run.task.scale[1] == pytest.approx(np.std([row["label"] for row in rows]), rel=0.1)
    values = [a["value"] for a in run.answer(records({"text": "f a b x"}, {"text": "h a b x"}))]
    assert values == pytest.approx([92_000, 252_000], rel=0.1)
    others = task.read(records({"text": "a", "label": 1}, {"text": "b", "label": 2}))
    others = Splits(others, [], 0, "")
    again = replace(run.config, task=task)
    there = begun(again)
    assert finetuned.settled(again, others, there).task.scale == run.task.scale
    fresh = replace(again, name="fresh")
    assert finetuned.settled(fresh, others).task.scale == (1.5, 0.5)


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
    for target, scale in (("class", (0.0, 1.0)), ("number", (0.0, 0.0)), ("number", (1e999, 1.0))):
        with pytest.raises(InputError, match="is not a mean and a deviation above 0 of numbers"):
            Classification(fields=TextFields(target=target), scale=scale)
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


@pytest.mark.parametrize(("class_weights", "is_found"), [((), False), (("balanced",), True)])
def test_a_rare_class_is_found_with_weights(train, write, records, class_weights, is_found):
    """It has one in five of the texts with a word that no others have."""
    rows = [
        {"text": f"{word}{filler} {end}", "label": "rare" if rare else "usual"}
        for word in ("good", "bad")
        for i, filler in enumerate(FILLERS)
        for j, end in enumerate("xyz")
        for rare in (word == "good" and (3 * i + j) % 5 == 0,)
    ]
    run = train(Classification(class_weights=class_weights, pooling="mean"), write(rows))
    answers = run.answer(records(*({"text": row["text"]} for row in rows)))
    found = [answer["label"] == "rare" for answer in answers]
    recall = np.mean([hit for hit, row in zip(found, rows, strict=True) if row["label"] == "rare"])
    assert (recall > 0.8) if is_found else (recall == 0)
    assert not any(found[30:])


def test_a_threshold_for_each_label(records):
    task = Classification(fields=TextFields(target="labels"), thresholds=("x=0.95", "z=0.05"))
    examples = task.read(records({"text": "a", "label": "x|y"}, {"text": "b", "label": "z"}))
    labels = task.labels(examples)
    outputs = {"probabilities": np.array([[0.9, 0.8, 0.1], [0.2, 0.6, 0.7]], np.float32)}
    answers = task.answers(examples, labels, outputs)
    assert [answer["labels"] for answer in answers] == [["y", "z"], ["y", "z"]]
    assert task.metrics(examples, labels, outputs)["micro_f1"] == pytest.approx(4 / 7)


@pytest.mark.slow
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
    assert kept["steps"] == list(run.averaged)
    kept = kept["thresholds"]
    assert run.task.thresholds == tuple(f"{name}={kept[name]!r}" for name in ("odd", "up"))
    answers = list(run.answer(records({"text": "good a x"}, {"text": "bad b y"})))
    for answer in answers:
        above = [name for name, value in answer["probabilities"].items() if value > kept[name]]
        assert answer["labels"] == above
