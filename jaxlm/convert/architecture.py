"""How a kind of model is written in Hugging Face's layout, and reading its ``config.json``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxlm.convert.table import Row
from jaxlm.errors import InputError

NUMBER = (int, float)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How one kind of model is written."""

    prefix: str
    """Prefix of the encoder's and the pooler's names; files of a bare encoder lack it."""
    encoder: tuple[Row, ...]
    """Always there."""
    heads: tuple[tuple[Row, ...], ...]
    """Each is there whole, or not at all."""
    copies: Mapping[str, str]
    """Second names of tied tensors -> first names."""
    ignored: str
    """A pattern of how names begin that hold nothing to read."""
    task_head: tuple[Row, ...] = ()
    """The last layer of a task's head, which is written and not read."""
    unused_positions: int = 0
    """Leading rows of the position table."""
    untied: str = "untied weights are not supported"
    """What to say where a copy differs."""


@dataclass(frozen=True, kw_only=True)
class TaskHead:
    """What a task's head is, for a ``config.json``."""

    task: Literal[
        "SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice"
    ]
    labels: tuple[str, ...] = ()
    """Names of what the last layer distinguishes, where they have names."""
    problem_type: (
        Literal["single_label_classification", "multi_label_classification", "regression"] | None
    ) = None
    pooling: Literal["cls", "mean"] | None = None
    """How it makes one vector of a row; None: it makes none."""

    def write_config(self, model: str) -> dict[str, Any]:
        """The keys of a ``config.json`` that tell of it."""
        names = dict(enumerate(self.labels or (("LABEL_0",) if self.problem_type else ())))
        said = {
            "id2label": {str(i): name for i, name in names.items()},
            "label2id": {name: i for i, name in names.items()},
            "problem_type": self.problem_type,
            "classifier_pooling": self.pooling,
        }
        kept = {key: value for key, value in said.items() if value}
        return {"architectures": [f"{model}For{self.task}"], **kept}


class Fields:
    """The keys of a ``config.json``, which errors call ``source``."""

    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        self.raw = raw
        self.source = source

    def get(self, key: str, kinds: type | tuple[type, ...], default: Any = None) -> Any:
        """Its value, of one of these types; the default where it is missing or null."""
        value = default if self.raw.get(key) is None else self.raw[key]
        if value is None:
            raise InputError(f"{self.source} lacks {key}")
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise InputError(f"{self.source}: {key}={value!r} is of the wrong type")
        return value

    def maybe(self, key: str, kinds: type | tuple[type, ...]) -> Any:
        """The same, but None where it is missing or null."""
        return None if self.raw.get(key) is None else self.get(key, kinds)

    def require(self, key: str, kind: type, value: Any) -> None:
        """Raise if it is there and another."""
        if self.get(key, kind, value) != value:
            raise InputError(
                f"{self.source}: {key}={self.raw[key]!r} is not supported; {value!r} is"
            )

    def name(self, key: str, known: Mapping[str, str], default: str) -> str:
        """What its value is called here."""
        value = self.get(key, str, default)
        if value not in known:
            raise InputError(
                f"{self.source}: {key}={value!r} is not supported; {', '.join(known)} are"
            )
        return known[value]


# What feed-forward blocks' activations are called there; the first name of each is written.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def published_activation(name: str) -> str:
    """The inverse of :data:`ACTIVATIONS`."""
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == name)
