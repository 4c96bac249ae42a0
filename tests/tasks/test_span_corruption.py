"""Span corruption: a run that learns it, fills in blanks, is evaluated, exported and tuned."""

import importlib
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from tiny_runs import make_config

from jaxlm.config import FinetuneConfig
from jaxlm.convert import huggingface
from jaxlm.data import tokenizers
from jaxlm.data.labelled.dataset import LabelledConfig
from jaxlm.data.labelled.records import JsonLines
from jaxlm.data.prepare import TokenizerConfig
from jaxlm.decode.beam import BeamConfig
from jaxlm.decode.generate import GenerateConfig
from jaxlm.errors import InputError
from jaxlm.models.bert import BertConfig
from jaxlm.models.gpt2 import Gpt2Config
from jaxlm.models.t5 import T5Config
from jaxlm.objectives.span_corruption import SpanConfig
from jaxlm.optim import OptimizerConfig
from jaxlm.runs.finetuning import finetune
from jaxlm.runs.pretrained import flops_per_token, open_pretrained
from jaxlm.runs.pretraining import pretrain
from jaxlm.tasks.causal_lm import CausalLm
from jaxlm.tasks.masked_lm import MaskedLm
from jaxlm.tasks.permutation_lm import PermutationLm
from jaxlm.tasks.replaced_token import ReplacedToken
from jaxlm.tasks.seq2seq import Seq2Seq
from jaxlm.tasks.span_corruption import SpanCorruption
from jaxlm.tasks.task import Given
from jaxlm.tasks.vocabulary import make_vocabulary
from jaxlm.train.loop import TrainConfig

WORDS = ["red", "green", "blue", "cat", "dog", "sun", "moon"]
# Of one token each: how long spans are is not to be guessed.
TASK = SpanCorruption(spans=SpanConfig(noise_density=0.3, mean_span=1.0))
QUIET = Console(quiet=True)


def config_in(folder: Path, steps: int):
    """Of lines that say a word again and again."""
    config = make_config(folder, steps=steps)
    lines = (" ".join([word] * size) for word in WORDS for size in range(20, 60))
    (folder / "text.txt").write_text("\n".join(lines))
    assert config.prepare is not None
    wanted = TokenizerConfig(vocab_size=80, sentinels=8)
    return replace(
        config,
        prepare=replace(config.prepare, tokenizer=wanted),
        model=T5Config(
            num_layers=1, hidden_dim=32, num_heads=2, head_dim=16, mlp_dim=64, dropout_rate=0.0
        ),
        task=TASK,
        optimizer=OptimizerConfig(peak_lr=1e-2),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrain(config_in(tmp_path_factory.mktemp("spans"), 150), console=QUIET)


@pytest.fixture(scope="module")
def loaded(run: Path):
    return open_pretrained(run)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # or the process would start anew
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    return importlib.import_module


@pytest.mark.slow
def test_it_learns_and_is_evaluated(run: Path, script, capsys):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line for line in found if "eval/loss" in line]
    assert evaluated[-1]["eval/loss"] < 0.5
    assert evaluated[-1]["eval/perplexity"] == pytest.approx(
        math.exp(evaluated[-1]["eval/loss"]), rel=1e-5
    )
    script("evaluate").main(run)
    assert "perplexity" in capsys.readouterr().out


TEXT = "cat cat [MASK] cat cat cat <extra_id_0> cat cat"


@pytest.mark.slow
def test_blanks_are_filled(run: Path, script, tmp_path: Path):
    (tmp_path / "in.txt").write_text(f"{TEXT}\n{TEXT.replace('cat', 'moon')}\nred green\n")
    out = tmp_path / "out.jsonl"
    script("predict").main(run, "fill-spans", file=tmp_path / "in.txt", out=out)
    *filled, wrong = map(json.loads, out.read_text().splitlines())
    for answer, word in zip(filled, ("cat", "moon"), strict=True):
        assert answer["spans"] == [word, word]
        assert set(answer["filled"].split()) == {word}
        assert list(TASK.lines(answer)) == [answer["filled"]]
    assert "has no blank: write [MASK] or <extra_id_0> where words are missing" in wrong["error"]


@pytest.mark.slow
def test_the_likeliest_are_searched(run: Path, script, capsys):
    script("predict").main(run, "fill-spans", TEXT, beam=BeamConfig(n_best=2))
    first, second = capsys.readouterr().out.splitlines()
    assert float(first.split()[0]) > float(second.split()[0])
    assert set(first.split()[1:]) == {"cat"}


@pytest.mark.slow
def test_texts_that_cannot_be_filled(loaded):
    eight, seven = "[MASK] red " * 8, "[MASK] red " * 7
    answers = loaded.answer([eight, seven, "red " * 1100 + "[MASK]"])
    assert answers[0]["error"].endswith("has 8 blanks, and the tokenizer is for 7")
    assert len(answers[1]["spans"]) == 7
    assert "tokens, more than the model's 1024" in answers[2]["error"]


@pytest.mark.slow
def test_what_is_sampled_depends_on_its_own_number(loaded):
    sampled = GenerateConfig(temperature=3.0, max_new_tokens=8)
    text = "red [MASK] blue cat"
    together = loaded.answer(["red", "moon [MASK] green", text], generate=sampled)
    instead = loaded.answer(["[MASK] red", "[MASK]", text], generate=sampled)
    assert together[2] == instead[2]
    assert together[2]["spans"] != loaded.answer([text])[0]["spans"]


def test_spans_that_are_not_written_are_none():
    """Of a model that ends at once."""
    tokenizer = tokenizers.train("characters", ["abcdefgh"], 20, sentinels=4)
    config = replace(config_of(tokenizer), scale_outputs=False)
    model = TASK.make_model(config)
    side = jnp.zeros((1, 4), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), side, side)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
    given = [Given(0, "x:1", "ab<extra_id_0>c")]
    options = {"top_k": 1, "generate": GenerateConfig(banned_tokens=("[PAD]",), max_new_tokens=1)}
    (answer,) = TASK.answers(config, params, tokenizer, given, **options)
    assert answer["spans"] == [None]
    assert answer["filled"] == "abc"
    assert answer["text"] == "ab<extra_id_0>c"


def test_what_is_wrong_or_without_text_changes_no_other():
    """The latter is counted, but not given."""
    tokenizer = tokenizers.train("characters", ["abcdefgh"], 20, sentinels=4)
    config = replace(config_of(tokenizer), scale_outputs=False)
    model = TASK.make_model(config)
    side = jnp.zeros((1, 4), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), side, side)
    banned = tuple(sorted(tokenizer.get_vocab().keys() - {"<extra_id_0>", "d", "e", "f", "g"}))
    sampled = GenerateConfig(max_new_tokens=16, temperature=1.0, banned_tokens=banned)

    def spans(given):
        return list(TASK.answers(config, params, tokenizer, given, top_k=1, generate=sampled))

    texts = {0: "ab[MASK]c", 1: "no blank", 3: "ab[MASK]c", 4: "[MASK]ab"}
    given = [Given(i, f"x:{i}", text) for i, text in texts.items()]
    found = spans(given)
    assert "has no blank" in found[1]["error"]
    for i in (0, 2, 3):
        assert spans([given[i]]) == [found[i]]
    assert found[0]["filled"] != found[2]["filled"]
    assert "error" in spans([given[1]])[0]


def config_of(tokenizer) -> T5Config:
    size = tokenizers.vocab_size(tokenizer)
    return T5Config(vocab_size=size, num_layers=1, hidden_dim=8, num_heads=1, head_dim=8, mlp_dim=8)


@pytest.mark.slow
def test_the_run_is_a_base_for_fine_tuning_and_for_others(run: Path, loaded, tmp_path: Path):
    params = jax.device_get(loaded.variables["params"])
    saved = tmp_path / "published"
    huggingface.save(saved, params, loaded.config.model, loaded.tokenizer)
    back = huggingface.load(str(saved))
    sides = (jnp.arange(12)[None], jnp.arange(5)[None])
    ours = loaded.model.apply(loaded.variables, *sides)
    model = TASK.make_model(back.config)
    params = jax.tree.map(jnp.asarray, back.params)
    theirs = model.apply({"params": params}, *sides)
    np.testing.assert_allclose(theirs, ours, atol=1e-5)
    pairs = itertools.product(WORDS, repeat=2)
    rows = [{"source": f"{a} {b}", "target": f"{b} {a}"} for a, b in pairs]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for base in (run, saved):
        tuned = finetune(
            FinetuneConfig(
                name=base.name,
                runs=tmp_path,
                base=str(base),
                data=LabelledConfig(
                    train=JsonLines(path=str(tmp_path / "data.jsonl")),
                    validation_fraction=0.5,
                    batch_size=8,
                    max_length=8,
                ),
                task=Seq2Seq(num_samples=0, num_scored=0),
                train=TrainConfig(steps=1, num_evals=1),
            ),
            console=QUIET,
        )
        assert (tuned / "config.json").is_file()


@pytest.mark.slow
def test_flops_are_of_both_sides(loaded):
    config = loaded.config
    expected = 3 * config.model.forward_flops(16 - 5 + 5 + 1, 5 + 5 + 2) / 16
    assert flops_per_token(config, 16) == pytest.approx(expected)


@pytest.mark.slow
def test_sentinels_of_a_tokenizer(loaded):
    tokenizer = loaded.tokenizer
    size = tokenizers.vocab_size(tokenizer)
    vocabulary = make_vocabulary(tokenizer)
    assert vocabulary.spans is not None
    assert vocabulary.spans.sentinels == tuple(range(size - 1, size - 9, -1))
    assert vocabulary.spans[:2] == (2, 3)
    assert not vocabulary.is_ordinary[size - 8 :].any()
    assert tokenizer.encode("red <extra_id_1>green").ids[2] == size - 2


@pytest.mark.parametrize(
    ("task", "model", "message"),
    [
        (TASK, BertConfig(vocab_size=8), "BertConfig is one of them alone: use task=MaskedLm, or"),
        (TASK, Gpt2Config(vocab_size=8), "Gpt2Config is one of them alone: use task=CausalLm, or"),
        *[
            (task, T5Config(vocab_size=8), "writes a target: use task=SpanCorruption, or an encod")
            for task in (MaskedLm(), CausalLm(), PermutationLm(), ReplacedToken())
        ],
    ],
)
def test_models_that_lack_what_a_task_needs(task, model, message):
    with pytest.raises(InputError, match=message) as raised:
        task.make_model(model)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("sentinels", "mean_span", "message"),
    [
        (0, 2.0, "has no sentinels <extra_id_0>, <extra_id_1>, …, which stand for hidden spans"),
        (2, 2.0, "needs? 3 sentinels, and the tokenizer has 2: prepare shorter rows, or the text"),
        (8, 6.0, "mean_span=6.0 is more than the 5 tokens that noise_density=0.3 hides of a row"),
    ],
)
def test_what_is_missing_is_said_before_training(tmp_path, sentinels, mean_span, message):
    config = config_in(tmp_path, 1)
    assert config.prepare is not None
    wanted = replace(config.prepare, tokenizer=TokenizerConfig(vocab_size=60, sentinels=sentinels))
    task = replace(TASK, spans=replace(TASK.spans, mean_span=mean_span))
    with pytest.raises(InputError, match=message) as raised:
        pretrain(replace(config, prepare=wanted, task=task), console=QUIET)
    assert "\n" not in str(raised.value)
    assert not config.directory.exists()
