"""Which values the fields of a config take, and in which combinations."""

from dataclasses import replace

import numpy as np
import pytest

from jaxlm.config import FinetuneConfig
from jaxlm.data.labelled.records import JsonLines
from jaxlm.errors import InputError
from jaxlm.peft.ia3 import Ia3Config
from jaxlm.peft.lora import LoraConfig
from jaxlm.peft.tuning import Full, HeadOnly
from jaxlm.runs import command_line
from jaxlm.sweep.space import Range, candidates, label, read_space, replaced

LR = "optimizer.peak_lr"


def test_values_have_the_types_of_their_fields(config: FinetuneConfig) -> None:
    texts = [
        "optimizer.peak-lr=1e-3,0.001,3e-3",
        "tuning.rank=4,8",
        "optimizer.clip_norm=None,1",
        "optimizer.name=adamw,lamb",
        "tuning.targets=query/kernel value/kernel,out/kernel",
        "data.few_shot=8",
        "data.train.header=true,False",
        "tuning.ranks=None,4 8",
    ]
    assert read_space(config, texts) == {
        LR: (0.001, 0.003),
        "tuning.rank": (4, 8),
        "optimizer.clip_norm": (None, 1.0),
        "optimizer.name": ("adamw", "lamb"),
        "tuning.targets": (("query/kernel", "value/kernel"), ("out/kernel",)),
        "data.few_shot": (8,),
        "data.train.header": (True, False),
        "tuning.ranks": (None, (4, 8)),
    }
    assert read_space(config, [f"{LR}=1e-5..1e-3:log", "tuning.rank=2..16"]) == {
        LR: Range(1e-5, 1e-3, is_log=True, is_whole=False),
        "tuning.rank": Range(2.0, 16.0, is_log=False, is_whole=True),
    }
    assert read_space(config, ["base=../a,../b"]) == {"base": ("../a", "../b")}  # no ranges


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer.lr=1", r"optimizer has no field lr; it has name, peak_lr, schedule"),
        ("optimiser.peak_lr=1", r"the config has no field optimiser; it has .*optimizer"),
        ("model.num_layers=1", r"model is None, which has no fields; put -- --model BertConfig or"),
        ("data.train=TfdsRecords", r"TfdsRecords needs more .* put -- --data.train TfdsRecords"),
        (f"{LR}.x=1", r"peak_lr is 0\.0005, which has no fields"),
        (f"{LR}=1e-3,fast", r"'fast' is not of type float"),
        ("tuning.rank=1.5", r"'1\.5' is not of type int"),
        ("optimizer.name=sgd", r"'sgd' is not of type Literal.*adamw"),
        ("tuning=Lora", r"Lora is not one of .*LoraConfig"),
        (LR, "names no values"),
        (f"{LR}=", "names no values"),
        ("train.seed=1,2", "--seeds says"),
        ("train.average=None,3", "compared by single checkpoints"),
        ("monitor=loss,accuracy", "--metric sets it"),
        (f"{LR}=1e-3..1e-5", "its ends must be finite and ascending"),
        (f"{LR}=0..1e-5:log", "its ends must be finite and ascending, above 0"),
        (f"{LR}=0..inf", "its ends must be finite"),
        (f"{LR}=nan..1", "its ends must be finite"),
        ("tuning.targets='query/kernel,out/kernel", '"\'query/kernel" is not of type tuple'),
    ],
)
def test_what_cannot_be_varied_is_one_sentence(
    config: FinetuneConfig, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=message):
        read_space(config, [text])
    assert capsys.readouterr() == ("", "")


def test_given_twice(config: FinetuneConfig) -> None:
    with pytest.raises(InputError, match="given twice"):
        read_space(config, [f"{LR}=1", f"{LR}=2"])


def test_grid(config: FinetuneConfig) -> None:
    space = read_space(config, [f"{LR}=1e-3,3e-3", "tuning.rank=4,8"])
    found = candidates(config, space, num_random=None, seed=0)
    assert [tuple(settings.values()) for settings in found] == [
        (0.001, 4), (0.001, 8), (0.003, 4), (0.003, 8)
    ]  # fmt: skip
    space = read_space(config, [f"{LR}=1e-3..3e-3"])
    with pytest.raises(InputError, match="add --random"):
        candidates(config, space, num_random=None, seed=0)


def test_fields_without_a_place_are_left_out(config: FinetuneConfig) -> None:
    config = replace(config, tuning=Full())
    with pytest.raises(InputError, match="tuning has no field rank"):
        read_space(config, ["tuning.rank=4,8"])
    space = read_space(config, ["tuning=Full,LoraConfig", "tuning.rank=4,8"])
    found = candidates(config, space, num_random=None, seed=0)
    assert [label(settings) for settings in found] == [
        "tuning=Full",
        "tuning=LoraConfig, tuning.rank=4",
        "tuning=LoraConfig, tuning.rank=8",
    ]
    assert replaced(config, found[2]).tuning == LoraConfig(rank=8)
    # What is inside may be named before what it is inside of.
    turned = candidates(
        replace(config, tuning=LoraConfig()),
        read_space(
            replace(config, tuning=LoraConfig()), ["tuning.rank=4,8", "tuning=Full,LoraConfig"]
        ),
        num_random=None,
        seed=0,
    )
    assert [label(settings) for settings in turned] == [
        "tuning=Full",
        "tuning.rank=4, tuning=LoraConfig",
        "tuning.rank=8, tuning=LoraConfig",
    ]


def test_classes_are_named_as_on_the_command_line(config: FinetuneConfig) -> None:
    space = read_space(config, ["tuning=head-only,LoraConfig,ia3config", "data.train=JsonLines"])
    path = config.data.train.path  # pyright: ignore[reportAttributeAccessIssue]
    assert space == {
        "tuning": (HeadOnly(), LoraConfig(rank=4), Ia3Config()),  # the config's rank, not 8
        "data.train": (JsonLines(path=path),),
    }
    for tuning in ("HeadOnly", "LoraConfig", "Ia3Config"):
        options = ["--tuning", tuning, "--data.train", "JsonLines"]
        changed = command_line.changed(config, options, prog="test")
        assert changed.tuning in space["tuning"]  # pyright: ignore
        assert changed.data.train in space["data.train"]  # pyright: ignore


def test_random_draws(config: FinetuneConfig) -> None:
    space = read_space(
        config, [f"{LR}=1e-5..1e-1:log", "tuning.rank=1..3", "optimizer.weight_decay=0..1"]
    )
    drawn = candidates(config, space, num_random=200, seed=0)
    assert drawn[:20] == candidates(config, space, num_random=20, seed=0)
    assert drawn[:20] != candidates(config, space, num_random=20, seed=1)
    rates = np.log10([settings[LR] for settings in drawn])
    assert (rates.min(), rates.max()) == (pytest.approx(-5, abs=0.2), pytest.approx(-1, abs=0.2))
    assert np.mean(rates < -3) == pytest.approx(0.5, abs=0.12)
    ranks = [settings["tuning.rank"] for settings in drawn]
    assert {type(rank) for rank in ranks} == {int}
    assert min(ranks.count(rank) for rank in (1, 2, 3)) > 40
    assert np.mean([s["optimizer.weight_decay"] for s in drawn]) == pytest.approx(0.5, abs=0.1)
    few = read_space(config, ["tuning.rank=4,8"])
    assert len(candidates(config, few, num_random=20, seed=0)) == 2  # each once


def test_fields_are_replaced_together() -> None:
    part = LoraConfig(targets=("a",), ranks=(1,))
    new = replaced(part, {"targets": ("a", "b"), "ranks": (1, 2)})  # neither is possible alone
    assert new == LoraConfig(targets=("a", "b"), ranks=(1, 2))
