"""The table in convert's README: what can be done with each architecture, asked of the code.

Where it differs, what the code can do has changed. If that was meant, write the table anew with
``PYTHONPATH=tests/support python tests/convert/test_capabilities.py``.
"""

import importlib.util
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import conftest  # noqa: F401  (the same eight devices)

from jaxlm.compile_check import check, topology
from jaxlm.compile_check.step import Assumed, make_step
from jaxlm.config import FinetuneConfig, LabelledTask, Model, PretrainingTask
from jaxlm.convert import (
    bert,
    gpt2,
    huggingface,
    layout,
    llama,
    modernbert,
    peft_load,
    peft_save,
    stablehlo,
    t5,
    table,
    task_model,
    xlnet,
)
from jaxlm.convert.architecture import TASKS as HEADS
from jaxlm.convert.peft_save import Adapter
from jaxlm.convert.task_model import TaskModel
from jaxlm.data import tokenizers
from jaxlm.data.labelled.dataset import LabelledConfig
from jaxlm.data.labelled.records import Table
from jaxlm.data.tokenizer_training import bert as bert_tokenizer
from jaxlm.data.tokenizer_training import with_specials
from jaxlm.errors import InputError
from jaxlm.models.bert import BertConfig
from jaxlm.models.bilstm import BilstmConfig
from jaxlm.models.gpt2 import Gpt2Config
from jaxlm.models.heads import WithHead
from jaxlm.models.llama import LlamaConfig
from jaxlm.models.model import example_inputs
from jaxlm.models.modernbert import ModernBertConfig
from jaxlm.models.t5 import T5Config
from jaxlm.models.transformer import TransformerConfig
from jaxlm.models.xlnet import XlnetConfig
from jaxlm.nn.intercept import find_sites
from jaxlm.peft import lora
from jaxlm.peft.lora import LoraConfig
from jaxlm.runs import adapter, embedder, finetuning, serving
from jaxlm.runs.base import Base
from jaxlm.runs.finetuned import FinetunedRun
from jaxlm.tasks.embedding import Embedding
from jaxlm.train.loop import TrainConfig
from jaxlm.train.placement import Placement
from jaxlm.train.state import TrainState

README = Path(huggingface.__file__).with_name("README.md")
SIZES = {"vocab_size": 64, "num_layers": 1, "hidden_dim": 8, "num_heads": 2, "mlp_dim": 8}
BERT = bert.write_config(BertConfig(**SIZES, max_length=16))
ROBERTA = BERT | {"pad_token_id": 1, "max_position_embeddings": 18}
DISTILBERT = {"n_layers": 1, "dim": 8, "n_heads": 2, "hidden_dim": 8, "activation": "gelu"}
# What a published config.json says; and what is published by nobody.
PUBLISHED: dict[str, dict[str, Any]] = {
    "bert": BERT,
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "camembert": ROBERTA,
    "electra": BERT,
    "distilbert": DISTILBERT | {"vocab_size": 64, "max_position_embeddings": 16},
    "modernbert": modernbert.write_config(ModernBertConfig(**SIZES, max_length=16), {"pad": 0}),
    "gpt2": gpt2.write_config(Gpt2Config(**SIZES, max_length=16)),
    "llama": llama.write_config(LlamaConfig(**SIZES, max_length=16)),
    "t5": t5.write_config(T5Config(**SIZES, head_dim=4), 2),
    "xlnet": xlnet.write_config(XlnetConfig(**SIZES)),
}
OWN = {
    "our BiLSTM": BilstmConfig(vocab_size=64, embed_dim=8, hidden_dim=8),
    "our Transformer": TransformerConfig(**SIZES),
}
NAMES = ("a", "b", "c")
LETTERS = {
    "Classification": "c",
    "Tagging": "t",
    "QuestionAnswering": "q",
    "MultipleChoice": "m",
    "Embedding": "e",
    "Instruction": "i",
    "Seq2Seq": "s",
}
LABELLED = {LETTERS[kind.__name__]: kind() for kind in get_args(LabelledTask)}
PRETRAINING = {kind.__name__: kind() for kind in get_args(PretrainingTask)}


@cache
def tokenizer() -> Tokenizer:
    vocab = {token: i for i, token in enumerate([*tokenizers.SPECIALS, *"abcdefgh"])}
    return with_specials(bert_tokenizer(models.WordPiece(vocab, unk_token="[UNK]")))


def drawn(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.5, shape).astype(np.float32)


def possible(tasks: Mapping[str, Any], attempt: Callable[[Any], Any], between: str = " ") -> str:
    """Names of the tasks that are not refused; raises where all are."""
    done, refused = [], None
    for name, task in tasks.items():
        try:
            attempt(task)
            done.append(name)
        except InputError as error:
            refused = refused or error
    if refused and not done:
        raise refused
    return between.join(done)


def base_of(config: Any) -> Base:
    """A base without weights."""
    return Base(
        name="a base",
        config=config,
        encoder={},
        pooler=None,
        lm_head=None,
        tokenizer=tokenizer(),
        tokenizer_path=Path("none"),
        fingerprint="",
    )


@cache
def config_of(model: Any, task: Any) -> FinetuneConfig:
    """Of a fine-tuning of all parameters."""
    config = FinetuneConfig(
        name="a run",
        base="a base",
        data=LabelledConfig(train=Table(path="x.csv"), max_length=16, batch_size=8),
        task=task,
        train=TrainConfig(steps=1),
    )
    return finetuning.resolve(config, base_of(model), tokenizer(), "cpu")


@cache
def encoder_of(config: Any) -> Any:
    """Parameters of the encoder."""
    return filled(config.make(), *example_inputs(config))


@cache
def params_of(config: Any, task: Any) -> Any:
    """Those of the model of a task."""
    model = task.make_model(config, NAMES, 0.0)
    if not isinstance(model, WithHead):
        return filled(model, *example_inputs(config))
    head = filled(model.head, jax.ShapeDtypeStruct((1, 8, config.hidden_dim), jnp.float32))
    return {"encoder": encoder_of(config), **({"head": head} if head else {})}


def filled(module: Any, *inputs: Any) -> Any:
    """Parameters of a module, drawn."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return jax.tree.map(lambda x: jnp.asarray(drawn(x.shape)), shapes.get("params", {}))


@cache
def adapters_of(config: Any, task: Any, tuning: LoraConfig) -> Any:
    """Those of the encoder."""
    params, inputs = params_of(config, task), example_inputs(config)
    model = task.make_model(config, NAMES, 0.0)
    sites = find_sites(lambda variables: model.apply(variables, *inputs), {"params": params})
    sites = sites.only(lambda path: path.startswith("encoder/"))
    make = lambda encoder: lora.init_at(jax.random.key(0), {"encoder": encoder}, sites, tuning)
    return jax.tree.map(
        lambda x: jnp.asarray(drawn(x.shape)), jax.eval_shape(make, params["encoder"])
    )


@cache
def lowered(config: FinetuneConfig) -> Any:
    """The step of a fine-tuning, for a TPU."""
    step = make_step(config, Assumed(length=16, vocab_size=64), jax.devices()[:1])
    one = jax.ShapeDtypeStruct((), np.float32)
    traced = step.placement.train_step.trace(step.placement.abstract_state, step.batch, one)
    return traced.lower(lowering_platforms=("tpu",))


class Asked:
    """A tiny model of a kind, and its folder where it is published.

    What a method of ``COLUMNS`` returns stands in the table; where one raises, "no" does.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder / name
        if name in OWN:
            self.config: Any = OWN[name]
            return
        self.folder.mkdir(parents=True)
        raw = PUBLISHED[name] | {"model_type": name}
        (self.folder / "config.json").write_text(json.dumps(raw))
        tokenizers.save(tokenizer(), self.folder / "tokenizer.json")
        architecture, self.config = layout.describe(self.folder)
        rows, sizes = layout.all_rows(architecture), layout.sizes_of(self.config)
        params = {row.ours: drawn(row.shape(sizes)) for row in rows if row.theirs}
        written = table.write(rows, unflatten_dict(params, sep="/"), sizes)
        save_file(written, self.folder / "model.safetensors")

    def reads(self) -> str:
        if self.name in OWN:
            raise InputError(f"nobody else has a {type(self.config).__name__} that could be read")
        huggingface.load(self.folder)
        architecture, _ = layout.describe(self.folder)
        return f"yes {self._heads(lambda kind: kind in architecture.task_heads)}".strip()

    def writes(self) -> str:
        out = self.folder.with_name(f"{self.name} again")
        if self.name in OWN:
            huggingface.save(out, {}, self.config, tokenizer())
        found = huggingface.load(self.folder)
        huggingface.save(out, found.params, found.config, found.tokenizer)
        again = huggingface.load(out)
        assert again.config == found.config
        jax.tree.map(np.testing.assert_array_equal, again.params, found.params)
        written = json.loads((out / "config.json").read_text())["model_type"]
        known = lambda kind: huggingface.poolings(self.config, kind) is not None
        return f"`{written}` {self._heads(known)}".strip()

    def pretrains(self) -> str:
        return possible(PRETRAINING, lambda task: task.make_model(self.config), ", ")

    def tunes(self) -> str:
        return possible(LABELLED, self._params)

    def adapts(self) -> str:
        return self._targets(lambda tuning: self._lora(tuning) and "yes")

    def gives_adapters(self) -> str:
        return self._targets(
            lambda tuning: possible(self.tasks, partial(self._save_adapter, tuning))
        )

    def takes_adapters(self) -> str:
        return self._targets(
            lambda tuning: possible(self.tasks, partial(self._load_adapter, tuning))
        )

    def embeds(self) -> str:
        model = WithHead(self.config.make(), embedder.settings(base_of(self.config)).head)
        jax.eval_shape(model.init, jax.random.key(0), *example_inputs(self.config))
        return "yes"

    def serves(self) -> str:
        return possible(self.tasks, self.served)

    def compiles(self) -> str:
        lowered(self.config_of(self.task))
        return "yes"

    def served(self, task: Any) -> serving.Served:
        config = self.config_of(task)
        state = TrainState(0, {"params": self._params(task)}, {}, ())
        none = Placement(*[None] * len(Placement._fields))  # nothing is run
        return serving.served(FinetunedRun(config, tokenizer(), NAMES, state, none, none, {}, (0,)))

    def _heads(self, known: Callable[[Any], bool]) -> str:
        kinds = {letter: adapter.KINDS[type(task)] for letter, task in LABELLED.items()}
        return " ".join(name for name, kind in kinds.items() if kind in HEADS and known(kind))

    @cached_property
    def tasks(self) -> dict[str, Any]:
        """Those that it can do, by their letters."""
        letters = possible(LABELLED, lambda task: task.make_model(self.config, NAMES, 0.0))
        return {letter: LABELLED[letter] for letter in letters.split()}

    @property
    def task(self) -> Any:
        """One of them."""
        return next(iter(self.tasks.values()))

    def config_of(self, task: Any) -> FinetuneConfig:
        return config_of(self.config, task)

    def _params(self, task: Any) -> Any:
        return params_of(self.config, self.config_of(task).task)

    def _task_model(self, task: Any) -> tuple[TaskModel, Any]:
        if self.name in OWN:
            raise InputError(f"PEFT adapts models of transformers, which has no {self.name[4:]}")
        if "pooling" in vars(task) and not isinstance(task, Embedding):  # as its classes pool
            task = replace(task, pooling=layout.describe(self.folder)[0].poolings[0])
        task, params = self.config_of(task).task, self._params(task)
        kernel = params.get("head", {}).get("classifier", {}).get("kernel")
        labels = None if kernel is None else kernel.shape[-1]
        pooling = vars(task).get("pooling")
        return task_model.read(self.folder, adapter.KINDS[type(task)], pooling, labels), params

    def _lora(self, tuning: LoraConfig) -> Any:
        return adapters_of(self.config, self.config_of(self.task).task, tuning)

    def _save_adapter(self, tuning: LoraConfig, task: Any) -> Path:
        out = self.folder / type(task).__name__
        model, params = self._task_model(task)
        saved = {"head": params["head"]} if "head" in params else {}
        one = Adapter(tuning=tuning, collection=self._lora(tuning), saved=saved)
        peft_save.save(out, one, params, model, str(self.folder))
        return out

    def _load_adapter(self, tuning: LoraConfig, task: Any) -> None:
        out = self._save_adapter(tuning, task)
        model, params = self._task_model(task)
        peft_load.load(out, params, model)

    @staticmethod
    def _targets(ask: Callable[[LoraConfig], str]) -> str:
        """By the usual targets, which are attention's, or by others."""
        try:
            return ask(LoraConfig())
        except InputError as usual:
            for others in ("mlp/.*kernel", "kernel"):
                try:
                    return f"{ask(LoraConfig(targets=(others,)))} `--tuning.targets`"
                except InputError:
                    continue
            raise usual


COLUMNS: dict[str, Callable[[Asked], str]] = {
    "import": Asked.reads,
    "export": Asked.writes,
    "pretraining": Asked.pretrains,
    "fine-tuning": Asked.tunes,
    "LoRA": Asked.adapts,
    "PEFT in": Asked.takes_adapters,
    "PEFT out": Asked.gives_adapters,
    "embed": Asked.embeds,
    "StableHLO": Asked.serves,
    "TPU": Asked.compiles,
}


def asked(name: str, folder: Path, columns: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """Cells, and a sentence for each no."""
    one, cells, reasons = Asked(name, folder), [name], {}
    for column in columns:
        try:
            cells.append(COLUMNS[column](one))
        except InputError as error:
            cells.append("no")
            reasons[column] = str(error).replace(str(one.folder), name)
    return cells, reasons


def write(folder: Path, columns: Sequence[str]) -> str:
    """The table, and the reasons beneath it."""
    lines = [["architecture", *columns], ["---"] * (len(columns) + 1)]
    notes: list[str] = []
    for name in (*PUBLISHED, *OWN):
        cells, reasons = asked(name, folder, columns)
        lines.append(cells)
        for reason in dict.fromkeys(reasons.values()):
            where = ", ".join(column for column in reasons if reasons[column] == reason)
            notes.append(f"- {name}, {where}: {reason}.")
    return "\n".join([*(f"| {' | '.join(cells)} |" for cells in lines), "", *notes])


BEGINS, ENDS = "<!-- by tests/convert/test_capabilities.py -->\n", "\n<!-- to here -->"


def readme() -> tuple[str, str, str]:
    """What is before the table, the table, and what is behind it."""
    before, _, rest = README.read_text().partition(BEGINS)
    written, _, after = rest.partition(ENDS)
    return before, written, after


def test_the_table_is_what_the_code_does(tmp_path):
    *columns, last = COLUMNS
    assert last == "TPU"  # which takes long: below
    kept = [re.sub(r" [^|]+\|$", "", line) for line in readme()[1].splitlines()]
    assert kept == write(tmp_path, columns).splitlines()


def test_every_architecture_is_in_it(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "none"}')
    with pytest.raises(InputError) as raised:
        layout.describe(tmp_path)
    known = str(raised.value).partition("supported; ")[2]
    assert set(re.findall(r"[\w-]+", known)) - {"and", "are"} == PUBLISHED.keys()
    published = {type(Asked(name, tmp_path).config) for name in PUBLISHED}
    assert published | {type(config) for config in OWN.values()} == set(get_args(Model))
    assert published == set(get_args(layout.Known))


def called(served: serving.Served) -> tuple[Callable[..., Any], Any]:
    """The function that is written, and its weights by their paths."""
    call = lambda weights, *arrays: served.apply(unflatten_dict(weights, sep="/"), *arrays)
    return call, flatten_dict(served.params, sep="/")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "modernbert", "gpt2", "llama", "t5", "xlnet", *OWN])
def test_what_is_lowered_and_compiled(name, tmp_path):
    cells, _ = asked(name, tmp_path, COLUMNS)
    assert f"| {' | '.join(cells)} |" in readme()[1].splitlines()
    one = Asked(name, tmp_path / "again")
    letters = cells[list(COLUMNS).index("StableHLO") + 1].replace("no", "").split()
    jaxtyping.config.update("jaxtyping_disable", True)  # a symbolic length is no int
    try:
        for served in (one.served(LABELLED[letter]) for letter in letters):
            assert stablehlo.serialize(*called(served), served.shapes, served.max_length)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    if importlib.util.find_spec("libtpu"):
        config = replace(one.config_of(one.task), base=None)
        found = check.check(config, Assumed(length=16, vocab_size=64), topology.read("v5e:2x2"))
        assert found.fits


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        new = write(Path(place), list(COLUMNS))
    before, _, after = readme()
    README.write_text(f"{before}{BEGINS}{new}{ENDS}{after}")
