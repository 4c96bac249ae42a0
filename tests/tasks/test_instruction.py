"""A model that learns to respond, and to stop: trained, resumed, asked, talked with."""

import importlib
import io
import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaxlm.data.labelled.instruction import Dialogue, Turn
from jaxlm.decode.generate import Generate, GenerateConfig
from jaxlm.errors import InputError
from jaxlm.models.gpt2 import Gpt2Config
from jaxlm.models.llama import LlamaConfig
from jaxlm.peft.lora import LoraConfig
from jaxlm.runs import best, finetuned, writing
from jaxlm.runs.base import Base
from jaxlm.runs.finetuning import finetune
from jaxlm.sharding import MeshConfig
from jaxlm.tasks.classification import Classification
from jaxlm.tasks.instruction import Instruction
from jaxlm.train.state import TrainState

GREEDY = GenerateConfig()
ANSWERS = {"red": "warm", "blue": "cold", "green": "fresh grass", "white": "snow"}
ROWS = [
    {"prompt": f"{colour} {i}", "response": answer}
    for i in range(10)
    for colour, answer in ANSWERS.items()
]
MODEL = Gpt2Config(num_layers=1, hidden_dim=16, num_heads=2, mlp_dim=32, max_length=48)


@pytest.fixture
def config(tiny, write):
    config = tiny(Instruction(num_samples=2, sample_tokens=8), write(ROWS), max_length=24)
    optimizer = replace(config.optimizer, peak_lr=0.01)
    train = replace(config.train, steps=60, num_evals=2)
    return replace(config, model=MODEL, optimizer=optimizer, train=train)


def sampled(run: Path) -> list[dict]:
    lines = (run / "samples.jsonl").read_text("utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


@pytest.mark.slow
def test_a_model_learns_to_respond_and_to_stop(config, eval_metrics, monkeypatch, capsys) -> None:
    out = io.StringIO()
    directory = finetune(config, console=Console(file=out, width=60))
    printed = out.getvalue()
    said = "30 dialogues in", "tokens are learned", "validation: 10 dialogues in"
    assert all(line in printed for line in said)
    samples = sampled(directory)
    task = config.task
    steps = np.repeat([0, 30, 60], task.num_samples)
    assert [one["step"] for one in samples] == steps.tolist()
    lengths = [len(one["response"].split()) for one in samples if one["stopped"] != "stop_token"]
    assert all(0 < length <= task.sample_tokens for length in lengths)
    assert samples[-1].keys() >= {"prompt", "response", "wanted", "stopped", "origin"}
    lines = [li for li in printed.splitlines() if li.startswith(f"  {samples[-1]['prompt']} → ")]
    assert len(lines) == 3
    assert samples[-1]["response"] in lines[-1]

    run = finetuned.open_finetuned(directory)
    found = eval_metrics()
    assert found["perplexity"] == pytest.approx(np.exp(found["loss"]), rel=1e-4)
    assert found["loss"] < 0.1
    assert found["accuracy"] > 0.95
    answers = run.answer([*(f"{colour} 3" for colour in ANSWERS), ""])
    assert [one.get("response") for one in answers] == [*ANSWERS.values(), None]
    assert {one["stopped"] for one in answers[:4]} == {"stop_token"}
    assert "'prompt' is empty" in answers[4]["error"]
    (answer,) = run.answer([{"messages": [{"role": "user", "content": "red 3"}]}])
    assert answer["response"] == "warm"

    monkeypatch.setenv("GLIBC_TUNABLES", "")  # or the process would start anew
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    predict = importlib.import_module("predict")
    capsys.readouterr()
    for stream in (False, True):
        predict.main(directory, "generate", "green 4", stream=stream)
        assert capsys.readouterr().out == "fresh grass\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("blue 5\n" + "red " * 60 + "\n\nwhite\n"))
    predict.main(directory, "chat", generate=GenerateConfig(max_new_tokens=20))
    first, long = capsys.readouterr().out.splitlines()
    assert first == "cold"
    assert long.startswith("(the prompt 'red red")
    assert "takes 48" in long  # and an empty line ends it


@pytest.mark.slow
@pytest.mark.parametrize(
    "places", [{"placement": "pmap"}, {"mesh": MeshConfig(fsdp=2, tensor=2)}], ids=str
)
def test_a_resumed_run_drops_later_samples(config, places) -> None:
    short = replace(config, train=replace(config.train, steps=2, num_evals=2), **places)
    directory = finetune(short, console=Console(quiet=True))
    path = directory / "samples.jsonl"
    path.write_text(path.read_text() + '{"step": 9}\n')
    longer = replace(short, train=replace(short.train, steps=4))
    finetune(longer, console=Console(quiet=True))
    assert [one["step"] for one in sampled(directory)] == [0, 0, 1, 1, 2, 2, 4, 4]


def responder(config, tokenizer):
    """Of the model with random parameters, and what makes one of others."""
    config = replace(config, model=replace(MODEL, vocab_size=64), dropout_rate=0.0)
    model, framer = finetuned.make_model(config, ()), finetuned.make_framer(config, tokenizer)
    make = writing.make_responder(config, model, framer, tokenizer)

    def of_seed(seed: int, added: float = 0.0) -> writing.Responder:
        variables = finetuned.make_init(config, ())(jax.random.key(seed)).variables
        return make(jax.tree.map(lambda x: x + added, variables))

    return of_seed


def test_what_is_sampled_depends_on_its_own_number(config, tokenizer) -> None:
    """Among all that are asked: not on their chunks, nor on others that have no answer."""
    config = replace(config, model=replace(MODEL, vocab_size=64), dropout_rate=0.0)
    init = finetuned.make_init(config, ())
    places = [finetuned.make_placement(config, (), init)] * 2
    state = init(jax.random.key(0))
    run = finetuned.FinetunedRun(config, tokenizer, (), state, *places, {}, (0,))
    sampled = GenerateConfig(max_new_tokens=6, temperature=1.0)

    def tokens(*asked: str, **options: int) -> list[list[int] | None]:
        answers = run.answer(list(asked), generate=sampled, **options)
        return [one.get("tokens") for one in answers]

    first, second, third = tokens("a b", "a b", "a b")
    assert len({*map(str, (first, second, third))}) == 3
    too_long, blank = "a " * 60, ""
    assert tokens("a b", "a b", too_long) == [first, second, None]
    assert tokens("a b", blank, "a b") == [first, None, third]
    assert tokens("a b", "a b", "a b", chunk=1) == [first, second, third]


def test_all_states_share_what_is_compiled(config, tokenizer) -> None:
    of_seed, said = responder(config, tokenizer), []
    dialogue = Dialogue(turns=(Turn("user", "a b"),), origin="x:1")
    for seed in (0, 1):
        one = of_seed(seed)
        said.append("".join(one.stream(dialogue, GenerateConfig(max_new_tokens=4))))
        programs = one.generate._begin, one.generate._advance
        assert [program._cache_size() for program in programs] == [1, 1]
    assert said[0] != said[1]


def test_a_model_that_has_diverged_is_said_and_trained_on(config, tokenizer) -> None:
    of_seed = responder(config, tokenizer)
    make = lambda variables: of_seed(0, jnp.nan)
    dialogue = Dialogue(turns=(Turn("user", "a b"), Turn("assistant", "c")), origin="x:1")
    samples = writing.make_samples(config, make, [dialogue], 80)
    state = TrainState(jnp.asarray(3), {}, {}, ())
    (line,) = samples(state).lines
    assert line.startswith("  no samples: the model's logits behind 'a b")
    assert not (config.directory / writing.SAMPLES).exists()


class Told(Generate):
    """A generator that responds g, and keeps what it was asked."""

    def __init__(self):
        self.asked = []

    @property
    def max_length(self):
        return 48

    def stream(self, text, config=GREEDY, *, number=0, steps=1):
        self.asked.append(text)
        yield "g"


def test_a_conversation_forgets_what_has_no_room(config, tokenizer) -> None:
    told = Told()
    framer = finetuned.make_framer(replace(config, model=MODEL), tokenizer)
    one = writing.Responder(task=config.task, framer=framer, generate=told)
    talk = writing.Conversation(one, GenerateConfig(max_new_tokens=8), system="f")
    forgotten = []
    for _ in range(6):
        count, pieces = talk.say("a b c d e f")
        forgotten.append(count)
        assert list(pieces) == ["g"]
    assert forgotten == [0, 0, 0, 0, 0, 1]
    assert [len(ids) for ids in told.asked] == [8, 16, 24, 32, 40, 40]
    assert told.asked[4] == told.asked[5]
    turns = (Turn("system", "f"), Turn("user", "a b c d e f"))
    dialogue = Dialogue(turns=(*turns, Turn("assistant", "g"), turns[1]), origin="x")
    assert told.asked[1] == one.prompt(dialogue)


def test_models_that_cannot_respond_are_refused(config, tokenizer) -> None:
    classes = replace(config, task=Classification())
    model = Instruction().make_model(replace(MODEL, vocab_size=8), (), 0.0)
    framer = finetuned.make_framer(replace(config, model=MODEL), tokenizer)
    with pytest.raises(InputError, match="Classification, which does not write: use classify"):
        writing.make_responder(classes, model, framer, tokenizer)


def test_a_head_over_the_vocabulary_is_the_bases_and_frozen_under_lora(config, tokenizer) -> None:
    llama = LlamaConfig(
        vocab_size=50,
        num_layers=1,
        hidden_dim=16,
        num_heads=2,
        num_kv_heads=1,
        mlp_dim=24,
        max_length=32,
        tied=False,
    )
    model = Instruction().make_model(llama, (), 0.0)
    params = jax.device_get(model.init(jax.random.key(3), jnp.zeros((1, 4), jnp.int32))["params"])
    base = Base(
        name="x",
        config=llama,
        encoder=params["encoder"],
        pooler=None,
        lm_head=params["lm_head"],
        tokenizer=tokenizer,
        tokenizer_path=Path("x"),
        fingerprint="x",
    )
    tuned = replace(
        config, base="x", model=llama.with_vocab_size(64), tokenizer=None, tuning=LoraConfig()
    )
    placement = finetuned.make_placement(tuned, (), finetuned.make_init(tuned, ()))
    state = finetuned.make_state(tuned, (), base, placement)
    assert set(state.trainable) == {"lora"}
    kernel = state.frozen["params"]["lm_head"]["unembed"]["kernel"]
    np.testing.assert_array_equal(kernel[:, :50], params["lm_head"]["unembed"]["kernel"])
    assert best.monitor(tuned).first_step == 0
    with pytest.raises(InputError, match="base='x' has no head that scores the vocabulary"):
        finetuned.make_state(tuned, (), replace(base, lm_head=None), placement)
