"""BERT-base with the training of MosaicBERT (Portes et al. 2023, arXiv:2312.17482, section 3).

    python scripts/prepare.py --out prepared/corpus_128 --row-length 128 \\
        --tokenizer.vocab-size 30522 text --glob 'corpus/*.txt'
    python scripts/pretrain.py configs/mosaic_bert_style.py

30 % of the tokens masked, no dropout, AdamW with beta 0.9 / 0.98 and epsilon 1e-6, a warm-up over
6 % of the run, then linear decay to 2 % of the peak; 70,000 steps of 4,096 rows of 128 tokens.
The network is BERT's own: ALiBi and gated units are not part of it.

Hardware and time: not yet measured (the paper: 8 A100-80GB, about 1.1 hours to BERT's score).
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
    name="mosaic_bert_style",
    data=DataConfig(paths=("prepared/corpus_128",), batch_size=4096),
    model=dataclasses.replace(bert.BASE, dropout_rate=0.0, attention_dropout_rate=0.0),
    task=MaskedLm(masking=MaskingConfig(rate=0.30)),
    optimizer=OptimizerConfig(
        peak_lr=5e-4,
        warmup_share=0.06,
        final_lr_share=0.02,
        b1=0.9,
        b2=0.98,
        epsilon=1e-6,
        weight_decay=1e-5,
    ),
    train=TrainConfig(steps=70_000, num_evals=35, save_every=3_500),
)
