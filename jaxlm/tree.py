"""Path-keyed pytrees: paths, partition and combine, counts."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from jaxlm.typing import Params


def path_name(path: tuple[Any, ...]) -> str:
    """``encoder/layers/query/kernel`` for a key path of ``jax.tree_util``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def map_with_path(function: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """``jax.tree.map`` whose function takes the leaf's path, as a string, first."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(path_name(path), *leaves), tree, *rest
    )


def leaves_with_path(tree: PyTree) -> list[tuple[str, Any]]:
    """The leaves in order, each with its path."""
    return [(path_name(p), leaf) for p, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    """The shape of each leaf, by its path."""
    return {path: tuple(leaf.shape) for path, leaf in leaves_with_path(tree)}


def replace(tree: PyTree, leaves: Mapping[str, Any]) -> PyTree:
    """The tree with other leaves at some paths."""
    return map_with_path(lambda path, leaf: leaves.get(path, leaf), tree)


def partition(tree: Params, keep: Callable[[str], bool]) -> tuple[Params, Params]:
    """Split a nested dict by path into (kept, rest); what is empty is left out of either."""
    flat = flatten_dict(tree)  # not by joined paths: a name may hold a slash (flax's WeightNorm)
    kept = {path: leaf for path, leaf in flat.items() if keep("/".join(path))}
    rest = {path: leaf for path, leaf in flat.items() if path not in kept}
    return unflatten_dict(kept), unflatten_dict(rest)


def combine(kept: Params, rest: Params) -> Params:
    """The inverse of :func:`partition`."""
    return unflatten_dict(flatten_dict(kept) | flatten_dict(rest))


def num_params(tree: PyTree) -> int:
    """Number of scalars in all leaves (arrays or ``ShapeDtypeStruct``)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def num_bytes(tree: PyTree) -> int:
    """Bytes of all leaves, as if on one device."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
