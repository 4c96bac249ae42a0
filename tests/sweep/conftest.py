from pathlib import Path

import pytest

from jaxlm.config import FinetuneConfig
from jaxlm.data.labelled.dataset import LabelledConfig
from jaxlm.data.labelled.records import Table
from jaxlm.peft.lora import LoraConfig
from jaxlm.train.loop import TrainConfig


@pytest.fixture
def config(tmp_path: Path) -> FinetuneConfig:
    (tmp_path / "data.csv").write_text("text,label\n")
    return FinetuneConfig(
        name="tiny",
        runs=tmp_path / "runs",
        base="nowhere",
        data=LabelledConfig(train=Table(path=str(tmp_path / "data.csv"))),
        tuning=LoraConfig(rank=4),
        train=TrainConfig(epochs=9.0),
    )
