"""What scripts/evaluate.py writes where, and the commands that a finished run hints at."""

import importlib
import json
import shlex
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tyro

from jaxlm.config import FinetuneConfig, LabelledTask
from jaxlm.data.labelled.classification import TextFields
from jaxlm.data.labelled.dataset import LabelledConfig
from jaxlm.data.labelled.framing import Framer
from jaxlm.data.labelled.question_answering import Question
from jaxlm.data.labelled.records import JsonLines, Table
from jaxlm.data.prepare import TokenizerConfig
from jaxlm.decode.beam import BeamConfig
from jaxlm.decode.generate import GenerateConfig
from jaxlm.errors import InputError
from jaxlm.models.bert import BertConfig
from jaxlm.runs.finetuning import finetune
from jaxlm.runs.folder import read_config
from jaxlm.tasks.classification import Classification
from jaxlm.tasks.multiple_choice import MultipleChoice
from jaxlm.tasks.question_answering import QuestionAnswering
from jaxlm.train.loop import TrainConfig


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], types.ModuleType]:
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # or the process would start anew
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "scripts")
    return importlib.import_module


@pytest.fixture
def evaluate(script: Callable[[str], types.ModuleType]) -> types.ModuleType:
    return script("evaluate")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    return make_run(folder, Classification())


def make_run(folder: Path, task: LabelledTask) -> Path:
    rows = "".join(f"{'good' if i % 2 else 'bad'} {i},{i % 2}\n" for i in range(40))
    for name in ("train.csv", "dev.csv", "other/dev.csv"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("text,label\n" + rows)
    config = FinetuneConfig(
        name="try [1] it's",
        task=task,
        runs=folder,
        data=LabelledConfig(
            train=Table(path=str(folder / "train.csv")), batch_size=8, num_buckets=1
        ),
        model=BertConfig(num_layers=1, hidden_dim=8, num_heads=1, mlp_dim=8, max_length=16),
        tokenizer=TokenizerConfig(vocab_size=60),
        train=TrainConfig(steps=1, num_evals=1),
    )
    directory = finetune(config)
    assert isinstance(directory, Path)
    return directory


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def test_each_data_set_has_a_folder_of_its_own(
    evaluate: types.ModuleType, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate.main(run)
    before = content(run)
    assert {"eval.json", "confusion.png", "reliability.png", "wrong.jsonl"} <= before.keys()
    first, second = run.parent / "dev.csv", run.parent / "other" / "dev.csv"
    for data in (first, second, first):  # the same name twice, and the first again
        evaluate.main(run, data=data)
    evaluate.main(run, split="train", rows=10)
    assert content(run) == before
    found = {
        path.parent.name: json.loads(path.read_text()).get("path")
        for path in run.glob("eval/*/eval.json")
    }
    assert found == {"dev": str(first), "dev-2": str(second), "train-rows-10": None}
    printed = capsys.readouterr().out
    assert f"in {run / 'eval' / 'dev-2'}: confusion.png, eval.json" in printed
    assert printed.count("attention: plain, rows of up to ") == 5


@pytest.mark.parametrize(
    ("given", "name", "options"),
    [
        ({"rows": 2}, "validation-rows-2", {"rows": 2}),
        ({"rows": 3}, "validation-rows-3", {"rows": 3}),
        ({"step": 1}, "validation-step-1", {"step": 1}),
        (
            {"generate": GenerateConfig(stop_strings=("/x",), temperature=0.5)},
            "validation-generate.temperature-0.5-generate.stop_strings-x",
            {"generate.temperature": 0.5, "generate.stop_strings": ["/x"]},
        ),
        ({"beam": BeamConfig(size=3)}, "validation-beam.size-3", {"beam.size": 3}),
        ({"split": "train"}, "train", {}),
    ],
)
def test_an_evaluation_in_another_way_leaves_the_runs_own(
    evaluate: types.ModuleType, run: Path, given: dict[str, Any], name: str, options: dict[str, Any]
) -> None:
    evaluate.main(run)
    before = content(run)
    assert "options" not in json.loads(before["eval.json"])
    for _ in range(2):  # the second finds the first's folder
        evaluate.main(run, **given)
    assert content(run) == before
    found = json.loads((run / "eval" / name / "eval.json").read_text())
    assert found.get("options", {}) == options
    assert not (run / "eval" / f"{name}-2").exists()


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"stride": 64}, "validation-stride-64"),
        ({"int8": True}, "validation-int8"),
        ({"rows": 9, "int8": True}, "validation-rows-9-int8"),
        ({"rows": 9, "data": Path("a/b.csv")}, "b-rows-9"),
        ({"data": Path("a/validation-rows-9.csv")}, "validation-rows-9"),
        ({}, None),
    ],
)
def test_options_name_the_folder(
    evaluate: types.ModuleType, tmp_path: Path, given: dict[str, Any], name: str | None
) -> None:
    data, usual = given.pop("data", None), {"rows": None, "stride": None, "step": None}
    writing = {"generate": evaluate.GREEDY, "beam": evaluate.GREEDY_BEAM}
    options = evaluate.options_of(**(usual | {"int8": False} | writing | given))
    folder = evaluate.folder_of(tmp_path, data, "validation", options)
    assert folder == (tmp_path / "eval" / name if name else tmp_path)
    if name:  # of other data or options, the same name gets a number
        folder.mkdir(parents=True)
        (folder / "eval.json").write_text('{"path": "elsewhere", "options": {"rows": 1}}')
        again = evaluate.folder_of(tmp_path, data, "validation", options)
        assert again == tmp_path / "eval" / f"{name}-2"


def test_a_folder_that_cannot_be_written_is_evaluated(
    evaluate: types.ModuleType,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    upload = evaluate.upload

    def refuse(source: Path, target: Path) -> None:
        if target.is_relative_to(run):
            raise PermissionError(13, "Permission denied", str(target))
        upload(source, target)

    monkeypatch.setattr(evaluate, "upload", refuse)
    evaluate.main(run)
    printed = capsys.readouterr().out
    assert "accuracy  " in printed
    assert f"nothing was written: {run} cannot be written (Permission denied); --out" in printed
    evaluate.main(run, out=tmp_path / "new" / "out")
    assert json.loads((tmp_path / "new" / "out" / "eval.json").read_text())["examples"] > 0
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="name another folder for --out"):
        evaluate.main(run, out=tmp_path / "file")


def test_a_record_of_which_no_row_can_be_made_is_as_bad_as_others(
    evaluate: types.ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Such as a question that leaves no room to its context."""

    class Reached(Exception): ...

    def outputs(examples: list[Question]) -> None:
        raise Reached([example.question for example in examples])

    framer = Framer(TokenizerConfig(vocab_size=60).train(["a b c ?"] * 5), 16)
    source = JsonLines(path=str(tmp_path / "qa.jsonl"))
    data = LabelledConfig(train=source)
    config = types.SimpleNamespace(data=data)
    run: dict[str, Any] = {"config": config, "framer": framer, "labels": (), "attends": ""}
    loaded = types.SimpleNamespace(task=QuestionAnswering(), outputs=outputs, **run)
    monkeypatch.setattr(evaluate.published_task, "open_tuned", lambda *_, **__: loaded)
    asked = ["a ?", "a b c " * 5, "b ?"]
    answers = {"text": ["b"], "answer_start": [2]}
    rows = [
        {"id": f"{i}", "question": one, "context": "a b c", "answers": answers}
        for i, one in enumerate(asked)
    ]
    Path(source.path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [tmp_path, tmp_path, Path(source.path), None, None, "validation", None, None, None]
    with pytest.raises(InputError, match=r"qa\.jsonl:2: question 1 .*1 of 3 .*--on-bad-row skip"):
        evaluate.evaluate_tuned(*given, None, None, "auto")
    with pytest.raises(Reached, match=r"\['a \?', 'b \?'\]"):
        evaluate.evaluate_tuned(*given, "skip", None, "auto")
    assert "1 of 3 records cannot be used, and are left out" in capsys.readouterr().err


def test_the_hints_of_a_run_of_pairs_work_as_they_are(
    script: Callable[[str], types.ModuleType],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    task = Classification(fields=TextFields(text="text", pair="label"))
    run = make_run(tmp_path, task)
    config = read_config(run, FinetuneConfig)
    for hint in script("finetune").hints(config, run):
        _, path, *arguments = shlex.split(hint)
        tyro.cli(script(Path(path).stem).main, args=arguments)
    printed = capsys.readouterr().out
    assert "accuracy" in printed
    last = printed.splitlines()[-2:]  # the classes of the text that the hint names
    assert sorted(line.split("%")[1].strip() for line in last) == ["0", "1"]

    choice = replace(
        config, task=MultipleChoice(), data=replace(config.data, train=JsonLines(path="a b.jsonl"))
    )
    assert script("finetune").hints(choice, run)[1].endswith(" choose --file 'a b.jsonl'")


def test_a_text_has_the_labels_above_their_thresholds(
    script: Callable[[str], types.ModuleType],
) -> None:
    ranked = script("predict").ranked
    probabilities = {"a": 0.2, "b": 0.6, "c": 0.1}
    assert ranked(probabilities, ["a"], 2) == [" 20.0%  a  (chosen)", " 60.0%  b"]
    assert ranked(probabilities, ["a", "c"], 1) == [" 20.0%  a  (chosen)", " 10.0%  c  (chosen)"]
    assert ranked(probabilities, (), 1) == [" 60.0%  b"]
