"""ModernBERT's recipe on a laptop, 3 of 3: the rate falls to nothing, by 1 - sqrt(progress).

    python scripts/pretrain.py configs/phase3_decay.py

From phase2_long.py's parameters and moments, so that it needs no warm-up, on the same rows.

Hardware and time: two CPU cores, five minutes beside other work.
Expected: validation loss 2.95.
"""

import runpy
from dataclasses import replace
from pathlib import Path

from jaxlm.train.loop import TrainConfig

parent = runpy.run_path(str(Path(__file__).with_name("phase2_long.py")))["config"]

config = replace(
    parent,
    name="phase3_decay",
    base="runs/phase2_long",
    base_moments=True,
    optimizer=replace(
        parent.optimizer,
        schedule="wsd",
        warmup_steps=None,
        warmup_share=0.0,
        decay_share=1.0,
        final_lr_share=0.001,
    ),
    train=TrainConfig(steps=200),
)
