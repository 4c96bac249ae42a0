"""ModernBERT-base by the first phase of its recipe (Warner et al. 2024, section 2.2), on your text.

    python scripts/prepare.py --out prepared/corpus_1024 --row-length 1024 \\
        --tokenizer.path TOKENIZER text --glob 'corpus/*.txt'
    python scripts/pretrain.py configs/modernbert_base.py --mesh.fsdp 8

1.7 trillion tokens in batches of 4,608 rows of 1,024, 30 % of them masked, no dropout, a learning
rate that grows over 3 billion tokens, stays, and falls as 1 - sqrt over the last 50 billion. The
paper's batches grow to that size over the first 50 billion tokens, its optimizer is StableAdamW,
for which AdamW with gradients of a limited norm stands here, and it decays after a second phase on
rows of 8,192 tokens.

Hardware and time: not yet measured (the paper: 8 H100, 194.5 hours).
Expected: not yet measured.
"""

from jaxlm.config import PretrainConfig
from jaxlm.data.loader import DataConfig
from jaxlm.models import modernbert
from jaxlm.objectives.masking import MaskingConfig
from jaxlm.optim import OptimizerConfig
from jaxlm.tasks.masked_lm import MaskedLm
from jaxlm.train.loop import TrainConfig

ROWS, LENGTH, BILLIONS = 4608, 1024, 1719
STEPS = BILLIONS * 10**9 // (ROWS * LENGTH)

config = PretrainConfig(
    name="modernbert_base",
    data=DataConfig(paths=("prepared/corpus_1024",), batch_size=ROWS),
    model=modernbert.BASE,
    task=MaskedLm(masking=MaskingConfig(rate=0.30)),
    optimizer=OptimizerConfig(
        peak_lr=8e-4,
        schedule="wsd",
        warmup_share=3 / BILLIONS,
        decay_share=50 / BILLIONS,
        b1=0.9,
        b2=0.98,
        epsilon=1e-6,
        weight_decay=1e-5,
    ),
    train=TrainConfig(steps=STEPS, num_evals=100, save_every=1_000, log_every=100),
)
