"""English to German from scratch: the tiny Transformer of Wu et al. (2021) on Multi30k.

    python scripts/finetune.py configs/multi30k.py \\
        --data.train.source train.en --data.train.target train.de \\
        --data.validation.source val.en --data.validation.target val.de
    python scripts/evaluate.py runs/multi30k --data test.en --target test.de
    python scripts/predict.py runs/multi30k translate "Two dogs are playing in the snow."
    python scripts/predict.py runs/multi30k translate --file test.en --out test.hyp

Line n of one file goes with line n of the other; they may be compressed. Tables and JSON lines are
read as well: --data.train JsonLines --data.train.path pairs.jsonl --data.validation None
--task.fields.source en --task.fields.target de. The other way round: exchange source and target.
With a vocabulary each: --source-tokenizer.vocab-size 4096.

Source: Wu et al. 2021, arXiv:2105.14462, section 3 and appendix (4 layers of 128, label smoothing
0.1, a joint vocabulary, the mean of the last 10 checkpoints). Half their batch, less than half
their learning rate and vocabulary, and dropout 0.2 for 0.3: within an hour this learns far more.
Hardware and time: two CPU cores; 64 M tokens, of which idle cores read some 33,000 a second.
Expected: BLEU 38.5 and chrF 62.8 on test2016, with five beams.
"""

from dataclasses import replace

from jaxlm.config import FinetuneConfig
from jaxlm.data.labelled.dataset import LabelledConfig
from jaxlm.data.labelled.parallel import ParallelText
from jaxlm.data.tokenizers import TokenizerConfig
from jaxlm.models.transformer import TINY
from jaxlm.optim import OptimizerConfig
from jaxlm.tasks.seq2seq import Seq2Seq
from jaxlm.train.loop import TrainConfig

config = FinetuneConfig(
    name="multi30k",
    data=LabelledConfig(
        train=ParallelText(source="train.en", target="train.de"),
        validation=ParallelText(source="val.en", target="val.de"),
        max_length=128,
        batch_size=8,
        batch_tokens=2048,
        num_buckets=8,
    ),
    task=Seq2Seq(label_smoothing=0.1),
    model=replace(TINY, dropout_rate=0.2),
    tokenizer=TokenizerConfig(kind="bpe", vocab_size=4096),
    optimizer=OptimizerConfig(
        peak_lr=2e-3,
        schedule="inverse_sqrt",
        warmup_steps=1000,
        b2=0.98,
        epsilon=1e-9,
        weight_decay=0.0,
    ),
    train=TrainConfig(epochs=60.0, num_evals=60, average=10),
)
