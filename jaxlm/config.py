"""A run's configuration: frozen dataclasses, written in Python, overridden on the command line.

    python scripts/pretrain.py configs/bert_base.py --optimizer.peak-lr 3e-4

A config file ends in ``config = PretrainConfig(...)`` or ``FinetuneConfig(...)``; a variant imports
its parent's and uses ``dataclasses.replace``. Each part lives beside what it configures.
"""

import dataclasses
import json
import runpy
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from jaxlm.data.labelled.dataset import LabelledConfig
from jaxlm.data.loader import DataConfig
from jaxlm.data.prepare import PrepareConfig, TokenizerConfig, check_extension
from jaxlm.data.tabular import parse_json
from jaxlm.errors import InputError
from jaxlm.models.bert import BertConfig
from jaxlm.models.bilstm import BilstmConfig
from jaxlm.models.gpt2 import Gpt2Config
from jaxlm.models.llama import LlamaConfig
from jaxlm.models.modernbert import ModernBertConfig
from jaxlm.models.t5 import T5Config
from jaxlm.models.transformer import TransformerConfig
from jaxlm.models.xlnet import XlnetConfig
from jaxlm.nn.choose import Wanted
from jaxlm.optim import OptimizerConfig
from jaxlm.peft.tuning import FrozenDtype, Full, Tuning
from jaxlm.runtime.storage import StoragePath, locate
from jaxlm.sharding import MeshConfig
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
from jaxlm.train.loop import TrainConfig

# What a run's configuration may hold: another architecture or task is added here.
Model = (
    BertConfig
    | BilstmConfig
    | Gpt2Config
    | LlamaConfig
    | TransformerConfig
    | T5Config
    | XlnetConfig
    | ModernBertConfig
)
PretrainingTask = MaskedLm | CausalLm | PermutationLm | ReplacedToken | SpanCorruption
LabelledTask = (
    Classification
    | Tagging
    | QuestionAnswering
    | MultipleChoice
    | Embedding
    | Instruction
    | Seq2Seq
)
UNKNOWN_BASE = BertConfig()  # what the compile check takes a base for that is not there
ANY_BASE = Gpt2Config(vocab_size=8, num_layers=1, hidden_dim=4, num_heads=1, mlp_dim=4)
"""A model that every labelled task takes but Seq2Seq."""


def check_name(name: str) -> None:
    """Raise if it cannot be the name of a folder."""
    if not name.strip():
        raise InputError(f"name={name!r}: the run folder needs a name")
    if ":/" in name:
        raise InputError(f"name={name!r} is a path or URL: put the folder in --runs")
    length = max(len(part.encode(errors="replace")) for part in name.split("/"))
    if length > 255:
        raise InputError(f"name={name!r:.40} has {length} bytes: a folder's name has at most 255")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What pretraining and fine-tuning share: the run folder, the optimizer and the devices."""

    name: str
    """Name of the run folder inside `runs`."""
    runs: Path = Path("runs")
    """Folder of all run folders; may be gs://bucket/folder."""
    base: str | None = None
    """The pretrained model to start from: a run folder, a folder in Hugging Face's layout, or a
    name on the hub; None: `model` is trained from scratch."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    placement: Literal["jit", "pmap"] = "jit"
    """jit shards over the whole mesh; pmap is data parallel only, for code that still needs it."""
    attention: Wanted = "auto"
    """How attention is computed: plain; blockwise, whose memory is linear in the length; by a
    kernel: splash on TPUs, tokamax or cudnn on GPUs; auto: as suits devices and rows."""
    resume: bool = True
    """Resume from the run folder's newest checkpoint; --no-resume refuses a used folder."""
    accept_changes: bool = False
    """Allow a resumed run to have other settings, data or seed than it began with, and one that
    trains all parameters another base, in pretraining also none."""
    wandb: str | None = None
    """Weights & Biases project to log to as well; None: none."""

    @property
    def directory(self) -> StoragePath:
        """The run folder."""
        check_name(self.name)
        return locate(self.runs / self.name)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """Pretraining: what is read, and what is learned by which model."""

    data: DataConfig
    prepare: PrepareConfig | None = None
    """How to prepare the first of `data.paths` if it is missing (with the tokenizer of `base`, if
    there is one); None: it must exist."""
    model: Model | None = None
    """The architecture to train from scratch, or the base's with other values of fields that change
    no parameters, such as those of rotations, and more positions; None: that of the base."""
    base_moments: bool = False
    """Begin with the optimizer's moments of the base, too, a run with the same optimizer and
    parameters: a decay then needs no warm-up."""
    task: PretrainingTask = field(default_factory=MaskedLm)
    """What is learned."""

    def __post_init__(self) -> None:
        if self.base is None and self.model is None:
            raise InputError(
                "base and model are None: name a pretrained model, or one to train from scratch"
            )
        if self.base_moments and self.base is None:
            raise InputError("base_moments=True, and there is no base: name a run, or leave it out")
        if self.prepare is not None and self.base is None:
            check_extension(self.prepare, "--prepare.", "--base")

    @property
    def packs_rows(self) -> bool:
        """Whether documents of a row do not see each other."""
        return getattr(self.task, "isolate_documents", False)  # a task of one's own may not ask


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """Fine-tuning: labelled data, a task, an encoder, and which of its parameters learn."""

    data: LabelledConfig
    task: LabelledTask = field(default_factory=Classification)
    model: Model | None = None
    """The encoder to train from scratch; None: that of the base."""
    tokenizer: TokenizerConfig | None = None
    """Tokenizer to train on the texts, or to load, if there is no base."""
    source_tokenizer: TokenizerConfig | None = None
    """Another for the sources of task Seq2Seq, whose embeddings are then their own; None: sources
    and targets share `tokenizer`."""
    tuning: Tuning = field(default_factory=Full)
    """Which parameters are trained, such as adapters, biases, the head, or all."""
    frozen_dtype: FrozenDtype = "float32"
    """Dtype of frozen parameters in memory; int8 quantizes kernels to 8 bits per weight."""
    dropout_rate: float | None = None
    """Dropout rate of encoder and head in fine-tuning, whatever pretraining used; None: 0.1 with a
    base, else as `model` says."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of matrix products and activations; None: as `model` says, else bfloat16 on GPUs and
    TPUs and float32 on CPUs. CPUs with AVX-512 BF16 or AMX are faster in bfloat16."""
    monitor: str | None = None
    """Metric that decides which checkpoint is best; None: the task's own."""
    baseline: bool = True
    """Say at the end what is reached without a network: the most frequent class, or a linear model
    on TF-IDF where that takes seconds."""

    def __post_init__(self) -> None:
        if self.base is None and self.model is None:
            raise InputError(
                "base and model are None: name a pretrained encoder, or one to train from scratch"
            )
        if self.base is None and not isinstance(self.tuning, Full):
            raise InputError(
                f"tuning={type(self.tuning).__name__} would freeze an untrained encoder: "
                "name a base, or use Full"
            )
        for name in ("tokenizer", "source_tokenizer"):
            if self.base is not None and vars(self)[name] is not None:
                raise InputError(
                    f"{name} is given, and also base={self.base!r}, which has its own: leave it out"
                )
        if self.source_tokenizer is not None and not isinstance(self.task, Seq2Seq):
            raise InputError(
                f"source_tokenizer is for the sources of task=Seq2Seq, and "
                f"task={type(self.task).__name__} reads all with tokenizer: leave it out"
            )
        if isinstance(self.tuning, Full) and self.frozen_dtype != "float32":
            raise InputError(
                f"frozen_dtype={self.frozen_dtype} is for frozen parameters, and "
                "tuning=Full freezes none: leave it out"
            )
        if isinstance(self.task, Embedding) and (
            self.train.num_micro_batches > 1 or self.placement == "pmap"
        ):
            raise InputError(
                "task=Embedding contrasts each pair with all others of a batch, which micro-"
                "batches and pmap take apart: use placement=jit and train.num_micro_batches=1"
            )
        if self.data.augment is not None and not isinstance(self.task, Classification):
            raise InputError(
                "data.augment would shift tags and answers: it is for Classification alone"
            )
        if self.data.pack and not self.may_pack:
            raise InputError(
                f"data.pack is for texts and pairs with a label, tags or an embedding, and not for "
                f"task={type(self.task).__name__}: leave it out"
            )
        if self.dropout_rate is not None and not 0 <= self.dropout_rate < 1:
            raise InputError(f"dropout_rate={self.dropout_rate} is not inside [0, 1); 0 is off")

    @property
    def may_pack(self) -> bool:
        """Whether examples of its task can share rows."""
        return isinstance(self.task, Classification | Tagging | Embedding)

    @property
    def packs_rows(self) -> bool:
        """Whether a row holds several examples, which do not see each other."""
        return self.data.pack or (isinstance(self.task, Instruction) and self.task.pack)


Config = PretrainConfig | FinetuneConfig
C = TypeVar("C", bound=RunConfig)


def read_file(path: StoragePath) -> Config:
    """``config`` as a Python file defines it, or as a run folder's ``config.json`` holds it."""
    if not path.is_file():
        raise InputError(f"there is no config file {path}")
    try:
        if path.suffix == ".json":
            return from_json(path.read_text(encoding="utf-8-sig"))
        config = runpy.run_path(str(path)).get("config")
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except Exception as error:  # a config file is a program: it may fail in any way
        raise InputError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise InputError(
            f"{path} does not end in `config = PretrainConfig(...)` or `FinetuneConfig(...)`"
        )
    return config


def to_json(config: Config) -> str:
    """All fields, for :func:`from_json`."""
    return json.dumps(encode(config), indent=2) + "\n"


def encode(value: Any) -> Any:
    """A configuration, or a part of one, in JSON; dataclasses carry their names under ``type``."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, tuple):
        return [encode(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def flatten(config: Config) -> dict[str, Any]:
    """The value of every field, by path such as ``optimizer.peak_lr``."""

    def walk(path: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict):
            for name, part in value.items():
                yield from walk(f"{path}.{name}" if path else name, part)
        else:
            yield path, value

    return dict(walk("", json.loads(to_json(config))))


def from_json(text: str) -> Config:
    """The inverse of :func:`to_json`; unknown fields and wrong types raise."""
    try:
        return decode(Config, _renamed(parse_json(text)), "config")
    except json.JSONDecodeError as error:
        raise InputError(f"the config is not JSON: {error}") from error


def _renamed(fields: Any) -> Any:
    """A config as runs before version 0.2 wrote it, in the names of today."""
    match fields:
        case {"objective": {"type": "MaskedLmConfig", **masking}, **others}:
            return others | {"task": {"type": "MaskedLm", **masking}}
    return fields


def decode(hint: Any, value: Any, where: str) -> Any:
    """The inverse of :func:`encode` for the type ``hint``; errors call the value ``where``."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        if dataclasses.is_dataclass(option) and isinstance(value, dict):
            if value.get("type") == option.__name__:  # pyright: ignore[reportAttributeAccessIssue]
                hints = get_type_hints(option)
                fields = {k: v for k, v in value.items() if k != "type"}
                if unknown := fields.keys() - hints.keys():
                    raise InputError(f"{where} has no field {sorted(unknown)[0]}")
                parts = {k: decode(hints[k], v, f"{where}.{k}") for k, v in fields.items()}
                try:
                    return option(**parts)  # pyright: ignore[reportCallIssue]
                except TypeError as error:
                    raise InputError(f"{where}: {error}") from error
        elif get_origin(option) is tuple and isinstance(value, list):
            return tuple(decode(get_args(option)[0], v, where) for v in value)
        elif get_origin(option) is Literal and value in get_args(option):
            return value
        elif option is Path and isinstance(value, str):
            return Path(value)
        elif option is float and type(value) is int:
            return float(value)
        elif isinstance(option, type) and type(value) is option:
            return value
    names = [option.__name__ for option in options if isinstance(option, type)]
    if isinstance(value, dict) and "type" in value:
        raise InputError(
            f"{where} is a {value['type']}, which is none of {', '.join(names)}: add a class of "
            "your own to the unions in jaxlm/config.py"
        )
    raise InputError(f"{where}={value!r} is not of type {hint}")
