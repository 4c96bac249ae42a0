"""Configurations: files, and the JSON of a run folder."""

import dataclasses
from pathlib import Path

import pytest

from jaxlm import config as configs
from jaxlm.config import PretrainConfig
from jaxlm.data.loader import DataConfig
from jaxlm.data.prepare import PrepareConfig
from jaxlm.data.sources import Csv, PyDocs
from jaxlm.errors import InputError
from jaxlm.models.bert import BertConfig
from jaxlm.train.loop import TrainConfig

FILE = """
from jaxlm.config import PretrainConfig
from jaxlm.data.loader import DataConfig
from jaxlm.models.bert import BertConfig
from jaxlm.train.loop import TrainConfig
data = DataConfig(paths=("b",))
config = PretrainConfig(name="a", data=data, model=BertConfig(), train=TrainConfig({}))
"""


def write(folder: Path, text: str) -> str:
    path = folder / "c.py"
    path.write_text(text)
    return str(path)


def test_misspelt_field_in_a_file_is_one_sentence(tmp_path: Path) -> None:
    path = write(tmp_path, FILE.format("step=5"))
    with pytest.raises(InputError, match=r"c\.py.*unexpected keyword argument 'step'"):
        configs.read_file(Path(path))


def test_file_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not end in"):
        configs.read_file(Path(write(tmp_path, "config = 3")))


@pytest.mark.parametrize("source", [PyDocs(), Csv(glob="*.csv", column="text", delimiter=";")])
def test_json_round_trip(source: object) -> None:
    config = PretrainConfig(
        name="a",
        data=DataConfig(paths=("b", "c"), weights=(1.0, 2.0)),
        model=BertConfig(),
        prepare=PrepareConfig(source=source),  # pyright: ignore[reportArgumentType]
        train=TrainConfig(minutes=3.0),
    )
    assert configs.from_json(configs.to_json(config)) == config


def test_a_class_that_no_union_holds_is_named() -> None:
    config = PretrainConfig(
        name="a", data=DataConfig(paths=("b",)), model=BertConfig(), train=TrainConfig(steps=5)
    )
    text = configs.to_json(config).replace('"BertConfig"', '"FNetConfig"')
    with pytest.raises(InputError, match=r"config\.model is a FNetConfig, .*none of Bert.*union"):
        configs.from_json(text)


def test_json_with_unknown_field_or_wrong_type() -> None:
    config = PretrainConfig(
        name="a",
        data=DataConfig(paths=("b",)),
        model=BertConfig(),
        train=TrainConfig(steps=5),
    )
    text = configs.to_json(config)
    with pytest.raises(InputError, match=r"config\.train has no field stepz"):
        configs.from_json(text.replace('"steps"', '"stepz"'))
    with pytest.raises(InputError, match=r"config\.train\.steps='5'"):
        configs.from_json(text.replace('"steps": 5', '"steps": "5"'))
    with pytest.raises(InputError, match="not JSON"):
        configs.from_json(text[:-5])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "are None"),
        ({"steps": 0}, r"train\.steps=0"),
        ({"minutes": -1.0}, r"train\.minutes=-1"),
        ({"steps": 1, "num_evals": 0}, r"train\.num_evals=0"),
    ],
)
def test_impossible_lengths_of_a_run(fields: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainConfig(**fields)  # pyright: ignore[reportArgumentType]


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig(steps=1).steps = 2  # pyright: ignore[reportAttributeAccessIssue]
