"""Where a step runs: under jit over a mesh, or under pmap. Both give the same few functions."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxlm import sharding, tree
from jaxlm.errors import InputError
from jaxlm.runtime.batch_rows import BatchRows
from jaxlm.sharding import AXES, RULES, AxisTable, Rules
from jaxlm.train.state import TrainState
from jaxlm.train.step import EvalStep, TrainStep
from jaxlm.train.stored import lay_out
from jaxlm.typing import Batch, HostBatch, PRNGKey

Init = Callable[..., TrainState]  # (key[, given parameters]) -> the state at step 0
AbstractBatch = Mapping[str, jax.ShapeDtypeStruct]


class Placement(NamedTuple):
    """A run's functions on its devices; ``train_step`` and ``eval_step`` can be lowered."""

    init: Init  # donates what is given, as ``put_params`` laid it out
    put_params: Callable[..., PyTree]  # (arrays or what is stored[, keep]) -> on the devices
    train_step: Callable[..., Any]  # (state, batch, progress) -> (state, Sums); donates the state
    eval_step: Callable[..., Any]  # (state, batch) -> Sums
    put_batch: Callable[[HostBatch], Batch]
    abstract_state: TrainState  # shapes and shardings
    batch_rows: BatchRows  # the rows of a batch that this process gives to put_batch
    abstract_batch: Callable[[AbstractBatch], AbstractBatch]  # of a global batch: adds shardings


def jit_placement(
    init: Init,
    train_step: TrainStep,
    eval_step: EvalStep,
    mesh: Mesh,
    axes: AxisTable = AXES,
    rules: Rules = RULES,
) -> Placement:
    """One program over the whole mesh; parameters and moments are never whole on one device.

    On several devices every parameter needs a row of ``axes``; on one, none does.
    """
    shapes = jax.eval_shape(init, jax.random.key(0))
    shardings = state_shardings(shapes, mesh, axes, rules)
    everywhere = NamedSharding(mesh, PartitionSpec())
    batch_rows = sharding.process_rows(mesh, jax.process_index(), rules)

    def on_mesh(function: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*args: Any) -> Any:
            with sharding.use_mesh(mesh, rules):
                return function(*args)

        return inside

    def sharding_of(shape: tuple[int, ...], length: int | None) -> NamedSharding:
        # Of the last axes, those are positions that are as long as the rows of tokens.
        last = "length" if shape[-1] == length else None
        names = ("batch", *(None,) * (len(shape) - 2), last)[: len(shape)]
        return NamedSharding(mesh, sharding.spec(names, mesh, shape, rules))

    def length_of(batch: Mapping[str, Any]) -> int | None:
        return batch["tokens"].shape[-1] if "tokens" in batch else None

    def put_batch(batch: HostBatch) -> Batch:
        length = length_of(batch)

        def put(x: np.ndarray) -> jax.Array:
            shape = (x.shape[0] * batch_rows.count, *x.shape[1:])
            return jax.make_array_from_process_local_data(sharding_of(shape, length), x, shape)

        return jax.tree.map(put, batch)

    def abstract_batch(batch: AbstractBatch) -> AbstractBatch:
        length = length_of(batch)
        return _abstract(batch, jax.tree.map(lambda x: sharding_of(x.shape, length), batch))

    return Placement(
        _making(init, shardings),
        partial(_put, shapes, lambda params: sharding.tree_shardings(params, mesh, axes, rules)),
        jax.jit(on_mesh(train_step), donate_argnums=0, out_shardings=(shardings, everywhere)),
        jax.jit(on_mesh(eval_step), out_shardings=everywhere),
        put_batch,
        _abstract(shapes, shardings),
        batch_rows,
        abstract_batch,
    )


def pmap_placement(
    init: Init,
    train_step: TrainStep,
    eval_step: EvalStep,
    axis_name: str,
    devices: Sequence[Any] | None = None,
) -> Placement:
    """Data parallel only, for code that still needs ``pmap``: each device holds all parameters.

    On all devices, or on ``devices``; no parameter needs a row of an axis table. The steps must
    have been made with the same ``axis_name``: with ``out_axes=None`` a missing ``psum`` would go
    unnoticed. The state keeps its plain shape, so checkpoints are those of jit.
    """
    mesh = Mesh(np.asarray(jax.devices() if devices is None else devices), (axis_name,))
    shapes = jax.eval_shape(init, jax.random.key(0))
    everywhere = lambda params: jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), params)
    shardings = everywhere(shapes)
    num_local = len(mesh.local_devices)

    def put_batch(batch: HostBatch) -> Batch:
        rows = len(next(iter(batch.values())))
        if rows % num_local:
            raise InputError(f"{rows} rows cannot be split over {num_local} devices")
        return {name: x.reshape(num_local, -1, *x.shape[1:]) for name, x in batch.items()}

    def abstract_batch(batch: AbstractBatch) -> AbstractBatch:
        split = lambda shape: (mesh.size, shape[0] // mesh.size, *shape[1:])
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(split(x.shape), x.dtype), batch)

    pmapped = jax.pmap(
        train_step,
        axis_name,
        in_axes=(None, 0, None),
        out_axes=None,  # pyright: ignore[reportArgumentType]
        devices=devices,
        donate_argnums=0,
    )

    def joined(*args: Any) -> Any:
        """The state of several processes, of which pmap gives each its own, as one again."""
        state, sums = pmapped(*args)
        return jax.tree.map(_as_one, state, shardings), sums

    return Placement(
        _making(init, shardings),
        partial(_put, shapes, everywhere),
        pmapped if jax.process_count() == 1 else joined,
        jax.pmap(
            eval_step,
            axis_name,
            in_axes=(None, 0),
            out_axes=None,  # pyright: ignore[reportArgumentType]
            devices=devices,
        ),
        put_batch,
        _abstract(shapes, shardings),
        BatchRows((jax.process_index(),), jax.process_count()),
        abstract_batch,
    )


def _making(init: Init, shardings: TrainState) -> Init:
    made = jax.jit(lambda key, *given: init(key, *given), donate_argnums=1, out_shardings=shardings)

    def make(key: PRNGKey, *given: PyTree) -> TrainState:
        with warnings.catch_warnings():  # what becomes smaller, such as bytes, cannot be reused
            warnings.filterwarnings("ignore", "Some donated buffers were not usable")
            return made(key, *given)

    return make


def _put(
    shapes: TrainState,
    shardings_of: Callable[[PyTree], PyTree],
    params: PyTree,
    keep: Callable[[Any, jax.Array], Any] = lambda _, x: x,
) -> PyTree:
    """Parameters on the devices, one after the other; ``keep(shapes, x)`` makes of one that is
    frozen what the state has, of those shapes."""
    frozen: dict[str, Any] = flatten_dict(shapes.frozen.get("params", {}), sep="/")
    then = lambda path, x: keep(frozen[path], x) if path in frozen else x
    return lay_out(params, shardings_of(params), then)


def _as_one(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Copies that each process holds, as one array; nothing is copied."""
    copies = [shard.data for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, sharding, copies)


def state_shardings(
    state: TrainState, mesh: Mesh, axes: AxisTable = AXES, rules: Rules = RULES
) -> TrainState:
    """Parameters by the axis table; a moment of a parameter's shape lies where the parameter does.

    Other moments (counters, Adafactor's factors) are small: every device holds them.
    """
    if mesh.size > 1:
        sharding.require_rows(axes, state.trainable, state.frozen)
    trainable = sharding.tree_shardings(state.trainable, mesh, axes, rules)
    everywhere = NamedSharding(mesh, PartitionSpec())
    params = {
        path: (leaf.shape, own)
        for (path, leaf), own in zip(
            tree.leaves_with_path(state.trainable), jax.tree.leaves(trainable), strict=True
        )
    }

    def moment(path: str, leaf: Any) -> NamedSharding:
        parts = path.split("/")
        for start in range(len(parts)):
            shape, own = params.get("/".join(parts[start:]), (None, everywhere))
            if shape == leaf.shape:
                return own
        return everywhere

    return TrainState(
        everywhere,  # pyright: ignore[reportArgumentType]
        trainable,
        sharding.tree_shardings(state.frozen, mesh, axes, rules),
        tree.map_with_path(moment, state.opt_state),
    )


def _abstract(shapes: PyTree, shardings: PyTree) -> Any:
    return jax.tree.map(
        lambda x, own: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own), shapes, shardings
    )
