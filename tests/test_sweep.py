"""The sweep's command line, and one whole sweep that trains, tiny."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm import config as configs
from jaxlm.config import FinetuneConfig
from jaxlm.models.bilstm import BilstmConfig
from jaxlm.sweep.sweep import load

ROOT = Path(__file__).parent.parent
LR = "optimizer.peak_lr"
CONFIG = """
from pathlib import Path
from jaxlm.config import FinetuneConfig
from jaxlm.data.labelled.dataset import LabelledConfig
from jaxlm.data.labelled.records import Table
from jaxlm.models.bilstm import BilstmConfig
from jaxlm.train.loop import TrainConfig

here = Path(__file__).parent
config = FinetuneConfig(
    name="tiny",
    runs=here,
    data=LabelledConfig(
        train=Table(path=str(here / "data.csv")), max_length=16, batch_size=16, num_buckets=1
    ),
    model=BilstmConfig(num_layers=1, embed_dim=8, hidden_dim=8),
    train=TrainConfig(steps=2, num_evals=1),
)
"""


@pytest.mark.slow
def test_from_the_command_line_to_the_table(tmp_path: Path) -> None:
    rng = random.Random(0)
    lines = [
        f"{' '.join(rng.choices(['red', 'blue', label], k=6))} n{i},{label}"
        for i, label in enumerate(rng.choices(["good", "bad"], k=120))
    ]
    (tmp_path / "data.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    (tmp_path / "config.py").write_text(CONFIG)
    command = ["scripts/sweep.py", str(tmp_path / "config.py"), "--set", f"{LR}=1e-3,1e-2"]
    done = subprocess.run(
        [sys.executable, *command, "--name", "s", "--", "--data.max-length", "12"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "GLIBC_TUNABLES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2/2 peak_lr=0.01_seed=0: accuracy" in done.stdout
    record = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert [trial["error"] for trial in record["trials"]] == [None, None]
    trial = tmp_path / "s" / "peak_lr=0.01_seed=0"
    assert {"config.json", "tokenizer.json", "checkpoints", "metrics.jsonl"} <= {
        path.name for path in trial.iterdir()
    }
    resolved = configs.read_file(trial / "config.json")
    assert isinstance(resolved, FinetuneConfig)
    assert isinstance(resolved.model, BilstmConfig)
    assert (resolved.data.max_length, resolved.optimizer.peak_lr) == (12, 0.01)


def test_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("text,label\n")
    (tmp_path / "c.py").write_text(CONFIG)
    argv = [str(tmp_path / "c.py"), "--set", f"{LR}=1e-3,1e-2", "--set", "model.embed_dim=4,8"]
    plan = load([*argv, "--seeds", "3", "--halving", "2", "--", "--train.steps", "8"])
    assert (plan.name, plan.num_seeds, plan.eta, plan.metric) == ("tiny_sweep", 3, 2, "accuracy")
    assert len(plan.candidates) == 4
    assert plan.config.train.steps == 8


def test_the_accelerator_is_left_to_the_trials() -> None:
    probe = (
        "import jaxlm.sweep.sweep; from jax._src import xla_bridge; "
        "raise SystemExit(xla_bridge.backends_are_initialized())"
    )
    assert subprocess.run([sys.executable, "-c", probe], cwd=ROOT).returncode == 0
