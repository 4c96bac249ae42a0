"""The classic baseline for the sentiment of film reviews: a bidirectional LSTM from scratch.

    python scripts/finetune.py configs/sst2_bilstm.py

Source and data: as sst2_lora.py.
Hardware and time: one CPU core, 2 minutes.
Expected: accuracy 0.798 (one seed).
"""

import runpy
from dataclasses import replace
from pathlib import Path

from jaxlm.data.labelled.classification import TextFields
from jaxlm.data.prepare import TokenizerConfig
from jaxlm.models.bilstm import BilstmConfig
from jaxlm.optim import OptimizerConfig
from jaxlm.peft.tuning import Full
from jaxlm.tasks.classification import Classification
from jaxlm.train.loop import TrainConfig

parent = runpy.run_path(str(Path(__file__).with_name("sst2_lora.py")))["config"]

config = replace(
    parent,
    name="sst2_bilstm",
    base=None,
    model=BilstmConfig(embed_dim=128, hidden_dim=256),
    tokenizer=TokenizerConfig(vocab_size=8192),
    task=Classification(fields=TextFields(text="text", label="label"), pooling="mean"),
    tuning=Full(),
    dropout_rate=0.3,
    optimizer=OptimizerConfig(peak_lr=2e-3),
    train=TrainConfig(epochs=6.0),
)
