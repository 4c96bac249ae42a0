"""A task's model as transformers has it: where the parameters of its encoder and its head are."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from jaxlm.convert import folder, layout
from jaxlm.convert.architecture import POOLED, Architecture, Fields, names_task
from jaxlm.convert.table import Row, Sizes
from jaxlm.errors import InputError
from jaxlm.models.model import ModelConfig, has_transform
from jaxlm.models.pooling import Pooling

Kind = Literal[
    "SequenceClassification",
    "TokenClassification",
    "QuestionAnswering",
    "MultipleChoice",
    "CausalLM",
    "Seq2SeqLM",
    "FeatureExtraction",
]


@dataclass(frozen=True, kw_only=True)
class TaskModel:
    """A class of transformers and the names of its parameters."""

    kind: Kind
    auto: str
    """The class that finds it."""
    config: ModelConfig
    """Its encoder's, as the base's folder says."""
    encoder: tuple[Row, ...]
    head: tuple[Row, ...]
    """What is not the base's."""
    sizes: Sizes
    prefix: str
    """Prefix of the encoder's names."""
    scoring: frozenset[str]
    """Tables that score the vocabulary, too."""

    @property
    def rows(self) -> dict[str, Row]:
        """All rows by our path."""
        return {row.ours: row for row in (*self.encoder, *self.head)}


def read(
    path: Path, kind: Kind, pooling: Pooling | None = None, num_labels: int | None = None
) -> TaskModel:
    """The model of that kind on the base in a folder.

    ``pooling`` is that of a head which makes one vector of a row. Raises where transformers has no
    such model, or one that computes something else.
    """
    architecture, config = layout.describe(path)
    sizes = layout.sizes_of(config)
    name = str(folder.read_config(path)["model_type"])
    architecture = architecture.of(kind)
    if kind == "FeatureExtraction":
        architecture = architecture.with_prefix("")
    encoder = architecture.encoder
    scoring: frozenset[str] = frozenset()
    if kind in ("CausalLM", "Seq2SeqLM"):
        rows = [row for head in architecture.heads for row in head]
        encoder += tuple(replace(row, ours=f"lm_{row.ours}") for row in rows)
        scoring = frozenset(architecture.copies.values())
    head = _head(name, kind, architecture, has_transform(config), str(path))
    pools = architecture.poolings
    if kind in POOLED and pooling is not None and pooling not in pools:
        raise InputError(
            f"pooling={pooling} is not what AutoModelFor{kind} does, which takes pooling="
            f"{pools[0]} of a {name}: train with --task.pooling {pools[0]} to use the run there"
        )
    auto = "AutoModel" if kind == "FeatureExtraction" else f"AutoModelFor{kind}"
    labels = {} if num_labels is None else {"labels": num_labels}
    return TaskModel(
        kind=kind,
        auto=auto,
        config=config,
        encoder=encoder,
        head=head,
        sizes={**sizes, **labels},
        prefix=architecture.prefix,
        scoring=scoring,
    )


def check_base(path: Path, model: TaskModel, name: str) -> None:
    """Raise if that class would find no encoder in a base's folder, and draw one at random.

    ``name`` is what errors call the base.
    """
    architecture, _ = layout.describe(path)
    fields = Fields(folder.read_config(path), str(path / folder.CONFIG))
    has, wants = architecture.of(names_task(fields)).prefix, architecture.of(model.kind).prefix
    if has != wants and any(name.startswith(has) for name in folder.open_tensors(path)):
        raise InputError(
            f"{model.auto} finds no encoder in {name}, where its name is {has[:-1]} and not "
            f"{wants[:-1]}: merge_lora.py writes the whole model, which it opens"
        )


def _head(
    name: str, kind: Kind, architecture: Architecture, transforms: bool, source: str
) -> tuple[Row, ...]:
    own = {str(task): rows for task, rows in architecture.task_heads.items()}
    if kind in own:
        begins = ("head/transform/", "head/norm/") if transforms else ()
        rows = (row for head in architecture.heads for row in head)
        shared = (row for row in rows if row.ours.startswith(begins))
        return tuple(row for row in (*shared, *own[kind]) if row.theirs)
    match name, kind:
        case ("t5", "Seq2SeqLM") | ("gpt2" | "llama", "CausalLM") | (_, "FeatureExtraction"):
            return ()
    raise InputError(f"{source}: transformers has no AutoModelFor{kind} of a {name} like ours")
