"""Models that decode, as functions of a few lines: a table of what follows what, and attention."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, decoders, models

from jaxlm.decode.causal_model import CausalModel

CHARACTERS = "abcdefghijklmnop .!"
VOCAB = 32  # rows of the models' tables: more than there are tokens


def characters(special: tuple[str, ...] = ("<end>",)) -> Tokenizer:
    """A tokenizer with a token for each character, and the special ones behind."""
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(CHARACTERS)}, []))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


END = len(CHARACTERS)


def table_step(variables, state, tokens, positions, segment_ids):
    """Logits by the last token alone. The state counts calls, and each row's tokens."""
    calls, seen = state
    return variables["table"][tokens], (calls + 1, seen + (segment_ids == 0).sum(axis=1))


def table_state(batch: int, kv_length: int):
    return jnp.zeros((), jnp.int32), jnp.zeros((batch,), jnp.int32)


def table_model(logits: np.ndarray | None = None, **changes) -> CausalModel:
    """By a table of random logits, or by these."""
    table = 2 * np.random.default_rng(0).normal(size=(VOCAB, VOCAB)) if logits is None else logits
    own = dict(
        step=table_step,
        make_state=table_state,
        variables={"table": jnp.asarray(table, jnp.float32)},
        tokenizer=characters(),
        max_length=64,
    )
    return CausalModel(**(own | changes))


class Cache(NamedTuple):
    key: jax.Array
    value: jax.Array
    segment_ids: jax.Array
    index: jax.Array


DIM = 16


def attention_variables(max_length: int = 64):
    rng = np.random.default_rng(1)
    shapes = {"token": (VOCAB, DIM), "position": (max_length, DIM), "out": (DIM, VOCAB)}
    shapes |= {name: (DIM, DIM) for name in ("query", "key", "value")}
    return {
        name: jnp.asarray(rng.normal(size=shape) * 0.8, jnp.float32)
        for name, shape in shapes.items()
    }


def attention_state(batch: int, kv_length: int) -> Cache:
    empty = jnp.zeros((batch, kv_length, DIM))
    return Cache(
        empty, empty, jnp.full((batch, kv_length), -1, jnp.int32), jnp.zeros((), jnp.int32)
    )


def attention_step(variables, state, tokens, positions, segment_ids):
    """One head over what is in the cache; its logits depend on all tokens and their positions."""
    x = variables["token"][tokens] + variables["position"][positions]
    slots, length = jnp.arange(state.key.shape[1]), tokens.shape[1]
    put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, state.index, axis=1)
    state = Cache(
        put(state.key, x @ variables["key"]),
        put(state.value, x @ variables["value"]),
        put(state.segment_ids, segment_ids),
        state.index,
    )
    earlier = slots[None, :] <= state.index + jnp.arange(length)[:, None]
    seen = earlier[None] & (segment_ids[:, :, None] == state.segment_ids[:, None, :])
    scores = jnp.einsum("bqd,bkd->bqk", x @ variables["query"], state.key) / DIM**0.5
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e9), axis=-1)
    x = x + jnp.einsum("bqk,bkd->bqd", weights, state.value)
    return x @ variables["out"], state._replace(index=state.index + length)


def attention_model(**changes) -> CausalModel:
    own = dict(
        step=attention_step,
        make_state=attention_state,
        variables=attention_variables(),
        tokenizer=characters(),
        max_length=64,
    )
    return CausalModel(**(own | changes))
