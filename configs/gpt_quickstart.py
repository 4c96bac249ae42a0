"""A small GPT-2 on the interpreter's own documentation: nothing to download.

    python scripts/pretrain.py configs/gpt_quickstart.py
    python scripts/predict.py runs/gpt_quickstart generate "Return the"

Hardware and time: two CPU cores, three minutes.
Expected: validation loss 4.21 after half of the time, whose checkpoint is used, and 4.44 at the
end, of 918 steps (unigram entropy 6.45).
"""

from jaxlm.config import PretrainConfig
from jaxlm.data.loader import DataConfig
from jaxlm.data.prepare import PrepareConfig, TokenizerConfig
from jaxlm.data.sources import PyDocs
from jaxlm.models.gpt2 import Gpt2Config
from jaxlm.optim import OptimizerConfig
from jaxlm.tasks.causal_lm import CausalLm
from jaxlm.train.loop import TrainConfig

config = PretrainConfig(
    name="gpt_quickstart",
    data=DataConfig(paths=("prepared/pydocs_bpe",), batch_size=32),
    prepare=PrepareConfig(
        source=PyDocs(), tokenizer=TokenizerConfig(kind="bpe", vocab_size=4096), row_length=128
    ),
    model=Gpt2Config(
        num_layers=4, hidden_dim=128, num_heads=4, mlp_dim=512, max_length=256
    ).with_dropout(0.0),
    task=CausalLm(),
    optimizer=OptimizerConfig(name="muon", peak_lr=5e-3),
    train=TrainConfig(minutes=2.75),
)
