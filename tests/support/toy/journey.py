"""Pretrain the toy, fine-tune it with LoRA, evaluate, use and compile-check it; prints JSON."""

import contextlib
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from jaxlm.models.toy import ToyConfig
from jaxlm.tasks.toy import NextToken
from tiny_runs import make_config

from jaxlm.compile_check.step import Assumed, make_step
from jaxlm.config import FinetuneConfig
from jaxlm.data.labelled.dataset import LabelledConfig
from jaxlm.data.labelled.records import Table
from jaxlm.optim import OptimizerConfig
from jaxlm.peft.lora import LoraConfig
from jaxlm.runs.finetuning import finetune
from jaxlm.runs.pretraining import pretrain
from jaxlm.tasks.classification import Classification
from jaxlm.train.loop import TrainConfig
from jaxlm.train.metrics import read_jsonl


def losses(directory: Path) -> list[float]:
    lines = read_jsonl(directory / "metrics.jsonl")
    return [line["eval/loss"] for line in lines if "eval/loss" in line]


def printed(function, *arguments) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        function(*arguments)
    return out.getvalue()


if __name__ == "__main__":
    folder, scripts = Path(sys.argv[1]), sys.argv[2]
    sys.path.insert(0, scripts)
    import evaluate
    import predict

    config = replace(make_config(folder, steps=40), model=ToyConfig(), task=NextToken(), name="toy")
    pretrained = pretrain(config)
    rng = np.random.default_rng(0)
    words = ["blue", "green", "cat"], ["red", "red", "dog"]
    rows = [f"{' '.join(rng.choice(words[i % 2], 3 + i % 9))},{i % 2}" for i in range(96)]
    (folder / "table.csv").write_text("\n".join(["text,label", *rows]))
    tuning = FinetuneConfig(
        name="toy_lora",
        runs=config.runs,
        base=str(pretrained),
        data=LabelledConfig(train=Table(path=str(folder / "table.csv")), batch_size=16),
        task=Classification(pooling="mean"),  # the first token sees no other
        tuning=LoraConfig(targets=("blend/kernel",), rank=2),
        optimizer=OptimizerConfig(peak_lr=3e-2),
        train=TrainConfig(steps=150, num_evals=1),
    )
    tuned = finetune(tuning)
    result = {"pretraining": losses(pretrained), "fine-tuning": losses(tuned)}
    for name, directory, verb in (
        ("pretrained", pretrained, "continue"),
        ("tuned", tuned, "classify"),
    ):
        result[f"{name} evaluated"] = printed(evaluate.main, directory)
        result[f"{name} used"] = printed(predict.main, directory, verb, "red red")
    for name, checked in (("pretraining", config), ("fine-tuning", tuning)):
        step = make_step(checked, Assumed(vocab_size=64), jax.devices())
        compiled = step.placement.train_step.lower(
            step.placement.abstract_state, step.batch, np.float32(0)
        ).compile()
        result[f"{name} flops"] = compiled.cost_analysis()["flops"]
    print(json.dumps(result))
