"""Write old_runs.tar.xz: run folders as commit 2e26618 made them, and what it computed from them.

Their layout is what people have on their disks, so the code of that commit must write them:

    git worktree add ../old 2e26618 && cd ../old
    PYTHONPATH=.:tests python PATH/TO/tests/golden/make_old_runs_golden.py

Folders are named in the configs relative to where they are unpacked.
"""

# ruff: noqa: I001  (some of these modules are no more, so ruff does not know whose they were)

import json
import os
import shutil
import signal
import tempfile
from dataclasses import replace
from pathlib import Path

import conftest  # noqa: F401  (eight devices, as in the tests)
import numpy as np
from tiny_runs import make_config

from jaxlm import run, tuned
from jaxlm.config import FinetuneConfig
from jaxlm.data.labelled.dataset import LabelledConfig
from jaxlm.data.labelled.records import Record, Table
from jaxlm.data.loader import eval_batches
from jaxlm.data.prepared import open_prepared
from jaxlm.fill_mask import FillMask
from jaxlm.finetune import finetune
from jaxlm.lora import LoraConfig
from jaxlm.optim import OptimizerConfig
from jaxlm.pretrain import pretrain
from jaxlm.train.loop import TrainConfig, evaluate
from jaxlm.train.metrics import read_jsonl
from jaxlm.train.view import View

STEPS = 6
BLANKS = ["red [MASK] blue [MASK]", "a [MASK]"]
TEXTS = ["red red cat", "dog blue", "green"]


def pretraining():
    config = make_config(Path(), steps=STEPS, num_layers=1)
    model = replace(config.model, hidden_dim=8, mlp_dim=16, max_length=16)
    return replace(config, model=model, train=replace(config.train, keep=1))


def fine_tuning():
    rng = np.random.default_rng(0)
    for name, rows in (("train", 48), ("dev", 16)):
        lines = ["text,label"]
        for row in range(rows):
            words = ["red", "cat"] if row % 2 else ["blue", "dog"]
            lines.append(f"{' '.join(rng.choice(words, rng.integers(3, 8)))},{row % 2}")
        Path(f"{name}.csv").write_text("\n".join(lines))
    return FinetuneConfig(
        name="lora",
        runs=Path("runs"),
        base="runs/whole",
        data=LabelledConfig(
            train=Table(path="train.csv"),
            validation=Table(path="dev.csv"),
            batch_size=16,
            max_length=12,
            num_buckets=1,
        ),
        tuning=LoraConfig(targets=("(query|value)/kernel",), rank=2),
        optimizer=OptimizerConfig(peak_lr=3e-2),
        train=TrainConfig(steps=40, num_evals=1, log_every=10, keep=1),
        monitor="loss",
    )


def interrupted(config):
    """Stopped after three steps."""
    add = View.add

    def add_and_stop(view, step, *rest):
        add(view, step, *rest)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    View.add = add_and_stop
    pretrain(config)
    View.add = add


def losses(folder):
    lines = read_jsonl(folder / "metrics.jsonl")
    kept = ("step", "train/loss", "eval/loss")
    return [{name: line[name] for name in kept if name in line} for line in lines]


def measured(config):
    read = run.open_run(config.directory)
    data = open_prepared("prepared")
    fill = FillMask(run.make_model(read.config.model).apply, read.variables, read.tokenizer, 16)
    lora = tuned.open_tuned("runs/lora")
    assert int(lora.state.step) > 0  # the best, with adapters that are not zero
    answers = lora.answer([Record(fields={"text": text}, place="here") for text in TEXTS])
    return {
        "loss": evaluate(read.placement, read.state, eval_batches(data, 16))["loss"],
        "blanks": [
            [[(one.token, float(one.probability)) for one in blank] for blank in blanks]
            for blanks in fill(BLANKS, top_k=3)
        ],
        "probabilities": [
            {label: float(p) for label, p in answer["probabilities"].items()} for answer in answers
        ],
    }


if __name__ == "__main__":
    archive = Path(__file__).with_name("old_runs")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        config = pretraining()
        pretrain(config)
        finetune(fine_tuning())
        interrupted(replace(config, name="stopped"))
        shutil.copytree("runs/stopped", "resumed/stopped")
        pretrain(replace(config, name="stopped", runs=Path("resumed")))
        expected = measured(config) | {"losses": losses(Path("resumed/stopped"))}
        Path("expected.json").write_text(json.dumps(expected, indent=1))
        shutil.rmtree("resumed")
        for path in [*Path("runs").glob("*/tensorboard"), Path("runs/stopped/checkpoints/0")]:
            shutil.rmtree(path)
        for path in [*Path("runs").glob("*/loss.png"), Path("text.txt")]:
            path.unlink()
        shutil.make_archive(str(archive), "xztar", ".")
        os.chdir("/")
