"""The first steps of three configurations, number by number: a change of code changes none of them.

Where one differs, what is computed has changed. If that was meant, say why in the commit, and write
the new numbers with ``PYTHONPATH=tests/support python tests/test_golden.py``; if not, ``git
bisect`` finds where it began.
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

if __name__ == "__main__":
    import conftest  # noqa: F401  (the same eight devices)

from jaxlm import config as configs
from jaxlm.config import FinetuneConfig, PretrainConfig
from jaxlm.data.labelled.records import Table
from jaxlm.data.prepare import PrepareConfig, TokenizerConfig
from jaxlm.data.sources import TextFiles
from jaxlm.runs.finetuning import finetune
from jaxlm.runs.pretraining import pretrain
from jaxlm.train.metrics import read_jsonl

CONFIGS = Path(__file__).parent.parent / "configs"
GOLDEN = Path(__file__).parent / "golden" / "first_steps.json"
KEPT = ("train/loss", "train/accuracy", "grad_norm", "lr", "eval/loss", "eval/accuracy")
WORDS = ["red", "green", "blue", "cat", "dog", "runs", "sleeps", "under", "over", "the", "house"]
STEPS = 2


def sentences(number: int, *, seed: int) -> list[list[str]]:
    rng = np.random.default_rng(seed)
    return [list(rng.choice(WORDS, rng.integers(5, 20))) for _ in range(number)]


def pretraining(folder: Path, name: str) -> PretrainConfig:
    """The configuration, with its lengths and data small enough for seconds."""
    (folder / "text.txt").write_text("\n".join(" ".join(words) for words in sentences(600, seed=0)))
    config = configs.read_file(CONFIGS / f"{name}.py")
    assert isinstance(config, PretrainConfig)
    model = config.model
    if name == "bert_base":
        small = {"num_layers": 2, "hidden_dim": 32, "num_heads": 4, "mlp_dim": 64, "max_length": 32}
        model = replace(model, **small)
    prepare = PrepareConfig(
        source=TextFiles(glob=str(folder / "text.txt"), document="line"),
        tokenizer=TokenizerConfig(vocab_size=80),
        row_length=16,
        validation_fraction=0.1,
    )
    return replace(
        config,
        runs=folder / "runs",
        data=replace(config.data, paths=(str(folder / "prepared"),), batch_size=64),
        prepare=prepare,
        model=replace(model, dtype="float32"),
        train=replace(config.train, steps=STEPS, minutes=None, num_evals=1, log_every=1),
    )


def fine_tuning(folder: Path, base: Path) -> FinetuneConfig:
    rows = [f"{' '.join(words)},{int('cat' in words)}" for words in sentences(400, seed=1)]
    (folder / "table.csv").write_text("\n".join(["text,topic", *rows]))
    config = configs.read_file(CONFIGS / "quickstart_lora.py")
    assert isinstance(config, FinetuneConfig)
    return replace(
        config,
        runs=folder / "runs",
        base=str(base),
        data=replace(config.data, train=Table(path=str(folder / "table.csv"))),
        dtype="float32",
        train=replace(config.train, steps=STEPS, epochs=None, num_evals=1, log_every=1),
    )


def measured(run: Path) -> list[dict[str, float]]:
    return [
        {name: line[name] for name in ("step", *KEPT) if name in line}
        for line in read_jsonl(run / "metrics.jsonl")
    ]


def measure(folder: Path) -> dict[str, list[dict[str, float]]]:
    """What the three runs write into their ``metrics.jsonl``."""
    runs = {}
    for name in ("quickstart", "bert_base"):
        runs[name] = pretrain(pretraining(folder, name))
    runs["quickstart_lora"] = finetune(fine_tuning(folder, runs["quickstart"]))
    return {name: measured(run) for name, run in runs.items()}


def test_first_steps(tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text())
    for name, lines in measure(tmp_path).items():
        assert [line.keys() for line in lines] == [line.keys() for line in golden[name]]
        for here, there in zip(lines, golden[name], strict=True):
            for metric, value in there.items():
                assert here[metric] == pytest.approx(value, rel=2e-5, abs=1e-7), (
                    f"{name}, step {here['step']}: {metric} was {value} and is {here[metric]}: "
                    f"what is computed has changed; see the head of {Path(__file__).name}"
                )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        GOLDEN.write_text(json.dumps(measure(Path(temporary)), indent=1) + "\n")
    sys.exit(print(f"written: {GOLDEN}"))
