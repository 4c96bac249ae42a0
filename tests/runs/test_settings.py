"""No setting does nothing: another value of it changes something, or is refused, or is said to be
idle. Each field of each class of a config is here, or in a table of the tests that see it change.
"""

import ast
import dataclasses
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console
from tiny_models import BERT

from jaxlm.config import FinetuneConfig, PretrainConfig
from jaxlm.convert import modernbert
from jaxlm.data import tokenizers
from jaxlm.data.labelled.augment import AugmentConfig, make_augment
from jaxlm.data.labelled.batching import make_batching
from jaxlm.data.labelled.classification import TextFields
from jaxlm.data.labelled.dataset import LabelledConfig, read_splits
from jaxlm.data.labelled.framing import Framer
from jaxlm.data.labelled.multiple_choice import ChoiceFields
from jaxlm.data.labelled.parallel import ParallelText
from jaxlm.data.labelled.pydocs import PyDocsTopics
from jaxlm.data.labelled.records import Conll, JsonLines, Table
from jaxlm.data.labelled.tagging import TagFields
from jaxlm.data.loader import DataConfig, train_batches
from jaxlm.data.prepare import PrepareConfig, TokenizerConfig, prepare
from jaxlm.data.prepared import open_prepared
from jaxlm.data.pydocs import PyDocs
from jaxlm.data.sources import Csv, Jsonl, TextFiles
from jaxlm.data.special_tokens import SpecialTokens
from jaxlm.errors import InputError
from jaxlm.models.bilstm import BilstmConfig
from jaxlm.models.gpt2 import Gpt2Config
from jaxlm.models.heads import EncoderDecoderLm
from jaxlm.models.llama import LlamaConfig
from jaxlm.models.model import example_inputs
from jaxlm.models.modernbert import ModernBertConfig
from jaxlm.models.t5 import T5Config
from jaxlm.models.transformer import TransformerConfig
from jaxlm.models.xlnet import XlnetConfig
from jaxlm.nn.positions import LinearScaling, Llama3Scaling
from jaxlm.objectives.masking import MaskingConfig, SpanTokens, Vocabulary
from jaxlm.objectives.span_corruption import SpanConfig
from jaxlm.optim import OptimizerConfig, make_optimizer, make_schedule
from jaxlm.peft.ia3 import Ia3Config
from jaxlm.peft.lora import LoraConfig
from jaxlm.runs import best, command_line, finetuned, finetuning, pretrained, pretraining
from jaxlm.runs import train as driver
from jaxlm.runs.base import Base
from jaxlm.runs.idle import idle
from jaxlm.runtime.batch_rows import ALL_ROWS
from jaxlm.sums import Sums
from jaxlm.sweep.space import replaced
from jaxlm.tasks.causal_lm import CausalLm
from jaxlm.tasks.classification import Classification
from jaxlm.tasks.embedding import Embedding
from jaxlm.tasks.instruction import Instruction
from jaxlm.tasks.masked_lm import MaskedLm
from jaxlm.tasks.multiple_choice import MultipleChoice
from jaxlm.tasks.permutation_lm import PermutationLm
from jaxlm.tasks.question_answering import QuestionAnswering
from jaxlm.tasks.replaced_token import ReplacedToken
from jaxlm.tasks.seq2seq import Seq2Seq
from jaxlm.tasks.span_corruption import SpanCorruption
from jaxlm.tasks.tagging import Tagging
from jaxlm.train import loop
from jaxlm.train.checkpoint import Checkpointer
from jaxlm.train.loop import TrainConfig
from jaxlm.train.metrics import Throughput
from jaxlm.train.placement import Placement
from jaxlm.train.plots import Reference
from jaxlm.train.progress import Progress
from jaxlm.train.restore import Monitor
from jaxlm.train.state import TrainState
from jaxlm.train.step import make_train_step
from jaxlm.train.view import View

TESTS = Path(__file__).resolve().parents[1]

VOCABULARY = Vocabulary(
    mask_id=4,
    start_id=2,
    end_id=3,
    ordinary=jnp.arange(5, 32),
    is_ordinary=jnp.arange(32) >= 5,
    word_starts=jnp.arange(32) >= 5,
    spans=SpanTokens(2, 3, (31, 30, 29, 28, 27)),
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


def as_text(program: Any) -> str:
    """Without the addresses of functions."""
    return re.sub(r"0x[0-9a-f]+", "", str(program))


@cache
def update_of(config: Any) -> str:
    """The optimizer alone, as a program, and its learning rates."""
    optimizer = make_optimizer(config.optimizer)
    schedule = make_schedule(config.optimizer, config.train.steps)
    params = {"layers": {"up": {"kernel": jnp.ones((2, 3, 4)), "bias": jnp.ones((2, 4))}}}

    def update(params: Any) -> Any:
        return optimizer.update(params, optimizer.init(params), params)

    rates = [float(schedule(jnp.float32(x))) for x in (0.01, 0.5, 0.9, 1.0)]
    return as_text(f"{jax.make_jaxpr(update)(params)} {rates}")


@cache
def step_of(config: Any) -> str:
    """The training and evaluation steps, and the first state, as programs."""
    if isinstance(config, PretrainConfig):
        placement = pretrained.make_placement(config, VOCABULARY)
        shape = lambda dtype, *sizes: jax.ShapeDtypeStruct(sizes, dtype)
        rows = config.data.batch_size
        batch = {"tokens": shape(jnp.int32, rows, 8)}
        batch |= {name: shape(jnp.int32, rows) for name in ("lengths", "index")}
    else:
        model = config.model or replace(MODEL, dtype=None, num_layers=1, unroll=None)
        config = finetuned.with_encoder(config, model, "cpu")
        labels = ("B-a", "B-b", "O")
        init = finetuned.make_init(config, labels)
        placement = finetuned.make_placement(config, labels, init)
        batch = config.task.abstract_batch(config.data.batch_size, 8, len(labels))
    start = jax.make_jaxpr(placement.init)(jax.random.key(0))
    state = placement.abstract_state
    train = jax.make_jaxpr(placement.train_step)(state, batch, np.float32(0.5))
    shardings = [str(leaf.sharding) for leaf in jax.tree.leaves(state)]
    text = f"{start} {train} {shardings}"
    return as_text(text)


@cache
def model_of(config: Any) -> str:
    """The encoder and its head, forward alone, as programs: to draw them, and to train them."""
    if isinstance(config, PretrainConfig):
        model = pretrained.make_model(config)
    else:
        model = finetuned.make_model(finetuned.with_encoder(config, config.model, "cpu"), ("a",))
    return program_of(model, jnp.zeros((2, 8), jnp.int32))


def program_of(model: Any, *tokens: Any) -> str:
    key = jax.random.key(0)
    drawn = jax.make_jaxpr(model.init)(key, *tokens)
    variables = jax.eval_shape(model.init, key, *tokens)

    def trained(variables: Any, key: Any) -> Any:
        return model.apply(variables, *tokens, deterministic=False, rngs={"dropout": key})

    program = jax.make_jaxpr(trained)(variables, key)
    return as_text(f"{drawn} {program} {listed(program.consts)}")


@cache
def hidden_of(config: PretrainConfig) -> str:
    """What masking hides in training and in evaluation, and what a model is told, as programs."""

    def apply(variables: Any, tokens: Any, predicted: Any = None, **told: Any) -> Any:
        told = {name: value for name, value in told.items() if name != "deterministic"}
        seen = sum(jnp.sum(x) for x in jax.tree.leaves((tokens, told.get("segment_ids"))))
        shape = tokens.shape if predicted is None else (*predicted.shape, 32)
        return jnp.zeros(shape) + seen

    batch = {"tokens": jnp.zeros((4, 8), jnp.int32)}
    batch |= {name: jnp.zeros(4, jnp.int32) for name in ("lengths", "index")}
    text = ""
    for task in (config.task, config.task.for_evaluation()):
        loss = task.make_loss(apply, VOCABULARY)
        call = lambda key, loss=loss: loss(
            {}, batch, key, progress=jnp.zeros(()), deterministic=True
        )
        text += str(jax.make_jaxpr(call)(jax.random.key(0)))
    return as_text(text)


@cache
def loss_of(config: FinetuneConfig) -> str:
    """A labelled task's loss in training, as a program."""
    labels = ("B-a", "B-b", "O")
    config = finetuned.with_encoder(config, config.model, "cpu")
    model = finetuned.make_model(config, labels)
    variables = jax.eval_shape(model.init, jax.random.key(0), *example_inputs(config.model))
    batch = config.task.abstract_batch(4, 8, len(labels))
    loss = config.task.make_loss(model.apply)

    def call(variables: Any, batch: Any, key: Any) -> Any:
        return loss(variables, batch, key, progress=jnp.zeros(()), deterministic=False)

    return as_text(jax.make_jaxpr(call)(variables, batch, jax.random.key(0)))


@cache
def mesh_of(config: Any) -> str:
    """Where parameters lie."""
    state = pretrained.make_placement(config, VOCABULARY).abstract_state
    places = [leaf.sharding for leaf in jax.tree.leaves(state.trainable)]
    return str([(place, getattr(place, "mesh", place)) for place in places])


def listed(tree: Any) -> str:
    return str(jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), tree))


@cache
def read_of(config: FinetuneConfig) -> str:
    """What fine-tuning reads: examples, rows of tokens, their lengths, and the first batches."""
    splits = read_splits(config.data, config.task.read, config.task.check)
    config = finetuned.settled(config, splits)
    made = (finetuning.make_tokenizer, finetuning.make_source_tokenizer)
    tokenizer, source_tokenizer = (make(config, splits) for make in made)
    config = finetuning.resolve(config, None, tokenizer, "cpu", source_tokenizer)
    labels = config.task.labels(splits.train)
    framer = finetuned.make_framer(config, tokenizer, source_tokenizer)
    examples = config.task.encode(framer, splits.train, labels)
    validation = config.task.encode(framer, splits.validation, labels)
    data, seed, special = config.data, config.train.seed, SpecialTokens.of(tokenizer)
    batching = make_batching(examples, data, framer.max_length, seed=seed)
    augment = data.augment and make_augment(data.augment, special, seed)
    batches = batching.train_batches(0, augment=augment, batch_rows=ALL_ROWS)
    batches = [next(batches) for _ in range(3)]
    rows = listed([examples.rows, validation.rows, batches])
    read = re.sub(r"origin='[^']*'", "", f"{splits.train} {splits.validation}")
    return f"{read} {labels} {vars(config.task).get('scale')} {rows} {splits.notes}"


def answers_of(config: FinetuneConfig) -> str:
    """What is answered, by numbers that a model might give."""
    task = config.task
    examples = task.read(config.data.train.records())[:4]
    framer = Framer(tokenizers.load("vocab.txt"), 12)
    rows, rng = task.encode(framer, examples, ()).rows, np.random.default_rng(0)
    outputs = {name: [row[name] for row in rows] for name in ("question", "offsets", "allowed")}
    for name in ("start_logits", "end_logits"):
        outputs[name] = [rng.normal(size=len(row["tokens"])) for row in rows]
    return str(task.answers(examples, (), outputs))


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the configs name, in the folder where the tests are."""
    folder = tmp_path_factory.mktemp("settings")
    rng, rows, lines, sentences = np.random.default_rng(0), [], [], []
    words = ["Red", "red", "café", "cat", "dog", "blue", "the", "on", "sat", "ran", "a", "b"]
    for i in range(60):
        text = " ".join(rng.choice(words, int(rng.integers(3, 30))))
        cell = f'{i} \\ ""{text}""' if i % 3 else f"{i} {text}"
        kind, number = ("odd" if i % 2 else "even"), i / 8
        kind = kind.title() if i % 10 == 3 else kind  # the same, unless labels are as written
        rows.append(f'"{cell}",pair {i} of {i % 7},{kind},{kind}|x|y;z,{number},{i % 5}')
        lines.append(f"{i}{text} {kind}\n\n{text}")
        red = "b-a" if i == 5 else "B-a"  # the same, unless tags are as written
        tagged = [(word, red if word in ("red", "Red") else "O") for word in text.split()]
        sentences.append("\n".join(f"{word} {len(word)} {tag}" for word, tag in tagged))
    header = "text,pair,label,labels,number,topic"
    (folder / "a.csv").write_text("\n".join([header, *rows, "an empty label,x,,,1,1"]))
    (folder / "b.csv").write_text("\n".join([header, *rows[:40]]))
    (folder / "a.txt").write_text("\n".join(lines))
    (folder / "a.en").write_text("\n".join(line.split("\n")[0] for line in lines))
    (folder / "a.de").write_text("\n".join(f"the {line.split()[-1]}" for line in lines))
    (folder / "a.conll").write_text("\n\n".join(sentences))
    choice = '{{"context": "c {0} é d", "question": "q", "choices": ["a", "b{0}"], "label": {1}, '
    choice += '"text": "té {0}", "other": {2}}}'
    made = [choice.format(i, i % 2, 1 - i % 2) for i in range(40)]
    (folder / "a.jsonl").write_text("\n".join(made))
    (folder / "b.jsonl").write_text("\n".join(made[:30]))
    ask = '{{"id": "n{0}", "question": "q", "other": "r", '
    ask += '"context": "a b a c d e f g a h {0} c d e f g h b c d e f g h", '
    ask += '"answers": {{"text": ["a"], "answer_start": [{1}]}}, "given": ["b"]}}'
    asked = [ask.format(i, 4 if i % 2 else 0) for i in range(30)]
    (folder / "questions.jsonl").write_text("\n".join(asked))
    turns = '"messages": [{{"role": "user", "content": "{0}"}}, '
    turns += '{{"role": "assistant", "content": "b"}}]'
    for name, form in (("prompts", '"prompt": "a {0}", "response": "b"'), ("messages", turns)):
        lines = ["{" + form.format(i) + "}" for i in range(30)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    vocabulary = [*tokenizers.SPECIALS, *"abcdefghijklmnopqrstuvwxyz", *words, *map(str, range(60))]
    for name, tokens in (("vocab.txt", vocabulary), ("other.txt", vocabulary[:-9])):
        (folder / name).write_text("\n".join(dict.fromkeys(tokens)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tokenizer = TokenizerConfig(path=Path("vocab.txt"))
        for name, unit in (("p", "line"), ("q", "paragraph")):
            source = TextFiles(glob="a.txt", document=unit)
            prepare(PrepareConfig(source=source, tokenizer=tokenizer, row_length=16), name)
        yield folder


def rows_of(directory: Path | str) -> str:
    data = open_prepared(directory)
    splits = [data.source(name) for name in data.info.rows]
    return listed([rows.read(np.arange(len(rows))) for rows in splits])


@cache
def prepared_of(config: PretrainConfig) -> str:
    """The rows that are prepared, and the tokenizer."""
    assert config.prepare is not None
    directory = Path(f"prepared {len(list(Path().iterdir()))}")
    prepare(config.prepare, directory)
    return rows_of(directory) + open_prepared(directory).tokenizer_path.read_text()


@cache
def continued_of(config: PretrainConfig) -> str:
    """The rows that are prepared where the run goes on from a base."""
    path = Path("vocab.txt")
    base = Base(
        name="b",
        config=MODEL,
        encoder={},
        pooler=None,
        lm_head=None,
        tokenizer=tokenizers.load(path),
        tokenizer_path=path,
        fingerprint="",
    )
    directory = f"prepared {len(list(Path().iterdir()))}"
    config = replace(config, data=replace(config.data, paths=(directory,)))
    pretraining.open_data(config, base, Console(quiet=True))
    return rows_of(directory)


@cache
def order_of(config: PretrainConfig) -> str:
    """The first batches, and those of an evaluation."""
    datasets = pretraining.open_data(config, None, Console(quiet=True))
    batches = train_batches(datasets, config.data, seed=config.train.seed)
    rows = config.train.eval_rows
    evaluated = pretrained.eval_rows(datasets, config.data.batch_size, max_rows=rows)
    return listed([[next(batches) for _ in range(2)], list(evaluated)])


class Ticking:
    """Stands in for the module ``time``: each look at it takes a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1
        return self.now


class Recorder(Checkpointer):
    """Also a writer; it keeps what it is told."""

    def __init__(self) -> None:
        self.monitor, self.told = Monitor(), []

    def save(self, step: int, state: Any, cursor: Any, metrics: Any = None) -> None:
        self.told.append((step, cursor["share"], metrics))

    def write(self, step: int, values: Any) -> None:
        self.told.append((step, sorted(values)))

    def close(self) -> None: ...


def run_of(config: Any) -> str:
    """When a run evaluates, saves, writes and ends: of no model, whose loss stays as it is."""

    def loss(variables: Any, batch: Any, key: Any, *, progress: Any, deterministic: Any) -> Any:
        total = jnp.sum(variables["x"] * batch["tokens"])
        return total, Sums({"loss": total}, jnp.ones(()), {"tokens": jnp.ones(())})

    sgd, recorder = optax.scale(0.0), Recorder()
    state = TrainState.create({"x": jnp.ones(())}, {}, sgd)
    train_step = jax.jit(make_train_step(loss, sgd))
    step = Placement(*[None] * 8)._replace(train_step=train_step, put_batch=lambda batch: batch)  # pyright: ignore
    poison = config.name == "poisoned"
    batch = {"tokens": np.full((2, 2), np.nan if poison else 1.0, np.float32)}
    cursor = {"examples_seen": 0, "tokens_seen": 0.0, "elapsed_s": 0.0, "share": 0.0}
    train = config.train.with_epochs(lambda epochs: -(-int(epochs * 96) // config.data.batch_size))
    console = Console(quiet=True)
    with pytest.MonkeyPatch.context() as patch, Progress(None, visible=False, console=console) as p:
        patch.setattr(loop, "time", Ticking())
        view = View(
            None,
            p,
            Throughput(None, "cpu", 1),
            step=0,
            tokens_seen=0.0,
            log_every=train.log_every,
            reference=Reference(),
            more_writers=(recorder,),
        )
        try:
            loop.fit(
                train,
                step,
                state,
                iter(lambda: batch, None),
                lambda state: {"loss": 1.0},
                recorder,  # pyright: ignore[reportArgumentType]
                cursor,
                view,
                examples_after=lambda steps: 2 * steps,
            )
        except InputError as error:
            recorder.told.append(str(error))
    return str(recorder.told)


OTHER: dict[str, Any] = {  # where no other value follows from the type
    "model.global_every": 2,  # twice as many is beyond the layers
    "task.masking.final_rate": 0.4,
    "task.eval_masking.final_rate": 0.4,
    "task.choice.final_rate": 0.4,
    "task.masking.budget": 3,
    "task.choice.budget": 3,
    "task.generator_share": 1.0,
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
    "task.class_weights": ("odd=3",),
    "task.scale": (1.0, 2.0),
    "task.doc_stride": 3,
    "task.pooling": "max",
    "task.head_bias": False,
    "task.prompt": "odd ",
    "task.pair_prompt": "odd ",
    "task.fields.choices": ("text", "other"),
    "task.min_similarity": 4.0,
    "task.fields.pair": "topic",
    "task.fields.text": "pair",
    "task.fields.label": "topic",
    "task.fields.names": ("one", "two", "three", "four", "five"),
    "runs": Path("other"),
    "task.fields.separator": ";",
    "task.fields.tags": None,
    "task.fields.words": "tags",
    "data.paths": ("q",),
    "data.weights": (1.0, 3.0),
    "data.ramp_sizes": (4,),
    "data.ramp_steps": (2,),
    "data.max_length": 48,
    "data.batch_tokens": 128,
    "data.train.source": "a.de",
    "data.train.target": "a.en",
    "data.train.path": "b.csv",
    "data.train.delimiter": ";",
    "data.train.columns": ("text", "label"),
    "data.train.encoding": "latin-1",
    "data.train.quoting": "none",
    "data.train.token_column": 1,
    "data.train.tag_column": 1,
    "data.augment.swap_rate": 0.6,
    "data.augment.mask_rate": 0.6,
    "data.augment.deletion_rate": 0.6,
    "tokenizer.path": Path("other.txt"),
    "source_tokenizer.path": Path("other.txt"),
    "prepare.tokenizer.path": Path("other.txt"),
    "prepare.extend_vocab": 3,
    "prepare.source.glob": "b.csv",
    "prepare.source.encoding": "latin-1",
    "prepare.source.field": "context",
    "prepare.source.column": "pair",
    "prepare.source.delimiter": ";",
    "prepare.source.quoting": "none",
    "train.patience": 2,
    "train.minutes": 0.2,
    "train.save_every": 3,
    "train.eval_rows": 1,
    "monitor": "macro_f1",
    "prepare.source.package": "jaxtyping",
    "data.train.package": "einops",
    "task.null_threshold": -50.0,
    "task.max_answer_length": 1,
    "task.num_best": 1,
    "task.prefix": "the ",
    "task.fields.source": "target",
    "task.fields.question": "other",
    "task.fields.answers": "given",
    "task.fields.starts": None,
    "task.fields.id": None,
}


def other(hint: Any, path: str, value: Any) -> Any:
    if path in OTHER:
        return OTHER[path]
    (kind, *_) = [k for k in command_line.alternatives(hint) if k is not type(None)]
    if get_origin(kind) is Literal:
        return next(option for option in get_args(kind) if option != value)
    if kind is bool:
        return not value
    return {
        int: lambda x: 2 * (x or 1) + (x == 0),
        float: lambda x: 0.7 * (x or 0.1),
        str: lambda x: "other",
    }[kind](value)


def at(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = vars(config)[name]
    return config


SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "num_layers": 1,
    "hidden_dim": 16,
    "num_heads": 2,
    "mlp_dim": 16,
    "dtype": "float32",
}
GPT2 = Gpt2Config(**SIZES, max_length=8)
LLAMA = LlamaConfig(
    **SIZES, num_kv_heads=1, max_length=8, dropout_rate=0.1, attention_dropout_rate=0.1
)
XLNET = XlnetConfig(**SIZES, max_length=8)
MODERN_SIZES = SIZES | {"num_layers": 3, "max_length": 8, "window": 2, "vocab_bias": False}
MODERN = replace(PRETRAINED, model=ModernBertConfig(**MODERN_SIZES).with_dropout(0.1))
PERMUTED = replace(PRETRAINED, model=XLNET, task=PermutationLm())
DETECTING = replace(PRETRAINED, task=ReplacedToken())
SMALLER = ("task.generator_share",)
SLOWED = replace(LLAMA, rope_scaling=LinearScaling(factor=2.0))
SCALING = Llama3Scaling(factor=2.0, low_freq_factor=0.02, high_freq_factor=0.9, original_length=8)
STRETCHED = replace(LLAMA, rope_scaling=SCALING)


def causal(model: Any) -> PretrainConfig:
    return replace(PRETRAINED, model=model, task=CausalLm())


TRANSFORMER = TransformerConfig(**SIZES, num_decoder_layers=2)
T5 = T5Config(**SIZES, head_dim=4, num_buckets=4, max_distance=6)


@cache
def decoder_of(config: Any) -> str:
    """An encoder and its decoder, forward alone, as programs: to draw them, and to train them."""
    model = EncoderDecoderLm(config.model.make(), config.model.make_lm_head())
    return program_of(model, *[jnp.zeros((2, 8), jnp.int32)] * 2)


def longest_of(config: Any) -> str:
    """Whether rows of nine tokens fit."""
    try:
        jax.eval_shape(
            pretrained.make_model(config).init, jax.random.key(0), jnp.zeros((1, 9), jnp.int32)
        )
    except InputError as error:
        return str(error)
    return "fits"


def values_of(config: Any) -> str:
    """What a model of drawn parameters computes: its program may hold what is never used."""
    model, tokens = config.model.make(), jnp.arange(16).reshape(2, 8) % 7
    return repr(np.asarray(model.init_with_output(jax.random.key(0), tokens)[0]).tolist())


def written_of(config: Any) -> str:
    """What other libraries are told of a model."""
    return repr(modernbert.write_config(config.model, {}))


class Part(NamedTuple):
    """Fields of a config, or all those of the parts that are named, and where to look."""

    config: Any
    look: Callable[[Any], str]
    names: tuple[str, ...]
    without: tuple[str, ...] = ()

    def paths(self) -> list[str]:
        found = []
        for name in self.names:
            part = at(self.config, name)
            inner = vars(part) if dataclasses.is_dataclass(part) else {}
            leaves = [n for n in inner if not command_line.classes(get_type_hints(type(part))[n])]
            found += [f"{name}.{leaf}" for leaf in leaves] if inner else [name]
        return [path for path in found if path not in self.without]


def optimizing(**changes: Any) -> Part:
    config = replace(TUNED, optimizer=OptimizerConfig(**changes))
    return Part(config, update_of, ("optimizer",))


def reading(source: Any, task: Any, **changes: Any) -> FinetuneConfig:
    data = LabelledConfig(
        train=source, batch_size=4, max_length=16, num_buckets=1, on_bad_row="skip", **changes
    )
    model = replace(MODEL, vocab_size=None, max_length=64)
    tokenizer = TokenizerConfig(path=Path("vocab.txt"))
    return replace(TUNED, data=data, task=task, model=model, tokenizer=tokenizer)


def reading_apart(tokenizer: TokenizerConfig) -> FinetuneConfig:
    config = reading(ParallelText(source="a.en", target="a.de"), Seq2Seq())
    model = replace(TRANSFORMER, vocab_size=None)
    return replace(config, model=model, source_tokenizer=tokenizer)


def preparing(source: Any, **changes: Any) -> PretrainConfig:
    tokenizer = TokenizerConfig(**({"path": Path("vocab.txt")} | changes))
    prepare = PrepareConfig(
        source=source, tokenizer=tokenizer, row_length=16, validation_fraction=0.2
    )
    return replace(PRETRAINED, prepare=prepare)


TEXTS = reading(Table(path="a.csv"), Classification())
TRAINED = replace(TEXTS, tokenizer=TokenizerConfig(vocab_size=60))
LABELS = Classification(fields=TextFields(label="labels", target="labels"))
NUMBERS = Classification(fields=TextFields(label="number", target="number"))
PAIRS = TextFields(pair="pair", label="number", target="number")
CHOICES = MultipleChoice(fields=ChoiceFields())
TOPICS = Classification(fields=TextFields(label="topic"))
NUMBERED = Tagging(fields=TagFields(names=tuple("abcde")), entities=False)
LINES = TextFiles(glob="a.txt", document="line")
SPANS = MaskedLm(masking=MaskingConfig(unit="span"), eval_masking=MaskingConfig(unit="span"))
HOLES = SpanCorruption(spans=SpanConfig(noise_density=0.5, mean_span=2.0))
BY_STEP = ("dropout_rate", "dtype", "frozen_dtype", "train.seed", "train.num_micro_batches")
BY_LOSS = ("task.class_weights", "task.thresholds", "task.scale")
ENDS = (
    "train.seed",
    "train.num_micro_batches",
    "train.keep",
    "train.eval_rows",
    "train.max_skipped",
    "train.average",
)
PARTS = {
    "adamw": optimizing(),
    "stable adamw": optimizing(name="stable_adamw", schedule="constant"),
    "lamb": optimizing(name="lamb", schedule="cosine"),
    "adafactor": optimizing(name="adafactor", schedule="inverse_sqrt"),
    "muon": optimizing(name="muon", schedule="wsd"),
    "warmed up": Part(
        optimizing(warmup_steps=3).config,
        update_of,
        ("optimizer.warmup_steps", "optimizer.warmup_share"),
    ),
    "lora": Part(BASED, step_of, ("tuning", *BY_STEP)),
    "ranks": Part(replace(BASED, tuning=LoraConfig(ranks=(2,))), step_of, ("tuning.rank",)),
    "ia3": Part(replace(BASED, tuning=Ia3Config()), step_of, ("tuning",)),
    "bert": Part(PRETRAINED, model_of, ("model",)),
    "bilstm": Part(replace(PRETRAINED, model=LSTM), model_of, ("model",), ("model.max_length",)),
    "gpt2": Part(causal(GPT2), model_of, ("model",), ("model.max_length",)),
    "gpt2 rows": Part(causal(GPT2), longest_of, ("model.max_length",)),
    "llama": Part(causal(LLAMA), model_of, ("model",), ("model.max_length",)),
    "llama rows": Part(causal(LLAMA), longest_of, ("model.max_length",)),
    "xlnet": Part(PERMUTED, model_of, ("model",), ("model.max_length",)),
    "xlnet rows": Part(PERMUTED, longest_of, ("model.max_length",)),
    "modernbert": Part(MODERN, model_of, ("model",), ("model.max_length", "model.pooling")),
    "modernbert rows": Part(MODERN, longest_of, ("model.max_length",)),
    "modernbert pooling": Part(MODERN, written_of, ("model.pooling",)),
    "permutations": Part(PERMUTED, hidden_of, ("task", "task.choice"), ("task.memory",)),
    "detection": Part(DETECTING, hidden_of, ("task", "task.masking", "task.eval_masking"), SMALLER),
    "holes": Part(replace(PRETRAINED, model=T5, task=HOLES), hidden_of, ("task", "task.spans")),
    "generator": Part(DETECTING, step_of, SMALLER),
    "linear scaling": Part(causal(SLOWED), model_of, ("model.rope_scaling",)),
    "llama 3 scaling": Part(causal(STRETCHED), model_of, ("model.rope_scaling",)),
    "transformer": Part(replace(PRETRAINED, model=TRANSFORMER), decoder_of, ("model",)),
    "t5": Part(replace(PRETRAINED, model=T5), decoder_of, ("model",)),
    "causal": Part(causal(GPT2), step_of, ("task",)),
    "tuned bert": Part(
        replace(TUNED, dropout_rate=0.2, dtype="float32"),
        model_of,
        ("model.dropout_rate", "model.attention_dropout_rate", "model.dtype", "task.pooling"),
    ),
    **{
        f"tuned {type(model).__name__}": Part(
            replace(TUNED, dropout_rate=0.2, model=model),
            model_of,
            tuple(f"model.{name}" for name in vars(model) if name.endswith("dropout_rate")),
        )
        for model in (MODERN.model, GPT2, XLNET, LSTM)
    },
    "modernbert without windows": Part(
        replace(MODERN, model=replace(MODERN.model, global_every=1)),
        values_of,
        ("model.window", "model.local_rope_base"),
    ),
    "meshes": Part(PRETRAINED, mesh_of, ("mesh", "placement"), ("mesh.num_slices",)),
    "masking": Part(PRETRAINED, hidden_of, ("task", "task.masking", "task.eval_masking")),
    "spans": Part(
        replace(PRETRAINED, task=SPANS),
        hidden_of,
        ("task.masking.mean_span", "task.eval_masking.mean_span"),
    ),
    "classification": Part(TUNED, loss_of, ("task",), (*BY_LOSS, "task.pooling")),
    "embedding": Part(
        replace(TUNED, task=Embedding()), loss_of, ("task.temperature", "task.pooling")
    ),
    "choosing": Part(
        replace(TUNED, task=CHOICES), loss_of, ("task.label_smoothing", "task.pooling")
    ),
    "smoothed tags": Part(replace(TUNED, task=Tagging()), loss_of, ("task.label_smoothing",)),
    "smoothed targets": Part(
        replace(TUNED, task=Seq2Seq(label_smoothing=0.1), model=TRANSFORMER),
        loss_of,
        ("task.label_smoothing",),
    ),
    "parallel": Part(
        reading(ParallelText(source="a.en", target="a.de"), Seq2Seq()),
        read_of,
        ("data.train", "task.fields", "task.prefix", "task.long", "data.batch_tokens"),
    ),
    "texts": Part(
        TEXTS, read_of, ("data", "data.train", "task.fields", "task.class_weights", "train.seed")
    ),
    "augmented": Part(
        reading(Table(path="a.csv"), Classification(), augment=AugmentConfig()),
        read_of,
        ("data.augment",),
    ),
    "packed": Part(
        reading(Table(path="a.csv"), Classification(), pack=True), read_of, ("data.num_buckets",)
    ),
    "given validation": Part(
        reading(Table(path="a.csv"), Classification(), validation=Table(path="b.csv")),
        read_of,
        ("data.validation_fraction", "data.split_seed"),
    ),
    "few": Part(
        reading(Table(path="a.csv"), Classification(), few_shot=3),
        read_of,
        ("data.few_shot", "data.split_seed"),
    ),
    "trained tokenizer": Part(TRAINED, read_of, ("tokenizer",)),
    "sources": Part(reading_apart(TokenizerConfig(vocab_size=60)), read_of, ("source_tokenizer",)),
    "given sources": Part(
        reading_apart(TokenizerConfig(path=Path("vocab.txt"))),
        read_of,
        ("source_tokenizer.kind", "source_tokenizer.vocab_size", "source_tokenizer.num_documents"),
    ),
    "given tokenizer": Part(TEXTS, read_of, ("tokenizer",)),
    "labels": Part(replace(TEXTS, task=LABELS), read_of, ("task.fields",)),
    "numbers": Part(replace(TEXTS, task=NUMBERS), read_of, ("task.fields", "task.scale")),
    "lstm rows": Part(
        replace(TEXTS, model=replace(LSTM, vocab_size=None, max_length=8)),
        read_of,
        ("model.max_length",),
    ),
    "pairs": Part(
        replace(TEXTS, task=Embedding(fields=PAIRS, min_similarity=2.0)),
        read_of,
        ("task.fields", "task.min_similarity"),
    ),
    "tags": Part(
        reading(Conll(path="a.conll"), Tagging()),
        read_of,
        ("data.train", "task.fields"),
    ),
    "numbered classes": Part(replace(TEXTS, task=TOPICS), read_of, ("task.fields.names",)),
    "numbered tags": Part(
        reading(Conll(path="a.conll", tag_column=1), NUMBERED), read_of, ("task.fields.names",)
    ),
    "pairs alone": Part(
        replace(TEXTS, task=Embedding(fields=TextFields(pair="pair", label=None))),
        read_of,
        ("task.fields", "task.prompt", "task.pair_prompt"),
    ),
    "json": Part(
        reading(JsonLines(path="a.jsonl"), CHOICES), read_of, ("data.train", "task.fields")
    ),
    "prepared": Part(
        preparing(LINES), prepared_of, ("prepare.source", "prepare.tokenizer", "prepare")
    ),
    "prepared otherwise": Part(
        preparing(LINES, path=None, vocab_size=60), prepared_of, ("prepare.tokenizer",)
    ),
    "prepared for a base": Part(
        replace(preparing(LINES, path=None), base="b", model=None),
        continued_of,
        ("prepare.tokenizer", "prepare.row_length", "prepare.extend_vocab"),
    ),
    "prepared json": Part(
        preparing(Jsonl(glob="a.jsonl", field="text")), prepared_of, ("prepare.source",)
    ),
    "prepared table": Part(
        preparing(Csv(glob="a.csv", column="text")), prepared_of, ("prepare.source",)
    ),
    "one folder": Part(
        PRETRAINED, order_of, ("data.paths", "data.weights", "data.batch_size", "train.eval_rows")
    ),
    "ramp": Part(
        replace(PRETRAINED, data=replace(PRETRAINED.data, ramp_sizes=(8,), ramp_steps=(1,))),
        order_of,
        ("data.ramp_sizes", "data.ramp_steps"),
    ),
    "two folders": Part(
        replace(PRETRAINED, data=DataConfig(paths=("p", "q"), batch_size=16)),
        order_of,
        ("data.weights", "train.seed"),
    ),
    "run": Part(replace(TUNED, train=TrainConfig(steps=30, num_evals=3)), run_of, ("train",), ENDS),
    "folder": Part(PRETRAINED, lambda config: str(config.directory), ("name", "runs")),
    "wandb": Part(PRETRAINED, lambda config: str(driver._writers(config)), ("wandb",)),
    "monitor": Part(TUNED, lambda config: best.monitor(config).name, ("monitor",)),
    "topics": Part(reading(PyDocsTopics(package="optax"), TOPICS), read_of, ("data.train",)),
    "prepared documentation": Part(
        preparing(PyDocs(package="einops")), prepared_of, ("prepare.source",)
    ),
    "questions": Part(
        reading(JsonLines(path="questions.jsonl"), QuestionAnswering(doc_stride=2)),
        read_of,
        ("task.doc_stride", "task.fields"),
    ),
    "prompts": Part(
        reading(JsonLines(path="prompts.jsonl"), Instruction()),
        read_of,
        ("task", "task.fields", "task.template"),
        ("task.num_samples", "task.sample_tokens", "task.fields.messages"),
    ),
    "messages": Part(
        reading(JsonLines(path="messages.jsonl"), Instruction()), read_of, ("task.fields.messages",)
    ),
    "answers": Part(
        reading(JsonLines(path="questions.jsonl"), QuestionAnswering(doc_stride=2)),
        answers_of,
        ("task.num_best", "task.max_answer_length", "task.null_threshold"),
    ),
    "epochs": Part(
        replace(TUNED, train=TrainConfig(epochs=3.0, num_evals=3)), run_of, ("train.epochs",)
    ),
    "poisoned": Part(
        replace(TUNED, name="poisoned", train=TrainConfig(steps=90, max_skipped=5)),
        run_of,
        ("train.max_skipped",),
    ),
    "tuned run": Part(TUNED, run_of, ("train.eval_rows",)),
}
CASES = [(name, path) for name, part in PARTS.items() for path in part.paths()]
PROGRAMS = (model_of, step_of)  # whole programs are traced for each value


def cases() -> list[Any]:
    slow = [case for case in CASES if PARTS[case[0]].look in PROGRAMS]
    return [pytest.param(*case, marks=pytest.mark.slow if case in slow else ()) for case in CASES]


@pytest.mark.parametrize(("name", "path"), cases())
def test_another_value_changes_something(name: str, path: str) -> None:
    config, look = PARTS[name].config, PARTS[name].look
    *above, last = path.split(".")
    hint = get_type_hints(type(at(config, ".".join(above)) if above else config))[last]
    before = look(config)
    try:
        same = look(replaced(config, {path: other(hint, path, at(config, path))})) == before
    except InputError:
        return  # refused
    # What is idle is said to be, and only that.
    assert same is (path in idle(config)), (path, idle(config).get(path))


# What others see change, each named with its file; the test reads or sets the field by its name.
ELSEWHERE = {
    "RunConfig.base": "runs/test_continued.py::test_continues_from_a_run_on_another_text",
    "RunConfig.attention": "runs/test_attention.py::test_the_model_is_told",
    "PretrainConfig.base_moments": (
        "runs/test_continued.py::test_a_phase_begins_with_the_moments_of_its_base"
    ),
    "RunConfig.resume": "runs/test_pretraining.py::test_no_resume_refuses_a_used_folder",
    "RunConfig.accept_changes": (
        "runs/test_pretraining.py::test_changes_are_accepted_when_asked_for"
    ),
    "FinetuneConfig.baseline": (
        "runs/test_finetuning.py::test_a_finished_run_is_compared_with_what_needs_no_network"
    ),
    "TrainConfig.keep": "train/test_checkpoint.py::test_keeps_the_newest_and_the_best",
    "MeshConfig.num_slices": "test_sharding.py::test_slices_share_out_data_alone",
    "DataConfig.num_threads": "data/test_loader.py::test_batches_depend_on_the_seed_alone",
    "DataConfig.prefetch": "data/test_loader.py::test_batches_depend_on_the_seed_alone",
    "Tfds.name": "data/test_tfds.py::test_splits_and_slices",
    "Tfds.split": "data/test_tfds.py::test_splits_and_slices",
    "Tfds.data_dir": "data/test_tfds.py::test_splits_and_slices",
    "Tfds.field": "data/test_tfds.py::test_legacy_names_are_found",
    "Tfds.beam": "data/test_beam.py::test_a_beam_data_set_is_prepared_and_becomes_rows",
    "TfdsRecords.name": "data/labelled/test_records.py::test_tfds_records_are_plain",
    "TfdsRecords.split": "data/labelled/test_records.py::test_tfds_records_are_plain",
    "TfdsRecords.data_dir": "data/labelled/test_records.py::test_tfds_records_are_plain",
    "Squad.path": "data/labelled/test_records.py::test_squad",
    "Classification.thresholds": "tasks/test_classification.py::test_a_threshold_for_each_label",
    "Instruction.num_samples": (
        "tasks/test_instruction.py::test_a_model_learns_to_respond_and_to_stop"
    ),
    "Instruction.sample_tokens": (
        "tasks/test_instruction.py::test_a_model_learns_to_respond_and_to_stop"
    ),
    "PermutationLm.memory": (
        "tasks/test_permutation_lm.py"
        "::test_a_run_with_a_memory_is_the_same_on_a_mesh_and_when_it_is_resumed"
    ),
    "TrainConfig.average": "train/test_checkpoint.py::test_keeps_those_whose_mean_is_a_model",
    "Seq2Seq.num_samples": "tasks/test_seq2seq.py::test_what_is_written_at_an_evaluation",
    "Seq2Seq.num_scored": "tasks/test_seq2seq.py::test_what_is_written_at_an_evaluation",
    "Seq2Seq.sample_tokens": "tasks/test_seq2seq.py::test_what_is_written_at_an_evaluation",
    "Tagging.doc_stride": "tasks/test_tagging.py::test_a_run_learns_whose_tag_a_word_has",
    "Tagging.entities": "tasks/test_tagging.py::test_tags_that_mark_no_entities",
    "Tagging.split": "tasks/test_tagging.py::test_a_run_learns_whose_tag_a_word_has",
}


def name_of(kind: type, field: str) -> str:
    """With the class that has the field first, of which others may inherit."""
    owners = [base for base in kind.__mro__ if field in vars(base).get("__annotations__", {})]
    return f"{owners[-1].__name__}.{field}"


def all_fields(kind: Any) -> set[str]:
    """Those of the config and of all that it may hold, but for what holds others."""
    found: set[str] = set()
    for name, hint in get_type_hints(kind).items():
        inner = command_line.classes(hint).values()
        found |= set().union(*map(all_fields, inner)) if inner else {name_of(kind, name)}
    return found


def test_every_field_is_seen_to_change_something() -> None:
    fields = all_fields(PretrainConfig) | all_fields(FinetuneConfig)
    assert len(fields) > 170
    here = set()
    for name, path in CASES:
        above, _, last = path.rpartition(".")
        config = PARTS[name].config
        here.add(name_of(type(at(config, above) if above else config), last))
    assert fields - here - ELSEWHERE.keys() == set()
    assert ELSEWHERE.keys() <= fields - here  # what is here is not named there as well


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_is_seen_elsewhere_is_named_there(name: str) -> None:
    file, _, function = ELSEWHERE[name].partition("::")
    source = (TESTS / file).read_text()
    (test,) = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.name == function
    ]
    field = name.rpartition(".")[2]
    segment = source.splitlines()[test.lineno - 1 : test.end_lineno]
    if field == "path":  # which any reader is given first
        field = name.partition(".")[0]
    assert re.search(rf"\b{field}\b", "\n".join(segment))


def test_every_rule_of_what_is_idle_is_tried() -> None:
    leaves = {name.rpartition(".")[2] for name in all_fields(PretrainConfig)}
    leaves |= {name.rpartition(".")[2] for name in all_fields(FinetuneConfig)}
    source = Path(command_line.__file__).with_name("idle.py").read_text()
    # Names of parts are not meant: the mesh has a `data`, and so has the run.
    named = {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}
    tried = {path.rpartition(".")[2] for n, path in CASES if path in idle(PARTS[n].config)}
    assert named & leaves - tried == {"data"}


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
