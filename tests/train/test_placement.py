"""Shapes alone tell where arrays will lie; that both placements compute the same is elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxlm.sharding import MeshConfig, make_mesh
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
