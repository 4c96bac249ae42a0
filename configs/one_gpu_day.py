"""BERT-base for a day on one GPU, in the spirit of Cramming (Geiping and Goldstein 2022,
arXiv:2212.14034): on any hardware the run ends after 24 hours, its learning rate decayed.

    python scripts/prepare.py --out prepared/corpus_128_32k --row-length 128 \\
        --tokenizer.vocab-size 32768 text --glob 'corpus/*.txt'
    python scripts/pretrain.py configs/one_gpu_day.py

Packed rows of 128 tokens, no dropout, 25 % masked, a one-cycle learning rate tied to the clock,
gradients of 4,096 rows accumulated over micro-batches of 512, clipped at 0.5.

Hardware and time: one GPU, 24 hours.
Expected: not yet measured.
"""

import dataclasses

from jaxlm.config import PretrainConfig
from jaxlm.data.loader import DataConfig
from jaxlm.models import bert
from jaxlm.objectives.masking import MaskingConfig
from jaxlm.optim import OptimizerConfig
from jaxlm.tasks.masked_lm import MaskedLm
from jaxlm.train.loop import TrainConfig

config = PretrainConfig(
    name="one_gpu_day",
    data=DataConfig(paths=("prepared/corpus_128_32k",), batch_size=4096),
    model=dataclasses.replace(
        bert.BASE, dropout_rate=0.0, attention_dropout_rate=0.0, max_length=128
    ),
    task=MaskedLm(masking=MaskingConfig(rate=0.25)),
    optimizer=OptimizerConfig(
        peak_lr=1e-3, warmup_share=0.1, b2=0.98, weight_decay=0.01, clip_norm=0.5
    ),
    train=TrainConfig(minutes=24 * 60.0, num_micro_batches=8, num_evals=48, log_every=20),
)
