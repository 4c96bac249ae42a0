"""A tag for each word."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxlm.data.labelled.records import Conll
from jaxlm.errors import InputError
from jaxlm.runs import finetuned
from jaxlm.tasks.tagging import Tagging

TAGS = {"john": "B-per", "smith": "I-per", "york": "B-loc"}


@pytest.mark.slow
def test_a_run_learns_whose_tag_a_word_has(train, write, rng, records, eval_metrics, capsys):
    words = [*"abcd", *TAGS]
    sentences = [rng.choice(words, rng.integers(2, 9)).tolist() for _ in range(64)]
    rows = [{"tokens": own, "tags": [TAGS.get(word, "O") for word in own]} for own in sentences]
    run = train(Tagging(doc_stride=6), write(rows), pack=True)
    assert run.labels == ("B-loc", "B-per", "I-loc", "I-per", "O")
    assert eval_metrics()["f1"] == 1.0
    asked = [sentence for sentence in sentences[:20] if len(sentence) > 2]
    answers = list(run.answer(records(*({"tokens": own} for own in asked))))
    for sentence, answer in zip(asked, answers, strict=True):
        assert answer["text"] == " ".join(sentence)
        assert answer["tags"] == [TAGS.get(word, "O") for word in sentence]
        for entity in answer["entities"]:
            assert answer["text"][entity["start"] : entity["end"]] == entity["text"]
    assert run.task.split == "punctuation"  # found out and kept with the run
    text = "a  John\tSmith, b york."
    (answer,) = run.answer(records({"tokens": text}))
    assert answer["text"] == text
    assert answer["words"] == ["a", "John", "Smith", ",", "b", "york", "."]
    assert answer["tags"] == ["O", "B-per", "I-per", "O", "O", "B-loc", "O"]
    assert [(found["text"], found["start"]) for found in answer["entities"]] == [
        ("John\tSmith", 3),
        ("york", 17),
    ]
    document = rng.choice(words, 3000).tolist()
    _check_document(run, records, document, capsys)


def _check_document(run, records, words, capsys):
    """All of it is learnt, measured and tagged, in windows of 14 tokens that share 6.

    And the same where windows share rows and where they do not.
    """
    tags = [TAGS.get(word, "O") for word in words]
    (new,) = run.task.read(records({"tokens": words, "tags": tags}))
    capsys.readouterr()
    sums, outputs = run.outputs([new])
    assert sums.weight == 3000  # each word once
    assert run.task.metrics([new], run.labels, outputs)["f1"] == 1.0
    said = "note: 1 document is longer than a row, and read in 375 overlapping windows\n"
    assert len(outputs["words"]) == 375 == 1 + np.ceil((3000 - 14) / (14 - 6))
    assert capsys.readouterr().err == said
    apart = replace(run, config=replace(run.config, data=replace(run.config.data, pack=False)))
    others, outputs_apart = apart.outputs([new])
    assert float(sums.totals["loss"]) == pytest.approx(float(others.totals["loss"]), rel=1e-4)
    for name in ("words", "probabilities"):
        for own, other in zip(outputs[name], outputs_apart[name], strict=True):
            np.testing.assert_allclose(own, other[: len(own)], atol=1e-4)
    assert capsys.readouterr().err == said
    long, short = run.answer(records({"tokens": words}, {"tokens": ["john", "a"]}), chunk=1)
    assert (long["tags"], short["tags"]) == (tags, ["B-per", "O"])
    assert capsys.readouterr().err == said
    examples = run.task.encode(finetuned.make_framer(run.config, run.tokenizer), [new], run.labels)
    learnt = np.concatenate([row["words"][row["weights"] > 0] for row in examples.rows])
    assert sorted(learnt.tolist()) == list(range(1, 3001))


def outputs_of(rows, probabilities):
    names = ("words", "sentence")
    return {name: [row[name] for row in rows] for name in names} | {"probabilities": probabilities}


def test_every_word_of_a_long_sentence_has_a_tag(framer, records):
    task, labels = Tagging(), ("B-x", "I-x", "O")
    words = [["aing", "b"], [*"abcdefgh", "john", "\u200d", "in", "new"]]  # room for 10 tokens
    examples = task.read(records(*({"tokens": own} for own in words)), labelled=False)
    rows = task.encode(framer, examples, labels).rows
    assert [row["words"].tolist() for row in rows] == [
        [0, 1, 0, 2, 0],
        [0, *range(1, 10), 0, 0],
        [0, 0, 11, 12, 0],
    ]
    probabilities = []
    for row in rows:  # lists, because rows differ in length
        likely = np.full((len(row["tokens"]), 3), 0.1, np.float32)
        likely[np.arange(len(likely)), np.where(row["words"] > 0, 0, 1)] = 0.8
        probabilities.append(likely)
    short, long = task.answers(examples, labels, outputs_of(rows, probabilities))
    assert short["tags"] == ["B-x", "B-x"]
    assert long["tags"] == ["B-x"] * 9 + ["O"] + ["B-x"] * 2
    assert [entity["text"] for entity in long["entities"]] == words[1][:9] + words[1][10:]


def test_the_first_tag_that_marks_no_entity_is_named(tmp_path):
    path = tmp_path / "bad.conll"
    path.write_text("Ada\tB-PER\n\nBo\tO\nBob\tPER\nwent\tO\n\nBob\tB-\nBo\tPER\n")
    examples = Tagging().read(Conll(path=str(path)).records())
    message = r"bad.conll:3: tag 'PER' is neither .*, at word 2 .*'Bob'; there are 'PER' \(2\), "
    with pytest.raises(InputError, match=message):
        Tagging().check(examples)
    assert Tagging().check(examples[:1]) == []


def test_tags_that_mark_no_entities(framer, records):
    task = Tagging(entities=False)
    examples = task.read(records({"tokens": ["a", *"bcdefghabcd"], "tags": ["DT", *["NN"] * 11]}))
    labels = task.labels(examples)
    assert (labels, task.monitor) == (("DT", "NN"), "accuracy")
    with pytest.raises(InputError, match=r"'DT' is neither O .* give --task.no-entities"):
        Tagging().check(examples)
    rows = task.encode(framer, examples, labels).rows  # of 12 words, in two windows
    probabilities = []
    for row in rows:
        probabilities.append(np.full((len(row["words"]), 2), 0.5, np.float32))
        probabilities[-1][:, 0] = np.where(row["words"] == 1, 0.9, 0.1)
        probabilities[-1][row["words"] == 2, 0] = 0.9  # the second word is wrong
    outputs = outputs_of(rows, probabilities)
    assert task.metrics(examples, labels, outputs) == {"accuracy": 11 / 12}
    (worst,) = task.predictions(examples, labels, outputs)
    assert worst.text.startswith("b: a b c")
    (answer,) = task.answers(examples, labels, outputs)
    assert answer.keys() == {"text", "tags"}


def guessed(framer, task, examples, labels, guesses, sure=0.6):
    """As if the model gave ``sure`` to each of these tags, and the rest to the others alike."""
    rows, probabilities = task.encode(framer, examples, labels).rows, []
    for row, tags in zip(rows, guesses, strict=True):
        rest = (1 - sure) / (len(labels) - 1)
        likely = np.full((len(row["words"]), len(labels)), rest, np.float32)
        for place in np.flatnonzero(row["words"]):
            likely[place, labels.index(tags[row["words"][place] - 1])] = sure
        probabilities.append(likely)
    return outputs_of(rows, probabilities)


def test_the_wrong_ones_are_those_of_the_metric(framer, records):
    task, labels = Tagging(), ("B-x", "I-x", "O")
    gold = ["B-x", "I-x", "O", "O"]
    examples = task.read(records(*[{"tokens": [*"abcd"], "tags": gold}] * 3))
    guesses = [gold, ["I-x", "I-x", "O", "O"], ["B-x", "O", "O", "O"]]
    outputs = guessed(framer, task, examples, labels, guesses)
    assert task.metrics(examples[:2], labels, {k: v[:2] for k, v in outputs.items()})["f1"] == 1
    (wrong,) = task.predictions(examples, labels, outputs)  # I- for the B- of a first word is none
    assert (wrong.origin, wrong.gold, wrong.predicted) == ("x.jsonl:3", "I-x", "O")
    assert wrong.loss == pytest.approx(-np.log(0.2))  # the tag's own, not 1 - 0.6
    assert not wrong.right
    each = Tagging(entities=False).predictions(examples, labels, outputs)
    assert [p.origin for p in each] == ["x.jsonl:2", "x.jsonl:3"]  # by accuracy of words, both


def test_the_baseline_is_each_word_s_most_frequent_tag(records):
    task = Tagging(entities=False)
    train = task.read(
        records(*({"tokens": ["a", "b", "b"], "tags": ["X", *tags]} for tags in ("YY", "YX", "YY")))
    )
    new = task.read(records({"tokens": ["a", "b", "c"], "tags": ["X", "Y", "Y"]}))
    (measured,) = task.baselines(train, new, ("X", "Y")).values()
    assert measured == {"accuracy": 1.0}  # c is unknown, and Y the commonest


def test_bad_input(framer, records):
    task = Tagging()
    with pytest.raises(InputError, match=r"x\.jsonl:1: 1 tags for 2 words"):
        task.read(records({"tokens": ["a", "b"], "tags": ["O"]}))
    examples = task.read(records({"tokens": ["a"], "tags": ["B-x"]}))
    with pytest.raises(InputError, match=r"x\.jsonl:1: label 'B-x' is not among"):
        task.encode(framer, examples, ("B-y", "I-y", "O"))
    with pytest.raises(InputError, match=r"task\.doc_stride=-1 is below 0"):
        Tagging(doc_stride=-1)
    with pytest.raises(InputError, match="there are no labels"):
        task.labels(task.read(records({"tokens": ["a"]}), labelled=False))


def test_predict_reads_words_without_tags_and_knows_a_closed_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # or the process would start anew
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    predict = importlib.import_module("predict")

    def read(train, path):
        return predict.read_records(train, ("B-x", "O"), Tagging().text_fields, path)

    train = Conll(path="train.words")
    words = [["john"], ["a", "b"]]
    for name, text in (
        ("a.words", "john\n\na\nb\n"),
        ("a.conll", "john O\n\na O\nb O\n"),
        ("a.csv", "tokens\njohn\na b\n"),
        ("a.txt", "john\na b\n"),
    ):
        (tmp_path / name).write_text(text)
        records = read(train, tmp_path / name)
        assert [record.texts("tokens") for record in records] == words
    train = Conll(path="train.txt")
    for text, expected in (
        ("-DOCSTART- -X-\n\njohn O\n\na O\nb O\n", words),
        ("john\n\na\nb\n", words),
        ("john lives\nmary works\n", [["john", "lives"], ["mary", "works"]]),
    ):
        (tmp_path / "a.txt").write_text(text)
        records = read(train, tmp_path / "a.txt")
        assert [record.texts("tokens") for record in records] == expected
    (tmp_path / "a.txt").write_text("{x y")
    with pytest.raises(InputError, match=r"a.txt:1: not JSON .* begins with { goes into an object"):
        [record.texts("tokens") for record in read(train, tmp_path / "a.txt")]
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="the standard input is closed"):
        list(read(train, Path("-")))
