import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer

from jaxlm.config import FinetuneConfig
from jaxlm.data import tokenizers
from jaxlm.data.labelled.dataset import LabelledConfig, Source
from jaxlm.data.labelled.framing import Framer
from jaxlm.data.labelled.records import JsonLines, Record
from jaxlm.data.prepare import TokenizerConfig
from jaxlm.errors import InputError
from jaxlm.models.bilstm import BilstmConfig
from jaxlm.optim import OptimizerConfig
from jaxlm.runs import finetuned
from jaxlm.runs.finetuned import FinetunedRun
from jaxlm.runs.finetuning import finetune
from jaxlm.train.loop import TrainConfig
from jaxlm.train.metrics import read_jsonl

WORDS = "a b c d e f g h john smith lives in new york ##ing ? . who where"


@pytest.fixture(scope="session")
def records() -> Callable[..., list[Record]]:
    """Of fields, at x.jsonl:1, x.jsonl:2 and so on."""

    def records(*fields: dict[str, Any]) -> list[Record]:
        return [Record(fields=one, origin=f"x.jsonl:{i}") for i, one in enumerate(fields, start=1)]

    return records


@pytest.fixture
def eval_metrics(tmp_path: Path) -> Callable[[], dict[str, float]]:
    """Of the last evaluation of the run of :func:`tiny`."""

    def eval_metrics() -> dict[str, float]:
        lines = read_jsonl(tmp_path / "tiny" / "metrics.jsonl")
        (*_, last) = [line for line in lines if "eval/loss" in line]
        names = [name for name in last if name.startswith("eval/")]
        return {name.removeprefix("eval/"): last[name] for name in names}

    return eval_metrics


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join([*tokenizers.SPECIALS, *WORDS.split()]) + "\n")
    return tokenizers.load(path)


@pytest.fixture(scope="session")
def framer(tokenizer: Tokenizer) -> Framer:
    return Framer(tokenizer, max_length=12)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Sequence[dict[str, Any]]], JsonLines]:
    def write(rows: Sequence[dict[str, Any]]) -> JsonLines:
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return JsonLines(path=str(path))

    return write


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., FinetuneConfig]:
    """A run of thirty steps on one shape of batches."""

    def tiny(task: Any, source: Source, max_length: int = 16, pack: bool = False) -> FinetuneConfig:
        return FinetuneConfig(
            name="tiny",
            runs=tmp_path,
            data=LabelledConfig(
                train=source,
                validation_fraction=0.25,
                max_length=max_length,
                batch_size=16,
                num_buckets=1,
                pack=pack,
            ),
            task=task,
            model=BilstmConfig(embed_dim=16, hidden_dim=16),
            tokenizer=TokenizerConfig(vocab_size=150),
            dropout_rate=0.0,
            optimizer=OptimizerConfig(peak_lr=0.05, schedule="constant"),
            train=TrainConfig(steps=30, num_evals=1),
        )

    return tiny


@pytest.fixture
def train(
    tiny: Callable[..., FinetuneConfig], eval_metrics: Callable[[], dict[str, float]]
) -> Callable[..., FinetunedRun]:
    """The run of :func:`tiny`, trained and read from its folder.

    A metric that its task does not measure is refused before, with the names of those it does.
    """

    def train(task: Any, source: Source, max_length: int = 16, pack: bool = False) -> FinetunedRun:
        config, quiet = tiny(task, source, max_length, pack), Console(quiet=True)
        with pytest.raises(InputError, match="monitor=f1/x is not measured here") as refused:
            finetune(replace(config, monitor="f1/x"), console=quiet)
        assert not config.directory.exists()
        run = finetuned.open_finetuned(finetune(config, console=quiet))
        assert str(refused.value).endswith(f"; there are {', '.join(eval_metrics())}")
        return run

    return train


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
