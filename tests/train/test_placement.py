"""Shapes alone tell where arrays will lie; that both placements compute the same is elsewhere."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from jaxlm.errors import InputError
from jaxlm.sharding import RULES, MeshConfig, make_mesh
from jaxlm.sums import Sums
from jaxlm.train.placement import jit_placement, pmap_placement
from jaxlm.train.state import TrainState

BATCH = {"tokens": np.ones((16, 2, 8), np.uint16), "lengths": np.full(16, 8, np.int32)}
SHAPES = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in BATCH.items()}


def init(key):
    return TrainState(
        jnp.zeros((), jnp.int32), {"params": {"norm": {"scale": jnp.ones(4)}}}, {}, ()
    )


def train_step(state, batch, progress):
    tokens = batch["tokens"].sum(dtype=jnp.float32)
    return state, Sums(totals={"loss": tokens * progress}, weight=jnp.ones(()))


def eval_step(state, batch):
    return Sums(totals={"loss": batch["lengths"].sum()}, weight=jnp.ones(()))


def test_jit_lays_out_a_batch_as_its_shapes_say():
    mesh = make_mesh(MeshConfig(fsdp=2, sequence=2))
    placement = jit_placement(init, train_step, eval_step, mesh)
    batch, shapes = placement.put_batch(BATCH), placement.abstract_batch(SHAPES)
    for name, x in batch.items():
        assert (x.shape, x.dtype) == (shapes[name].shape, shapes[name].dtype)
        assert x.sharding == shapes[name].sharding
    assert tuple(batch["tokens"].sharding.spec) == (("data", "fsdp"), None, "sequence")


@pytest.mark.parametrize("devices", [None, 4])
def test_pmap_splits_a_batch_as_its_shapes_say(devices):
    chosen = None if devices is None else jax.devices()[:devices]
    placement = pmap_placement(init, train_step, eval_step, "data", chosen)
    batch, shapes = placement.put_batch(BATCH), placement.abstract_batch(SHAPES)
    for name, x in batch.items():
        assert (x.shape, x.dtype) == (shapes[name].shape, shapes[name].dtype)
    assert batch["tokens"].shape[0] == (devices or 8)
    scale = placement.abstract_state.trainable["params"]["norm"]["scale"]
    assert scale.sharding.spec == PartitionSpec()
    assert len(scale.sharding.device_set) == (devices or 8)


class Foreign(nn.Module):
    """A model of somebody else."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(16, name="last")(nn.gelu(nn.Dense(32, name="first")(x)))


AXES = (
    (r"first/kernel", "embed -> mlp"),
    (r"first/bias", "mlp"),
    (r"last/kernel", "mlp -> embed"),
    (r"last/bias", "norm"),
)


def foreign_state(key):
    trainable = Foreign().init(key, jnp.ones((1, 8)))
    return TrainState.create(trainable, {"lora": {"first": {"a": jnp.ones((8, 2))}}}, optax.adam(1))


def test_rows_of_ones_own():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    steps = train_step, eval_step
    with pytest.raises(InputError, match="matches first/bias, first/kernel, last/bias, last/ker"):
        jit_placement(foreign_state, *steps, mesh)
    state = jit_placement(foreign_state, *steps, mesh, AXES).init(jax.random.key(0))
    kernel = state.trainable["params"]["first"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec("fsdp", "tensor")
    assert state.opt_state[0].mu["params"]["first"]["kernel"].sharding == kernel.sharding
    rules = (*RULES, ("embed", None))
    state = jit_placement(foreign_state, *steps, mesh, AXES, rules).init(jax.random.key(0))
    kernel = state.trainable["params"]["first"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, "tensor")


def test_one_device_and_pmap_need_no_rows():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    for placement in (
        jit_placement(foreign_state, train_step, eval_step, mesh),
        pmap_placement(foreign_state, train_step, eval_step, "data"),
    ):
        state = placement.init(jax.random.key(0))
        assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state))


def test_only_axes_as_long_as_the_rows_are_positions():
    """Three labels of each row are not cut in two, whatever the mesh does to positions."""
    mesh = make_mesh(MeshConfig(fsdp=2, sequence=2))
    batch = {
        "tokens": np.ones((16, 8), np.int32),
        "labels": np.ones((16, 3), np.float32),
        "weights": np.ones((16, 8), np.float32),
    }
    placed = jit_placement(init, train_step, eval_step, mesh).put_batch(batch)
    specs = {name: x.sharding.spec for name, x in placed.items()}
    rows = ("data", "fsdp")
    assert specs["tokens"] == specs["weights"] == PartitionSpec(rows, ("sequence",))
    assert specs["labels"] == PartitionSpec(rows, None)
