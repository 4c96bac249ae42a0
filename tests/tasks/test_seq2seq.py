"""A model that learns to write one text for another: trained, resumed, averaged, asked."""

import importlib
import io
import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from jaxlm.data.labelled.dataset import LabelledConfig
from jaxlm.data.labelled.parallel import ParallelText
from jaxlm.data.tokenizers import TokenizerConfig
from jaxlm.errors import InputError
from jaxlm.models.gpt2 import Gpt2Config
from jaxlm.models.transformer import TransformerConfig
from jaxlm.optim import OptimizerConfig
from jaxlm.runs import finetuned
from jaxlm.runs.finetuning import finetune
from jaxlm.tasks.seq2seq import Seq2Seq
from jaxlm.train.loop import TrainConfig
from jaxlm.train.metrics import read_jsonl

WORDS = {"red": "rot", "blue": "blau", "green": "grün", "white": "weiß"}
MODEL = TransformerConfig(num_layers=1, hidden_dim=32, num_heads=2, mlp_dim=64, dropout_rate=0.0)


@pytest.fixture(scope="module")
def lines() -> dict[str, str]:
    """Three words each, and the other words for them, the other way round."""
    chosen = np.random.default_rng(0).choice(list(WORDS), (60, 3))
    chosen = np.unique(chosen, axis=0)
    return {" ".join(words): " ".join(WORDS[w] for w in words[::-1]) for words in chosen.tolist()}


@pytest.fixture
def config(lines, tmp_path):
    for side, texts in (("en", lines.keys()), ("de", lines.values())):
        (tmp_path / f"a.{side}").write_text("".join(f"{text}\n" for text in texts))
    source = ParallelText(source=str(tmp_path / "a.en"), target=str(tmp_path / "a.de"))
    return replace(
        _config(source),
        runs=tmp_path,
    )


def _config(source):
    from jaxlm.config import FinetuneConfig

    return FinetuneConfig(
        name="tiny",
        data=LabelledConfig(
            train=source, validation=source, batch_size=4, batch_tokens=128, num_buckets=2
        ),
        task=Seq2Seq(label_smoothing=0.1, num_scored=None, sample_tokens=12),
        model=MODEL,
        tokenizer=TokenizerConfig(kind="bpe", vocab_size=300),
        optimizer=OptimizerConfig(peak_lr=0.01, schedule="inverse_sqrt", warmup_steps=20),
        train=TrainConfig(steps=150, num_evals=5, average=2),
    )
