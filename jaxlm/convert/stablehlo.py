"""A function and its weights as StableHLO: what jax alone loads and runs, without any model code.

The function is compiled where it is loaded, for any batch size and length (``jax.export`` with
symbolic shapes), on CPUs, GPUs and TPUs.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.extend.mlir import ir, passmanager
from jax.extend.mlir.dialects import stablehlo
from jaxtyping import Array, PyTree, Shaped
from tokenizers import Tokenizer

from jaxlm.data import tokenizers
from jaxlm.data.workspace import building
from jaxlm.errors import InputError
from jaxlm.runtime.storage import on_disk, write_whole

MODEL, WEIGHTS, ABOUT = "model.stablehlo", "weights.npz", "model.json"
PLATFORMS = ("cpu", "cuda", "tpu")
STABLEHLO = "1.13.0"  # an earlier version than JAX 0.10.0's, so that all from there on read it
# What a newer JAX calls by a name, such as erfc, is written as what it consists of.
_DECOMPOSE = "builtin.module(func.func(stablehlo-legalize-composite-to-call))"


def serialize(
    function: Callable[..., Any],
    weights: Mapping[str, Shaped[Array | np.ndarray, "..."]],
    shapes: Sequence[str],
    max_length: int | None,
) -> bytes:
    """``function(weights, *arrays)`` of int32 arrays, for any sizes that their ``shapes`` name.

    A shape is written as "batch, length"; ``length`` is at most ``max_length``.
    """
    try:
        import flatbuffers  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(
            "jax.export writes files with flatbuffers, which is missing: pip install flatbuffers"
        ) from error
    # All at once: dimensions of one name are equal within one scope alone.
    limit = () if max_length is None else (f"length <= {max_length}",)
    scope = jax.export.SymbolicScope(limit)
    arrays = [
        jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape, scope=scope), np.int32)
        for shape in shapes
    ]
    abstract = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights.items()}
    exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(abstract, *arrays)
    return bytes(_for_older_versions(exported).serialize())


def _for_older_versions(exported: jax.export.Exported) -> jax.export.Exported:
    """The same function, as JAX from 0.10 on reads it.

    JAX writes what versions of the month before read.
    """
    stablehlo.register_stablehlo_passes()
    with ir.Context() as context:
        read = stablehlo.deserialize_portable_artifact
        module = read(context, exported.mlir_module_serialized)
        passmanager.PassManager.parse(_DECOMPOSE).run(module.operation)
        written = stablehlo.serialize_portable_artifact(module, STABLEHLO)
    return replace(exported, mlir_module_serialized=written)


def write(
    path: str | Path,
    apply: Callable[..., Any],
    params: PyTree[Shaped[Array | np.ndarray, "..."]],
    shapes: Sequence[str],
    max_length: int | None,
    tokenizer: Tokenizer,
    about: Mapping[str, Any],
    readme: str,
) -> int:
    """A new folder with ``apply(params, *arrays)``; it appears when it is complete.

    Beside the function are its weights by name, the tokenizer as it is, ``about`` as JSON, and the
    README. Returns the function's bytes.
    """
    path = on_disk(path)
    if path.exists():
        raise InputError(f"{path} exists: name a new folder")
    weights = flatten_dict(params, sep="/")
    wanted: dict[str, Any] = {name: np.asarray(x, np.float32) for name, x in weights.items()}
    function = lambda given, *arrays: apply(unflatten_dict(given, sep="/"), *arrays)
    model = serialize(function, wanted, shapes, max_length)
    with building(path) as unfinished:
        (unfinished / MODEL).write_bytes(model)
        np.savez(unfinished / WEIGHTS, **wanted)
        tokenizers.save(tokenizer, unfinished / "tokenizer.json")
        text = json.dumps({**about, "jax": jax.__version__}, indent=2, ensure_ascii=False) + "\n"
        write_whole(unfinished / ABOUT, text)
        write_whole(unfinished / "README.md", readme)
    return len(model)
