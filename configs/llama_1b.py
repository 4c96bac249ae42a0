"""A Llama of 1.1 billion parameters, of TinyLlama's sizes (Zhang et al. 2024), on your own text.

    python scripts/prepare.py --out prepared/corpus_2048 --row-length 2048 \\
        --tokenizer.path TOKENIZER text --glob 'corpus/*.txt'
    python scripts/pretrain.py configs/llama_1b.py --mesh.fsdp 8

Half a million tokens a batch, cosine decay to a tenth of the peak, every block recomputed in the
backward pass.

Hardware and time: not yet measured; compiled for 16 TPU v5e chips, on which it fits with
--train.num-micro-batches 2 (scripts/README.md).
Expected: not yet measured.
"""

from dataclasses import replace

from jaxlm.config import PretrainConfig
from jaxlm.data.loader import DataConfig
from jaxlm.models import llama
from jaxlm.optim import OptimizerConfig
from jaxlm.tasks.causal_lm import CausalLm
from jaxlm.train.loop import TrainConfig

config = PretrainConfig(
    name="llama_1b",
    data=DataConfig(paths=("prepared/corpus_2048",), batch_size=256),
    model=replace(llama.BASE, unroll=1, remat="full"),
    task=CausalLm(),
    optimizer=OptimizerConfig(
        schedule="cosine",
        peak_lr=4e-4,
        warmup_share=0.01,
        final_lr_share=0.1,
        b1=0.9,
        b2=0.95,
        epsilon=1e-8,
        weight_decay=0.1,
        clip_norm=1.0,
    ),
    train=TrainConfig(steps=100_000, num_evals=100, save_every=1_000, log_every=100),
)
