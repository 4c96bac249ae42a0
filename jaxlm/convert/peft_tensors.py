"""Adapters as PEFT stores them: matrices for each module of each layer, and ours, both ways.

Where theirs is one map and ours are several, such as GPT-2's query, key and value, the low-rank
products of ours are blocks of theirs, side by side or, if they share a factor, on top of it.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Float, Float32, PyTree, Shaped

from jaxlm.convert.table import Row, Sizes
from jaxlm.convert.task_model import TaskModel
from jaxlm.errors import InputError
from jaxlm.nn.intercept import flatten
from jaxlm.peft.lora import LoraConfig

Ours = PyTree[Float[Array | np.ndarray, "..."]]
Theirs = dict[str, Float32[np.ndarray, "..."]]
Found = Mapping[str, Mapping[str, Shaped[np.ndarray, "..."]]]  # module -> part -> tensor


class Factors(NamedTuple):
    """The low-rank product of a map in each layer, which is added ``scale`` times."""

    a: Float32[np.ndarray, "layers inputs rank"]
    b: Float32[np.ndarray, "layers rank outputs"]
    magnitude: Float32[np.ndarray, "layers outputs"] | None
    scale: float


class Placed(NamedTuple):
    """What PEFT's configuration says of the modules of a row."""

    row: Row
    rank: int
    scale: float


def by_parent(leaves: Ours) -> dict[str, dict[str, Any]]:
    """The leaves of a collection for each module."""
    parents: dict[str, dict[str, Any]] = {}
    for path, leaf in flatten(leaves).items():
        parent, _, name = path.rpartition("/")
        parents.setdefault(parent, {})[name] = leaf
    return parents


def modules(row: Row, sizes: Sizes) -> list[str]:
    """Names of the modules whose weight a row is."""
    return [name.removesuffix(".weight") for name in row.names(sizes)]


def kernels(model: TaskModel) -> dict[str, Row]:
    """Rows of what can be adapted, by the path of our module."""
    weights = (row for row in model.encoder if row.is_matrix)
    ends = ("/kernel", "/embedding")
    return {row.ours.rpartition("/")[0]: row for row in weights if row.ours.endswith(ends)}


def _groups(leaves: Ours, model: TaskModel) -> dict[str, list[tuple[Row, dict[str, Any]]]]:
    """What is adapted, by their name: several rows are parts of one."""
    rows, groups = kernels(model), {}
    for parent, found in by_parent(leaves).items():
        if parent not in rows:
            raise InputError(
                f"{parent} has an adapter, and is no module of its own in {model.auto}, which PEFT "
                "could adapt: merge it into the base, or train with other targets"
            )
        row = rows[parent]
        if row.ours.endswith("/embedding") and row.theirs in model.scoring:
            raise InputError(
                f"{row.ours} has an adapter and also scores the vocabulary, where PEFT would not "
                "see it: merge it into the base, or train with other targets"
            )
        groups.setdefault(row.theirs, []).append((row, found))
    return {theirs: sorted(rows, key=lambda pair: pair[0].part) for theirs, rows in groups.items()}


def write_lora(
    lora: Ours, tuning: LoraConfig, params: Ours, model: TaskModel, start: Ours | None = None
) -> tuple[Theirs, list[Placed]]:
    """The tensors by module and part, and each module's rank and scale.

    ``start`` are the factors that were taken out of the base (PiSSA): what is written adds to the
    base as it was, with twice the rank.
    """
    tensors, placed, sizes = {}, [], model.sizes
    weights, before = flatten(params), by_parent(start or {})
    for theirs, found in _groups(lora, model).items():
        parts = {}
        for row, leaves in found:
            factors = _factors(row, leaves, tuning, sizes)
            first = before.get(row.ours.rpartition("/")[0])
            if first is not None:
                taken = _factors(row, first, tuning, sizes)
                a = np.concatenate([factors.a, taken.a], 2)
                factors = factors._replace(a=a, b=np.concatenate([factors.b, -taken.b], 1))
            parts[row.part] = factors
        row = found[0][0]
        others = {r.part: r for r in kernels(model).values() if r.theirs == theirs}
        joined = _join(parts, [_norms(weights, others[i], sizes) for i in sorted(others)])
        placed.append(Placed(row, joined.a.shape[2], joined.scale))
        table = row.ours.endswith("/embedding")
        names = ("lora_embedding_A", "lora_embedding_B") if table else ("lora_A", "lora_B")
        end = "" if table else ".weight"
        for layer, module in enumerate(modules(row, sizes)):
            a = np.pad(joined.a[layer], [(row.unused, 0), (0, 0)])
            tensors[f"{module}.{names[0]}{end}"] = a.T
            tensors[f"{module}.{names[1]}{end}"] = joined.b[layer].T
            if joined.magnitude is not None:
                tensors[f"{module}.lora_magnitude_vector"] = joined.magnitude[layer]
    return tensors, placed


def _factors(row: Row, leaves: Mapping[str, Any], tuning: LoraConfig, sizes: Sizes) -> Factors:
    if "magnitude" in leaves and row.unused:
        raise InputError(
            f"{row.ours} has {row.unused} more rows there, which the lengths of DoRA would count: "
            "train with kind=lora, or with other targets"
        )
    layers = len(row.names(sizes))
    inputs, outputs = (math.prod(sizes[axis] for axis in axes) for axes in _axes(row))
    rank = leaves["a"].shape[-1]
    a = np.asarray(leaves["a"], np.float32).reshape(layers, -1, rank)[:, :inputs]
    b = np.asarray(leaves["b"], np.float32).reshape(layers, rank, -1)[:, :, :outputs]
    sizes_of = leaves.get("magnitude")
    magnitude = None
    if sizes_of is not None:
        magnitude = np.asarray(sizes_of, np.float32).reshape(layers, -1)[:, :outputs]
    if row.factors is not None:
        factors = np.array(row.factors, np.float32)
        b = b / factors[:, None, None]
        magnitude = None if magnitude is None else magnitude / factors[:, None]
    return Factors(a, b, magnitude, tuning.scale(rank))


def _axes(row: Row) -> tuple[list[str], list[str]]:
    ours = row.layout.split(" -> ")[1].split()
    return row.inputs, ours[len(row.inputs) :]


def _norms(weights: Mapping[str, Any], row: Row, sizes: Sizes) -> Float32[np.ndarray, "layers _"]:
    """The length of each output's weights, of the base, as theirs has them."""
    weight = np.asarray(weights[row.ours], np.float32)
    stack = int("{layer}" in row.theirs)
    flat = weight.reshape(
        len(row.names(sizes)), math.prod(weight.shape[stack : stack + len(row.inputs)]), -1
    )
    norms = np.sqrt(np.square(flat).sum(1))
    return norms if row.factors is None else norms / np.array(row.factors, np.float32)[:, None]


def _join(parts: Mapping[int, Factors], norms: list[Float32[np.ndarray, "layers _"]]) -> Factors:
    """One product for all parts of a map; ``norms`` are for those that have none."""
    if len(norms) == 1:
        return parts[0]
    different: list[Any] = []
    for one in parts.values():
        if not any(np.array_equal(one.a, a) for a in different):
            different.append(one.a)
    starts = np.cumsum([0, *(a.shape[2] for a in different)])
    first = next(iter(parts.values()))
    width = norms[0].shape[1]
    b = np.zeros((len(first.b), starts[-1], width * len(norms)), np.float32)
    for number, one in parts.items():
        place = next(i for i, a in enumerate(different) if np.array_equal(one.a, a))
        columns = slice(number * width, (number + 1) * width)
        b[:, starts[place] : starts[place + 1], columns] = one.b * np.float32(
            one.scale / first.scale
        )
    magnitude = None
    if first.magnitude is not None:
        both = [parts[i].magnitude if i in parts else norm for i, norm in enumerate(norms)]
        magnitude = np.concatenate(both, 1)  # pyright: ignore[reportArgumentType, reportCallIssue]
    return Factors(np.concatenate(different, 2), b, magnitude, first.scale)


def read_lora(
    found: Found, scales: Mapping[str, float], rslora: bool, params: Ours, model: TaskModel
) -> tuple[Ours, dict[str, Any]]:
    """Our collection, and ``targets``, ``ranks`` and ``alpha`` of the :class:`LoraConfig` for it.

    ``scales`` are by module. Layers without an adapter get one without effect; factors whose scale
    is not that of most are multiplied by what is missing.
    """
    weights, dora = flatten(params), any("lora_magnitude_vector" in x for x in found.values())
    read = {}
    for parent, row in kernels(model).items():
        factors = _read(row, found, scales, model)
        if factors is not None:
            read[parent] = row, *factors
    used = [(max(own.values()), a.shape[2]) for _, a, _, _, own in read.values()]
    scale, rank = Counter(used).most_common(1)[0][0]
    alpha = scale * (math.sqrt(rank) if rslora else rank)
    alpha = float(round(alpha)) if math.isclose(alpha, round(alpha), rel_tol=1e-9) else alpha
    tuning = LoraConfig(alpha=alpha, scaling="rslora" if rslora else "lora")
    lora = {}
    for parent, (row, a, b, magnitudes, own) in read.items():
        shape, stack = weights[row.ours].shape, int("{layer}" in row.theirs)
        split = stack + len(row.inputs)
        wanted = tuning.scale(a.shape[2])
        for layer, theirs in own.items():
            if not math.isclose(theirs, wanted, rel_tol=1e-6):
                b[layer] *= np.float32(theirs / wanted)
        if row.factors is not None:
            b *= np.array(row.factors, np.float32)[:, None, None]
        more = math.prod(shape[stack:split]) - a.shape[1]  # rows of a table that stand for nothing
        a = np.pad(a, [(0, 0), (0, more), (0, 0)])
        lora[f"{parent}/a"] = a.reshape(*shape[:split], -1)
        lora[f"{parent}/b"] = b.reshape(*shape[:stack], -1, *shape[split:])
        if dora:
            magnitude = _norms(weights, row, model.sizes)
            for layer, theirs in magnitudes.items():
                magnitude[layer] = theirs
            if row.factors is not None:
                magnitude = magnitude * np.array(row.factors, np.float32)[:, None]
            lora[f"{parent}/magnitude"] = magnitude.reshape(*shape[:stack], *shape[split:])
    ranks = tuple(a.shape[2] for _, a, *_ in read.values())
    settings = {
        "targets": tuple(row.ours for row, *_ in read.values()),
        "rank": rank,
        "ranks": None if set(ranks) == {rank} else ranks,
        "alpha": alpha,
    }
    return unflatten_dict(lora, sep="/"), settings


def _read(row: Row, found: Found, scales: Mapping[str, float], model: TaskModel) -> Any:
    """``a`` and ``b`` of all layers, magnitudes and scales of those that have them."""
    names = modules(row, model.sizes)
    there = {layer: found[name] for layer, name in enumerate(names) if name in found}
    if not there:
        return None
    table = row.ours.endswith("/embedding")
    if table and row.theirs in model.scoring:
        raise InputError(
            f"{names[0]} has an adapter and also scores the vocabulary, which PEFT does without it "
            "and one table here cannot: train one without it among target_modules"
        )
    if row.unused and any("lora_magnitude_vector" in one for one in there.values()):
        raise InputError(
            f"{names[0]} has {row.unused} rows there that stand for nothing, which the lengths of "
            "DoRA count: train one with use_dora=False, or without it among target_modules"
        )
    inputs, outputs = (math.prod(model.sizes[axis] for axis in axes) for axes in _axes(row))
    part = slice(row.part * outputs, (row.part + 1) * outputs)
    a_name, b_name = ("lora_embedding_A", "lora_embedding_B") if table else ("lora_A", "lora_B")
    rank = max(one[a_name].shape[0] for one in there.values() if a_name in one)
    a = np.zeros((len(names), inputs, rank), np.float32)
    b = np.zeros((len(names), rank, outputs), np.float32)
    whole = np.zeros(rank, bool)
    magnitudes = {}
    for layer, one in there.items():
        own = one[a_name].shape[0]
        whole_width = outputs * row.parts
        _check(f"{names[layer]}.{a_name}", one[a_name], (own, inputs + row.unused))
        _check(f"{names[layer]}.{b_name}", one[b_name], (whole_width, own))
        a[layer, :, :own] = one[a_name].T[row.unused :]
        b[layer, :own] = one[b_name].T[:, part]
        whole[:own] |= one[b_name].any(0)
        if "lora_magnitude_vector" in one:
            magnitude = one["lora_magnitude_vector"]
            _check(f"{names[layer]}.lora_magnitude_vector", magnitude, (whole_width,))
            magnitudes[layer] = magnitude[part]
    if row.parts > 1 and not magnitudes and whole.any():
        kept = b.any((0, 2))  # the others are other parts'
        if not kept.any():
            return None
        a, b = a[:, :, kept], b[:, kept]
    return a, b, magnitudes, {layer: scales[names[layer]] for layer in there}


def _check(name: str, tensor: Shaped[np.ndarray, "..."], shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise InputError(
            f"{name} has the shape {tensor.shape}, where the base has {shape}: the adapter is of "
            "another base"
        )


def write_ia3(ia3: Ours, model: TaskModel) -> tuple[Theirs, list[Row], list[Row]]:
    """The tensors; rows of modules whose outputs, and of those whose inputs are scaled."""
    tensors, rows = {}, {"output": [], "input": []}
    for theirs, found in _groups(ia3, model).items():
        row = found[0][0]
        kinds = {name for _, leaves in found for name in leaves}
        if len(kinds) > 1:
            raise InputError(
                f"both inputs and outputs of {theirs.removesuffix('.weight')} are scaled, of which "
                "PEFT scales one: train with other tuning.outputs or tuning.inputs"
            )
        (kind,) = kinds
        layers = len(row.names(model.sizes))
        values = {r.part: np.asarray(x[kind], np.float32).reshape(layers, -1) for r, x in found}
        first = next(iter(values.values()))
        if kind == "input":
            same = len(values) == row.parts and all(
                np.array_equal(x, first) for x in values.values()
            )
            if not same:
                raise InputError(
                    f"parts of {theirs.removesuffix('.weight')} have different scales of their one "
                    "input: train with other tuning.inputs"
                )
            scales = np.pad(first, [(0, 0), (row.unused, 0)])[:, None]
        else:
            ones = np.ones_like(first)
            joined = [values.get(part, ones) for part in range(row.parts)]
            scales = np.concatenate(joined, 1)[:, :, None]
        rows[kind].append(row)
        for layer, module in enumerate(modules(row, model.sizes)):
            tensors[f"{module}.ia3_l"] = scales[layer]
    return tensors, rows["output"], rows["input"]


def read_ia3(
    found: Found, is_input: Mapping[str, bool], params: Ours, model: TaskModel
) -> tuple[Ours, dict[str, tuple[str, ...]]]:
    """Our collection, and ``outputs`` and ``inputs`` of the configuration for it."""
    weights, ia3 = flatten(params), {}
    targets: dict[str, list[str]] = {"outputs": [], "inputs": []}
    for parent, row in kernels(model).items():
        names = modules(row, model.sizes)
        there = {layer: name for layer, name in enumerate(names) if name in found}
        inputs, outputs = (math.prod(model.sizes[axis] for axis in axes) for axes in _axes(row))
        shape, stack = weights[row.ours].shape, int("{layer}" in row.theirs)
        split = stack + len(row.inputs)
        for kind, width, axes in (
            ("output", outputs, shape[split:]),
            ("input", inputs, shape[stack:split]),
        ):
            own = {i: name for i, name in there.items() if is_input[name] == (kind == "input")}
            if not own:
                continue
            scales = np.ones((len(names), width), np.float32)
            for layer, name in own.items():
                tensor = found[name]["ia3_l"]
                full = (1, inputs) if kind == "input" else (outputs * row.parts, 1)
                _check(f"{name}.ia3_l", tensor, full)
                first = row.part * width if kind == "output" else 0
                scales[layer] = tensor.reshape(-1)[first : first + width]
            whole = all((found[name]["ia3_l"] == 1).all() for name in own.values())
            if kind == "output" and row.parts > 1 and (scales == 1).all() and not whole:
                continue  # the others are other parts'
            ia3[f"{parent}/{kind}"] = scales.reshape(*shape[:stack], *axes)
            targets[f"{kind}s"].append(row.ours)
    return unflatten_dict(ia3, sep="/"), {name: tuple(paths) for name, paths in targets.items()}


def all_modules(model: TaskModel) -> Iterator[str]:
    """Names of the modules that PEFT could match."""
    rows: Iterable[Row] = (*kernels(model).values(), *(r for r in model.head if r.is_matrix))
    yield from dict.fromkeys(name for row in rows for name in modules(row, model.sizes))
