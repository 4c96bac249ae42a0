"""Batches of examples of like length; a global batch is a function of (data, seed, examples seen).

Each batch is padded to the smallest of a few lengths, its bucket, so that short texts are not
computed as long ones, and few shapes are compiled.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from jaxlm.data.labelled.augment import Augment
from jaxlm.data.labelled.examples import Examples, Row, pad_rows
from jaxlm.errors import InputError
from jaxlm.runtime.batch_rows import ALL_ROWS, BatchRows

_CHUNK = 64  # batches that are sorted by length together
_EPOCH, _ORDER = 2, 3  # set apart the random numbers of epochs and of chunks


MANY = 2048
"""Examples from which on :func:`buckets_read_once` are the same."""


def make_buckets(
    lengths: Int[np.ndarray, " examples"],
    num_buckets: int = 4,
    *,
    multiple: int = 8,
    max_length: int | None = None,
) -> tuple[int, ...]:
    """The lengths to pad to that pad least in all, ascending; the last is enough for the longest.

    All are multiples of ``multiple``, except that none exceeds ``max_length``.
    """
    rounded = -(-np.asarray(lengths) // multiple) * multiple
    if max_length is not None:
        rounded = np.minimum(rounded, max_length)
    sizes, counts = np.unique(rounded, return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])
    # costs[j]: of the best buckets, so many as the round, for all examples up to size j.
    costs = sizes * below[1:]
    choices: list[np.ndarray] = []
    for _ in range(min(num_buckets, len(sizes)) - 1):
        split = costs[:, None] + sizes[None, :] * (below[None, 1:] - below[1:, None])
        split = np.where(np.tri(len(sizes), k=-1).T > 0, split, np.iinfo(np.int64).max)
        choices.append(split.argmin(axis=0))
        costs = np.minimum(split.min(axis=0), sizes * below[1:])
    buckets, j = [len(sizes) - 1], len(sizes) - 1
    for choice in reversed(choices):
        j = int(choice[j])
        buckets.append(j)
    return tuple(sizes[sorted(set(buckets))].tolist())


def train_batches(
    examples: Examples,
    batch_size: int,
    buckets: Sequence[int],
    *,
    seed: int,
    examples_seen: int = 0,
    augment: Augment | None = None,
    batch_rows: BatchRows = ALL_ROWS,
) -> Iterator[Row]:
    """The rows that one process holds of every global batch, without end.

    Epochs, each in an order of its own, follow each other without a gap. Chunks of this sequence
    are sorted by bucket and cut into batches, which come in random order: up to the bounds of
    chunks, every example comes once an epoch. ``index`` numbers the rows of a run, modulo 2³¹.
    """
    local = batch_rows.rows(batch_size)
    if examples_seen % batch_size:
        raise InputError(
            f"examples_seen={examples_seen} is not a multiple of batch_size={batch_size}; "
            "resume with the batch size that the run began with, or go on at the next batch that "
            "begins, with --accept-changes"
        )
    which = _bucket_numbers(examples, buckets)
    # At most an epoch, so that copies of one example, which are equally long, seldom meet in a
    # batch: only where a chunk holds the end of an epoch and the beginning of the next.
    chunk_batches = min(_CHUNK, max(1, len(examples) // batch_size))

    def batches() -> Iterator[Row]:
        step, chunk = examples_seen // batch_size, -1
        order = np.empty((0, 0, 2), int)
        while True:
            if step // chunk_batches != chunk:
                chunk = step // chunk_batches
                order = _chunk_order(which, chunk, chunk_batches, batch_size, seed)
            numbers, epochs = order[step % chunk_batches].T
            rows = [examples.rows[i] for i in numbers[local]]
            if augment is not None:
                keys = zip(rows, numbers[local].tolist(), epochs[local].tolist(), strict=True)
                rows = [augment(row, number, epoch) for row, number, epoch in keys]
            length = buckets[which[numbers].max()]
            yield stack(examples, rows, length) | index_of(step * batch_size, local)
            step += 1

    return batches()


def buckets_of_many(max_length: int) -> tuple[int, ...]:
    """Lengths about an eighth to a quarter apart, whatever the examples.

    They are more programs to compile than of :func:`make_buckets`, which pay off for thousands of
    examples, and they serve every part of a file that is read in parts.
    """
    sizes = []
    while not sizes or sizes[-1] < max_length:
        longest = sizes[-1] if sizes else 0
        step = max(4, 1 << max(0, longest.bit_length() - 3))
        sizes.append(min(longest + step, max_length))
    return tuple(sizes)


def buckets_read_once(
    lengths: Int[np.ndarray, " examples"],
    num_buckets: int = 4,
    *,
    multiple: int = 8,
    max_length: int,
) -> tuple[int, ...]:
    """Those of :func:`make_buckets` for few examples, and of many :func:`buckets_of_many`."""
    if len(lengths) >= MANY:
        return buckets_of_many(max_length)
    return make_buckets(lengths, num_buckets, multiple=multiple, max_length=max_length)


def eval_batches(
    examples: Examples,
    batch_size: int,
    buckets: Sequence[int],
    *,
    batch_rows: BatchRows = ALL_ROWS,
) -> Iterator[Row]:
    """The rows that one process holds of every batch of one pass, the longest examples first.

    ``example`` gives the number of each row's example. The last batch is filled up with copies,
    whose ``weights`` are 0 and whose ``example`` is -1.
    """
    local = batch_rows.rows(batch_size)
    which = _bucket_numbers(examples, buckets)

    def batches() -> Iterator[Row]:
        order = np.argsort(-examples.lengths, kind="stable")
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            length = buckets[which[numbers].max()]
            real = (np.arange(batch_size) < len(numbers))[local]
            numbers = np.resize(numbers, batch_size)[local]
            batch = stack(examples, [examples.rows[i] for i in numbers], length)
            batch["weights"][~real] = 0
            example = np.where(real, numbers, -1).astype(np.int32)
            yield batch | index_of(start, local) | {"example": example}

    return batches()


def _bucket_numbers(examples: Examples, buckets: Sequence[int]) -> Int[np.ndarray, " examples"]:
    if not len(examples):
        raise InputError("there are no examples to make batches of")
    lengths = examples.lengths
    if lengths.max() > buckets[-1]:
        raise InputError(
            f"an example of {lengths.max()} tokens does not fit the longest bucket, {buckets[-1]}; "
            "make the buckets from all examples"
        )
    return np.searchsorted(np.asarray(buckets), lengths)


def _chunk_order(
    which: np.ndarray, chunk: int, chunk_batches: int, batch_size: int, seed: int
) -> Int[np.ndarray, "batches batch 2"]:
    """The example and the epoch of each row of a chunk."""
    size = chunk_batches * batch_size
    epochs, places = np.divmod(np.arange(chunk * size, (chunk + 1) * size), len(which))
    numbers = np.empty(size, int)
    for epoch in np.unique(epochs):
        order = rng_of(seed, _EPOCH, int(epoch)).permutation(len(which))
        numbers[epochs == epoch] = order[places[epochs == epoch]]
    rows = np.stack([numbers, epochs], axis=-1)
    rows = rows[np.argsort(which[numbers], kind="stable")]
    batches = rows.reshape(chunk_batches, batch_size, 2)
    return batches[rng_of(seed, _ORDER, chunk).permutation(chunk_batches)]


def rng_of(seed: int, *key: int) -> np.random.Generator:
    """Random numbers of their own for each key."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)))


def index_of(start: int, local: Int[np.ndarray, " batch"]) -> dict[str, np.ndarray]:
    """Numbers of the rows of a run, modulo 2³¹."""
    return {"index": ((start + local) % 2**31).astype(np.int32)}


def apart(outputs: Row) -> Iterator[tuple[int, Row]]:
    """Each example's number, and what a model gave for its row; -1 is a copy, which is left out."""
    about = ("example", "lengths")
    for i, number in enumerate(outputs["example"].tolist()):
        if number >= 0:
            yield number, {name: x[i] for name, x in outputs.items() if name not in about}


def stack(examples: Examples, rows: Sequence[Row], *lengths: int) -> Row:
    """A batch of rows, each side of which is padded to its length."""
    sides = examples.along_length, examples.along_target
    padded = {name: size for names, size in zip(sides, lengths, strict=False) for name in names}
    batch = {}
    for name in rows[0]:
        arrays = [row[name] for row in rows]
        if name in padded:
            batch[name] = pad_rows(arrays, examples.pad if name == "tokens" else 0, padded[name])
        else:
            batch[name] = np.stack(arrays)
    return batch
