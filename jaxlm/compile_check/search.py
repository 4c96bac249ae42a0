"""Meshes worth trying for a number of devices, and the best of those that fit."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.sharding import AbstractMesh
from jaxtyping import PyTree

from jaxlm import sharding
from jaxlm.compile_check.check import Report
from jaxlm.compile_check.step import Assumed, encoder_config
from jaxlm.compile_check.topology import Topology
from jaxlm.config import Config
from jaxlm.errors import InputError
from jaxlm.models.model import example_inputs
from jaxlm.sharding import MeshConfig


def candidates(config: Config, assumed: Assumed, target: Topology) -> list[MeshConfig]:
    """Up to 8 tensor parts, and for each the parts 1, 4, 16 and so on, and as many as there can be,
    of parameters; as far as they divide parameters and rows."""
    if config.placement == "pmap":
        raise InputError("--search varies the mesh, and placement=pmap has none: leave it out")
    model = encoder_config(config, assumed)
    model = dataclasses.replace(model, vocab_size=model.vocab_size or 64)  # any size is padded
    shapes = jax.eval_shape(model.make().init, jax.random.key(0), *example_inputs(model))
    in_slice = target.num_devices // target.num_slices
    meshes = []
    for tensor in (1, 2, 4, 8):
        left = in_slice // tensor
        if in_slice % tensor:
            continue
        powers = [4**i for i in range(math.ceil(math.log(left + 1, 4))) if 4**i < left]
        for fsdp in [*powers, left]:
            rows = (target.num_devices // tensor) * config.train.num_micro_batches
            if left % fsdp or config.data.batch_size % rows:
                continue
            if _divides(shapes, {"data": left // fsdp, "fsdp": fsdp, "tensor": tensor}):
                mesh = dataclasses.replace(
                    config.mesh, data=None, fsdp=fsdp, tensor=tensor, sequence=1
                )
                meshes.append(mesh)
    if not meshes:
        raise InputError(
            f"no mesh of {target.num_devices} devices divides data.batch_size="
            f"{config.data.batch_size}: give a multiple of {target.num_devices}"
        )
    return meshes


def _divides(shapes: PyTree, sizes: dict[str, int]) -> bool:
    """Whether every parameter can be split over a mesh of these sizes."""
    shape = tuple(sizes.get(axis, 1) for axis in sharding.MESH_AXES)
    mesh = AbstractMesh(shape, sharding.MESH_AXES)
    try:
        sharding.tree_shardings(shapes, mesh)
    except InputError:
        return False
    return True


def best(reports: Sequence[Report]) -> Report | None:
    """The one of those that fit whose estimated step is shortest."""
    return min((each for each in reports if each.fits), key=lambda each: each.step_s, default=None)
