import json

import numpy as np
import pytest
from rich.console import Console

from jaxlm.errors import InputError
from jaxlm.evaluate import report

NAMES = ["bad", "good"]
PROBABILITIES = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [1.0, 0.0]], np.float32)
TEXTS = ["a [bold]\nfilm", "fine", "so so — naïve" + " long" * 40, "sure"]
PLACES = [f"dev.tsv:{line}" for line in (2, 3, 4, 5)]


def predictions():
    return report.classified(TEXTS, np.array([1, 1, 1, 1]), PROBABILITIES, NAMES, PLACES)


def shown(table):
    console = Console(width=90, no_color=True)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_the_most_wrong_come_first():
    wrong = report.most_wrong(predictions())
    assert [p.origin for p in wrong] == ["dev.tsv:5", "dev.tsv:2", "dev.tsv:4"]  # 3 is right
    assert wrong[1].loss == pytest.approx(-np.log(0.1))
    assert (wrong[1].gold, wrong[1].predicted) == ("good", "bad")
    assert wrong[1].probability == pytest.approx(0.9)
    assert 80 < wrong[0].loss < 90  # a probability of 0
    assert report.most_wrong(predictions(), 1) == wrong[:1]


def test_writes_json_lines(tmp_path):
    path = tmp_path / "most_wrong.jsonl"
    report.write_jsonl(report.most_wrong(predictions()), path)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["text"] for line in lines] == [TEXTS[3], TEXTS[0], TEXTS[2]]
    assert set(lines[0]) == {"loss", "gold", "predicted", "probability", "text", "origin"}
    assert "naïve" in path.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_s_name_may_not_be_utf_8(tmp_path):
    path, origins = tmp_path / "wrong.jsonl", [f"caf\udce9.tsv:{line}" for line in range(2, 6)]
    found = report.classified(TEXTS, np.array([1, 1, 1, 1]), PROBABILITIES, NAMES, origins)
    report.write_jsonl(report.most_wrong(found, 1), path)
    assert json.loads(path.read_text("utf-8"))["origin"] == "caf\udce9.tsv:5"


def test_prints_texts_as_they_are():
    text = shown(report.predictions_table(report.most_wrong(predictions())))
    assert "a [bold] film" in text
    assert "bad 90%" in text
    lines = text.splitlines()
    long = lines[next(i for i, line in enumerate(lines) if "dev.tsv:4" in line) - 1]
    assert "0.92" in long
    assert "bad 60%" in long
    assert long.rstrip().endswith("…")


def test_a_narrow_terminal_cuts_nothing_but_texts():
    wrong = report.most_wrong(predictions())
    console = Console(width=40, no_color=True)
    with console.capture() as capture:
        console.print(report.predictions_table(wrong, width=console.width))
    text = capture.get()
    for p in wrong:
        assert p.origin in text
        assert f"{p.loss:.2f}  good → bad {p.probability:.0%}" in text
    assert text.count("…") == 1  # the long text


def test_what_does_not_belong_together_is_refused():
    with pytest.raises(InputError, match="3 texts, 4 labels, 4 predictions and 4 origins"):
        report.classified(TEXTS[:3], np.array([1, 1, 1, 1]), PROBABILITIES, NAMES, PLACES)


SCORES = {
    "LoRA": {"accuracy": [0.9, 0.92, 0.94], "loss": [0.3], "note|x": [1.0]},
    "full": {"accuracy": [0.91], "loss": [0.2]},
}


def test_summary_by_hand():
    assert report.summary_markdown(SCORES, scale=100.0, digits=1) == (
        "|  | accuracy | loss | note\\|x |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| LoRA | **92.0 ± 2.0** | 30.0 | 100.0 |\n"
        "| full | 91.0 | **20.0** | – |\n"
    )
    text = shown(report.summary_table(SCORES, title="SST-2"))
    assert "0.9200 ± 0.0200" in text
    assert "SST-2" in text
    assert report.mean_and_sd([]) == "–"
