"""Permutation language modelling: which models it takes, and how its blanks are filled in."""

import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_xlnet
from rich.console import Console
from tiny_runs import make_config

from jaxlm.data import tokenizers
from jaxlm.decode.generate import GenerateConfig
from jaxlm.errors import InputError
from jaxlm.models.bert import BertConfig
from jaxlm.models.bilstm import BilstmConfig
from jaxlm.models.gpt2 import Gpt2Config
from jaxlm.models.xlnet import XlnetConfig
from jaxlm.objectives.masking import ChoiceConfig
from jaxlm.optim import OptimizerConfig
from jaxlm.runs.folder import CHECKPOINTS
from jaxlm.runs.pretraining import pretrain
from jaxlm.sharding import MeshConfig
from jaxlm.tasks.causal_lm import CausalLm
from jaxlm.tasks.instruction import Instruction
from jaxlm.tasks.masked_lm import MaskedLm
from jaxlm.tasks.permutation_lm import PermutationLm
from jaxlm.tasks.task import Given
from jaxlm.train.metrics import read_jsonl
from jaxlm.train.restore import list_steps

SIZES = {"vocab_size": 64, "num_layers": 1, "hidden_dim": 16, "num_heads": 2, "mlp_dim": 32}
CONFIG = XlnetConfig(**SIZES)
UNI = XlnetConfig(**SIZES, attention="uni")
INSTRUCT = Instruction()


@pytest.mark.parametrize(
    ("task", "config", "message"),
    [
        (
            PermutationLm(),
            BertConfig(**SIZES),
            "BertConfig has not: use task=MaskedLm, or an XLNet",
        ),
        (PermutationLm(), BilstmConfig(vocab_size=8), "BilstmConfig has not: use task=MaskedLm"),
        (PermutationLm(), Gpt2Config(**SIZES), "Gpt2Config has not: use task=CausalLm, or an XLN"),
        (PermutationLm(), UNI, "this XlnetConfig reads one way: use attention=bi"),
        (CausalLm(), CONFIG, "XlnetConfig sees all of them: use task=MaskedLm, or one"),
        (CausalLm(), UNI, "models that write, which XlnetConfig does not: use a GPT-2 or a Llama"),
        (MaskedLm(), UNI, "XlnetConfig reads one way: use one that reads both, as a BERT"),
    ],
)
def test_models_that_lack_what_a_task_needs(task, config, message):
    with pytest.raises(InputError, match=message) as raised:
        task.make_model(config)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("config", [CONFIG, UNI])
def test_no_xlnet_follows_instructions(config):
    with pytest.raises(InputError, match="XlnetConfig"):
        INSTRUCT.make_model(config, (), 0.0)


def test_the_ways_out():
    for task in (MaskedLm(), PermutationLm()):
        task.make_model(CONFIG)
    CausalLm().make_model(Gpt2Config(**SIZES))


def ask(config, variables, tokenizer, *texts):
    given = [Given(i, f"x:{i}", text) for i, text in enumerate(texts)]
    return list(
        PermutationLm().answers(
            config, variables, tokenizer, given, top_k=3, generate=GenerateConfig()
        )
    )


@pytest.mark.parametrize("kind", ["own", "xlnet"])
def test_blanks_are_predicted_last_by_all_but_blanks(kind):
    if kind == "own":
        tokenizer = tokenizers.train("characters", ["abcdefgh ijkl"], 20)
    else:
        tokenizer = tiny_xlnet.tokenizer()
    model = PermutationLm().make_model(CONFIG)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda s: jnp.float32(rng.normal(size=s.shape) / 2), shapes)
    first, error, two = ask(CONFIG, variables, tokenizer, "ab[MASK]d", "abc", "[MASK]b[MASK]d")
    assert error == {"error": "x:1 has no blank: write [MASK] where a word is missing"}
    (blank,) = first["blanks"]
    text = "ab[MASK]d" if kind == "own" else "ab<mask>d"
    ids = np.array(tokenizer.encode(text).ids)[None]
    size = tokenizers.vocab_size(tokenizer)
    hidden = tokenizer.token_to_id("[MASK]" if kind == "own" else "<mask>")
    place = np.flatnonzero(ids[0] == hidden)
    # Whatever stands there is not looked at: the same with any other token, seen by nobody.
    for token in (hidden, ids[0, 0]):
        tokens = jnp.asarray(np.where(ids == hidden, token, ids), jnp.int32)
        seen = jnp.asarray(ids != hidden)[:, None, None]
        predicted = jnp.asarray(place[None], jnp.int32)
        logits = model.apply(variables, tokens, predicted, mask=seen, method="predict")
        expected = jax.nn.softmax(logits[0, 0, :size])
        best = np.argsort(-np.asarray(expected))[:3]
        found = [one["probability"] for one in blank]
        np.testing.assert_allclose(found, np.asarray(expected)[best], rtol=1e-4)
    assert len(two["blanks"]) == 2
    assert len(list(PermutationLm().lines(two))) == 6


def test_a_tokenizer_without_a_mask_has_no_blanks():
    tokenizer = tiny_xlnet.tokenizer()
    state = tokenizer.to_str().replace("<mask>", "<other>")
    with pytest.raises(InputError, match=r"no token \[MASK\] or <mask>, so that no text can have"):
        ask(CONFIG, {}, tokenizer.from_str(state), "a[MASK]")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory": -1}, "task.memory=-1 is below 0; 0 is none"),
        ({"memory": 4, "isolate_documents": True}, "isolate_documents hides others: leave out"),
    ],
)
def test_impossible_memories(changes, message):
    with pytest.raises(InputError, match=message):
        PermutationLm(**changes)


def test_a_memory_that_rows_have_not_is_refused_before_training(tmp_path):
    config = replace(make_config(tmp_path, steps=1), model=replace(CONFIG, vocab_size=None))
    with pytest.raises(InputError, match=r"memory=17 is more than the 16 tokens of the row before"):
        pretrain(replace(config, task=PermutationLm(memory=17)), console=Console(quiet=True))
    assert not config.directory.exists()


@pytest.mark.slow
def test_a_run_with_a_memory_is_the_same_on_a_mesh_and_when_it_is_resumed(tmp_path, monkeypatch):
    base = make_config(tmp_path, steps=6)
    model = replace(CONFIG, vocab_size=None, dtype="float32").with_dropout(0.0)
    optimizer = OptimizerConfig(peak_lr=1e-2)
    config = replace(base, model=model, task=PermutationLm(memory=8), optimizer=optimizer)
    config = replace(config, train=replace(config.train, num_evals=2, save_every=3, keep=9))
    runs = {
        "whole": config,
        "resumed": config,
        "mesh": replace(config, mesh=MeshConfig(fsdp=2, tensor=2)),
        "pmap": replace(config, placement="pmap"),
        "none": replace(config, task=PermutationLm()),
    }
    quiet = Console(quiet=True)
    for name, one in runs.items():
        folder = config.runs / name
        if name == "resumed":
            shutil.copytree(config.runs / "whole", folder)
            for step in list_steps(folder / CHECKPOINTS):
                if step > 3:
                    shutil.rmtree(folder / CHECKPOINTS / str(step))
        pretrain(replace(one, name=name), console=quiet)
    losses = {
        name: [
            x["eval/loss"]
            for x in read_jsonl(config.runs / name / "metrics.jsonl")
            if "eval/loss" in x
        ]
        for name in runs
    }
    for name in ("resumed", "mesh", "pmap"):
        assert losses[name] == pytest.approx(losses["whole"], rel=1e-5)
    assert losses["none"] != pytest.approx(losses["whole"], rel=1e-5)
    # What evaluates a run reads what is before each row, too.
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    importlib.import_module("evaluate").main(config.runs / "whole")
    found = json.loads((config.runs / "whole" / "eval.json").read_text())
    assert found["loss"] == pytest.approx(losses["whole"][-1], rel=1e-5)


def test_evaluation_has_one_rate():
    task = PermutationLm(choice=ChoiceConfig(rate=0.2, final_rate=0.4))
    assert task.for_evaluation().choice == ChoiceConfig(rate=0.2)
    assert task.num_predicted(100) == 40


def test_the_query_stream_counts():
    task = PermutationLm(choice=ChoiceConfig(rate=0.25))
    assert task.more_flops(CONFIG, 32) == CONFIG.query_flops(32, 8)
    assert CONFIG.query_flops(32, 16) > CONFIG.query_flops(32, 8)
    remembering = replace(task, memory=16)
    assert remembering.more_flops(CONFIG, 32) > task.more_flops(CONFIG, 32)
