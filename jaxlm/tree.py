"""Path-keyed pytrees: paths, partition and combine, counts."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PyTree


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


def partition(tree: PyTree, keep: Callable[[str], bool]) -> tuple[PyTree, PyTree]:
    """Split by path into (kept, rest): two trees of the same structure, ``None`` where absent."""
    kept = map_with_path(lambda path, leaf: leaf if keep(path) else None, tree)
    rest = map_with_path(lambda path, leaf: None if keep(path) else leaf, tree)
    return kept, rest


def combine(kept: PyTree, rest: PyTree) -> PyTree:
    """The inverse of :func:`partition`."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, kept, rest, is_leaf=lambda leaf: leaf is None
    )


def num_params(tree: PyTree) -> int:
    """Number of scalars in all leaves (arrays or ``ShapeDtypeStruct``)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def num_bytes(tree: PyTree) -> int:
    """Bytes of all leaves, as if on one device."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
