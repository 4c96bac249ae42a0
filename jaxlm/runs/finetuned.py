"""A fine-tuned model assembled from its configuration: what training and using it share."""

import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from tokenizers import Tokenizer

from jaxlm import optim, sharding, tree
from jaxlm.config import FinetuneConfig
from jaxlm.data.labelled.batches import eval_batches, make_buckets
from jaxlm.data.labelled.dataset import Splits, read_splits
from jaxlm.data.labelled.examples import Examples
from jaxlm.data.labelled.framing import Framer
from jaxlm.data.labelled.records import Record
from jaxlm.errors import InputError
from jaxlm.evaluate.metrics import higher_is_better
from jaxlm.models.bert import BertConfig
from jaxlm.models.heads import WithHead
from jaxlm.peft import tuning
from jaxlm.runs import base as bases
from jaxlm.runs import run
from jaxlm.runs.base import Base
from jaxlm.runtime.batch_rows import ALL_ROWS
from jaxlm.runtime.storage import StoragePath, locate
from jaxlm.sharding import MeshConfig
from jaxlm.sums import Sums, add_all
from jaxlm.tasks.task import Labels, Outputs, Task
from jaxlm.train import restore
from jaxlm.train.placement import Placement, jit_placement, pmap_placement
from jaxlm.train.restore import Cursor, Monitor
from jaxlm.train.state import TrainState
from jaxlm.train.step import make_predict_step, make_train_step
from jaxlm.typing import Apply, Batch, Params, PRNGKey, Variables

LABELS = "labels.json"


def base_encoder(published: BertConfig, mesh: MeshConfig) -> BertConfig:
    """A base's encoder for this mesh: its token table is filled up as pretraining would."""
    assert published.vocab_size is not None
    rows = run.padded_vocab_size(published.vocab_size, mesh)
    return replace(published, dtype=None, vocab_size=rows)


def with_encoder(config: FinetuneConfig, model: Any, platform: str) -> FinetuneConfig:
    """The config with that encoder, which gets the run's dropout rate and dtype."""
    rates = {"dropout_rate": config.dropout_rate}
    if isinstance(model, BertConfig):
        rates["attention_dropout_rate"] = config.dropout_rate
    dtype = config.dtype or model.dtype or run.default_dtype(platform)
    model = replace(model, dtype=dtype, **rates)
    return replace(config, model=model, monitor=monitor(config).name)


def make_model(config: FinetuneConfig, labels: Labels) -> WithHead:
    """The resolved config's encoder with its task's head."""
    assert config.model is not None  # resolved
    return WithHead(config.model.make(), config.task.make_head(labels, config.dropout_rate))


def adapted_apply(config: FinetuneConfig, labels: Labels) -> Apply:
    """The model's, reading adapters and frozen parameters of any dtype."""
    return tuning.adapt(config.tuning, make_model(config, labels).apply)


def make_state(config: FinetuneConfig, labels: Labels, base: Base | None) -> TrainState:
    """Step 0: the base's parameters, and a new head and adapters, on the host's first device."""
    model = make_model(config, labels)
    key, adapter_key = jax.random.split(jax.random.key(config.train.seed))

    def init(key: PRNGKey) -> Params:
        params = dict(model.init(key, _tokens())["params"])
        if base is not None:  # what is not returned is not computed
            del params["encoder"]
        return params

    params = jax.jit(init)(key)
    if base is not None:
        params = params | {"encoder": _with_rows(base.encoder, config.model)}
        if base.pooler is not None and "pooler" in params.get("head", {}):
            params["head"] = params["head"] | {"pooler": base.pooler}
    params = jax.tree.map(jnp.asarray, params)
    trainable, frozen = tuning.prepare(
        config.tuning,
        adapter_key,
        params,
        lambda variables: model.apply(variables, _tokens()),
        config.frozen_dtype,
        split_layers=getattr(config.model, "unroll", 1) is None,
    )
    if not trainable:
        raise InputError(
            f"tuning={type(config.tuning).__name__} leaves nothing to learn: the head of "
            f"{type(config.task).__name__} has no parameters; tune the encoder as well"
        )
    return TrainState.create(trainable, frozen, make_optimizer(config))


def _tokens() -> jax.Array:
    """To initialise and to trace with."""
    return jnp.zeros((1, 8), jnp.int32)


def _with_rows(encoder: dict[str, Any], model: Any) -> dict[str, Any]:
    """The same, its token table filled up with zeros to the model's ``vocab_size``."""
    table = np.asarray(encoder["token_embed"]["embedding"])
    more = model.vocab_size - len(table)
    if not more:
        return encoder
    return encoder | {"token_embed": {"embedding": np.pad(table, ((0, more), (0, 0)))}}


def make_optimizer(config: FinetuneConfig) -> Any:
    """The config's, with the rates of its tuning."""
    return optim.make_optimizer(config.optimizer, tuning.lr_factor(config.tuning))


def make_placement(
    config: FinetuneConfig,
    labels: Labels,
    state: TrainState,
    *,
    labelled: bool = True,
    devices: Sequence[Any] | None = None,
) -> Placement:
    """The run's steps on all devices, or on ``devices``; of ``state`` the shapes alone are used.

    ``eval_step`` gives sums, of labelled data, and outputs. :func:`put_state` puts the state there.
    """
    apply = adapted_apply(config, labels)
    axis_name = "data" if config.placement == "pmap" else None
    train_step = make_train_step(
        config.task.make_loss(apply),
        make_optimizer(config),
        optim.make_schedule(config.optimizer),
        seed=config.train.seed,
        num_micro_batches=config.train.num_micro_batches,
        axis_name=axis_name,
    )
    task = config.task.for_evaluation()
    predict = task.make_predict(apply)
    predict_step = make_predict_step(
        task.make_loss(apply) if labelled else None,
        lambda variables, batch: {**predict(variables, batch), "example": batch["example"]},
        seed=run.EVAL_SEED,
        axis_name=axis_name,
    )

    def init(_: PRNGKey) -> TrainState:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)

    mesh = sharding.make_mesh(config.mesh, devices)
    run.check_batch(config.data.batch_size, config.train.num_micro_batches, mesh)
    if axis_name is None:
        return jit_placement(init, train_step, predict_step, mesh)
    run.check_pmap(mesh)
    return pmap_placement(init, train_step, predict_step, axis_name, devices)


def flops_per_token(config: FinetuneConfig, trainable: PyTree, row_length: int) -> float | None:
    """Floating-point operations of a training step per token; None for encoders but BERT's.

    The products of the encoder forward; again for the gradients of activations, where anything
    below the head learns, and of kernels, where those do; and six for every number in an adapter.
    Heads, norms and biases are left out: below 1 % for a BERT-base.
    """
    if not isinstance(config.model, BertConfig):
        return None
    forward = config.model.forward_flops(row_length, 0) / row_length
    passes = {tuning.Full: 3, tuning.HeadOnly: 1}.get(type(config.tuning), 2)
    return passes * forward + 6.0 * tree.num_params(trainable.get("lora", {}))


def put_state(state: TrainState, placement: Placement) -> TrainState:
    """The state on the devices of its placement."""
    return jax.tree.map(
        lambda x, abstract: jax.device_put(x, abstract.sharding), state, placement.abstract_state
    )


def predict(
    placement: Placement,
    state: TrainState,
    examples: Examples,
    batch_size: int,
    buckets: Sequence[int],
) -> tuple[Sums | None, Outputs]:
    """Sums over all examples, if they are labelled, and the outputs for each, in their order."""
    sums, rows = [], {}
    batches = eval_batches(
        examples,
        batch_size,
        buckets,
        batch_rows=placement.batch_rows,
    )
    for batch in batches:
        one, outputs = jax.device_get(placement.eval_step(state, placement.put_batch(batch)))
        sums += [] if one is None else [one]
        for i, example in enumerate(outputs.pop("example").tolist()):
            if example >= 0:
                rows[example] = {name: values[i] for name, values in outputs.items()}
    collected = {name: [rows[i][name] for i in range(len(rows))] for name in rows[0]}
    return add_all(sums) if sums else None, {
        name: _stack(values) for name, values in collected.items()
    }


def check_monitor(
    config: FinetuneConfig,
    labels: Labels,
    placement: Placement,
    state: TrainState,
    examples: Sequence[Any],
    encoded: Examples,
    buckets: Sequence[int],
) -> None:
    """Raise where the task does not measure what decides which checkpoint is best.

    The metrics are taken of made up outputs, which choose the first of all classes, then the last:
    what only one of them brings may not be there in an evaluation. Nothing is compiled.
    """
    name = monitor(config).name
    if name in ("loss", config.task.monitor):
        return
    step = jax.jit(config.task.make_predict(adapted_apply(config, labels)))

    def made_up(sign: int, state: TrainState, batch: Batch) -> tuple[None, Outputs]:
        shapes = jax.eval_shape(step, state.variables, batch)
        outputs = {
            name: np.broadcast_to((sign * np.arange(x.shape[-1])).astype(x.dtype), x.shape)
            for name, x in shapes.items()
        }
        kept = {*outputs, "example"}  # some are of the batch, such as whose a window is
        return None, outputs | {name: x for name, x in batch.items() if name in kept}

    found: list[Iterable[str]] = []
    for sign in (-1, 1):
        eval_step = functools.partial(made_up, sign)
        on_host = placement._replace(
            eval_step=eval_step, put_batch=lambda x: x, batch_rows=ALL_ROWS
        )
        _, outputs = predict(on_host, state, encoded, config.data.batch_size, buckets)
        found.append(config.task.metrics(examples, labels, outputs))
    check_measured(name, [metric for metric in found[0] if metric in found[1]])


def check_measured(name: str, metrics: Iterable[str]) -> None:
    """Raise where a metric is not among those of a task."""
    known = dict.fromkeys(["loss", *metrics])
    if name not in known:
        raise InputError(f"monitor={name} is not measured here; there are {', '.join(known)}")


def _stack(values: list[Any]) -> Any:
    """An array, unless rows were padded to different lengths."""
    return np.stack(values) if len({np.shape(value) for value in values}) == 1 else values


def monitor(config: FinetuneConfig) -> Monitor:
    """Which checkpoint is best."""
    name = config.monitor or config.task.monitor
    return Monitor(name, higher_is_better(name))


@dataclass(frozen=True)
class FinetunedRun:
    """A fine-tuned run, read from its folder."""

    config: FinetuneConfig
    tokenizer: Tokenizer
    labels: Labels
    state: TrainState
    placement: Placement
    unlabelled: Placement
    """For data without labels."""
    cursor: Cursor

    @property
    def task(self) -> Task:
        """What it was tuned for."""
        return self.config.task

    @property
    def variables(self) -> Variables:
        """All collections, adapters among them, as plain arrays."""
        return tuning.plain(self.state.variables)

    def splits(self) -> Splits:
        """The examples that it was trained on and chosen by; raises if they are others now."""
        data = self.config.data
        splits = read_splits(data, self.task.read)
        if [splits.fingerprint] != self.cursor["data"]:
            raise InputError(
                f"{data.train} or the validation data have changed since {self.config.name} was "
                "trained, and other examples would be held out now: restore them, or evaluate "
                "another file (--data)"
            )
        return splits

    def merged(self) -> Params:
        """The parameters of a plain model, without adapters, that computes the same."""
        model = make_model(self.config, self.labels)
        call = lambda variables: model.apply(variables, _tokens())
        return tuning.merge(self.config.tuning, self.variables, call)

    def outputs(
        self, examples: Sequence[Any], *, labelled: bool = True
    ) -> tuple[Sums | None, Outputs]:
        """What the model gives for examples of its task, in their order."""
        placement = self.placement if labelled else self.unlabelled
        framer = make_framer(self.config, self.tokenizer)
        encoded = self.task.encode(framer, examples, self.labels)
        buckets = make_buckets(
            encoded.lengths, self.config.data.num_buckets, max_length=framer.max_length
        )
        batch_size = self.config.data.batch_size
        return predict(placement, self.state, encoded, batch_size, buckets)

    def answer(self, records: Iterable[Record], *, chunk: int = 4096) -> Iterator[dict[str, Any]]:
        """What the model says of each record, in JSON."""
        records = iter(records)
        while part := list(islice(records, chunk)):
            examples: list[Any] = self.task.read(part, labelled=False)
            _, outputs = self.outputs(examples, labelled=False)
            yield from self.task.answers(examples, self.labels, outputs)


def make_framer(config: FinetuneConfig, tokenizer: Tokenizer) -> Framer:
    """Rows no longer than both data and model allow."""
    assert config.model is not None
    longest = config.model.max_length or config.data.max_length
    return Framer(tokenizer, min(config.data.max_length, longest))


def open_tuned(
    directory: StoragePath | str, *, base: Base | str | None = None, step: int | None = None
) -> FinetunedRun:
    """Read a fine-tuned run: its best checkpoint, or that of ``step``.

    ``base`` is the encoder's path, if it is no longer the config's, or is that encoder, read
    once for several adapters; it is not needed if all parameters were tuned. Raises
    :class:`InputError` where it is another than the adapters' own.
    """
    directory = locate(directory)
    config = run.read_config(directory, FinetuneConfig)
    tokenizer = run.read_tokenizer(directory)
    checkpoints = directory / run.CHECKPOINTS
    cursor = restore.peek(checkpoints)
    run.check_tokenizer(directory, cursor, tokenizer)
    try:
        labels = tuple(json.loads((directory / LABELS).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{directory / LABELS} cannot be read: {error}") from error
    if list(labels) != cursor["labels"]:
        raise InputError(
            f"{directory / LABELS} does not hold the labels that the run was trained with: write "
            f"{json.dumps(cursor['labels'])} there"
        )
    loaded = None
    if config.base is not None and not isinstance(config.tuning, tuning.Full):
        loaded = base if isinstance(base, Base) else bases.load(base or config.base)
        if loaded.fingerprint != cursor["base_sha256"]:
            raise InputError(
                f"{loaded.name} (sha256 {loaded.fingerprint[:12]}) is not the encoder that the "
                f"adapters of {directory} were trained on ({cursor['base_sha256'][:12]}): give "
                "that one with --base"
            )
    config = run.for_evaluation(config)
    state = make_state(config, labels, loaded)
    placement = make_placement(config, labels, state)
    unlabelled = make_placement(config, labels, state, labelled=False)
    restored = restore.restore_part(
        checkpoints,
        {"trainable": placement.abstract_state.trainable},
        restore.best_step(checkpoints, monitor(config), report=restore.warn)
        if step is None
        else step,
    )
    state = put_state(
        TrainState(jnp.asarray(restored.step), restored.state["trainable"], state.frozen, ()),
        placement._replace(abstract_state=replace(placement.abstract_state, opt_state=())),
    )
    return FinetunedRun(config, tokenizer, labels, state, placement, unlabelled, restored.cursor)
