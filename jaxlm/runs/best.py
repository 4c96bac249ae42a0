"""Which checkpoint of a fine-tuning is best, and by what."""

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import jax

from jaxlm.config import ANY_BASE, FinetuneConfig
from jaxlm.errors import InputError
from jaxlm.evaluate.metrics import higher_is_better
from jaxlm.models.model import example_inputs
from jaxlm.tasks.task import Generative, Labels, Task
from jaxlm.train.restore import Monitor


def monitor(config: FinetuneConfig) -> Monitor:
    """Which checkpoint is best: never one with an untrained head, if there is another."""
    name = config.monitor or config.task.monitor
    if isinstance(config.task, Generative):  # with the base's head
        return Monitor(name, higher_is_better(name))
    return Monitor(name, higher_is_better(name), first_step=int(_has_head(config.task)))


@cache  # a run asks several times, and tracing takes a tenth of a second
def _has_head(task: Task) -> bool:
    """Whether the task's head has parameters, which then are untrained at first."""
    model = task.make_model(ANY_BASE, ("a", "b"), 0.0)  # the config's may not be known yet
    shapes = jax.eval_shape(model.init, jax.random.key(0), *example_inputs(ANY_BASE))
    return "head" in shapes["params"]


def check_monitor(config: FinetuneConfig, labels: Labels, examples: Sequence[Any]) -> None:
    """Raise where the task does not measure what decides which checkpoint is best."""
    check_measured(monitor(config).name, config.task.metric_names(examples, labels))


def check_measured(name: str, metrics: Iterable[str]) -> None:
    """Raise where a metric is not among those of a task."""
    known = dict.fromkeys(["loss", *metrics])
    if name not in known:
        hint = " (of one class for each text it is the accuracy)" if name == "micro_f1" else ""
        raise InputError(f"monitor={name} is not measured here{hint}; there are {', '.join(known)}")
