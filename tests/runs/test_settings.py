"""No setting does nothing: another value of it changes the step, or is refused, or is said to be
idle. Field by field for what decides the step; ``test_command_line.py`` holds that all are read.
"""

import dataclasses
import re
from dataclasses import replace
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import BERT

from jaxlm.config import FinetuneConfig, PretrainConfig
from jaxlm.data.labelled.dataset import LabelledConfig
from jaxlm.data.labelled.records import Table
from jaxlm.data.loader import DataConfig
from jaxlm.errors import InputError
from jaxlm.models.bilstm import BilstmConfig
from jaxlm.objectives.masking import MaskingConfig, Vocabulary
from jaxlm.optim import OptimizerConfig, make_optimizer, make_schedule
from jaxlm.peft.lora import LoraConfig
from jaxlm.runs import command_line, finetuned, pretrained
from jaxlm.runs.idle import idle
from jaxlm.sweep.space import replaced
from jaxlm.tasks.masked_lm import MaskedLm
from jaxlm.train.loop import TrainConfig

VOCABULARY = Vocabulary(
    mask_id=4,
    start_id=2,
    end_id=3,
    ordinary=jnp.arange(5, 32),
    is_ordinary=jnp.arange(32) >= 5,
    word_starts=jnp.arange(32) >= 5,
)
MODEL = replace(BERT, dtype="float32", dropout_rate=0.1, attention_dropout_rate=0.1, unroll=2)
TUNED = FinetuneConfig(
    name="a",
    data=LabelledConfig(train=Table(path="a.csv"), batch_size=16),
    model=MODEL,
    train=TrainConfig(steps=10),
)
BASED = replace(TUNED, base="b", model=None, tuning=LoraConfig(rank=2))
PRETRAINED = PretrainConfig(
    name="a",
    data=DataConfig(paths=("p",), batch_size=16),
    model=MODEL,
    train=TrainConfig(steps=10),
)
LSTM = BilstmConfig(vocab_size=32, embed_dim=8, num_layers=2, hidden_dim=8, dtype="float32")


@cache
def update_of(config: OptimizerConfig) -> str:
    """The optimizer alone, as a program, and its learning rates."""
    optimizer, schedule = make_optimizer(config), make_schedule(config)
    params = {"layers": {"up": {"kernel": jnp.ones((2, 3, 4)), "bias": jnp.ones((2, 4))}}}

    def update(params: Any) -> Any:
        return optimizer.update(params, optimizer.init(params), params)

    rates = [float(schedule(jnp.float32(x))) for x in (0.01, 0.5, 0.9, 1.0)]
    return re.sub(r"0x[0-9a-f]+", "", f"{jax.make_jaxpr(update)(params)} {rates}")


@cache
def step_of(config: Any) -> str:
    """The training and evaluation steps, and the first state, as programs."""
    if isinstance(config, PretrainConfig):
        placement = pretrained.make_placement(config, VOCABULARY)
        start = str(jax.make_jaxpr(placement.init)(jax.random.key(0)))
        shape = lambda dtype, *sizes: jax.ShapeDtypeStruct(sizes, dtype)
        rows = config.data.batch_size
        batch = {"tokens": shape(jnp.int32, rows, 8)}
        batch |= {name: shape(jnp.int32, rows) for name in ("lengths", "index")}
    else:
        model = config.model or replace(MODEL, dtype=None)
        config = finetuned.with_encoder(config, model, "cpu")
        labels = ("B-a", "B-b", "O")
        make = lambda: finetuned.make_state(config, labels, None)
        start = str(jax.make_jaxpr(make)())
        placement = finetuned.make_placement(config, labels, jax.eval_shape(make))
        batch = config.task.abstract_batch(config.data.batch_size, 8, len(labels))
    state = placement.abstract_state
    train = jax.make_jaxpr(placement.train_step)(state, batch, np.float32(0.5))
    shardings = [str(leaf.sharding) for leaf in jax.tree.leaves(state)]
    text = f"{start} {train} {shardings}"
    if isinstance(config, PretrainConfig):
        text += str(jax.make_jaxpr(placement.eval_step)(state, batch))
    return re.sub(r"0x[0-9a-f]+", "", text)


OTHER: dict[str, Any] = {  # where no other value follows from the type
    "task.masking.final_rate": 0.4,
    "task.eval_masking.final_rate": 0.4,
    "task.masking.budget": 3,
    "task.eval_masking.budget": 3,
    "tuning.ranks": (3,),
    "tuning.targets": ("key/kernel",),
    "tuning.outputs": ("query/kernel",),
    "tuning.inputs": ("mlp/up/kernel",),
    "optimizer.clip_norm": 2.0,
    "optimizer.layer_decay": 0.5,
    "dropout_rate": 0.3,
    "dtype": "bfloat16",
    "model.max_length": 16,
    "model.hidden_dim": 32,
    "model.num_heads": 4,
    "model.vocab_size": 64,
    "mesh.data": 4,
    "task.mean_span": 5.0,
    "task.temperature": 0.1,
}


def other(hint: Any, path: str, value: Any) -> Any:
    if path in OTHER:
        return OTHER[path]
    (kind, *_) = [k for k in command_line.alternatives(hint) if k is not type(None)]
    if get_origin(kind) is Literal:
        return next(option for option in get_args(kind) if option != value)
    if kind is bool:
        return not value
    return {int: lambda x: 2 * (x or 1) + (x == 0), float: lambda x: 0.7 * (x or 0.1)}[kind](value)


def fields_of(config: Any, path: str) -> list[str]:
    part = config
    for name in path.split("."):
        part = vars(part)[name]
    return [
        f"{path}.{name}" for name in vars(part) if not dataclasses.is_dataclass(vars(part)[name])
    ]


def with_optimizer(**changes: Any) -> Any:
    return replace(TUNED, optimizer=OptimizerConfig(**changes))


SPANS = MaskedLm(masking=MaskingConfig(unit="span"), eval_masking=MaskingConfig(unit="span"))
PARTS = {
    "adamw": (with_optimizer(), ["optimizer"]),
    "lamb": (with_optimizer(name="lamb", schedule="cosine"), ["optimizer"]),
    "adafactor": (with_optimizer(name="adafactor", schedule="inverse_sqrt"), ["optimizer"]),
    "muon": (with_optimizer(name="muon", schedule="wsd"), ["optimizer"]),
    "lora": (BASED, ["tuning"]),
}
ALSO = {  # fields of the whole config
    "lora": ["dropout_rate", "dtype", "frozen_dtype", "train.seed", "train.num_micro_batches"],
}
# Of the task, what decides how data are read and measured, and not the step.
ELSEWHERE = {"task.entities", "task.min_similarity"}
# Where nothing is left to differ: of a base, the model is not known before it is read; a stack of
# two in one loop or in none is one program but for the loop.
CASES = [
    (name, path)
    for name, (config, parts) in PARTS.items()
    for path in [p for part in parts for p in fields_of(config, part)] + ALSO.get(name, [])
    if path not in ELSEWHERE
]


@pytest.mark.parametrize(("name", "path"), CASES)
def test_another_value_changes_the_step(name: str, path: str) -> None:
    config = PARTS[name][0]
    *above, last = path.split(".")
    part = config
    for step in above:
        part = vars(part)[step]
    hint = get_type_hints(type(part))[last]
    try:
        changed = replaced(config, {path: other(hint, path, vars(part)[last])})
        if above == ["optimizer"]:
            same = update_of(changed.optimizer) == update_of(config.optimizer)
        else:
            same = step_of(changed) == step_of(config)
    except InputError:
        return  # refused
    # What is idle is said to be, and only that.
    assert same is (path in idle(config)), (path, idle(config).get(path))


def test_what_is_idle_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--optimizer.decay-share", "0.3", "--train.eval-rows", "5", "--train.seed", "1"]
    command_line.changed(TUNED, options, prog="test")
    said = capsys.readouterr().err
    assert "optimizer.decay_share has no effect: optimizer.schedule is linear, not wsd" in said
    assert "train.eval_rows has no effect" in said
    assert "seed" not in said


def test_evaluation_has_one_masking_rate() -> None:
    with pytest.raises(InputError, match=r"final_rate=0\.4, but evaluation hides the same all"):
        MaskedLm(eval_masking=MaskingConfig(final_rate=0.4))
