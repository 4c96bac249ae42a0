"""One of several texts."""

from types import SimpleNamespace

import numpy as np
import pytest

from jaxlm.data.labelled.multiple_choice import ChoiceFields
from jaxlm.errors import InputError
from jaxlm.runs.finetuned import FinetunedRun
from jaxlm.tasks.multiple_choice import MultipleChoice


@pytest.mark.slow
def test_a_run_finds_the_right_choice(train, write, rng, records, eval_metrics):
    rows = []
    for _ in range(64):
        words = rng.choice([*"abcdefgh"], (4, 3)).tolist()
        label = int(rng.integers(3))
        words[label][1] = "right"
        *choices, context = (" ".join(own[: rng.integers(2, 4)]) for own in words)
        rows.append({"context": context, "choices": choices, "label": label})
    run = train(MultipleChoice(), write(rows))
    assert eval_metrics()["accuracy"] == 1.0
    given = records(*({k: row[k] for k in ("context", "choices")} for row in rows[:20]))
    for row, answer in zip(rows, run.answer(given), strict=False):
        assert answer["context"] == row["context"]
        assert answer["number"] == row["label"]
        assert answer["choice"] == row["choices"][row["label"]]
        assert answer["probability"] == max(answer["probabilities"])
        assert sum(answer["probabilities"]) == pytest.approx(1, abs=1e-5)
    numbers = [3, 2, 3, 4]  # of choices
    texts = [["a", "a right", "b b", "c"][:n] for n in numbers]
    mixed = run.answer(records(*({"context": "a", "choices": own} for own in texts)))
    assert [len(answer["probabilities"]) for answer in mixed] == numbers
    assert {answer["choice"] for answer in mixed} == {"a right"}


def test_records_with_other_numbers_of_choices_are_answered_in_their_order(records):
    """As many at a time as have equally many, which is what a batch can hold."""

    def outputs(examples, labelled, report):
        (count,) = {len(example.choices) for example in examples}
        report(0, len(examples), 8, (0, 0))
        return None, {"probabilities": np.eye(count, dtype=np.float32)[[-1] * len(examples)]}

    run = SimpleNamespace(task=MultipleChoice(), labels=(), outputs=outputs)
    texts = ["xyz", "xy", "pqr", "x", "abcd", "uv"]
    given = records(*({"context": "c", "choices": list(text)} for text in texts))
    found = [answer for _, answer in FinetunedRun.stream(run, given)]
    assert [answer.get("choice") for answer in found] == ["z", "y", "r", None, "d", "v"]
    assert found[3]["error"].startswith("x.jsonl:4: 1 choices where 2 are expected")


def test_metrics_and_predictions(records):
    task = MultipleChoice(fields=ChoiceFields(question="question", choices=("one", "two")))
    row = {"context": "c", "question": "q", "one": "x", "two": "y"}
    examples = task.read(records(row | {"label": "A"}, row | {"label": 1}))
    probabilities = np.array([[0.75, 0.25], [0.75, 0.25]], np.float32)
    outputs = {"probabilities": probabilities, "logits": np.log(probabilities)}
    assert task.classes(examples) == ["0", "1"]
    assert task.metrics(examples, (), outputs) == {"accuracy": 0.5}
    assert task.baselines(examples[1:], examples, ()) == {"always choice 1": {"accuracy": 0.5}}
    right, wrong = task.predictions(examples, (), outputs)
    assert (right.right, wrong.right) == (True, False)
    assert right.gold == right.predicted == wrong.predicted == "x"
    assert (wrong.text, wrong.gold, wrong.loss) == ("c q", "y", pytest.approx(np.log(4)))
    assert [one["choice"] for one in task.answers(examples, (), outputs)] == ["x", "x"]


def test_bad_input(records):
    with pytest.raises(InputError, match=r"task\.fields\.label is None"):
        MultipleChoice(fields=ChoiceFields(label=None))
    task, row = MultipleChoice(), {"context": "c", "choices": ["x", "y"], "label": 2}
    with pytest.raises(InputError, match=r"x\.jsonl:1: label is '2', which is none of the 2"):
        task.read(records(row))
    with pytest.raises(InputError, match=r"x\.jsonl:2: 1 choices where 2 are expected"):
        task.read(records(row | {"label": 0}, row | {"choices": ["x"]}))
