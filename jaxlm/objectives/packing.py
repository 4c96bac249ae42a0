"""Documents that share a row: who belongs together, and where each counts from."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxlm.objectives.masking import Vocabulary
from jaxlm.typing import Tokens


class Packed(NamedTuple):
    """What a model is told of the rows."""

    segment_ids: Int[Array, "batch length"]
    """Equal ids see each other; -1 is padding."""
    positions: Int[Array, "batch length"] | None
    """None: counted along the row."""


def documents(tokens: Tokens, lengths: Int[Array, "batch"], vocabulary: Vocabulary) -> Packed:
    """Each document by itself, the first of a row being perhaps the rest of one."""
    if vocabulary.start_id is None:
        starts = jnp.roll(tokens, 1, axis=1) == vocabulary.end_id
    else:
        starts = tokens == vocabulary.start_id
    if vocabulary.end_id == vocabulary.start_id:  # GPT-2's <|endoftext|>: of two, the second starts
        before = jnp.roll(tokens, 1, axis=1) == vocabulary.end_id
        starts &= before | (jnp.arange(tokens.shape[1])[None, :] == 0)
    ids = jnp.where(_real(tokens, lengths), jnp.cumsum(starts, axis=1), -1)
    # Computed once: XLA:CPU would fuse the running sum into every layer's attention.
    ids = jax.lax.optimization_barrier(ids)
    return Packed(ids, positions_within(ids))


def whole_rows(tokens: Tokens, lengths: Int[Array, "batch"], vocabulary: Vocabulary) -> Packed:
    """All that is in a row sees each other."""
    return Packed(jnp.where(_real(tokens, lengths), 0, -1), None)


def of_lengths(lengths: Int[Array, "batch segments"], length: int) -> Packed:
    """Segments of so many tokens each, one behind the other, in rows of ``length``."""
    ends = jnp.cumsum(lengths, axis=1)
    place = jnp.arange(length)[None, :]
    number = (place[:, :, None] >= ends[:, None, :]).sum(-1)
    ids = jnp.where(place < ends[:, -1:], number, -1)
    ids = jax.lax.optimization_barrier(ids)  # computed once, as in `documents`
    return Packed(ids, positions_within(ids))


def positions_within(segment_ids: Int[Array, "batch length"]) -> Int[Array, "batch length"]:
    """Positions that start from 0 in every segment."""
    position = jnp.arange(segment_ids.shape[1])[None, :]
    starts = jnp.diff(segment_ids, axis=1, prepend=-2) != 0
    return position - jax.lax.cummax(jnp.where(starts, position, 0), axis=1)


def _real(tokens: Tokens, lengths: Int[Array, "batch"]) -> Array:
    return jnp.arange(tokens.shape[1])[None, :] < lengths[:, None]
