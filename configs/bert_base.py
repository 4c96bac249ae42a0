"""BERT-base as published (Devlin et al. 2018, appendix A.2), on your own text.

    python scripts/prepare.py --out prepared/corpus_512 --row-length 512 \\
        --tokenizer.vocab-size 30522 text --glob 'corpus/*.txt'
    python scripts/pretrain.py configs/bert_base.py --mesh.fsdp 8

A million steps of 256 rows, 15 % of the tokens masked, AdamW at 1e-4 with 10,000 steps of
warm-up, then linear decay to 0. The paper trains nine tenths of the steps on rows of 128 tokens;
here all rows have the length they were prepared with.

Hardware and time: not yet measured (the paper: 16 TPU v2 chips, four days).
Expected: not yet measured.
"""

from jaxlm.config import PretrainConfig
from jaxlm.data.loader import DataConfig
from jaxlm.models import bert
from jaxlm.objectives.masking import MaskingConfig
from jaxlm.optim import OptimizerConfig
from jaxlm.tasks.masked_lm import MaskedLm
from jaxlm.train.loop import TrainConfig

STEPS = 1_000_000

config = PretrainConfig(
    name="bert_base",
    data=DataConfig(paths=("prepared/corpus_512",), batch_size=256),
    model=bert.BASE,
    task=MaskedLm(masking=MaskingConfig(rate=0.15)),
    optimizer=OptimizerConfig(
        peak_lr=1e-4, warmup_share=10_000 / STEPS, b1=0.9, b2=0.999, weight_decay=0.01
    ),
    train=TrainConfig(steps=STEPS, num_evals=100, save_every=1_000, log_every=100),
)
