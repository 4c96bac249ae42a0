"""A model that learns to write one text for another: trained, resumed, averaged, asked."""

import io
import itertools
from pathlib import Path

import pytest
from rich.console import Console

from jaxlm.config import FinetuneConfig
from jaxlm.data.labelled.dataset import LabelledConfig
from jaxlm.data.labelled.parallel import ParallelText
from jaxlm.data.tokenizers import TokenizerConfig
from jaxlm.models.transformer import TransformerConfig
from jaxlm.optim import OptimizerConfig
from jaxlm.runs.finetuning import finetune
from jaxlm.tasks.seq2seq import Seq2Seq
from jaxlm.train.loop import TrainConfig
from jaxlm.train.metrics import read_jsonl

WORDS = {"red": "rot", "blue": "blau", "green": "grün", "white": "weiß"}
MODEL = TransformerConfig(num_layers=1, hidden_dim=32, num_heads=2, mlp_dim=64, dropout_rate=0.0)


@pytest.fixture
def config(tmp_path: Path) -> FinetuneConfig:
    """One to three words, and the other words for them the other way round."""
    sources = [words for n in (1, 2, 3) for words in itertools.product(WORDS, repeat=n)]
    targets = [[WORDS[word] for word in reversed(words)] for words in sources]
    for side, texts in (("en", sources), ("de", targets)):
        (tmp_path / f"a.{side}").write_text("".join(f"{' '.join(text)}\n" for text in texts))
    return FinetuneConfig(
        name="tiny",
        runs=tmp_path,
        data=LabelledConfig(
            train=ParallelText(source=str(tmp_path / "a.en"), target=str(tmp_path / "a.de")),
            batch_size=8,
            batch_tokens=256,
            num_buckets=2,
        ),
        task=Seq2Seq(label_smoothing=0.1, num_scored=None, sample_tokens=12),
        model=MODEL,
        tokenizer=TokenizerConfig(kind="bpe", vocab_size=300),
        optimizer=OptimizerConfig(peak_lr=0.01, schedule="inverse_sqrt", warmup_steps=20),
        train=TrainConfig(steps=120, num_evals=4, average=2),
    )


def test_a_model_learns_to_translate(config) -> None:
    out = io.StringIO()
    directory = finetune(config, console=Console(file=out, width=300))
    lines = [line for line in read_jsonl(directory / "metrics.jsonl") if "eval/bleu" in line]
    assert lines[-1]["eval/chrf"] > 90
