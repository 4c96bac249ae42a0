"""Answers that are no numbers, and the weights that they are of."""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxlm import tree
from jaxlm.errors import InputError
from jaxlm.tasks.task import Outputs
from jaxlm.train.stored import Stored


class NotFinite(InputError):
    """What a model gives is not finite."""

    everywhere: bool = True
    """Of all that it was asked, and not of some."""


def damaged(params: PyTree) -> str | None:
    """The path of the first weights that hold a number which is not finite, if any do."""
    for path, leaf in tree.leaves_with_path(params):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            x: Any = leaf.read() if isinstance(leaf, Stored) else leaf
            if not bool(jnp.isfinite(x).all()):
                return path
    return None


def not_finite(params: PyTree) -> NotFinite:
    """What to say of a model with these weights."""
    path = damaged(params)
    if path is None:
        return NotFinite(
            "what the model gives is not finite, although its weights are: check the numbers in "
            "its configuration, or take an earlier step"
        )
    return NotFinite(
        f"what the model gives is not finite, for its weights {path} are not: copy or download "
        "them (or the base's) again, or take an earlier step"
    )


def require_finite(outputs: Outputs, params: PyTree) -> None:
    """Raises :class:`NotFinite` unless all rows of the outputs are finite."""
    broken = [_broken(rows) for rows in outputs.values()]
    some = np.any([rows for rows in broken if rows is not None] or [[False]], axis=0)
    if some.any():
        error = not_finite(params)
        error.everywhere = bool(some.all())
        raise error


def require_finite_loss(metrics: Mapping[str, float], params: PyTree) -> None:
    """Raises :class:`NotFinite` where the loss is not finite for these weights are not."""
    if not math.isfinite(metrics["loss"]) and damaged(params) is not None:
        raise not_finite(params)


def _broken(rows: Any) -> Any:
    """Which rows are not finite; None of what is no number with a fraction."""
    if not len(rows) or not jnp.issubdtype(np.asarray(rows[0]).dtype, jnp.floating):
        return None
    return np.array([not np.isfinite(row).all() for row in rows])
