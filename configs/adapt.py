"""Continue pretraining the quickstart's model on the text of another field: SciPy's documentation.

    python scripts/pretrain.py configs/quickstart.py
    python scripts/pretrain.py configs/adapt.py
    python scripts/finetune.py configs/quickstart_lora.py --base runs/adapt \\
        --data.train.package scipy --name scipy_lora

Your own text, with nothing prepared before: --prepare.source TextFiles --prepare.source.glob
'texts/*.txt' --data.paths prepared/texts; any other model: --base bert-base-uncased, a folder in
Hugging Face's layout, or a run folder. The text is cut by the base's own tokenizer.

Hardware and time: two CPU cores, one minute.
Expected: validation loss 3.2 where the quickstart's model has 4.9; accuracy of the fine-tuned 0.80.
"""

from jaxlm.config import PretrainConfig
from jaxlm.data.loader import DataConfig
from jaxlm.data.prepare import PrepareConfig
from jaxlm.data.sources import PyDocs
from jaxlm.optim import OptimizerConfig
from jaxlm.train.loop import TrainConfig

config = PretrainConfig(
    name="adapt",
    base="runs/quickstart",
    data=DataConfig(paths=("prepared/scipy_docs",), batch_size=64),
    prepare=PrepareConfig(source=PyDocs(package="scipy"), row_length=64),
    optimizer=OptimizerConfig(name="muon", peak_lr=2e-3),
    train=TrainConfig(minutes=1.0),
)
