"""Token after token, on the device: what a prompt leaves behind, and a loop that goes on from it.

A model is a pure function
``step(variables, state, tokens, positions, segment_ids) -> (logits, state)`` with arguments
[batch, length] and float32 logits [batch, length, vocab], of which those of the last position alone
are enough here. Its state, any pytree that ``make_state(batch, kv_length)`` makes, holds what is to
be known of the tokens so far, such as keys and values. It is given the prompts first, padded on the
left, then one token at a time. Segment ids are 0 at tokens and -1 at padding; positions count from
0 at a row's first token.

Where a model reads a source first, its state begins with that: the state of
``read(variables, sources, segment_ids, kv_length)``, whose sources are padded on the right.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxlm.decode.sampling import Sampling, choose
from jaxlm.errors import InputError
from jaxlm.typing import Tokens, Variables

Step = Callable[..., Any]  # (variables, state, tokens, positions, segment_ids) -> (logits, state)
MakeState = Callable[[int, int], PyTree]  # (batch, kv_length) -> state
Read = Callable[..., PyTree]  # (variables, sources, segment_ids, kv_length) -> state
Take = Callable[..., PyTree]  # (state, rows) -> state


class Progress(NamedTuple):
    """New tokens so far, and how each row stands. A row that has ended changes no more."""

    count: Int[Array, ""]  # tokens taken by rows that have not ended
    tokens: Int[Array, "batch kv_length"]
    log_probabilities: Float[Array, "batch kv_length"]
    lengths: Int[Array, " batch"]  # the new tokens of each row, a stop token among them
    last: Int[Array, " batch"]  # the newest token, not yet given to the model
    positions: Int[Array, " batch"]  # its position
    seen: Bool[Array, "batch vocab"]  # the tokens of the prompt and the new ones
    done: Bool[Array, " batch"]


def take(state: PyTree, rows: Int[Array, " rows"]) -> PyTree:
    """The state of these rows, in this order, where all arrays but single numbers begin with rows.

    How beams are told apart. A state may share what is equal for all beams of a row, and so have
    its own way.
    """
    return jax.tree.map(lambda x: x[rows] if x.ndim else x, state)


def layout(
    lengths: Int[Array, " batch"], length: int
) -> tuple[Int[Array, "batch length"], Int[Array, "batch length"]]:
    """Positions and segment ids of rows of these lengths, padded on the left to ``length``."""
    positions = jnp.arange(length)[None, :] - (length - lengths[:, None])
    return jnp.maximum(positions, 0), jnp.where(positions < 0, -1, 0)


def begin(
    step: Step,
    variables: Variables,
    state: PyTree,
    tokens: Tokens,
    lengths: Int[Array, " batch"],
    sampling: Sampling,
    kv_length: int,
) -> tuple[PyTree, Progress]:
    """Reads the prompts, which end at the right, and takes the first new token of each row.

    ``kv_length`` is how many tokens the state has room for: those of the padded prompts, and of
    the new ones all but the last.
    """
    batch, length = tokens.shape
    positions, segment_ids = layout(lengths, length)
    logits, state = step(variables, state, tokens, positions, segment_ids)
    vocab = sampling.banned.shape[1]
    if logits.shape[-1] < vocab:
        raise InputError(
            f"the model has {logits.shape[-1]} logits, and the tokenizer ids up to {vocab - 1}: "
            "use the tokenizer that the model was trained with"
        )
    rows = jnp.arange(batch)[:, None]
    progress = Progress(
        count=jnp.zeros((), jnp.int32),
        tokens=jnp.zeros((batch, kv_length), jnp.int32),
        log_probabilities=jnp.zeros((batch, kv_length), jnp.float32),
        lengths=jnp.zeros((batch,), jnp.int32),
        last=tokens[:, -1],
        positions=lengths - 1,
        seen=jnp.zeros((batch, vocab), bool).at[rows, tokens].max(segment_ids == 0),
        done=jnp.zeros((batch,), bool),
    )
    return state, _take(logits, progress, sampling)


def advance(
    step: Step,
    variables: Variables,
    state: PyTree,
    progress: Progress,
    sampling: Sampling,
    ended: Bool[Array, " batch"],
    steps: Int[Array, ""],
) -> tuple[PyTree, Progress]:
    """Takes ``steps`` more tokens of each row, fewer where all have ended.

    ``ended`` marks rows that the caller ends. ``steps`` is an array: another number compiles
    nothing.
    """
    until = progress.count + steps

    def unfinished(carry: tuple[PyTree, Progress]) -> Bool[Array, ""]:
        _, progress = carry
        return (progress.count < until) & ~jnp.all(progress.done)

    def one(carry: tuple[PyTree, Progress]) -> tuple[PyTree, Progress]:
        state, progress = carry
        last, positions = progress.last[:, None], progress.positions[:, None]
        logits, state = step(variables, state, last, positions, jnp.zeros_like(last))
        return state, _take(logits, progress, sampling)

    progress = progress._replace(done=progress.done | ended)
    return lax.while_loop(unfinished, one, (state, progress))


def _take(
    logits: Float[Array, "batch length vocab"], progress: Progress, sampling: Sampling
) -> Progress:
    vocab = sampling.banned.shape[1]
    # Rows of the model's table above the tokenizer's ids only round its size up.
    tokens, log_probabilities = choose(
        logits[:, -1, :vocab], sampling, progress.lengths, progress.seen
    )
    tokens = jnp.where(progress.done, progress.last, tokens)
    lengths = progress.lengths + ~progress.done
    is_stop = jnp.take_along_axis(sampling.stops, tokens[:, None], axis=1)[:, 0]

    def put(x: Array, column: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(x, column[:, None], progress.count, axis=1)

    return Progress(
        count=progress.count + 1,
        tokens=put(progress.tokens, tokens),
        log_probabilities=put(progress.log_probabilities, log_probabilities),
        lengths=lengths,
        last=tokens,
        positions=progress.positions + ~progress.done,
        seen=progress.seen | (jnp.arange(vocab)[None, :] == tokens[:, None]),
        done=progress.done | is_stop | (lengths >= sampling.max_tokens),
    )
