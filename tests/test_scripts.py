"""The scripts as a person runs them: exit codes, one sentence for bad input, kills and resumes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from xla_flags import xla_flags

from jaxlm import tree
from jaxlm.runs import pretrained
from jaxlm.train.metrics import read_jsonl

ROOT = Path(__file__).parent.parent
STEPS = 40
CONFIG = """
from pathlib import Path
from jaxlm.config import PretrainConfig
from jaxlm.data.loader import DataConfig
from jaxlm.data.prepare import PrepareConfig, TokenizerConfig
from jaxlm.data.sources import TextFiles
from jaxlm.models.bert import BertConfig
from jaxlm.optim import OptimizerConfig
from jaxlm.train.loop import TrainConfig

here = Path(__file__).parent
config = PretrainConfig(
    name="run",
    runs=here,
    data=DataConfig(paths=(str(here / "prepared"),), batch_size=16),
    prepare=PrepareConfig(
        source=TextFiles(glob=str(here / "text.txt"), document="line"),
        tokenizer=TokenizerConfig(vocab_size=60),
        row_length=16,
    ),
    model=BertConfig(
        num_layers=1, hidden_dim=16, num_heads=2, mlp_dim=32, max_length=16, dropout_rate=0.0,
        attention_dropout_rate=0.0,
    ),
    optimizer=OptimizerConfig(peak_lr=1e-3),
    train=TrainConfig(steps={steps}, num_evals=1, save_every=1, log_every=1),
)
"""


def start(name: str, *args: str, devices: int = 1, fault: str = "") -> subprocess.Popen[str]:
    env = os.environ | {
        "XLA_FLAGS": xla_flags(devices),
        "GLIBC_TUNABLES": "",  # no restart, so that a kill meets the process that trains
        "PYTHONPATH": str(ROOT),
        "FAULT": fault,
    }
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / name), *args],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=900)
    return process.returncode, out, err


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    words = np.random.default_rng(0).choice(["red", "green", "blue", "cat", "dog"], (400, 12))
    (tmp_path / "text.txt").write_text("\n".join(" ".join(line) for line in words))
    (tmp_path / "config.py").write_text(CONFIG.format(steps=STEPS))
    return tmp_path


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("pretrain.py", "nowhere.py"), "error: there is no config file nowhere.py\n"),
        (("evaluate.py", "nowhere"), "error: nowhere is not a run folder: it has no config.json\n"),
        (("predict.py", "nowhere", "fill-mask"), "error: give either a text"),
        (
            ("predict.py", "nowhere", "classify", "\udce9"),
            "error: the text '\\udce9' is not UTF-8;",
        ),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence(command: tuple[str, ...], message: str) -> None:
    code, _, err = finish(start(*command))
    assert code == 2
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_from_text_to_predictions(folder: Path) -> None:
    code, out, err = finish(start("pretrain.py", str(folder / "config.py"), "--train.steps", "4"))
    assert code == 0, err
    assert "compiling the train step" in out
    run_folder = str(folder / "run")
    code, out, err = finish(start("evaluate.py", run_folder))
    assert code == 0, err
    assert "perplexity" in out
    attends = "attention: plain, rows of up to 16 tokens have small squares of scores\n"
    assert attends in out
    assert json.loads((folder / "run" / "eval.json").read_text())["loss"] < 6
    (folder / "in.txt").write_text('red [MASK] blue\n\n{"text": "the [MASK] [MASK]"}\n')
    code, out, err = finish(
        start("predict.py", run_folder, "fill-mask", "--file", str(folder / "in.txt"))
    )
    assert code == 0, err
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["line"] for answer in answers] == [1, 2, 3]
    assert answers.pop(1)["error"].endswith("in.txt:2: field 'text' is empty; remove the record")
    assert "1 of 3 have no answer" in err
    assert attends in err
    assert [answer["text"] for answer in answers] == ["red [MASK] blue", "the [MASK] [MASK]"]
    assert [len(answer["blanks"]) for answer in answers] == [1, 2]
    assert len(answers[0]["blanks"][0]) == 5


def final(folder: Path) -> dict[str, np.ndarray]:
    read = pretrained.open_pretrained(folder, STEPS)
    return {path: np.asarray(leaf) for path, leaf in tree.leaves_with_path(read.variables)}


def losses(folder: Path) -> dict[int, float]:
    lines = read_jsonl(folder / "metrics.jsonl")
    return {int(line["step"]): line["train/loss"] for line in lines if "train/loss" in line}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_faults_lose_nothing(processes: int) -> None:
    faults = ["--kills", "3", "--damages", "1", "--processes", str(processes)]
    code, out, err = finish(start("fault_campaign.py", *faults))
    assert code == 0, err
    assert "| SIGKILL | 3 |" in out


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
def test_resumed_on_fewer_devices_sees_the_same(folder: Path, devices: int) -> None:
    config = str(folder / "config.py")
    assert finish(start("pretrain.py", config, "--name", "whole", devices=8))[0] == 0
    faulty = "../tests/support/faulty_run.py"
    first = start(faulty, config, "--name", "moved", devices=8, fault="SIGTERM:5")
    code, out, err = finish(first)
    assert code == 0, err
    assert "stopped at step 6" in out
    code, out, err = finish(start("pretrain.py", config, "--name", "moved", devices=devices))
    assert code == 0, err
    assert "resuming from step" in out
    a, b = final(folder / "whole"), final(folder / "moved")
    for path in a:
        np.testing.assert_allclose(a[path], b[path], atol=1e-5, err_msg=path)
    one, other = losses(folder / "whole"), losses(folder / "moved")
    assert one.keys() == other.keys()
    np.testing.assert_allclose(list(one.values()), list(other.values()), atol=1e-5)


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_a_loop_of_ones_own_learns(devices):
    code, out, err = finish(start("minimal.py", devices=devices))
    assert (code, err) == (0, "")
    losses = [float(line.split()[-1]) for line in out.splitlines() if line.startswith("step")]
    assert losses[-1] < 0.3 * losses[0]
