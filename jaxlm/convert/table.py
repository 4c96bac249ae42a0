"""One row for each parameter: its name there, its path here, and the layout between; both ways."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Float32, PyTree, Shaped

from jaxlm.errors import InputError
from jaxlm.train.stored import Stored, of_parts

Tensors = Mapping[str, Shaped[np.ndarray, "..."]]  # by their names
Weights = PyTree[Float32[np.ndarray, "..."]]  # by our paths
Sizes = Mapping[str, int]  # of the axes that layouts name

_FLOATS = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Row:
    """One parameter."""

    theirs: str
    """The tensor's name; ``{layer}`` stands for 0, 1, … and is a leading axis of ours, as is
    ``{next}``, for 1, 2, …; empty: there is none, and ours is zeros."""
    ours: str
    """The path in our tree."""
    layout: str
    """An einops pattern, theirs -> ours, without the axis of layers."""
    unused: int = 0
    """Leading entries of the first axis that theirs has and ours has not."""

    part: int = 0
    """Which of the equal ``parts`` of theirs it is, along its ``axis``."""
    parts: int = 1
    axis: int = -1
    last: str | None = None
    """The name of the last layer's tensor, where it is another."""
    factors: tuple[float, ...] | None = None
    """What ours is multiplied by when it is read, for each layer."""
    stack: str = "layers"
    """The size that says how many layers there are."""

    def of(self, stack: str) -> "Row":
        """The same in that stack."""
        return replace(self, stack=stack)

    def times(self, factors: tuple[float, ...] | None) -> "Row":
        """The same with these factors; where all are 1, with none."""
        return replace(self, factors=None if set(factors or ()) <= {1.0} else factors)

    @property
    def is_matrix(self) -> bool:
        """Whether theirs is the weight of a module, a linear map or a table."""
        return self.theirs.endswith(".weight") and len(_groups(self.layout.split(" -> ")[0])) == 2

    @property
    def inputs(self) -> list[str]:
        """The axes of a matrix that come first in ours: inputs, or a table's rows."""
        there, here = self.layout.split(" -> ")
        first, second = _groups(there)
        axes = [axis for group in _groups(here) for axis in group]
        return first if axes[: len(first)] == first else second

    @property
    def inputs_first(self) -> bool:
        """Whether theirs, a matrix, is [inputs, outputs]; PyTorch's linear maps are not."""
        return _groups(self.layout.split(" -> ")[0])[0] == self.inputs

    def names(self, sizes: Sizes) -> list[str]:
        """Names of all tensors that make up the parameter."""
        if not self._stacked:
            return [self.theirs] if self.theirs else []
        layers = range(sizes[self.stack])
        names = [self.theirs.format(layer=layer, next=layer + 1) for layer in layers]
        return names if self.last is None else [*names[:-1], self.last]

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        """That of ours."""
        ours = _shape(self.layout.split(" -> ")[1], sizes)
        return (sizes[self.stack], *ours) if self._stacked else ours

    def read(
        self,
        tensors: Tensors,
        sizes: Sizes,
        source: str,
        index: tuple[slice, ...] | None = None,
    ) -> Float32[np.ndarray, "..."]:
        """Ours, or a part of it, from theirs, one after the other; ``source`` is for errors."""
        shape, names = self.shape(sizes), self.names(sizes)
        if not names:
            return np.zeros(shape, np.float32)[index or ...]
        if index is None:
            ours, index = _aligned(shape), (slice(None),) * len(shape)
        else:
            # Mostly not aligned, so that `stored.lay_out` copies it once, into memory of XLA's own.
            part = tuple(len(range(n)[i]) for n, i in zip(shape, index, strict=True))
            ours = np.empty(part, np.float32)
        if not self._stacked:
            ours[...] = self._one(0, names[0], tensors, sizes, source)[index]
            return ours
        for place, layer in enumerate(range(len(names))[index[0]]):
            ours[place] = self._one(layer, names[layer], tensors, sizes, source)[index[1:]]
        return ours

    def write(
        self, parameter: Float[Array | np.ndarray, "..."], sizes: Sizes
    ) -> dict[str, Float32[np.ndarray, "..."]]:
        """Theirs, from ours; unused entries are 0. Of parts, this one alone."""
        there, here = self.layout.split(" -> ")
        names = self.names(sizes)
        parts = np.asarray(parameter, np.float32)
        if not names:
            if parts.any():
                raise InputError(
                    f"{self.ours} has learned something, and has no place there: use the run from "
                    "its folder"
                )
            return {}
        if not self._stacked:
            parts = parts[None]
        _check(self.ours, parts.shape, (len(names), *_shape(here, sizes)))
        tensors = {}
        for name, part in zip(names, parts, strict=True):
            tensor = rearrange(part, f"{here} -> {there}", **_axes(self.layout, sizes))
            padding = [(self.unused, 0), *[(0, 0)] * (tensor.ndim - 1)]
            tensors[name] = np.ascontiguousarray(np.pad(tensor, padding))
        return tensors

    @property
    def _stacked(self) -> bool:
        return "{" in self.theirs

    def _one(
        self, layer: int, name: str, tensors: Tensors, sizes: Sizes, source: str
    ) -> Float32[np.ndarray, "..."]:
        """Ours, of one layer."""
        first, *rest = _shape(self.layout.split(" -> ")[0], sizes)
        shape = [first + self.unused, *rest]
        shape[self.axis] *= self.parts
        _require(name, tensors, source)
        tensor = tensors[name]
        if tensor.dtype.name not in _FLOATS:
            raise InputError(
                f"{source}: {name} is {tensor.dtype.name}; quantised weights cannot be read"
            )
        _check(f"{source}: {name}", tensor.shape, tuple(shape))
        if self.parts > 1:
            tensor = np.split(tensor, self.parts, self.axis)[self.part]
        ours = rearrange(
            tensor[self.unused :].astype(np.float32, copy=False),
            self.layout,
            **_axes(self.layout, sizes),
        )
        return ours if self.factors is None else ours * np.float32(self.factors[layer])


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


LAST = ("head/classifier", "embed -> labels")
"""Where the last layer of a task's head is, and its axes."""


def without_bias(theirs: str) -> tuple[Row, Row]:
    """A last layer that has none: ours is zeros."""
    kernel, bias = linear(theirs, *LAST)
    return kernel, replace(bias, theirs="")


def norm(theirs: str, ours: str) -> tuple[Row, Row]:
    """Scale and bias of a normalisation."""
    return (
        Row(f"{theirs}.weight", f"{ours}/scale", "embed -> embed"),
        Row(f"{theirs}.bias", f"{ours}/bias", "embed -> embed"),
    )


def stored(rows: Iterable[Row], tensors: Tensors, sizes: Sizes, source: str) -> PyTree:
    """The tree of all rows, of which none has been read."""

    def one(row: Row) -> Stored:
        for name in row.names(sizes):
            _require(name, tensors, source)
        shape, part = row.shape(sizes), partial(row.read, tensors, sizes, source)
        of_tensor = math.prod(shape) // max(len(row.names(sizes)), 1)
        return of_parts(shape, np.dtype(np.float32), part, of_tensor)

    return unflatten_dict({row.ours: one(row) for row in rows}, sep="/")


def write(
    rows: Iterable[Row], params: PyTree, sizes: Sizes
) -> dict[str, Float32[np.ndarray, "..."]]:
    """The inverse of :func:`stored`; rows without a parameter are left out, not the reverse."""
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    known = {row.ours: row for row in rows}
    tensors: dict[str, np.ndarray] = {}
    parts: dict[str, dict[int, np.ndarray]] = {}
    for path, parameter in flat.items():
        if path not in known:
            raise InputError(
                f"{path} has no name there: take it out, or merge it into what has one"
            )
        row = known[path]
        for name, tensor in row.write(np.asarray(parameter), sizes).items():
            parts.setdefault(name, {})[row.part] = tensor
            if len(parts[name]) == row.parts:
                whole = [parts[name][number] for number in range(row.parts)]
                tensors[name] = whole[0] if row.parts == 1 else np.concatenate(whole, row.axis)
                del parts[name]
    if parts:
        raise InputError(f"the parameters hold a part of {min(parts)}, and not all of it")
    return tensors


def _aligned(shape: tuple[int, ...]) -> Float32[np.ndarray, "..."]:
    """Not yet filled, and such that XLA's CPU devices take it without a copy."""
    size = 4 * math.prod(shape)
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(np.float32).reshape(shape)


def _groups(side: str) -> list[list[str]]:
    """``[["heads", "head_dim"], ["embed"]]`` for ``(heads head_dim) embed``."""
    return [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\w+", side)]


def _shape(side: str, sizes: Sizes) -> tuple[int, ...]:
    return tuple(math.prod(sizes[axis] for axis in group) for group in _groups(side))


def _axes(layout: str, sizes: Sizes) -> dict[str, int]:
    return {axis: sizes[axis] for axis in re.findall(r"\w+", layout)}


def _require(name: str, tensors: Tensors, source: str) -> None:
    if name not in tensors:
        raise InputError(f"{source} lacks the tensor {name}")


def _check(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise InputError(f"{name} has the shape {shape}, but the configuration says {expected}")
