"""A pretraining run on random words that takes seconds."""

from pathlib import Path

import numpy as np

from jaxlm.config import PretrainConfig
from jaxlm.data.loader import DataConfig
from jaxlm.data.prepare import PrepareConfig, TokenizerConfig
from jaxlm.data.sources import TextFiles
from jaxlm.models.bert import BertConfig
from jaxlm.optim import OptimizerConfig
from jaxlm.train.loop import TrainConfig


def make_config(folder: Path, *, steps: int, num_layers: int = 2) -> PretrainConfig:
    """Writes its text; all that the run makes is in the folder as well."""
    words = np.random.default_rng(0).choice(["red", "green", "blue", "cat", "dog"], (400, 12))
    (folder / "text.txt").write_text("\n".join(" ".join(line) for line in words))
    return PretrainConfig(
        name="whole",
        runs=folder / "runs",
        data=DataConfig(paths=(str(folder / "prepared"),), batch_size=16),
        prepare=PrepareConfig(
            source=TextFiles(glob=str(folder / "text.txt"), document="line"),
            tokenizer=TokenizerConfig(vocab_size=60),
            row_length=16,
            validation_fraction=0.1,
        ),
        model=BertConfig(
            num_layers=num_layers, hidden_dim=16, num_heads=2, mlp_dim=32, max_length=32
        ),
        optimizer=OptimizerConfig(peak_lr=1e-2),
        train=TrainConfig(steps=steps, num_evals=2, log_every=1),
    )
