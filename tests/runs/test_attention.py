"""How a run settles what computes its attention."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import pytest
from tiny_models import BERT

from jaxlm import config as configs
from jaxlm.config import FinetuneConfig, PretrainConfig
from jaxlm.data.labelled.dataset import LabelledConfig
from jaxlm.data.labelled.records import Table
from jaxlm.data.loader import DataConfig
from jaxlm.errors import InputError
from jaxlm.models.bilstm import BilstmConfig
from jaxlm.models.gpt2 import Gpt2Config
from jaxlm.models.llama import LlamaConfig
from jaxlm.models.modernbert import ModernBertConfig
from jaxlm.runs import finetuned, resume, steps
from jaxlm.runs.attention import settle
from jaxlm.train.loop import TrainConfig

SIZES = {"vocab_size": 32, "num_layers": 1, "hidden_dim": 16, "num_heads": 2, "mlp_dim": 24}
STEPS = TrainConfig(steps=1)
LABELLED = LabelledConfig(train=Table(path="x.csv"), max_length=64)
CONFIG = PretrainConfig(name="x", data=DataConfig(paths=("p",)), model=BERT, train=STEPS)


@pytest.mark.parametrize(
    "model", [BERT, Gpt2Config(**SIZES), LlamaConfig(**SIZES), ModernBertConfig(**SIZES)]
)
def test_the_model_is_told(model):
    config = replace(CONFIG, model=model)
    short, line = settle(config, 128, jax.devices())
    assert short.model.attention == "plain"
    assert line == "attention: plain, rows of up to 128 tokens have small squares of scores"
    long, line = settle(config, 2048, jax.devices())
    assert long.model.attention == "blockwise"
    assert "rows of up to 2,048 tokens" in line
    assert settle(replace(config, attention="plain"), 2048, jax.devices()).config.model == (
        replace(model, attention="plain")
    )


@pytest.mark.parametrize(
    "config", [BERT, Gpt2Config(**SIZES), LlamaConfig(**SIZES), ModernBertConfig(**SIZES)]
)
def test_the_model_does_as_told(config):
    tokens = jnp.zeros((1, 512), jnp.int32)

    def program(attention):
        model = replace(config, attention=attention, max_length=512).make()
        params = jax.eval_shape(model.init, jax.random.key(0), tokens[:, :8])
        return str(jax.make_jaxpr(lambda params: model.apply(params, tokens))(params))

    assert "pallas_call" in program("splash")
    assert "pallas_call" not in program(None)


def test_fine_tuning_is_told():
    config = FinetuneConfig(name="x", data=LABELLED, model=BERT, attention="blockwise", train=STEPS)
    assert settle(config, 64, jax.devices()).config.model.attention == "blockwise"


def test_a_kernel_that_cannot_run_is_refused():
    with pytest.raises(InputError, match="attention=splash cannot run here: it is a kernel for"):
        settle(replace(CONFIG, attention="splash"), 128, jax.devices())


def test_a_model_without_a_choice():
    config = replace(CONFIG, model=BilstmConfig(vocab_size=32))
    assert settle(config, 2048, jax.devices()) == (config, "")
    with pytest.raises(InputError, match="attention=blockwise, but BilstmConfig"):
        settle(replace(config, attention="blockwise"), 2048, jax.devices())


def test_a_run_of_other_devices_is_evaluated_as_suits_these():
    trained = replace(CONFIG, attention="splash", model=replace(BERT, attention="splash"))
    (here, line), length = steps.for_evaluation(trained), BERT.max_length
    assert here.model.attention == "plain"
    assert line == f"attention: plain, rows of up to {length} tokens have small squares of scores"
    assert steps.for_evaluation(trained, "blockwise").config.model.attention == "blockwise"


def test_rows_are_as_long_as_the_data_say():
    long = replace(CONFIG, model=replace(BERT, max_length=2048))
    assert steps.for_evaluation(long).config.model.attention == "blockwise"
    assert steps.for_evaluation(long, longest=128).config.model.attention == "plain"
    tuned = FinetuneConfig(name="x", data=LABELLED, model=long.model, train=STEPS)
    assert "up to 64 tokens" in steps.for_evaluation(tuned).line
    packed = replace(tuned, data=replace(LABELLED, pack=True))
    assert steps.for_evaluation(packed).config.model.attention == "blockwise"


TUNED = FinetuneConfig(name="x", data=LABELLED, model=BERT, train=STEPS)
SHARES = re.compile("pack|isolate|document")  # fields of tasks that put several texts into a row
H100 = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100", compute_capability="9.0")


def test_evaluation_drops_no_weights():
    """So that a kernel, which drops none, is chosen that training could not use."""
    model = replace(BERT, dtype="bfloat16", max_length=512, attention_dropout_rate=0.1)
    config = replace(CONFIG, model=model)
    assert "not cudnn: it drops no weights" in settle(config, 512, [H100]).line
    assert settle(config, 512, [H100], trains=False).config.model.attention == "cudnn"


def test_a_gpu_that_is_not_of_nvidia():
    mi300 = SimpleNamespace(platform="gpu", device_kind="MI300X", compute_capability="gfx942")
    config = replace(CONFIG, model=replace(BERT, dtype="bfloat16", max_length=2048))
    assert settle(config, 2048, [mi300]).config.model.attention == "blockwise"


def test_a_kernel_that_drops_no_weights_says_how_to_have_it():
    dropping = replace(BERT, dtype="bfloat16", max_length=512, attention_dropout_rate=0.1)
    config = replace(CONFIG, model=dropping)
    with pytest.raises(InputError, match=r"set model\.attention_dropout_rate to 0, or in fine-tun"):
        settle(config, 512, [H100], wanted="cudnn")
    without = replace(dropping, attention_dropout_rate=0.0)
    tuned = finetuned.with_encoder(replace(TUNED, dropout_rate=0.0), dropping, "gpu")
    for out in (replace(config, model=without), tuned):
        assert settle(out, 512, [H100], wanted="cudnn").config.model.attention == "cudnn"


@pytest.mark.parametrize("config_class", [PretrainConfig, FinetuneConfig])
def test_every_task_whose_rows_are_shared_rules_out_a_kernel(config_class):
    model = replace(BERT, dtype="bfloat16", max_length=512).with_dropout(0.0)
    config = CONFIG if config_class is PretrainConfig else TUNED
    tasks = [task() for task in get_args(get_type_hints(config_class)["task"])]
    sharing = [(task, name) for task in tasks for name in vars(task) if SHARES.search(name)]
    assert sharing
    for task, name in sharing:
        for shared in (True, False):
            one = replace(config, model=model, task=replace(task, **{name: shared}))
            chosen = settle(one, 512, [H100]).config.model.attention
            assert (chosen == "cudnn") is not shared, (task, name)


def test_rows_of_several_examples_rule_out_a_kernel():
    model = replace(BERT, dtype="bfloat16", max_length=512).with_dropout(0.0)
    config = replace(TUNED, model=model)
    assert settle(config, 512, [H100]).config.model.attention == "cudnn"
    packed = replace(config, data=replace(LABELLED, pack=True))
    assert "not cudnn: rows hold several documents" in settle(packed, 512, [H100]).line


def test_a_run_may_resume_on_other_devices(monkeypatch):
    now = replace(CONFIG, attention="splash")
    before = replace(CONFIG, model=replace(BERT, attention="plain"))
    one, other = map(configs.flatten, (now, before))
    assert {path for path in one if one[path] != other[path]} == {"attention", "model.attention"}
    monkeypatch.setattr(resume, "read_config", lambda *_: before)
    resume.check_config(Path("x"), now, {"examples_seen": 8, "share": 0.5})
