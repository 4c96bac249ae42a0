"""A GPT-2 of 0.8 million parameters on Shakespeare, character by character.

    python scripts/pretrain.py configs/gpt_shakespeare.py

`shakespeare.txt` is the text to learn, for the figure below nine tenths of Tiny Shakespeare
(configs/README.md, "Shakespeare", has the command that cuts it). Sizes and training are those of
nanoGPT's recipe for a CPU (Karpathy 2022), 1.5 million characters in rows of 64, here in 3,000
batches of 8 where there they are 2,000 of 12. Paragraphs share rows and see each other, as they do
there.

Hardware and time: two CPU cores, two minutes.
Expected: loss 1.85 on the tenth that is kept apart (configs/README.md).
"""

from jaxlm.config import PretrainConfig
from jaxlm.data.loader import DataConfig
from jaxlm.data.prepare import PrepareConfig, TokenizerConfig
from jaxlm.data.sources import TextFiles
from jaxlm.models.gpt2 import Gpt2Config
from jaxlm.optim import OptimizerConfig
from jaxlm.tasks.causal_lm import CausalLm
from jaxlm.train.loop import TrainConfig

config = PretrainConfig(
    name="gpt_shakespeare",
    data=DataConfig(paths=("prepared/shakespeare",), batch_size=8),
    prepare=PrepareConfig(
        source=TextFiles(glob="shakespeare.txt"),
        tokenizer=TokenizerConfig(kind="characters", vocab_size=128),
        row_length=64,
        validation_fraction=0.02,
    ),
    model=Gpt2Config(
        num_layers=4, hidden_dim=128, num_heads=4, mlp_dim=512, max_length=64
    ).with_dropout(0.0),
    task=CausalLm(isolate_documents=False),
    optimizer=OptimizerConfig(
        name="adamw",
        peak_lr=1e-3,
        final_lr_share=0.1,
        warmup_share=0.05,
        b2=0.99,
        weight_decay=0.1,
    ),
    train=TrainConfig(steps=3000),
)
