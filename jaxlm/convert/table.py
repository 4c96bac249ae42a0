"""One row for each parameter: its name there, its path here, and the layout between; both ways."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Float32, PyTree, Shaped

from jaxlm.errors import InputError

Tensors = Mapping[str, Shaped[np.ndarray, "..."]]  # by their names
Weights = PyTree[Float32[np.ndarray, "..."]]  # by our paths
Sizes = Mapping[str, int]  # of the axes that layouts name

_FLOATS = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Row:
    """One parameter."""

    theirs: str
    """The tensor's name; ``{layer}`` stands for 0, 1, … and is a leading axis of ours."""
    ours: str
    """The path in our tree."""
    layout: str
    """An einops pattern, theirs -> ours, without the axis of layers."""
    unused: int = 0
    """Leading entries of the first axis that theirs has and ours has not."""

    def names(self, sizes: Sizes) -> list[str]:
        """Names of all tensors that make up the parameter."""
        layers = range(sizes["layers"]) if "{layer}" in self.theirs else [0]
        return [self.theirs.format(layer=layer) for layer in layers]

    def read(self, tensors: Tensors, sizes: Sizes, source: str) -> Float32[np.ndarray, "..."]:
        """Ours, from theirs; ``source`` names their origin in errors."""
        there, _ = self.layout.split(" -> ")
        first, *rest = _shape(there, sizes)
        shape = (first + self.unused, *rest)
        parts = []
        for name in self.names(sizes):
            if name not in tensors:
                raise InputError(f"{source} lacks the tensor {name}")
            tensor = tensors[name]
            if tensor.dtype.name not in _FLOATS:
                raise InputError(
                    f"{source}: {name} is {tensor.dtype.name}; quantised weights cannot be read"
                )
            _check(f"{source}: {name}", tensor.shape, shape)
            part = tensor[self.unused :].astype(np.float32)
            parts.append(rearrange(part, self.layout, **_axes(self.layout, sizes)))
        return np.ascontiguousarray(np.stack(parts) if "{layer}" in self.theirs else parts[0])

    def write(
        self, parameter: Float[Array | np.ndarray, "..."], sizes: Sizes
    ) -> dict[str, Float32[np.ndarray, "..."]]:
        """Theirs, from ours; unused entries are 0."""
        there, here = self.layout.split(" -> ")
        names = self.names(sizes)
        parts = np.asarray(parameter, np.float32)
        if "{layer}" not in self.theirs:
            parts = parts[None]
        _check(self.ours, parts.shape, (len(names), *_shape(here, sizes)))
        tensors = {}
        for name, part in zip(names, parts, strict=True):
            tensor = rearrange(part, f"{here} -> {there}", **_axes(self.layout, sizes))
            padding = [(self.unused, 0), *[(0, 0)] * (tensor.ndim - 1)]
            tensors[name] = np.ascontiguousarray(np.pad(tensor, padding))
        return tensors


def linear(theirs: str, ours: str, axes: str) -> tuple[Row, Row]:
    """Kernel and bias of a linear map, whose axes are written as in the sharding table.

    PyTorch keeps a matrix [outputs, inputs]; ours has the real axes, inputs first.
    """
    inputs, outputs = axes.split(" -> ")
    kernel = f"({outputs}) ({inputs}) -> {inputs} {outputs}"
    return (
        Row(f"{theirs}.weight", f"{ours}/kernel", kernel),
        Row(f"{theirs}.bias", f"{ours}/bias", f"({outputs}) -> {outputs}"),
    )


def norm(theirs: str, ours: str) -> tuple[Row, Row]:
    """Scale and bias of a normalisation."""
    return (
        Row(f"{theirs}.weight", f"{ours}/scale", "embed -> embed"),
        Row(f"{theirs}.bias", f"{ours}/bias", "embed -> embed"),
    )


def read(rows: Iterable[Row], tensors: Tensors, sizes: Sizes, source: str) -> Weights:
    """The tree of all rows."""
    return unflatten_dict({row.ours: row.read(tensors, sizes, source) for row in rows}, sep="/")


def write(
    rows: Iterable[Row], params: PyTree[Float[Array | np.ndarray, "..."]], sizes: Sizes
) -> dict[str, Float32[np.ndarray, "..."]]:
    """The inverse of :func:`read`; rows without a parameter are left out, not the reverse."""
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    known = {row.ours: row for row in rows}
    tensors: dict[str, np.ndarray] = {}
    for path, parameter in flat.items():
        if path not in known:
            raise InputError(
                f"{path} has no name there: take it out, or merge it into what has one"
            )
        tensors |= known[path].write(parameter, sizes)
    return tensors


def _groups(side: str) -> list[list[str]]:
    """``[["heads", "head_dim"], ["embed"]]`` for ``(heads head_dim) embed``."""
    return [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\w+", side)]


def _shape(side: str, sizes: Sizes) -> tuple[int, ...]:
    return tuple(math.prod(sizes[axis] for axis in group) for group in _groups(side))


def _axes(layout: str, sizes: Sizes) -> dict[str, int]:
    return {axis: sizes[axis] for axis in re.findall(r"\w+", layout)}


def _check(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise InputError(f"{name} has the shape {shape}, but the configuration says {expected}")
