"""Answers in the windows of contexts."""

import json
from dataclasses import replace

import numpy as np
import pytest

from jaxlm.data import tokenizers
from jaxlm.data.labelled.framing import Framer
from jaxlm.data.labelled.question_answering import SpanFields
from jaxlm.data.labelled.records import Squad
from jaxlm.errors import InputError
from jaxlm.runs.finetuned import open_finetuned
from jaxlm.runs.finetuning import finetune
from jaxlm.tasks.question_answering import QuestionAnswering

CONTEXT = "a b c d e f g h john smith lives in new york . a b"  # of which a window holds 7


def asked(answer: str | None = None, context: str = CONTEXT, name: str = "q") -> dict:
    found = [] if answer is None else [answer]
    return {
        "id": name,
        "question": "who ?",
        "context": context,
        "answers/text": found,
        "answers/answer_start": [context.index(text) for text in found],
    }


def outputs_for(framer, task, examples, spans):
    """As if the model were sure of ``spans``, or of no answer, in windows of all lengths."""
    outputs = {}
    for row in task.encode(framer, examples, ()).rows:
        logits = np.zeros((2, len(row["tokens"])), np.float32)
        logits[:, ~row["allowed"]] = -1e9
        span = spans[int(row["question"])]
        inside = span is not None and {span[0], span[1]} <= set(row["offsets"].flat)
        if inside:
            logits[0, row["offsets"][0] == span[0]] = 9
            logits[1, row["offsets"][1] == span[1]] = 9
        else:
            logits[:, 0] = 9
        found = {"start_logits": logits[0], "end_logits": logits[1]}
        found |= {name: row[name] for name in ("question", "offsets", "allowed")}
        for name, value in found.items():
            outputs.setdefault(name, []).append(value)
    return outputs


def test_answers_of_windows_are_those_characters_of_the_context(framer, records):
    task = QuestionAnswering(doc_stride=3)
    other = "h g f e d c b a g f e york in d c b a"
    examples = task.read(records(asked("john smith"), asked(None), asked("york in", other)))
    spans = [(16, 26), None, (22, 29)]
    outputs = outputs_for(framer, task, examples, spans)
    assert np.bincount(outputs["question"]).tolist() == [4, 4, 4]
    john, none, york = task.answers(examples, (), outputs)
    assert (john["answer"], john["start"], john["end"]) == ("john smith", 16, 26)
    assert (york["answer"], york["start"], york["end"]) == ("york in", 22, 29)
    assert none["answer"] is none["start"] is none["end"] is None
    assert john["probability"] > 0.9
    assert none["probability"] > 0.9
    assert task.metrics(examples, (), outputs)["exact_match"] == 1.0
    assert all(p.right for p in task.predictions(examples, (), outputs))

    # A window of another question would give another answer, so the numbers are not idle.
    outputs["question"] = [2 - number for number in outputs["question"]]
    assert task.metrics(examples, (), outputs)["exact_match"] < 1.0


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_answers_of_any_tokenizer_of_ours_are_words_of_the_context(kind, records):
    own = Framer(tokenizers.train(kind, [CONTEXT] * 20, 300), max_length=64)
    task = QuestionAnswering()
    examples = task.read(records(asked("john smith")))
    (row,) = task.encode(own, examples, ()).rows
    logits = np.zeros((2, len(row["tokens"])), np.float32)
    logits[0, row["starts"]] = logits[1, row["ends"]] = 9
    outputs = {"start_logits": [logits[0]], "end_logits": [logits[1]]}
    outputs |= {name: [row[name]] for name in ("question", "offsets", "allowed")}
    (answer,) = task.answers(examples, (), outputs)
    assert (answer["answer"], answer["start"], answer["end"]) == ("john smith", 16, 26)


def test_the_wrong_ones_are_those_of_the_metric(framer, records):
    """What counts as an exact match is right, however it is written; so is no answer for none."""
    task = QuestionAnswering(doc_stride=3)
    articles = "the a b c john . d"
    examples = task.read(
        records(asked("a b", articles), asked("john", articles), asked(None), asked("in"))
    )
    outputs = outputs_for(framer, task, examples, [(0, 7), (10, 16), (16, 26), None])
    found = task.predictions(examples, (), outputs)
    assert [(p.predicted, p.gold) for p in found[:2]] == [("the a b", "a b"), ("john .", "john")]
    assert [p.right for p in found] == [True, True, False, False]
    assert task.metrics(examples, (), outputs)["exact_match"] == np.mean([p.right for p in found])
    assert found[0].loss < 0.1 < 1 < found[2].loss


def test_the_threshold_decides_whether_there_is_an_answer(framer, records):
    examples = QuestionAnswering().read(records(asked("john smith")))
    answers = {}
    for threshold in (0.0, 100.0, None):
        task = QuestionAnswering(doc_stride=3, null_threshold=threshold)
        outputs = outputs_for(framer, task, examples, [None])
        (answer,) = task.answers(examples, (), outputs)
        answers[threshold] = answer["answer"]
        assert ("best_f1" in task.metrics(examples, (), outputs)) == (threshold is not None)
    assert answers[0.0] is None
    assert answers[100.0] == answers[None] is not None


def test_the_baseline_never_answers(records):
    task = QuestionAnswering()
    examples = task.read(records(asked("john"), asked(None)))
    assert task.baselines(examples, examples, ())["never an answer"]["exact_match"] == 0.5
    assert task.baselines(examples, examples[:1], ()) == {}


def test_questions_of_one_id_are_two(framer, records):
    task = QuestionAnswering(doc_stride=3)
    examples = task.read(records(asked("john"), asked(None)))
    outputs = outputs_for(framer, task, examples, [(16, 20), (16, 20)])
    assert task.metrics(examples, (), outputs)["exact_match"] == 0.5


def test_a_run_answers_in_order(train, tmp_path, rng, records, eval_metrics):
    questions = []
    for i in range(40):
        words = rng.choice([*"abcdefgh"], 24).tolist()
        words[rng.integers(24)] = "john"
        context = " ".join(words)
        found = [] if i % 4 == 0 else [{"text": "john", "answer_start": context.index("john")}]
        qas = [{"id": f"q{i}", "question": f"who {i} ?", "answers": found}]
        questions.append({"context": context, "qas": qas})
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": [{"paragraphs": questions}]}))
    run = train(QuestionAnswering(doc_stride=4, null_threshold=None), Squad(path=str(path)), 24)
    metrics = eval_metrics()
    assert metrics["has_answer_exact_match"] > 0.9
    assert metrics["no_answer_exact_match"] == 0
    given = records(
        *({"question": q["qas"][0]["question"], "context": q["context"]} for q in questions)
    )
    answers = list(run.answer(given, chunk=30))
    assert [answer["question"] for answer in answers] == [f"who {i} ?" for i in range(40)]
    for question, answer in zip(questions, answers, strict=True):
        assert question["context"][answer["start"] : answer["end"]] == answer["answer"]
    assert np.mean([answer["answer"] == "john" for answer in answers]) > 0.9


def test_answers_that_are_longer_than_any_prediction_are_counted(framer, records):
    task = QuestionAnswering(doc_stride=3, max_answer_length=2)
    examples = task.read(records(asked("john smith"), asked("new york ."), asked()))
    (note,) = task.encode(framer, examples, ()).notes
    assert "answers to 1 questions have more tokens than task.max_answer_length=2" in note


def test_a_question_without_room_is_left_out_of_training_too(tiny, write, capfd):
    rows = [asked("john", f"{CONTEXT} {i}", f"q{i}") for i in range(16)]
    rows[3] |= {"question": "who " * 16}
    config = tiny(QuestionAnswering(doc_stride=3), write(rows), 16)
    config = replace(config, train=replace(config.train, steps=1))
    with pytest.raises(InputError, match=r"data\.jsonl:4: question q3 .*1 of .*--data.on-bad-row"):
        finetune(config)
    config = replace(config, data=replace(config.data, on_bad_row="skip"))
    loaded = open_finetuned(finetune(config))
    said = capfd.readouterr()
    assert "records cannot be used, and are left out: " in said.out + said.err
    assert loaded.config.data.on_bad_row == "skip"


def test_bad_input(framer, records):
    with pytest.raises(InputError, match=r"task\.fields\.answers is None"):
        QuestionAnswering(fields=SpanFields(answers=None))
    with pytest.raises(InputError, match=r"task\.num_best=0 is not above 0"):
        QuestionAnswering(num_best=0)
    with pytest.raises(InputError, match=r"task\.doc_stride=-1 is below 0"):
        QuestionAnswering(doc_stride=-1)
    task = QuestionAnswering(doc_stride=7)
    with pytest.raises(
        InputError, match=r"share doc_stride=7: .*, train with task\.doc_stride below \d"
    ):
        task.encode(framer, task.read(records(asked())), ())
    full, long = Framer(framer._tokenizer, 12, most=12), asked() | {"question": "a " * 12}
    with pytest.raises(InputError, match=r"shorten the question \(the model reads 12 at most"):
        task.encode(full, task.read(records(long)), ())
    with pytest.raises(InputError, match="the answer 'john' to question q is not at character 0"):
        task.read(records(asked("john") | {"answers/answer_start": [0]}))
