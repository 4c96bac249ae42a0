"""What a run stands on, and whether and how it resumes with the settings of today."""

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax

from jaxlm import config as configs
from jaxlm.config import Config, FinetuneConfig, PretrainConfig
from jaxlm.errors import InputError
from jaxlm.models.model import is_attentive
from jaxlm.peft.tuning import Full
from jaxlm.runs.folder import read_config
from jaxlm.runtime import distributed
from jaxlm.runtime.storage import StoragePath
from jaxlm.tasks.classification import Classification
from jaxlm.tasks.embedding import Embedding
from jaxlm.train import restore
from jaxlm.train.loop import TrainConfig
from jaxlm.train.restore import Cursor, compares

# Fields that may change when a run resumes: where things lie (contents have fingerprints), how they
# are computed, and what is kept and shown.
_FREE = (
    r"name|attention|runs|resume|accept_changes|wandb|baseline|placement|base|mesh\..*|prepare(\..*)?"
    r"|data\.paths|task\.split|data\.(train|validation)\.(path|data_dir|source|target)|model\.(remat|unroll)"
    r"|train\.(num_micro_batches|save_every|keep|average|log_every|max_skipped)"
)
# And of a model whose attention can be computed in several ways: how. XLNet's says what sees what.
_ATTENTION = r"model\.attention"
# And of a finished run, which is extended, or one not yet begun: its length.
_LENGTH = r"train\.(steps|epochs|minutes|num_evals)"
# Fields of a task, a model and adapters on which metrics do not depend, rounding apart.
_UNMEASURED = r".*dropout_rate|initializer_std|init|lr_ratio|dtype|unroll|remat|split|num_samples"


def make_cursor(
    config: Config,
    *,
    data: Sequence[str],
    tokenizer_sha256: str,
    base_sha256: str | None,
    monitor: str,
    source_tokenizer_sha256: str | None = None,
) -> Cursor:
    """Where a run stands at its start, and what it stands on: fingerprints of ``data``.

    ``evaluation`` is one of all else that its metrics depend on.
    """
    return {
        "examples_seen": 0,
        "tokens_seen": 0.0,
        "elapsed_s": 0.0,
        "share": 0.0,
        "seed": config.train.seed,
        "length": _length(config.train),
        "monitor": monitor,
        "data": list(data),
        "evaluation": _evaluation(config),
        "tokenizer_sha256": tokenizer_sha256,
        "source_tokenizer_sha256": source_tokenizer_sha256,
        "base_sha256": base_sha256,
    }


def check_processes(config: Config, checkpoints: StoragePath) -> None:
    """All processes of a run must be about to do the same, and see the same checkpoints."""
    if jax.process_count() == 1:
        return
    distributed.check_same(
        "program",
        {
            "the version of jax": jax.__version__,
            "the source code": distributed.code_hash(),
            "the number of devices": jax.local_device_count(),
            "the list of checkpoints": restore.list_steps(checkpoints),
            **configs.flatten(config),
        },
    )


def check_config(directory: StoragePath, config: Config, saved: Cursor) -> None:
    """A resumed run has the settings that it began with, as far as they decide what is learned.

    A finished one may be made longer, and one that has trained nothing may get any length.
    """
    began = read_config(directory, type(config))
    if isinstance(began, FinetuneConfig):  # that of a run before these were fields of its task
        task = began.task.with_pooling(None)
        if isinstance(task, Classification) and task.head_bias is None:
            task = replace(task, head_bias=True)
        began = replace(began, task=task)
    before, now = configs.flatten(began), configs.flatten(config)
    any_length = saved["share"] >= 1 or saved["examples_seen"] == 0
    free = f"{_FREE}|{_LENGTH}" if any_length else _FREE
    free += f"|{_ATTENTION}" if config.model and is_attentive(config.model) else ""
    changed = [
        f"{path}={before.get(path)} there and {now.get(path)} here"
        for path in sorted({*before, *now})
        if before.get(path) != now.get(path) and not re.fullmatch(free, path)
    ]
    if changed and not config.accept_changes:
        raise InputError(
            f"{directory} holds a run that began with other settings: {'; '.join(changed)}; change "
            "them back, add --accept-changes, or give the run another --name"
        )


def check_same(config: Config, saved: Cursor, now: Cursor) -> None:
    """A resumed run has the tokenizer, data, seed, labels and base that it began with.

    Where it accepts changes, data and seed may be others, and a base of which it keeps nothing.
    """
    may_change = ["data", "seed"]
    if isinstance(config, PretrainConfig) or isinstance(config.tuning, Full):
        may_change.append("base_sha256")
    for name in (
        "tokenizer_sha256",
        "source_tokenizer_sha256",
        "data",
        "seed",
        "labels",
        "base_sha256",
    ):
        if config.accept_changes and name in may_change:
            continue
        if name == "data" and saved.get(name) == []:  # of an imported adapter, not known
            continue
        if saved.get(name) != now.get(name):
            way = ", add --accept-changes," if name in may_change else ","
            difference = _difference(saved.get(name), now.get(name))
            raise InputError(
                f"the run in {config.directory} was trained with {name} {difference}: restore it"
                f"{way} or give the run another --name"
            )


def resume_cursor(config: Config, saved: Cursor, start: Cursor) -> Cursor:
    """Where a run resumes that was ``saved`` and would now ``start`` with these data.

    What belongs to other settings is dropped: of another length the share that is done, the
    evaluations that were counted and the patience; of another ``monitor``, of other data, and of
    another evaluation, where values do not compare, the best value.
    """
    check_same(config, saved, start)
    now = ("data", "evaluation", "seed", "length", "monitor")
    cursor = saved | {name: start[name] for name in now}
    if saved.get("length", start["length"]) != start["length"]:
        minutes = config.train.minutes
        # Where nothing was trained, time went into compiling alone.
        done = saved["elapsed_s"] / (60 * minutes) if minutes and saved["examples_seen"] else 0.0
        cursor |= {"share": min(done, 1.0), "since_best": 0}
        cursor.pop("evals_done", None)
    if saved.get("monitor", start["monitor"]) != start["monitor"] or not compares(saved, start):
        for name in ("best", "since_best"):
            cursor.pop(name, None)
    return cursor


def at_a_batch(
    cursor: Cursor, next_begin: Callable[[int], int], say: Callable[[str], None]
) -> Cursor:
    """A cursor where a batch begins, which with other data or another seed may be further on."""
    seen = cursor["examples_seen"]
    begin = next_begin(seen)
    if begin != seen:
        say(
            f"with what has changed no batch begins after {seen:,} examples: going on at the next, "
            f"after {begin:,}"
        )
    return cursor | {"examples_seen": begin}


def with_length(directory: StoragePath, config: Config, saved: Cursor) -> Cursor:
    """A cursor with what older versions did not save in it but in the run's config alone."""
    before = read_config(directory, type(config))
    monitor = configs.flatten(before).get("monitor") or "loss"
    return {"length": _length(before.train), "monitor": monitor} | saved


def _evaluation(config: Config) -> str:
    """A sha256 of the settings that metrics depend on."""
    config = configs.from_json(configs.to_json(config))  # whole numbers given for others are these
    parts: list[Any] = [config.task.for_evaluation(), config.model]
    if isinstance(config, PretrainConfig):
        parts.append(config.train.eval_rows)
    else:
        parts += [config.tuning, config.data.max_length]
        if isinstance(config.task, Embedding):  # its loss is that of a batch
            data = config.data
            parts += [data.batch_size, data.batch_tokens, data.num_buckets, data.pack]
    text = json.dumps([_as_given(part) for part in parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _as_given(part: Any) -> Any:
    """In JSON, without fields at their defaults, so that one of a later version changes nothing."""
    if not dataclasses.is_dataclass(part):
        return configs.encode(part)
    model: Any = part  # if it has attention
    fields: dict[str, Any] = {"type": type(part).__name__}
    for field in dataclasses.fields(part):
        make, value = field.default_factory, getattr(part, field.name)
        default = field.default if make is dataclasses.MISSING else make()
        is_how = field.name == "attention" and is_attentive(model)
        if value != default and not is_how and not re.fullmatch(_UNMEASURED, field.name):
            fields[field.name] = _as_given(value)
    return fields


def _length(train: TrainConfig) -> list[int | float | None]:
    return [train.steps, train.minutes, train.num_evals]


def _difference(before: object, after: object) -> str:
    """What is not the same, and where in a list."""
    if isinstance(before, list) and isinstance(after, list):
        pairs = itertools.zip_longest(before, after)
        number = next(i for i, (a, b) in enumerate(pairs) if a != b)
        one, other = (_short(x[number]) if number < len(x) else "none" for x in (before, after))
        return f"whose number {number + 1} was {one}, and would now be {other}"
    return f"{_short(before)} and would now be {_short(after)}"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 16 else f"{text[:16]}…"
