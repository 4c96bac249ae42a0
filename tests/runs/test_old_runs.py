"""Run folders that earlier code wrote are opened, used and trained to their end.

Where one no longer can be, the change log has to say how to move; golden/make_old_runs_golden.py
says which code wrote these.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jaxlm import config as configs
from jaxlm.config import PretrainConfig
from jaxlm.data.labelled.records import Record
from jaxlm.data.loader import eval_batches
from jaxlm.data.prepared import open_prepared
from jaxlm.decode.fill_mask import FillMask
from jaxlm.runs import finetuned, pretrained
from jaxlm.runs.folder import CONFIG
from jaxlm.runs.pretraining import pretrain
from jaxlm.train.loop import evaluate
from jaxlm.train.metrics import read_jsonl

ARCHIVE = Path(__file__).parents[1] / "golden" / "old_runs.tar.xz"
BLANKS = ["red [MASK] blue [MASK]", "a [MASK]"]
TEXTS = ["red red cat", "dog blue", "green"]


@pytest.fixture
def expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What that code computed; its folders are in the working directory, where the configs look."""
    shutil.unpack_archive(ARCHIVE, tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return json.loads(Path("expected.json").read_text())


def test_a_pretraining_run_is_evaluated_and_fills_in(expected: dict[str, Any]) -> None:
    read = pretrained.open_pretrained("runs/whole")
    batches = eval_batches(open_prepared("prepared"), read.config.data.batch_size)
    loss = evaluate(read.placement, read.state, batches)["loss"]
    assert loss == pytest.approx(expected["loss"], abs=1e-5)
    fill = FillMask(read.model.apply, read.variables, read.tokenizer, 16)
    for found, wanted in zip(fill(BLANKS, top_k=3), expected["blanks"], strict=True):
        for blank, tokens in zip(found, wanted, strict=True):
            assert [one.token for one in blank] == [token for token, _ in tokens]
            probabilities = [probability for _, probability in tokens]
            assert [one.probability for one in blank] == pytest.approx(probabilities, abs=1e-5)


def test_adapters_are_read_with_their_base(expected: dict[str, Any]) -> None:
    answers = finetuned.open_finetuned("runs/lora").answer(
        [Record(fields={"text": text}, origin="here") for text in TEXTS]
    )
    for answer, wanted in zip(answers, expected["probabilities"], strict=True):
        assert answer["probabilities"] == pytest.approx(wanted, abs=1e-5)


@pytest.mark.slow
def test_an_interrupted_run_resumes_to_its_end(expected: dict[str, Any]) -> None:
    config = configs.read_file(Path("runs/stopped") / CONFIG)
    assert isinstance(config, PretrainConfig)
    pretrain(replace(config, prepare=None))
    found = losses(read_jsonl(Path("runs/stopped/metrics.jsonl")))
    assert found == pytest.approx(losses(expected["losses"]), abs=1e-5)


def losses(lines: list[dict[str, Any]]) -> dict[tuple[int, str], float]:
    return {
        (line["step"], name): line[name]
        for line in lines
        for name in ("train/loss", "eval/loss")
        if name in line
    }
