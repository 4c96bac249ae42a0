"""One table of axis names per parameter, one table of rules from names to mesh axes.

The same function shards parameters, optimizer moments, adapters and scanned stacks, because the
path of a moment ends like the path of its parameter. Nothing is matched by default: a parameter
without a row, a row of the wrong rank, or an axis name without a rule raises.
"""

import contextlib
import contextvars
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from jaxlm import tree
from jaxlm.errors import InputError
from jaxlm.runtime.batch_rows import BatchRows

# (pattern of a path's end, axes). An arrow marks a linear map and separates its inputs from its
# outputs: such parameters are decayed, and adapters split where the arrow stands.
AXES: tuple[tuple[str, str], ...] = (
    (r"token_embed/embedding", "vocab -> embed"),
    (r"(position|token_type)_embed/embedding", "table -> embed"),
    (r"(query|key|value)/kernel", "embed -> heads head_dim"),
    (r"(query|key|value)/bias", "heads head_dim"),
    (r"attention/out/kernel", "heads head_dim -> embed"),
    (r"(up|gate)/kernel", "embed -> mlp"),
    (r"(up|gate)/bias", "mlp"),
    (r"down/kernel", "mlp -> embed"),
    (r"(out|down)/bias", "norm"),
    (r"transform/kernel", "embed -> embed_out"),
    (r"transform/bias", "norm"),
    (r"pooler/kernel", "embed -> embed_out"),
    (r"pooler/bias", "norm"),
    (r"classifier/kernel", "embed -> labels"),
    (r"classifier/bias", "labels"),
    (r"input/kernel", "embed -> gates state"),
    (r"input/bias", "gates state"),
    (r"recurrent_kernel", "state -> gates state"),
    (r"(\w+_)?norm/(scale|bias)", "norm"),
    (r"head/bias", "vocab"),
)

# What stands beside a linear map's or a table's parameter W, or in its place, has axes of W.
DERIVED: tuple[tuple[str, str], ...] = (
    (r"a", "inputs -> rank"),  # jaxlm.peft.lora
    (r"b", "rank -> outputs"),
    (r"magnitude", "outputs"),
    (r"input", "inputs"),  # jaxlm.peft.ia3
    (r"output", "outputs"),
    (r"kernel/values", "inputs -> outputs"),  # jaxlm.peft.quantize
    (r"kernel/scale", "outputs"),
    (r"embedding/values", "inputs -> outputs"),
    (r"embedding/scale", "inputs"),
)

# Axis name -> mesh axes it is split over, or None. `batch` to `mlp` also pin activations, where
# `embed` stays whole: gathering it is what FSDP does to parameters just before their use.
RULES: tuple[tuple[str, tuple[str, ...] | None], ...] = (
    ("batch", ("data", "fsdp")),
    ("length", ("sequence",)),
    ("adapters", None),
    ("layers", None),
    ("vocab", ("tensor",)),
    ("table", None),
    ("embed", ("fsdp",)),
    ("embed_out", None),
    ("heads", ("tensor",)),
    ("head_dim", None),
    ("mlp", ("tensor",)),
    ("norm", None),
    ("rank", None),
    ("labels", None),
    ("gates", None),
    ("state", None),
)
MESH_AXES = ("data", "fsdp", "tensor", "sequence")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis of the mesh."""

    data: int | None = None
    """Copies of the model, each on its part of the batch; None = on all devices that are left."""
    fsdp: int = 1
    """Splits of every parameter and moment, gathered when used; also splits the batch."""
    tensor: int = 1
    """Splits of heads, feed-forward channels and vocabulary."""
    sequence: int = 1
    """Splits of each row."""
    num_slices: int = 1
    """TPU slices, or groups of hosts, that a slower network joins; the copies of the model, which
    `data` counts over all of them, are shared out among them."""


class Axes(NamedTuple):
    """The axis names of a parameter, ``inputs`` of them contracted: 0 if it is no linear map."""

    names: tuple[str, ...]
    inputs: int


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices, or over ``devices``. Raises when the sizes do not fit them.

    What talks most, the last axis, lies closest together; over slices there is ``data`` alone.
    """
    devices = jax.devices() if devices is None else devices
    wanted = config.data, config.fsdp, config.tensor, config.sequence
    sizes = dict(zip(MESH_AXES, wanted, strict=True))
    known = math.prod(size for size in sizes.values() if size is not None)
    shape = [len(devices) // max(1, known) if size is None else size for size in sizes.values()]
    if math.prod(shape) != len(devices) or min(shape) < 1:
        text = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise InputError(
            f"the mesh {text} does not fit {len(devices)} devices: its sizes must multiply to "
            "their number"
        )
    slices = _slices(devices, config.num_slices)
    if shape[0] % len(slices):
        raise InputError(
            f"data={shape[0]} copies of the model cannot be shared out over "
            f"num_slices={len(slices)}: data must be divisible by it, so that each slice holds "
            "whole copies"
        )
    shape[0] //= len(slices)
    # Unlike jax.make_mesh, which splits an axis of the hardware over two of ours on v5e alone.
    laid_out = [
        mesh_utils.create_device_mesh(shape, part, allow_split_physical_axes=True)
        for part in slices
    ]
    # Linen's Embed fails on explicit axes.
    return Mesh(np.concatenate(laid_out), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _slices(devices: Sequence[Any], num_slices: int) -> list[Sequence[Any]]:
    """The devices of each slice: TPUs know theirs; others are cut into groups of whole hosts."""
    on_tpu = devices[0].platform == "tpu"
    # On GPUs, every host is a slice of its own to JAX.
    home = "slice_index" if on_tpu else "process_index"
    homes = {device: getattr(device, home, None) or 0 for device in devices}
    count = len(set(homes.values()))
    if on_tpu and count != num_slices:
        raise InputError(f"num_slices={num_slices}, but the TPUs are of {count}: set it to {count}")
    if num_slices < 1 or len(devices) % num_slices or (count > 1 and count % num_slices):
        hosts = f"{count} host{'s' if count > 1 else ''}"
        raise InputError(
            f"num_slices={num_slices} does not divide {len(devices)} devices of {hosts} into equal "
            "groups: 1 is no division"
        )
    if num_slices == 1:
        return [devices]
    ordered = sorted(devices, key=lambda device: homes[device])
    size = len(devices) // num_slices
    return [ordered[start : start + size] for start in range(0, len(devices), size)]


def process_rows(mesh: Mesh, process_index: int) -> BatchRows:
    """What a process holds of a batch: processes share it where ``tensor`` or ``sequence`` spans
    them."""
    num_blocks = mesh.shape["data"] * mesh.shape["fsdp"]
    blocks: dict[int, set[int]] = {}
    for block, devices in enumerate(mesh.devices.reshape(num_blocks, -1)):
        for device in devices:
            blocks.setdefault(device.process_index, set()).add(block)
    parts = sorted({tuple(sorted(held)) for held in blocks.values()})
    if sum(map(len, parts)) != num_blocks or len({len(part) for part in parts}) > 1:
        raise InputError(
            f"the mesh {dict(mesh.shape)} gives processes different numbers of rows: make tensor * "
            "sequence a divisor or a multiple of the devices of a process"
        )
    return BatchRows(tuple(sorted(blocks[process_index])), num_blocks)


def axes_of(path: str, ndim: int) -> Axes:
    """The axis names of the parameter at ``path``; a stacked one has ``layers`` in front."""
    path = re.sub(r"/layers/\d+(?=/|$)", "", path)  # one of jaxlm.nn.stack.Layers
    text = _row(path) or _derived_row(path)
    if text is None:
        raise ValueError(f"no row of sharding.AXES matches the parameter {path}: add one")
    left, arrow, right = text.partition("->")
    names = (*left.split(), *right.split())
    inputs = len(left.split()) if arrow else 0
    if ndim == len(names):
        return Axes(names, inputs)
    if ndim == len(names) + 1:
        return Axes(("layers", *names), inputs)
    raise ValueError(f"{path} has {ndim} axes, but sharding.AXES names {text!r} for it")


def _names(path: str, ndim: int) -> tuple[str, ...]:
    """The axis names of :func:`axes_of`, and before them that of adapters of ``lora.stack``."""
    try:
        return axes_of(path, ndim).names
    except ValueError:
        with contextlib.suppress(ValueError):
            if re.search(r"(^|/)(a|b|magnitude)$", path):
                return ("adapters", *axes_of(path, ndim - 1).names)
        raise


def _row(path: str) -> str | None:
    rows = (text for pattern, text in AXES if re.search(rf"(^|/){pattern}$", path))
    return next(rows, None)


def _derived_row(path: str) -> str | None:
    for pattern, text in DERIVED:
        if end := re.search(rf"(^|/){pattern}$", path):
            for name in ("kernel", "embedding"):
                row = _row(f"{path[: end.start()]}/{name}")
                if row is not None:
                    inputs, _, outputs = row.partition("->")
                    return text.replace("inputs", inputs).replace("outputs", outputs)
    return None


def spec(names: tuple[str, ...], mesh: Mesh, shape: tuple[int, ...]) -> PartitionSpec:
    """Names to mesh axes, leaving out axes of size 1. Raises where a size is not divisible."""
    rules = dict(RULES)
    parts: list[tuple[str, ...] | None] = []
    for name, size in zip(names, shape, strict=True):
        if name not in rules:
            raise ValueError(f"the axis name {name!r} has no row in sharding.RULES: add one")
        part = tuple(axis for axis in rules[name] or () if mesh.shape[axis] > 1)
        pieces = math.prod(mesh.shape[axis] for axis in part)
        if size % pieces:
            raise InputError(
                f"the axis {name} of size {size} cannot be split over {'*'.join(part)}={pieces} "
                "devices: change the mesh or the size"
            )
        parts.append(part or None)
    used = [axis for part in parts if part for axis in part]
    if len(used) != len(set(used)):
        raise ValueError(f"two of the axes {names} are split over the same mesh axis: {used}")
    return PartitionSpec(*parts)


def tree_shardings(shapes: PyTree, mesh: Mesh) -> PyTree:
    """A ``NamedSharding`` for each leaf (array or ``ShapeDtypeStruct``); scalars are replicated."""
    if missing := set(MESH_AXES) - set(mesh.axis_names):
        raise InputError(
            f"the mesh has the axes {', '.join(mesh.axis_names)}, and no "
            f"{', '.join(sorted(missing))}: make it with make_mesh"
        )

    def one(path: str, leaf: Any) -> NamedSharding:
        names = _names(path, leaf.ndim) if leaf.ndim else ()
        try:
            return NamedSharding(mesh, spec(names, mesh, leaf.shape))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    return tree.map_with_path(one, shapes)


_MESH: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("jaxlm_mesh", default=None)


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Makes :func:`constrain` act. Enter it inside the traced function."""
    token = _MESH.set(mesh)
    try:
        yield
    finally:
        _MESH.reset(token)


def constrain(x: Float[Array, "..."], names: tuple[str, ...]) -> Float[Array, "..."]:
    """Pin how an activation is laid out; the identity where no mesh is set (one device, pmap)."""
    mesh = _MESH.get()
    if mesh is None:
        return x
    # `embed` is split in parameters only: in activations the batch already uses those devices.
    rules_apply = tuple("norm" if name == "embed" else name for name in names)
    return jax.lax.with_sharding_constraint(
        x, NamedSharding(mesh, spec(rules_apply, mesh, x.shape))
    )
