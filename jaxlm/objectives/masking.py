"""Which tokens to predict, and what to show in their place: on the device, inside the step.

Every choice is a function of the key and of the row's ``index`` alone, so it is the same however
rows are spread over devices, hosts and micro-batches, and there is nothing to save.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxlm.errors import InputError
from jaxlm.objectives.cross_entropy import cross_entropy
from jaxlm.sums import Sums
from jaxlm.typing import PRNGKey, Scalar, Tokens


@dataclass(frozen=True, kw_only=True)
class ChoiceConfig:
    """Which tokens are predicted."""

    rate: float = 0.15
    """Share of a row's ordinary tokens that are predicted, inside (0, 1)."""
    final_rate: float | None = None
    """Share at the end of the run, reached linearly; None = `rate` throughout."""
    unit: Literal["token", "word", "span"] = "token"
    """What is chosen as a whole: tokens, words, or spans cut at random."""
    mean_span: float = 3.8
    """Mean length of a span, in tokens (SpanBERT, Joshi et al. 2020, section 3.1)."""
    budget: int | None = None
    """Predicted positions computed per row; what is chosen beyond it is left alone and counted as
    overflow. None = enough for tokens; for words and spans, with a margin."""

    def __post_init__(self) -> None:
        for name, rate in (("rate", self.rate), ("final_rate", self.final_rate)):
            if rate is not None and not 0 < rate < 1:
                raise InputError(f"{name}={rate} is not inside (0, 1); 0.15 to 0.4 is usual")
        if self.mean_span < 1:
            raise InputError(f"mean_span={self.mean_span} is shorter than one token")
        if self.budget is not None and self.budget < 1:
            raise InputError(f"budget={self.budget} has no room for one token: None = enough")

    def rate_at(self, progress: Scalar) -> Scalar | float:
        """The rate after that share of the run."""
        if self.final_rate is None:
            return self.rate
        return self.rate + (self.final_rate - self.rate) * progress

    def num_predicted(self, length: int) -> int:
        """Predicted positions for which a row of ``length`` tokens has room."""
        if self.budget is not None:
            return min(self.budget, length)
        margin = {"token": 0, "word": 8, "span": math.ceil(3 * self.mean_span)}[self.unit]
        return min(math.ceil(max(self.rate, self.final_rate or 0) * length) + margin, length)

    def check(self, vocabulary: "Vocabulary") -> None:
        """:class:`InputError` where the tokenizer lacks what this needs."""
        if self.unit == "word" and vocabulary.word_starts is None:
            raise InputError(
                "where words begin is not known of this tokenizer: set the unit of what is "
                "predicted to token or span (task.choice.unit; or task.masking.unit and "
                "task.eval_masking.unit)"
            )


@dataclass(frozen=True, kw_only=True)
class MaskingConfig(ChoiceConfig):
    """How many tokens are predicted, which, and what stands in their place (BERT's by default)."""

    mask_share: float = 0.8
    """Share of the predicted tokens that the mask token replaces."""
    random_share: float = 0.1
    """Share replaced by a random token; the rest stay as they are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        shares = self.mask_share, self.random_share
        if min(shares) < 0 or sum(shares) > 1:
            raise InputError(
                f"mask_share={self.mask_share} and random_share={self.random_share} are shares of "
                "the predicted tokens: each at least 0, together at most 1"
            )

    def check(self, vocabulary: "Vocabulary") -> None:
        """The same, with a mask token."""
        super().check(vocabulary)
        if vocabulary.mask_id is None:
            raise InputError(
                "the tokenizer has no token [MASK] or <mask>: prepare the text anew with one that "
                "has it, as those that are trained here have (leave tokenizer.path out), or use "
                "task=CausalLm and a model that writes, such as GPT-2"
            )


class SpanTokens(NamedTuple):
    """What a text with hidden spans is written with, and the target that says what they were."""

    start_id: int
    """Begins every target."""
    end_id: int
    """Ends the text and its target."""
    sentinels: tuple[int, ...]
    """Stand for the spans, in this order."""


@flax.struct.dataclass
class Vocabulary:
    """What objectives have to know of the tokenizer.

    Attributes:
        mask_id: shown in place of a masked token; None: there is none.
        start_id: begins every document; None: nothing does, and one begins behind another's end.
        end_id: ends every document; may be the same.
        ordinary: ids that may be predicted and drawn: all but the special tokens, ``[ordinary]``.
        is_ordinary: the same as a table, ``[vocab]``.
        word_starts: True where a token begins a word, ``[vocab]``; None: not known.
        spans: for spans to be hidden; None: there are no such tokens.
    """

    mask_id: int | None = flax.struct.field(pytree_node=False)
    start_id: int | None = flax.struct.field(pytree_node=False)
    end_id: int = flax.struct.field(pytree_node=False)
    ordinary: Int[Array, "ordinary"]
    is_ordinary: Bool[Array, "vocab"]
    word_starts: Bool[Array, "vocab"] | None
    spans: SpanTokens | None = flax.struct.field(pytree_node=False, default=None)


class Chosen(NamedTuple):
    """For each row what to predict where, in random order of the units."""

    predicted: Int[Array, "batch masked"]  # positions
    labels: Int[Array, "batch masked"]
    weights: Float[Array, "batch masked"]  # 1, or 0 on spare positions
    overflow: Scalar  # chosen tokens that had no room in the budget


class Corrupted(NamedTuple):
    """A batch to fill in: the tokens shown, and of :class:`Chosen` the rest."""

    tokens: Tokens
    predicted: Int[Array, "batch masked"]
    labels: Int[Array, "batch masked"]
    weights: Float[Array, "batch masked"]
    overflow: Scalar


def score(
    logits: Float[Array, "batch masked vocab"],
    chosen: Chosen | Corrupted,
    lengths: Int[Array, "batch"],
) -> tuple[Scalar, Sums]:
    """The summed cross-entropy of what was to be predicted, and what is reported of it."""
    losses, correct = cross_entropy(logits, chosen.labels)
    total = (losses * chosen.weights).sum()
    sums = Sums(
        totals={"loss": total, "accuracy": (correct * chosen.weights).sum()},
        weight=chosen.weights.sum(),
        counts={"tokens": lengths.sum().astype(jnp.float32), "overflow": chosen.overflow},
    )
    return total, sums


def choose(
    key: PRNGKey,
    tokens: Tokens,
    lengths: Int[Array, "batch"],
    index: Int[Array, "batch"],
    vocabulary: Vocabulary,
    config: ChoiceConfig,
    *,
    progress: Scalar,
) -> Chosen:
    """Choose ``round(rate * ordinary tokens)`` of each row, at least one (Devlin et al. 2018, A.1).

    Whole units are taken in random order until the count is reached, so words and spans may
    exceed it by what is left of the last one.

    Args:
        lengths: real tokens of each row; what lies behind is never chosen.
        index: a number for each row: its stream of random numbers.
        progress: share of the run that is done, for ``final_rate``.
    """
    config.check(vocabulary)
    rate = config.rate_at(progress)
    num_predicted = config.num_predicted(tokens.shape[1])

    def row(tokens: Array, length: Array, index: Array) -> Chosen:
        keys = row_keys(key, index)
        position = jnp.arange(tokens.size)
        allowed = vocabulary.is_ordinary[tokens] & (position < length)
        if config.unit == "word" and vocabulary.word_starts is not None:
            begins = vocabulary.word_starts[tokens]
        elif config.unit == "span":
            begins = jax.random.uniform(keys[3], tokens.shape) < 1 / config.mean_span
        else:
            begins = jnp.ones_like(allowed)
        # One uniform number a unit; a special token ends the unit before it.
        unit = jnp.cumsum(begins | ~allowed)
        order = jax.random.uniform(keys[0], (tokens.size + 1,))[unit]
        order, position = jax.lax.sort_key_val(jnp.where(allowed, order, jnp.inf), position)
        opens = jnp.diff(order, prepend=-1.0) != 0
        rank = jax.lax.cummax(jnp.where(opens, jnp.arange(tokens.size), 0))
        count = allowed.sum()
        target = jnp.clip(jnp.round(rate * count), 1, count)
        chosen = (rank < target) & jnp.isfinite(order)
        predicted, weights = position[:num_predicted], chosen[:num_predicted]
        overflow = chosen[num_predicted:].sum().astype(jnp.float32)
        return Chosen(predicted, tokens[predicted], weights.astype(jnp.float32), overflow)

    rows = jax.vmap(row)(tokens, lengths, index)
    return rows._replace(overflow=rows.overflow.sum())


def row_keys(key: PRNGKey, index: Int[Array, ""]) -> Key[Array, "4"]:
    """A row's: for the order of units, for the drawn tokens, for their fate, for spans."""
    return jax.random.split(jax.random.fold_in(key, index), 4)


def corrupt(
    key: PRNGKey,
    tokens: Tokens,
    lengths: Int[Array, "batch"],
    index: Int[Array, "batch"],
    vocabulary: Vocabulary,
    config: MaskingConfig,
    *,
    progress: Scalar,
) -> Corrupted:
    """:func:`choose`, and show something else in place of what is chosen."""
    config.check(vocabulary)
    mask_id = vocabulary.mask_id
    assert mask_id is not None  # checked
    chosen = choose(key, tokens, lengths, index, vocabulary, config, progress=progress)
    mask_share, random_share = config.mask_share, config.random_share

    def shown(tokens: Array, index: Array, predicted: Array, labels: Array, real: Array) -> Array:
        keys = row_keys(key, index)
        draw = jax.random.randint(keys[1], labels.shape, 0, vocabulary.ordinary.size)
        fate = jax.random.uniform(keys[2], labels.shape)
        instead = jnp.where(
            fate < mask_share,
            mask_id,
            jnp.where(fate < mask_share + random_share, vocabulary.ordinary[draw], labels),
        )
        return tokens.at[predicted].set(jnp.where(real, instead, labels))

    hidden = jax.vmap(shown)(tokens, index, chosen.predicted, chosen.labels, chosen.weights > 0)
    return Corrupted(hidden, *chosen)
