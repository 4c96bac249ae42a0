"""Beam search on the device: of each row the likeliest continuations, found in one loop.

It takes the functions of a model that :mod:`jaxlm.decode.decoding` describes, and one that picks
rows of a state. Of a row with K beams each step keeps 2 K candidates: the K best that go on, and
the K best that end with a stop token, so that however many end, K go on. Those that end are
compared as in Hugging Face's ``generate``: they are taken if they are among the K best of all.

Length penalties are tables, and so is when a row ends: other values compile nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxlm.decode.decoding import Step, Take, layout
from jaxlm.errors import InputError
from jaxlm.typing import Tokens, Variables

Totals = Float[Array, "batch beams vocab"]
_BLOCK = 256


class Rules(NamedTuple):
    """What every row keeps to; lengths are numbers of new tokens, the stop token among them."""

    # Of tokens that never go on: those banned, and stop tokens, which end texts all the same.
    banned: Bool[Array, " vocab"]
    stops: Int[Array, " stops"]  # -1: none
    min_tokens: Int[Array, ""]
    no_repeat_ngram: Int[Array, ""]  # 0: off
    divisors: Float[Array, " lengths"]  # of sums of log-probabilities, which so become scores
    max_tokens: Int[Array, " batch"]  # 0: the row is not searched
    # A row ends when no beam's sum over this, at the beams' length, is above the worst of its K
    # scores; 0: when it has K.
    prospects: Float[Array, "batch lengths"]


class Found(NamedTuple):
    """The best of each row that have ended, best first."""

    scores: Float[Array, "batch beams"]  # -inf: there are no more
    lengths: Int[Array, "batch beams"]
    tokens: Int[Array, "batch beams room"]
    log_probabilities: Float[Array, "batch beams room"]


class Beams(NamedTuple):
    """Those that go on."""

    count: Int[Array, ""]  # new tokens of each
    sums: Float[Array, "batch beams"]  # of log-probabilities, best first; -inf: there are no more
    parents: Int[Array, "batch beams"]  # which beams they were, for the state
    tokens: Int[Array, "batch beams room"]
    log_probabilities: Float[Array, "batch beams room"]
    done: Bool[Array, " batch"]
    broken: Bool[Array, " batch"]  # logits that are not numbers


def search(
    step: Step,
    take: Take,
    variables: Variables,
    state: PyTree,
    prompts: Tokens,
    lengths: Int[Array, " batch"],
    rules: Rules,
    num_beams: int,
    room: int,
) -> tuple[Found, Bool[Array, " batch"]]:
    """What was found of each row, and which rows' logits are not numbers.

    Prompts end at the right; ``room`` is for the new tokens of a row. The state has room for the
    padded prompts and all new tokens but the last.
    """
    batch, length = prompts.shape
    vocab = len(rules.banned)
    positions, segment_ids = layout(lengths, length)
    logits, state = step(variables, state, prompts, positions, segment_ids)
    if logits.shape[-1] < vocab:
        raise InputError(
            f"the model has {logits.shape[-1]} logits, and the tokenizer ids up to {vocab - 1}: "
            "use the tokenizer that the model was trained with"
        )
    empty = jnp.zeros((batch, num_beams, room), jnp.int32)
    none = jnp.full((batch, num_beams), -jnp.inf)
    found = Found(none, jnp.zeros_like(empty[..., 0]), empty, jnp.zeros(empty.shape))
    beams = Beams(
        count=jnp.zeros((), jnp.int32),
        sums=none.at[:, 0].set(0),
        parents=jnp.zeros_like(empty[..., 0]),
        tokens=empty,
        log_probabilities=jnp.zeros(empty.shape),
        done=rules.max_tokens == 0,
        broken=jnp.zeros((batch,), bool),
    )
    state = take(state, jnp.repeat(jnp.arange(batch), num_beams))
    history = prompts, lengths
    first = repeat(logits[:, -1, :vocab], "batch vocab -> batch beams vocab", beams=num_beams)
    beams, found = _extend(first, beams, found, history, rules)

    def unfinished(carry: tuple[PyTree, Beams, Found]) -> Bool[Array, ""]:
        return ~jnp.all(carry[1].done)

    def one(carry: tuple[PyTree, Beams, Found]) -> tuple[PyTree, Beams, Found]:
        state, beams, found = carry
        first = num_beams * jnp.arange(batch)[:, None]
        state = take(state, rearrange(first + beams.parents, "batch beams -> (batch beams)"))
        last = lax.dynamic_index_in_dim(beams.tokens, beams.count - 1, axis=2)
        last = rearrange(last, "batch beams one -> (batch beams) one")
        positions = jnp.repeat(lengths - 1 + beams.count, num_beams)[:, None]
        logits, state = step(variables, state, last, positions, jnp.zeros_like(last))
        logits = rearrange(
            logits[:, -1, :vocab], "(batch beams) vocab -> batch beams vocab", beams=num_beams
        )
        return state, *_extend(logits, beams, found, history, rules)

    _, beams, found = lax.while_loop(unfinished, one, (state, beams, found))
    return found, beams.broken


def _extend(
    logits: Totals,
    beams: Beams,
    found: Found,
    history: tuple[Tokens, Int[Array, " batch"]],
    rules: Rules,
) -> tuple[Beams, Found]:
    """Beams that are longer by a token, and what was found with those that have ended."""
    num_beams, vocab = logits.shape[1:]
    scale = jax.nn.logsumexp(logits, axis=-1)
    totals = logits - scale[:, :, None] + beams.sums[:, :, None]
    totals = lax.cond(
        rules.no_repeat_ngram > 0,
        _without_repetition,
        lambda x, *_: x,
        totals,
        beams,
        history,
        rules,
    )
    count = beams.count + 1

    sums, index = top(
        rearrange(
            jnp.where(rules.banned[None, None, :], -jnp.inf, totals),
            "batch beams vocab -> batch (beams vocab)",
        ),
        num_beams,
    )
    may_end = (rules.stops >= 0) & (beams.count >= rules.min_tokens)
    ended = jnp.where(may_end[None, None, :], totals[:, :, rules.stops], -jnp.inf)
    ended, which = lax.top_k(
        rearrange(ended, "batch beams stops -> batch (beams stops)"), num_beams
    )
    num_stops = len(rules.stops)
    parents = jnp.concatenate([index // vocab, which // num_stops], axis=1)
    tokens = jnp.concatenate([index % vocab, rules.stops[which % num_stops]], axis=1)

    # Of all 2 K the K best, which are no others than of all continuations that there are.
    last = count >= rules.max_tokens
    best, order = lax.top_k(jnp.concatenate([sums, ended], axis=1), num_beams)
    ends = ((order >= num_beams) | last[:, None]) & ~beams.done[:, None]
    scores = jnp.where(ends, best / rules.divisors[count], -jnp.inf)
    candidates = _grown(beams, _along(parents, order), _along(tokens, order), logits, scale)
    found = _best(found, Found(scores, jnp.full_like(order, count), *candidates))

    parents, tokens = parents[:, :num_beams], tokens[:, :num_beams]
    grown, log_probabilities = _grown(beams, parents, tokens, logits, scale)
    prospects = lax.dynamic_index_in_dim(rules.prospects, count, axis=1, keepdims=False)
    hope = jnp.where(prospects > 0, sums[:, 0] / prospects, -jnp.inf)
    broken = beams.broken | (jnp.isnan(scale).any(axis=1) & ~beams.done)
    worst = found.scores[:, -1]
    no_better = (hope <= worst) & (worst > -jnp.inf)
    done = beams.done | last | broken | no_better | (sums[:, 0] == -jnp.inf)
    return Beams(count, sums, parents, grown, log_probabilities, done, broken), found


def _along(x: Array, index: Int[Array, "batch chosen"]) -> Array:
    """The chosen entries of each row's second axis."""
    return jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1)


def _grown(
    beams: Beams,
    parents: Int[Array, "batch chosen"],
    tokens: Int[Array, "batch chosen"],
    logits: Totals,
    scale: Float[Array, "batch beams"],
) -> tuple[Int[Array, "batch chosen room"], Float[Array, "batch chosen room"]]:
    """Tokens and log-probabilities of these beams with these tokens behind."""
    rows = jnp.arange(len(parents))[:, None]
    new = logits[rows, parents, tokens] - _along(scale, parents)

    def put(x: Array, column: Array) -> Array:
        column = column[:, :, None]
        return lax.dynamic_update_slice_in_dim(_along(x, parents), column, beams.count, axis=2)

    return put(beams.tokens, tokens), put(beams.log_probabilities, new)


def _best(one: Found, other: Found) -> Found:
    """The best of both; of equal ones the first."""
    both = [jnp.concatenate(pair, axis=1) for pair in zip(one, other, strict=True)]
    _, order = lax.top_k(both[0], one.scores.shape[1])
    return Found(*(_along(x, order) for x in both))


def _without_repetition(
    totals: Totals, beams: Beams, history: tuple[Tokens, Int[Array, " batch"]], rules: Rules
) -> Totals:
    """-inf at tokens that would end a run of n that is there before, in the prompt, too."""
    prompts, lengths = history
    batch, num_beams, _ = totals.shape
    before = repeat(prompts, "batch length -> batch beams length", beams=num_beams)
    tokens = jnp.concatenate([before, beams.tokens], axis=2)
    slots, end = jnp.arange(tokens.shape[2])[None, None, :], prompts.shape[1] + beams.count
    begin = (prompts.shape[1] - lengths)[:, None, None]
    follows = (slots >= begin) & (slots < end)

    def equal(back: Int[Array, ""], found: Bool[Array, "batch beams slots"]) -> Array:
        """Where the tokens so far behind are equal, too."""
        newest = lax.dynamic_index_in_dim(tokens, end - back, axis=2)
        same = jnp.roll(tokens, back, axis=2) == newest
        return found & same & (slots - back >= begin) & (end - back >= begin)

    follows = jnp.broadcast_to(follows, tokens.shape)
    follows = lax.fori_loop(1, rules.no_repeat_ngram, equal, follows)
    rows, columns = jnp.arange(batch)[:, None, None], jnp.arange(num_beams)[None, :, None]
    repeats = jnp.zeros(totals.shape, bool).at[rows, columns, tokens].max(follows)
    return jnp.where(repeats, -jnp.inf, totals)


def top(
    x: Float[Array, "batch size"], k: int
) -> tuple[Float[Array, "batch k"], Int[Array, "batch k"]]:
    """As ``lax.top_k``, which at large sizes takes four times as long on CPUs.

    The k largest lie in the k blocks whose largest are largest.
    """
    if (size := x.shape[1]) <= 2 * k * _BLOCK:
        values, index = lax.top_k(x, k)
        return values, index
    x = jnp.pad(x, ((0, 0), (0, -size % _BLOCK)), constant_values=-jnp.inf)
    blocks = rearrange(x, "batch (block i) -> batch block i", i=_BLOCK)
    _, chosen = lax.top_k(blocks.max(axis=-1), k)
    chosen = jnp.sort(chosen, axis=-1)  # of equal numbers the first is taken
    values, index = lax.top_k(rearrange(_along(blocks, chosen), "batch k i -> batch (k i)"), k)
    index = _along(chosen, index // _BLOCK) * _BLOCK + index % _BLOCK
    return values, jnp.minimum(index, size - 1)  # where there are not k that are above -inf
