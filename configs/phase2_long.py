"""ModernBERT's recipe on a laptop, 2 of 3: rows of 1,024, not of 128, at a lower rate.

    python scripts/pretrain.py configs/phase2_long.py

From phase1_short.py's parameters. Layers that see all of a row turn by larger wavelengths from here
on, a batch holds as many tokens as before in an eighth of the rows, and the rate is constant again.

Hardware and time: two CPU cores, ten minutes beside other work.
Expected: validation loss 3.30 on these rows at first, 3.01 at the end; see phase2_long.png.
"""

import runpy
from dataclasses import replace
from pathlib import Path

from jaxlm.train.loop import TrainConfig

parent = runpy.run_path(str(Path(__file__).with_name("phase1_short.py")))["config"]

config = replace(
    parent,
    name="phase2_long",
    base="runs/phase1_short",
    data=replace(
        parent.data, paths=("prepared/sotu_1024",), batch_size=8, ramp_sizes=(), ramp_steps=()
    ),
    prepare=replace(parent.prepare, row_length=1024),
    model=replace(parent.model, max_length=1024, global_rope_base=160_000.0),
    optimizer=replace(parent.optimizer, peak_lr=7.5e-4, warmup_steps=20),
    train=TrainConfig(steps=400),
)
