"""Meshes worth trying for a number of devices, and the best of those that fit."""

import dataclasses
import math
from collections.abc import Sequence

from jaxlm.compile_check.check import Report
from jaxlm.compile_check.step import Assumed, base_config
from jaxlm.compile_check.topology import Topology
from jaxlm.config import Config, FinetuneConfig
from jaxlm.errors import InputError
from jaxlm.models.bert import BertConfig
from jaxlm.sharding import MeshConfig


def candidates(config: Config, assumed: Assumed, target: Topology) -> list[MeshConfig]:
    """Up to 8 tensor parts, and for each the parts 1, 4, 16 and so on, and as many as there can be,
    of parameters; as far as they divide heads, channels and rows."""
    model = config.model
    if isinstance(config, FinetuneConfig) and config.base is not None:
        model = base_config(config.base) or assumed.encoder
    if not isinstance(model, BertConfig) or config.placement == "pmap":
        raise InputError("--search varies the mesh of a BERT under placement=jit: leave it out")
    in_slice = target.num_devices // target.num_slices
    meshes = []
    for tensor in (1, 2, 4, 8):
        left = in_slice // tensor
        if in_slice % tensor or math.gcd(model.num_heads, model.mlp_dim) % tensor:
            continue
        powers = [4**i for i in range(math.ceil(math.log(left + 1, 4))) if 4**i < left]
        for fsdp in [*powers, left]:
            rows = (target.num_devices // tensor) * config.train.num_micro_batches
            fits = left % fsdp == 0 and model.hidden_dim % fsdp == 0
            if fits and config.data.batch_size % rows == 0:
                meshes.append(
                    dataclasses.replace(
                        config.mesh, data=None, fsdp=fsdp, tensor=tensor, sequence=1
                    )
                )
    if not meshes:
        raise InputError(
            f"no mesh of {target.num_devices} devices divides data.batch_size="
            f"{config.data.batch_size}: give a multiple of {target.num_devices}"
        )
    return meshes


def best(reports: Sequence[Report]) -> Report | None:
    """The one of those that fit whose estimated step is shortest."""
    return min((each for each in reports if each.fits), key=lambda each: each.step_s, default=None)
