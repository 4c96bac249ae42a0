"""What a task is to the rest of fine-tuning."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn

from jaxlm.data.labelled.examples import Examples
from jaxlm.data.labelled.framing import Framer
from jaxlm.data.labelled.records import Record
from jaxlm.evaluate.report import Prediction
from jaxlm.objectives.supervised import Predict
from jaxlm.typing import Apply, Loss

# Of all rows of a data set, in its order: arrays, or lists of them where lengths differ. A row is
# an example, unless the task's rows say whose they are.
Outputs = Mapping[str, Any]
Labels = tuple[str, ...]


@runtime_checkable
class Task(Protocol):
    """The configuration of a task is the task: a frozen dataclass with these methods.

    Examples are of the task's own kind; they have a ``stratum``, a ``content`` and a ``origin``.
    """

    @property
    def verb(self) -> str:
        """The subcommand of scripts/predict.py."""
        ...

    @property
    def text_fields(self) -> tuple[str, ...]:
        """The fields of a record that hold what a user gives: one or two texts."""
        ...

    @property
    def monitor(self) -> str:
        """The metric that says which checkpoint is best."""
        ...

    def for_evaluation(self) -> "Task":
        """The task without what only regularises training."""
        ...

    def read(self, records: Iterable[Record], *, labelled: bool = True) -> list[Any]:
        """The examples; with ``labelled=False`` no label is looked for."""
        ...

    def labels(self, examples: Sequence[Any]) -> Labels:
        """The labels of the training examples, that the head distinguishes; empty for numbers."""
        ...

    def classes(self, examples: Sequence[Any]) -> list[str]:
        """All labels of all examples, to be counted."""
        ...

    def encode(self, framer: Framer, examples: Sequence[Any], labels: Labels) -> Examples:
        """Rows of arrays, in the order of the examples; with labels where those have them."""
        ...

    def make_head(self, labels: Labels, dropout_rate: float) -> nn.Module:
        """The head on top of the encoder."""
        ...

    def make_loss(self, apply: Apply) -> Loss:
        """What is minimised in training."""
        ...

    def make_predict(self, apply: Apply) -> Predict:
        """The outputs for a batch."""
        ...

    def metrics(
        self, examples: Sequence[Any], labels: Labels, outputs: Outputs
    ) -> dict[str, float]:
        """The task's metrics over a whole data set."""
        ...

    def predictions(
        self, examples: Sequence[Any], labels: Labels, outputs: Outputs
    ) -> list[Prediction]:
        """Each example with its loss, for a list of the most wrong ones; may be empty."""
        ...

    def answers(
        self, examples: Sequence[Any], labels: Labels, outputs: Outputs
    ) -> list[dict[str, Any]]:
        """The answer to each example as scripts/predict.py prints it, in JSON."""
        ...
