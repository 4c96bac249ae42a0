"""Span corruption (Raffel et al. 2020, arXiv:1910.10683, section 3.1.4): spans of a row are hidden.

Each is one sentinel in what the encoder reads. The decoder writes the sentinels, what was hidden
behind each, a last sentinel and an end (figure 2; the published code leaves out the last sentinel,
as a row's last span is at its end). Counts and lengths of spans are those of its
``random_spans_noise_mask``. On the device, inside the step, and a function of the key and of the
row's ``index`` alone, as in :mod:`jaxlm.objectives.masking`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32

from jaxlm.errors import InputError
from jaxlm.objectives import packing
from jaxlm.objectives.cross_entropy import cross_entropy
from jaxlm.objectives.masking import SpanTokens, Vocabulary
from jaxlm.sums import Sums
from jaxlm.typing import Apply, Batch, Loss, PRNGKey, Scalar, Tokens, Variables


@dataclass(frozen=True, kw_only=True)
class SpanConfig:
    """How much is hidden of a row, and in what pieces."""

    noise_density: float = 0.15
    """Share of a row's tokens that are hidden, inside (0, 1)."""
    mean_span: float = 3.0
    """Mean length of a hidden span, in tokens."""

    def __post_init__(self) -> None:
        if not 0 < self.noise_density < 1:
            raise InputError(
                f"noise_density={self.noise_density} is not inside (0, 1); 0.15 is usual"
            )
        if not 1 <= self.mean_span < float("inf"):
            raise InputError(f"mean_span={self.mean_span} is not a number from 1 up; 3 is usual")

    def counts(self, length: int) -> tuple[int, int]:
        """Hidden tokens of a row with ``length``, and the spans that they are in.

        As published, but that there are never more spans than tokens left to part them.
        """
        if length < 2:
            return 0, 0
        noise = min(max(round(length * self.noise_density), 1), length - 1)
        return noise, min(max(round(noise / self.mean_span), 1), length - noise)

    def inputs_length(self, length: int) -> int:
        """The length that the encoder reads of a row: what is left, sentinels and an end."""
        noise, spans = self.counts(length)
        return length - noise + spans + 1

    def targets_length(self, length: int) -> int:
        """The length that the decoder writes: what is hidden, sentinels, the last and an end."""
        noise, spans = self.counts(length)
        return noise + spans + 2

    def check(self, length: int, vocabulary: Vocabulary) -> SpanTokens:
        """What rows of ``length`` are written with; :class:`InputError` where that cannot be."""
        noise, spans = self.counts(length)
        if self.mean_span > max(noise, 1):
            raise InputError(
                f"mean_span={self.mean_span} is more than the {noise} tokens that noise_density="
                f"{self.noise_density} hides of a row of {length}: lower it to {max(noise, 1)} or "
                "less, or prepare longer rows"
            )
        if vocabulary.spans is None:
            raise InputError(
                "the tokenizer has no sentinels <extra_id_0>, <extra_id_1>, …, which stand for "
                "hidden spans: prepare the text with tokenizer.sentinels=100, or use a T5's"
            )
        if (found := len(vocabulary.spans.sentinels)) <= spans:
            raise InputError(
                f"a row of {length} tokens has {spans} hidden spans, which with a last one need "
                f"{spans + 1} sentinels, and the tokenizer has {found}: prepare shorter rows, or "
                f"the text with tokenizer.sentinels={spans + 1}"
            )
        return vocabulary.spans


class Sides(NamedTuple):
    """What the encoder reads and the decoder writes, from the left; behind both is padding."""

    tokens: Int[Array, "batch inputs"]
    segment_ids: Int[Array, "batch inputs"]
    targets: Int[Array, "batch targets"]
    target_segment_ids: Int[Array, "batch targets"]


def make_loss(
    apply: Apply, vocabulary: Vocabulary, config: SpanConfig, *, isolate_documents: bool = False
) -> Loss:
    """The summed cross-entropy of targets: of what is hidden, of sentinels and of ends.

    ``apply(variables, tokens, decoder_tokens, *, positions, segment_ids, decoder_positions,
    decoder_segment_ids, deterministic, rngs)`` gives logits ``[batch, targets, vocab]``. The batch
    is that of :mod:`jaxlm.objectives.masked_lm`. Isolated documents see only themselves on both
    sides; of a span over a border each writes its own part, and the sentinel is the former's.
    """

    def loss(
        variables: Variables,
        batch: Batch,
        key: PRNGKey,
        *,
        progress: Scalar,
        deterministic: bool,
    ) -> tuple[Scalar, Sums]:
        tokens = jnp.asarray(batch["tokens"], jnp.int32)
        lengths, index = jnp.asarray(batch["lengths"]), jnp.asarray(batch["index"])
        spans = config.check(tokens.shape[1], vocabulary)
        span_key, dropout_key = jax.random.split(key)
        # Devices under pmap and micro-batches hold different rows, and so drop differently.
        dropout_key = jax.random.fold_in(dropout_key, index[0])
        pack = packing.documents if isolate_documents else packing.whole_rows
        segment_ids = pack(tokens, lengths, vocabulary).segment_ids
        sides = corrupt(span_key, tokens, lengths, index, segment_ids, spans, config)
        ids = sides.segment_ids, sides.target_segment_ids
        places = map(packing.positions_within, ids) if isolate_documents else (None, None)
        positions, decoder_positions = places
        logits = apply(
            variables,
            sides.tokens,
            shifted(sides, spans.start_id),
            positions=positions,
            segment_ids=sides.segment_ids,
            decoder_positions=decoder_positions,
            decoder_segment_ids=sides.target_segment_ids,
            deterministic=deterministic,
            rngs=None if deterministic else {"dropout": dropout_key},
        )
        losses, correct = cross_entropy(logits, sides.targets)
        weights = sides.target_segment_ids >= 0
        total = (losses * weights).sum()
        sums = Sums(
            totals={"loss": total, "accuracy": (correct * weights).sum()},
            weight=weights.sum().astype(jnp.float32),
            counts={"tokens": lengths.sum().astype(jnp.float32)},
        )
        return total, sums

    return loss


def shifted(sides: Sides, start_id: int) -> Int[Array, "batch targets"]:
    """Targets moved by one place, behind a start in each document of its own."""
    before = jnp.roll(sides.targets, 1, axis=1)
    starts = jnp.diff(sides.target_segment_ids, axis=1, prepend=-2) != 0
    return jnp.where(starts, start_id, before)


def corrupt(
    key: PRNGKey,
    tokens: Tokens,
    lengths: Int[Array, "batch"],
    index: Int[Array, "batch"],
    segment_ids: Int[Array, "batch length"],
    spans: SpanTokens,
    config: SpanConfig,
) -> Sides:
    """Hide spans of each row. Of a row of less than two tokens there is nothing on either side.

    Args:
        lengths: real tokens of each row.
        index: a number for each row: its stream of random numbers.
        segment_ids: of the documents, or 0.
    """
    length = tokens.shape[1]
    sizes = config.inputs_length(length), config.targets_length(length)
    sentinels = jnp.asarray(spans.sentinels, jnp.int32)
    masks = draw(key, lengths, index, length, config)

    def row(tokens: Array, mask: Array, ids: Array, real: Array) -> Sides:
        begins = mask & ~jnp.roll(mask, 1).at[0].set(False)
        number = jnp.cumsum(begins) - 1  # of the span, at its tokens
        shown = real & mask.any() & (begins | ~mask)
        # Where each token goes, on its side; what goes beyond its end is dropped.
        there = jnp.where(shown, jnp.cumsum(shown) - 1, sizes[0])
        hidden = jnp.where(mask, jnp.cumsum(mask) + number, sizes[1])
        heads = jnp.where(begins, hidden - 1, sizes[1])
        count, rest = shown.sum(), mask.sum() + begins.sum()
        last = jnp.where(mask.any(), ids.max(), -1)
        inputs, targets = (jnp.full(size, spans.end_id, jnp.int32) for size in sizes)
        input_ids, target_ids = (jnp.full(size, -1, jnp.int32) for size in sizes)
        name = sentinels[number]
        put: Any = {"mode": "drop"}
        return Sides(
            inputs.at[there].set(jnp.where(begins, name, tokens), **put),
            input_ids.at[there].set(ids, **put).at[count].set(last, **put),
            targets.at[hidden]
            .set(tokens, **put)
            .at[heads]
            .set(name, **put)
            .at[rest]
            .set(sentinels[begins.sum()], **put),
            target_ids.at[hidden]
            .set(ids, **put)
            .at[heads]
            .set(ids, **put)
            .at[rest + jnp.arange(2)]
            .set(last, **put),
        )

    real = jnp.arange(length)[None, :] < lengths[:, None]
    return jax.vmap(row)(tokens, masks, segment_ids, real)


def draw(
    key: PRNGKey,
    lengths: Int[Array, "batch"],
    index: Int[Array, "batch"],
    length: int,
    config: SpanConfig,
) -> Bool[Array, "batch {length}"]:
    """Where the tokens of rows are hidden: rows begin with one that is not, and end with one."""
    table: Int32[np.ndarray, "lengths 2"] = np.array(
        [config.counts(size) for size in range(length + 1)], np.int32
    )
    most = config.counts(length)[1]

    def row(size: Array, index: Array) -> Array:
        keys = jax.random.split(jax.random.fold_in(key, index))
        noise, spans = jnp.asarray(table)[size]
        pieces = [  # of what is left and of what is hidden, in turns
            _segment(one, count, spans, length, most)
            for one, count in zip(keys, (size - noise, noise), strict=True)
        ]
        ends = jnp.cumsum(jnp.stack(pieces, axis=1).ravel())
        position = jnp.arange(length)
        number = (ends[None, :] <= position[:, None]).sum(1)
        return (number % 2 == 1) & (position < size)

    return jax.vmap(row)(lengths, index)


def _segment(key: PRNGKey, items: Array, segments: Array, most_items: int, most: int) -> Array:
    """So many items cut into segments, each of at least one, all cuts alike likely: their sizes."""
    position = jnp.arange(most_items)
    inside = (position > 0) & (position < items)
    order = jnp.where(inside, jax.random.uniform(key, (most_items,)), jnp.inf)
    rank = jnp.argsort(jnp.argsort(order))
    begins = inside & (rank < segments - 1)
    return jnp.zeros(most, jnp.int32).at[jnp.cumsum(begins)].add(jnp.int32(position < items))
