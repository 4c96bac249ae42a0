"""ModernBERT-base by the first phase of its recipe (Warner et al. 2024, section 2.2), on your text.

    python scripts/prepare.py --out prepared/corpus_1024 --row-length 1024 \\
        --tokenizer.path TOKENIZER text --glob 'corpus/*.txt'
    python scripts/pretrain.py configs/modernbert_base.py --mesh.fsdp 8

1.7 trillion tokens in batches of 4,608 rows of 1,024, 30 % of them masked, no dropout, StableAdamW
with no other clipping. The batch grows in steps of 1,024 rows over the first 50 billion tokens (the
paper's from 768 rows, one by one), and the learning rate over the first 3 billion, and then it
stays: the paper's second phase, rows of 8,192 with larger wavelengths, and its third, the decay,
are phase2_long.py and phase3_decay.py in small.

Hardware and time: not yet measured (the paper: 8 H100, 194.5 hours).
Expected: not yet measured.
"""

from dataclasses import replace

from jaxlm.config import PretrainConfig
from jaxlm.data.loader import DataConfig
from jaxlm.models import modernbert
from jaxlm.objectives.masking import MaskingConfig
from jaxlm.optim import OptimizerConfig
from jaxlm.tasks.masked_lm import MaskedLm
from jaxlm.train.loop import TrainConfig

LENGTH, ROWS, TOKENS = 1024, 4608, 1_719 * 10**9
RAMP, RAMP_TOKENS, WARMUP_TOKENS = (1024, 2048, 3072, 4096), 50 * 10**9, 3 * 10**9
RAMP_STEPS = tuple(RAMP_TOKENS // len(RAMP) // (rows * LENGTH) for rows in RAMP)
PEAK_LR = 8e-4

config = PretrainConfig(
    name="modernbert_base",
    data=DataConfig(
        paths=("prepared/corpus_1024",), batch_size=ROWS, ramp_sizes=RAMP, ramp_steps=RAMP_STEPS
    ),
    model=replace(modernbert.BASE, global_rope_base=10_000.0),
    task=MaskedLm(masking=MaskingConfig(rate=0.30)),
    optimizer=OptimizerConfig(
        name="stable_adamw",
        peak_lr=PEAK_LR,
        schedule="constant",
        warmup_steps=WARMUP_TOKENS // (RAMP[0] * LENGTH),
        b1=0.9,
        b2=0.98,
        epsilon=1e-6,
        weight_decay=1e-5 / PEAK_LR,  # the paper's is not times the learning rate
        clip_norm=None,
    ),
    train=TrainConfig(
        steps=sum(RAMP_STEPS) + (TOKENS - RAMP_TOKENS) // (ROWS * LENGTH),
        num_evals=100,
        save_every=1_000,
        log_every=100,
    ),
)
