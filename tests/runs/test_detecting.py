"""A run of replaced-token detection as a base: for other libraries, for adapters, and for more."""

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console
from tiny_runs import make_config

from jaxlm.config import FinetuneConfig, PretrainConfig
from jaxlm.convert import huggingface
from jaxlm.convert.peft_save import WEIGHTS
from jaxlm.data.labelled.dataset import LabelledConfig
from jaxlm.data.labelled.records import Table
from jaxlm.data.prepared import open_prepared
from jaxlm.peft.tuning import LoraConfig
from jaxlm.runs import adapter, finetuned, finetuning, pretrained, pretraining, steps
from jaxlm.runs import base as bases
from jaxlm.runs.pretraining import pretrain
from jaxlm.tasks.masked_lm import MaskedLm
from jaxlm.tasks.replaced_token import ReplacedToken
from jaxlm.tasks.vocabulary import make_vocabulary

STEPS = 1


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = make_config(tmp_path_factory.mktemp("detecting"), steps=STEPS)
    train = replace(config.train, num_evals=1)
    return Path(str(pretrain(replace(config, task=ReplacedToken(), train=train))))


@pytest.fixture(scope="module")
def base(run: Path) -> bases.Base:
    return bases.load(str(run))


@pytest.fixture(scope="module")
def params(run: Path) -> dict[str, Any]:
    return jax.tree.map(np.asarray, dict(pretrained.open_pretrained(run).variables["params"]))


def check_published(folder: Path, params: dict[str, Any]) -> None:
    published = huggingface.load(folder)
    jax.tree.map(np.testing.assert_array_equal, published.params["encoder"], params["encoder"])
    assert published.lm_head is None


def test_it_is_published_without_its_head(
    run: Path,
    params: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # or the process would start anew
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    importlib.import_module("merge_lora").main(run, tmp_path / "out")
    said = "; its generator and head, which have no place there, stay behind"
    assert f"{run} at step {STEPS} is in {tmp_path / 'out'}{said}" in capsys.readouterr().out
    check_published(tmp_path / "out", params)


def test_adapters_of_it_are_written_with_it(
    base: bases.Base, params: dict[str, Any], tmp_path: Path
) -> None:
    said: list[str] = []
    config = FinetuneConfig(
        name="adapted",
        base=base.name,
        data=LabelledConfig(train=Table(path="x.csv"), batch_size=8),
        tuning=LoraConfig(),
        train=replace(pretraining_config(base).train, steps=1),
    )
    labels = ("cat", "dog")
    config = finetuning.resolve(config, base, base.tokenizer, jax.default_backend())
    config = steps.for_evaluation(config).config
    placement = finetuned.make_placement(config, labels, finetuned.make_init(config, labels))
    state = finetuned.make_state(config, labels, base, placement)
    places: Any = (placement, placement)
    loaded = finetuned.FinetunedRun(config, base.tokenizer, labels, state, *places, {}, (0,))
    named = adapter.export(loaded, tmp_path / "out", say=said.append)
    left = "its generator and head, which have no place there, stay behind"
    assert said == [f"{base.name} is in {tmp_path / 'out' / 'base'}; {left}"]
    assert (tmp_path / "out" / WEIGHTS).is_file()
    check_published(Path(named), params)


def pretraining_config(base: bases.Base) -> PretrainConfig:
    return pretrained.read_config(Path(base.name), PretrainConfig)


def next_phase(base: bases.Base, capsys: pytest.CaptureFixture[str], **changes: Any) -> Any:
    """The parameters that the next phase begins with, and what is said of them."""
    config = replace(pretraining_config(base), base=base.name, **changes)
    data = open_prepared(config.data.paths[0])
    placement = pretrained.make_placement(
        config, make_vocabulary(base.tokenizer, data.info.special)
    )
    given = pretraining.base_params(config, placement, base, base.tokenizer, Console(width=300))
    state = placement.init(jax.random.key(1), placement.put_params(given))
    (said,) = capsys.readouterr().out.splitlines()
    return state.trainable["params"], said.removeprefix(f"from {base.name}: ")


def test_a_further_phase_has_its_head_and_generator(
    base: bases.Base, params: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    found, said = next_phase(base, capsys)
    assert said == "encoder, head and generator"
    assert "generator" in found
    jax.tree.map(np.testing.assert_array_equal, found, params)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (ReplacedToken(generator_share=1.0), "encoder and head; its generator is new"),
        (
            MaskedLm(),
            "encoder; its head is new; its generator, for which this task has no place, is left "
            "behind",
        ),
    ],
)
def test_what_has_another_shape_is_new(
    base: bases.Base, capsys: pytest.CaptureFixture[str], task: Any, said: str
) -> None:
    assert next_phase(base, capsys, task=task)[1] == said
