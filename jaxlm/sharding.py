"""One table of axis names per parameter, one table of rules from names to mesh axes.

The same function shards parameters, optimizer moments, adapters and scanned stacks, because the
path of a moment ends like the path of its parameter. Nothing is matched by default: a parameter
without a row, a row of the wrong rank, or an axis name without a rule raises. Both tables are
arguments with a default, so that another model brings its own rows; a mesh of one device splits
nothing and needs none.
"""

import contextlib
import contextvars
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from jaxlm import tree
from jaxlm.errors import InputError
from jaxlm.runtime.batch_rows import BatchRows

AxisTable = Sequence[tuple[str, str]]
Rules = Sequence[tuple[str, tuple[str, ...] | None]]

# (pattern of a path's end, axes). An arrow marks a linear map and separates its inputs from its
# outputs: such parameters are decayed, and adapters split where the arrow stands.
AXES: tuple[tuple[str, str], ...] = (
    (r"(token|source)_embed/embedding", "vocab -> embed"),
    (r"(position|token_type)_embed/embedding", "table -> embed"),
    (r"relative_embed/embedding", "table heads"),
    (r"(query|key|value|position)/kernel", "embed -> heads head_dim"),
    (r"(query|key|value)/bias", "heads head_dim"),
    (r"(cross_)?attention/out/kernel", "heads head_dim -> embed"),
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
    (r"unembed/kernel", "embed -> vocab"),
    (r"(content|position|segment)_bias", "heads head_dim"),
    (r"segment_embed", "table heads head_dim"),
    (r"query_embed", "norm"),
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
AnyMesh = Mesh | AbstractMesh  # the latter of devices that are not there
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


def process_rows(mesh: Mesh, process_index: int, rules: Rules = RULES) -> BatchRows:
    """What a process holds of a batch: processes share it where ``tensor`` or ``sequence`` spans
    them."""
    split = [mesh.axis_names.index(axis) for axis in dict(rules)["batch"] or ()]
    num_blocks = math.prod(mesh.devices.shape[axis] for axis in split)
    blocks: dict[int, set[int]] = {}
    by_block = np.moveaxis(mesh.devices, split, range(len(split))).reshape(num_blocks, -1)
    for block, devices in enumerate(by_block):
        for device in devices:
            blocks.setdefault(device.process_index, set()).add(block)
    parts = sorted({tuple(sorted(held)) for held in blocks.values()})
    if sum(map(len, parts)) != num_blocks or len({len(part) for part in parts}) > 1:
        raise InputError(
            f"the mesh {dict(mesh.shape)} gives processes different numbers of rows: make tensor * "
            "sequence a divisor or a multiple of the devices of a process"
        )
    return BatchRows(tuple(sorted(blocks[process_index])), num_blocks)


def axes_of(path: str, ndim: int, axes: AxisTable = AXES) -> Axes:
    """The axis names of the parameter at ``path``; a stacked one has ``layers`` in front."""
    text = _row(path, axes)
    if text is None:
        raise InputError(_missing({path: ndim}, axes))
    left, arrow, right = text.partition("->")
    names = (*left.split(), *right.split())
    inputs = len(left.split()) if arrow else 0
    if ndim == len(names):
        return Axes(names, inputs)
    if ndim == len(names) + 1:
        return Axes(("layers", *names), inputs)
    raise InputError(f"{path} has {ndim} axes, but the row {text!r} of the axis table names others")


def has_row(path: str, axes: AxisTable = AXES) -> bool:
    """Whether :func:`axes_of` knows the parameter, by a row of its own or of what it adapts."""
    return _row(path, axes) is not None


def require_rows(axes: AxisTable, *trees: PyTree) -> None:
    """Raises where leaves (arrays or their shapes) have no row: one error names all of them."""
    leaves = [leaf for shapes in trees for leaf in tree.leaves_with_path(shapes)]
    if missing := _missing({path: leaf.ndim for path, leaf in leaves}, axes):
        raise InputError(missing)


def _names(path: str, ndim: int, axes: AxisTable) -> tuple[str, ...]:
    """The axis names of :func:`axes_of`, and before them that of adapters of ``lora.stack``."""
    try:
        return axes_of(path, ndim, axes).names
    except InputError:
        with contextlib.suppress(InputError):
            if re.search(r"(^|/)(a|b|magnitude)$", path):
                return ("adapters", *axes_of(path, ndim - 1, axes).names)
        raise


def _row(path: str, axes: AxisTable) -> str | None:
    path = _stacked(path)
    for pattern, text in axes:
        if re.search(rf"(^|/){pattern}$", path):
            return text
    for pattern, text in DERIVED:
        if end := re.search(rf"(^|/){pattern}$", path):
            for name in ("kernel", "embedding"):
                row = _row(f"{path[: end.start()]}/{name}", axes)
                if row is not None:
                    inputs, _, outputs = row.partition("->")
                    return text.replace("inputs", inputs).replace("outputs", outputs)
    return None


def _stacked(path: str) -> str:
    return re.sub(r"/layers/\d+(?=/|$)", "", path)  # one of jaxlm.nn.stack.Layers


def _missing(ndims: Mapping[str, int], axes: AxisTable) -> str | None:
    """What is wrong where some of the parameters have no row: one for each, to be pasted."""
    bare = {re.sub(r"^(params|lora|ia3)/", "", _stacked(path)): n for path, n in ndims.items()}
    owners: dict[str, str] = {}
    for path, ndim in ndims.items():
        if ndim and not has_row(path, axes):
            owner = _owner(path, bare)
            end = "/".join(owner.split("/")[-2:])
            owners.setdefault(owner, f'(r"{end}", "{_guess(owner, bare.get(owner, 2))}")')
    if not owners:
        return None
    return (
        f"no row of the axis table matches {', '.join(owners)}: pass axes=(*sharding.AXES, "
        f"{', '.join(dict.fromkeys(owners.values()))}), with the names of sharding.RULES that are "
        "right for each axis, and in kernels an arrow between inputs and outputs"
    )


def _owner(path: str, known: Mapping[str, int]) -> str:
    """The kernel or table that the leaf is derived from; if it is no such leaf, itself."""
    collection, path = path.partition("/")[0], re.sub(r"^(params|lora|ia3)/", "", _stacked(path))
    for pattern, _ in DERIVED:
        if end := re.search(rf"(^|/){pattern}$", path):
            parent = path[: end.start()]
            owners = [f"{parent}/{name}".lstrip("/") for name in ("kernel", "embedding")]
            for owner in owners:
                if owner in known or path.startswith(f"{owner}/"):
                    return owner
            if collection in ("lora", "ia3"):
                return owners[0]
    return path


def _guess(path: str, ndim: int) -> str:
    """A row that would do for a leaf: its names are those of the usual layers."""
    if ndim < 2 or not re.search(r"(kernel|embedding)$", path):
        return " ".join(["norm"] * ndim)
    last = "vocab -> embed" if path.endswith("embedding") else "embed -> mlp"
    return " ".join([*["head_dim"] * (ndim - 2), last])


def spec(
    names: tuple[str | None, ...],
    mesh: AnyMesh,
    shape: tuple[int, ...],
    rules: Rules = RULES,
) -> PartitionSpec:
    """Names to mesh axes, leaving out axes of size 1; None is not split.

    Raises where a size is not divisible.
    """
    by_name = dict(rules)
    parts: list[tuple[str, ...] | None] = []
    for name, size in zip(names, shape, strict=True):
        if name is not None and name not in by_name:
            raise InputError(
                f"the axis name {name!r} has no rule: pass rules=(*sharding.RULES, "
                f"({name!r}, None)), or mesh axes instead of None"
            )
        axes = by_name[name] or () if name is not None else ()
        if unknown := set(axes) - set(mesh.axis_names):
            raise InputError(
                f"the rule of {name!r} names the mesh axis {', '.join(sorted(unknown))}: those "
                f"of the mesh are {', '.join(mesh.axis_names)}"
            )
        part = tuple(axis for axis in axes if mesh.shape[axis] > 1)
        pieces = math.prod(mesh.shape[axis] for axis in part)
        if size % pieces:
            raise InputError(
                f"the axis {name} of size {size} cannot be split over {'*'.join(part)}={pieces} "
                "devices: change the mesh or the size"
            )
        parts.append(part or None)
    used = [axis for part in parts if part for axis in part]
    if len(used) != len(set(used)):
        raise InputError(
            f"two of the axes {names} are split over the same mesh axis, {used}: give one of them "
            "another name, or another rule"
        )
    return PartitionSpec(*parts)


def tree_shardings(
    shapes: PyTree, mesh: AnyMesh, axes: AxisTable = AXES, rules: Rules = RULES
) -> PyTree:
    """A ``NamedSharding`` for each leaf (array or ``ShapeDtypeStruct``); scalars are replicated.

    A mesh of one device asks for no rows.
    """
    if missing := set(MESH_AXES) - set(mesh.axis_names):
        raise InputError(
            f"the mesh has the axes {', '.join(mesh.axis_names)}, and no "
            f"{', '.join(sorted(missing))}: make it with make_mesh"
        )
    if mesh.size == 1:
        return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), shapes)
    require_rows(axes, shapes)

    def one(path: str, leaf: Any) -> NamedSharding:
        names = _names(path, leaf.ndim, axes) if leaf.ndim else ()
        try:
            return NamedSharding(mesh, spec(names, mesh, leaf.shape, rules))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    return tree.map_with_path(one, shapes)


_MESH: contextvars.ContextVar[tuple[Mesh, Rules] | None] = contextvars.ContextVar(
    "jaxlm_mesh", default=None
)


@contextlib.contextmanager
def use_mesh(mesh: Mesh, rules: Rules = RULES) -> Iterator[None]:
    """Makes :func:`constrain` act. Enter it inside the traced function."""
    token = _MESH.set((mesh, rules))
    try:
        yield
    finally:
        _MESH.reset(token)


def in_use() -> tuple[Mesh, Rules] | None:
    """What :func:`use_mesh` has set, for what XLA cannot split by itself, such as a kernel."""
    return _MESH.get()


def is_split(name: str) -> bool:
    """Whether the mesh in use splits the activations' axis of that name."""
    if (used := in_use()) is None:
        return False
    mesh, rules = used
    return any(mesh.shape[axis] > 1 for axis in dict(rules)[name] or ())


def constrain(x: Float[Array, "..."], names: tuple[str | None, ...]) -> Float[Array, "..."]:
    """Pin how an activation is laid out; the identity where no mesh is set (one device, pmap)."""
    if (used := _MESH.get()) is None:
        return x
    mesh, rules = used
    # `embed` is split in parameters only: in activations the batch already uses those devices.
    split = tuple(None if name == "embed" else name for name in names)
    return jax.lax.with_sharding_constraint(
        x, NamedSharding(mesh, spec(split, mesh, x.shape, rules))
    )
