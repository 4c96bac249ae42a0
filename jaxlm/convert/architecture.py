"""How a kind of model is written in Hugging Face's layout, and reading its ``config.json``."""

import difflib
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from jaxlm.convert.table import Row
from jaxlm.errors import InputError
from jaxlm.models.pooling import Pooling

C = TypeVar("C")
OWN = "jaxlm"  # the key of a config.json for what other libraries have no name for
NUMBER = (int, float)
_CALLED: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a string",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}
TaskName = Literal[
    "SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice"
]
TASKS: tuple[TaskName, ...] = (
    "SequenceClassification",
    "TokenClassification",
    "QuestionAnswering",
    "MultipleChoice",
)
POOLED: tuple[TaskName, ...] = ("SequenceClassification", "MultipleChoice")
Problem = Literal["single_label_classification", "multi_label_classification", "regression"]
PROBLEMS: tuple[Problem, ...] = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How one kind of model is written."""

    class_name: str
    """How names of its classes begin there."""
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
    task_heads: Mapping[TaskName, tuple[Row, ...]] = field(default_factory=dict)
    """The heads of tasks, of which a file has one, and its ``config.json`` names which."""
    poolings: tuple[Pooling, ...] = ("cls", "mean")
    """How such a head makes one vector of a row: the first, unless ``config.json`` says how."""
    question_answering: str = "QuestionAnswering"
    """How the name of the class ends that marks the answer's first and last token."""
    prefixes: Mapping[TaskName, str] = field(default_factory=dict)
    """The prefix in the class of a task, where it is another."""
    unused_positions: int = 0
    """Leading rows of the position table."""
    untied: str = "untied weights are not supported"
    """What to say where a copy differs."""

    def of(self, kind: str | None) -> "Architecture":
        """The same, as the class of that kind, such as ``QuestionAnswering``, names it."""
        new = {str(task): prefix for task, prefix in self.prefixes.items()}.get(str(kind))
        return self if new is None else self.with_prefix(new)

    def with_prefix(self, prefix: str) -> "Architecture":
        """The same with that prefix."""

        def named(name: str) -> str:
            begins = name.startswith(self.prefix)
            return f"{prefix}{name.removeprefix(self.prefix)}" if begins else name

        def renamed(rows: Iterable[Row]) -> tuple[Row, ...]:
            return tuple(
                replace(row, theirs=named(row.theirs), last=row.last and named(row.last))
                for row in rows
            )

        return replace(
            self,
            prefix=prefix,
            encoder=renamed(self.encoder),
            heads=tuple(renamed(rows) for rows in self.heads),
            copies={named(copy): named(original) for copy, original in self.copies.items()},
            task_heads={task: renamed(rows) for task, rows in self.task_heads.items()},
        )


def check_distinct(labels: Sequence[str], where: str) -> None:
    """Raise where two classes have one name: what is said of them by name would be of one."""
    for name, count in Counter(labels).most_common(1):
        if count > 1:
            raise InputError(f"{where} names {count} classes {name!r}: give each a name of its own")


# Or its cross-encoders would give the sigmoid of a number.
_NUMBER = {"activation_fn": "torch.nn.modules.linear.Identity"}


@dataclass(frozen=True, kw_only=True)
class TaskHead:
    """What a task's head is, for a ``config.json``."""

    task: TaskName
    labels: tuple[str, ...] = ()
    """Names of what the last layer distinguishes, where they have names."""
    problem_type: Problem | None = None
    pooling: Pooling | None = None
    """How it makes one vector of a row; None: it makes none."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What answers depend on beside the weights, and other libraries do not have: fields of the
    task, in JSON, and ``max_length``, the tokens in the longest row."""

    @property
    def size(self) -> int:
        """Outputs of the last layer."""
        return {"QuestionAnswering": 2, "MultipleChoice": 1}.get(self.task, len(self.labels) or 1)

    @classmethod
    def read(cls, fields: "Fields", architecture: Architecture) -> "TaskHead | None":
        """What a ``config.json`` says of it, if it names the class of a task that is known."""
        task = names_task(fields)
        if task is None or task not in architecture.task_heads:
            return None
        name = str(fields.raw["architectures"][0])
        if task == "QuestionAnswering" and not name.endswith(architecture.question_answering):
            return None
        labels: tuple[str, ...] = ()
        problem: Any = None
        if task in ("SequenceClassification", "TokenClassification"):
            names = fields.get("id2label", dict, {"0": "LABEL_0", "1": "LABEL_1"})
            if sorted(names) != sorted(map(str, range(len(names)))):
                raise InputError(f"{fields.source}: id2label does not name the labels 0, 1, …")
            labels = tuple(str(names[str(i)]) for i in range(len(names)))
        if task == "SequenceClassification":
            kind = "regression" if len(labels) == 1 else "single_label_classification"
            known = {one: one for one in PROBLEMS}
            problem = fields.name("problem_type", known, kind)
            if problem == "regression" and len(labels) > 1:
                raise InputError(
                    f"{fields.source}: problem_type='regression' of {len(labels)} "
                    "numbers is not supported; of one it is"
                )
            labels = () if problem == "regression" else labels
        pooling: Any = None
        if task in POOLED:
            known = {one: one for one in architecture.poolings}
            pooling = fields.name("classifier_pooling", known, architecture.poolings[0])
        settings = fields.get(OWN, dict, {})
        return cls(
            task=task, labels=labels, problem_type=problem, pooling=pooling, settings=settings
        )

    def write_config(self, architecture: Architecture) -> dict[str, Any]:
        """The keys of a ``config.json`` that tell of it."""
        names = dict(enumerate(self.labels or (("LABEL_0",) if self.problem_type else ())))
        said = {
            "id2label": {str(i): name for i, name in names.items()},
            "label2id": {name: i for i, name in names.items()},
            "problem_type": self.problem_type,
            "sentence_transformers": _NUMBER if self.problem_type == "regression" else None,
            "classifier_pooling": self.pooling if self.pooling in ("cls", "mean") else None,
            OWN: dict(self.settings),
        }
        kept = {key: value for key, value in said.items() if value}
        asks = self.task == "QuestionAnswering"
        end = architecture.question_answering if asks else self.task
        return {"architectures": [f"{architecture.class_name}For{end}"], **kept}


class Fields:
    """The keys of a ``config.json``, which errors call ``source``."""

    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        self.raw = raw
        self.source = source
        self._read: dict[str, Any] = {}

    def get(self, key: str, kinds: type | tuple[type, ...], default: Any = None) -> Any:
        """Its value, of one of these types; the default where it is missing or null."""
        value = default if self.raw.get(key) is None else self.raw[key]
        if value is None:
            raise InputError(f"{self.source} lacks {key}")
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            wanted = kinds[-1] if isinstance(kinds, tuple) else kinds
            raise InputError(
                f"{self.source}: {key}={value!r:.80} is of the wrong type: write {_CALLED[wanted]}"
            )
        if isinstance(value, int | float) and not abs(value) <= sys.float_info.max:  # or it is NaN
            raise InputError(
                f"{self.source}: {key}={value!s:.80} is not a finite number: correct it"
            )
        self._read[key] = value
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

    def require_tied(self, names: Iterable[str], scores: str) -> None:
        """Raise if the table that scores the vocabulary is another, and any of it is there."""
        if any(name.startswith(scores) for name in names):
            self.require("tie_word_embeddings", bool, True)

    def name(self, key: str, known: Mapping[str, str], default: str) -> str:
        """What its value is called here."""
        value = self.get(key, str, default)
        if value not in known:
            raise InputError(
                f"{self.source}: {key}={value!r} is not supported; {', '.join(known)} are"
            )
        return known[value]

    def make(self, config: Callable[..., C], values: Mapping[str, Any]) -> C:
        """A config of what has been read; errors say what its fields are called in the file."""
        try:
            return config(**values)
        except InputError as error:
            called, read = {}, {k: x for k, x in self._read.items() if not isinstance(x, bool)}
            for name in re.findall(r"(\w+)=", str(error)):
                # The key of that value, if its name is alike: not all that is 0 is meant.
                keys = [key for key, x in read.items() if x == values.get(name, ...)]
                called[name] = difflib.get_close_matches(name, keys, n=1, cutoff=0.4)
            there = ", ".join(
                f"{name} is {key}" for name, keys in called.items() for key in keys if key != name
            )
            there = there and f" (in the file {there})"
            raise InputError(f"{self.source}: {error}{there}") from error


def names_task(fields: Fields) -> TaskName | None:
    """The task whose class a ``config.json`` names."""
    named = fields.get("architectures", list, []) or [""]
    name = str(named[0]).removesuffix("Simple")  # of XLNet
    return next((one for one in TASKS if name.endswith(f"For{one}")), None)


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
