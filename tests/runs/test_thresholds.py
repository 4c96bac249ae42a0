"""Thresholds that a run keeps belong to the checkpoints that they were chosen for."""

import json

import pytest

from jaxlm.data.labelled.classification import TextFields
from jaxlm.errors import InputError
from jaxlm.runs import thresholds
from jaxlm.tasks.classification import Classification

TASK = Classification(fields=TextFields(target="labels"), thresholds=("chosen",))
LABELS = ("a", "thresholds")


def of(task: Classification) -> list[float]:
    return task.thresholds_of(LABELS).tolist()


def test_they_are_those_of_the_same_checkpoints_alone(tmp_path, capsys):
    assert of(thresholds.read(TASK, tmp_path, [20])) == [0.5, 0.5]
    thresholds.write(tmp_path, [10, 20], {"a": 0.3, "thresholds": 0.9})
    assert of(thresholds.read(TASK, tmp_path, [10, 20])) == [0.3, 0.9]
    assert capsys.readouterr().err == ""
    assert of(thresholds.read(TASK, tmp_path, [20])) == [0.5, 0.5]
    said = capsys.readouterr().err
    assert "of the checkpoints of steps [10, 20], and those read are of [20]: 0.5 is taken" in said


def test_a_file_of_before_says_no_steps(tmp_path):
    (tmp_path / thresholds.THRESHOLDS).write_text(json.dumps({"a": 0.25, "thresholds": 0.75}))
    assert of(thresholds.read(TASK, tmp_path, [20])) == [0.25, 0.75]


@pytest.mark.parametrize("content", ["[]", '{"thresholds": {}}', '{"thresholds": 1, "a": "x"}'])
def test_what_is_no_such_file(tmp_path, content):
    (tmp_path / thresholds.THRESHOLDS).write_text(content)
    with pytest.raises(InputError, match="cannot be read"):
        of(thresholds.read(TASK, tmp_path, [20]))
