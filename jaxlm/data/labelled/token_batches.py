"""Batches of about as many tokens each: of short examples more, of one side or of pairs.

Examples are divided by their lengths among a few buckets, whose batches all have one shape. A
global batch is a function of (data, seed, examples seen), on any devices and number of processes.
"""

import bisect
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from jaxlm.data.labelled.augment import Augment
from jaxlm.data.labelled.batches import apart, index_of, make_buckets, rng_of, stack
from jaxlm.data.labelled.examples import Examples, Row
from jaxlm.errors import InputError
from jaxlm.runtime.batch_rows import ALL_ROWS, BatchRows

Bucket = tuple[int, ...]  # the length of each side
_EPOCH, _ORDER = 4, 5  # set apart the random numbers of examples and of batches
_MOST = 24  # lengths of a side that are tried
_SIDES = np.array([1, 2])  # what a token costs: those of targets reach the vocabulary as well


def make_pair_buckets(
    sizes: Int[np.ndarray, "examples sides"],
    num_buckets: int,
    *,
    multiple: int = 4,
    max_length: int | None = None,
) -> tuple[Bucket, ...]:
    """The pairs of lengths to pad to, from the shortest; one of them is enough for all.

    Each is the one that saves most beside those before it, which is then done once more for each.
    """
    rounded = -(-sizes // multiple) * multiple
    if max_length is not None:
        rounded = np.minimum(rounded, max_length)
    cells, counts = np.unique(rounded, axis=0, return_counts=True)
    values = [np.unique(side) for side in cells.T]
    values = [v[np.linspace(0, len(v) - 1, min(len(v), _MOST)).astype(int)] for v in values]
    tried = np.stack(np.meshgrid(*values, indexing="ij"), axis=-1).reshape(-1, 2)
    prices = tried @ _SIDES
    fits = np.all(cells[:, None] <= tried[None], axis=-1)  # [cells, tried]
    largest = len(tried) - 1

    def best(others: Sequence[int]) -> int:
        """What to add to others."""
        now = np.where(fits[:, others], prices[others], np.inf).min(1)
        saved = np.where(fits, np.maximum(now[:, None] - prices[None], 0), 0)
        return int((counts @ saved).argmax())

    chosen = [largest]
    while len(chosen) < num_buckets:
        chosen.append(best(chosen))
    for _ in range(2):
        for place in range(1, len(chosen)):
            chosen[place] = best(chosen[:place] + chosen[place + 1 :])
    return tuple(tuple(tried[i].tolist()) for i in sorted(set(chosen), key=lambda i: prices[i]))


@dataclass(frozen=True)
class Plan:
    """Which examples the batches of a run hold.

    The examples of a bucket follow each other without end, each epoch of them in an order of its
    own, and are cut into batches. An epoch of a run has the batches that begin in it, in random
    order; so it has each example once, up to those by which its last batches reach into the next.
    """

    examples: Examples
    buckets: tuple[Bucket, ...]
    rows: tuple[int, ...]
    """Those of a batch of each bucket."""
    members: tuple[Int[np.ndarray, " _"], ...]
    """The examples of each bucket; none is empty."""
    seed: int

    @property
    def longest(self) -> int:
        """The longest bucket of both sides."""
        return max(map(max, self.buckets))

    @property
    def padding(self) -> float:
        """The share of positions that are padding, as far as examples are alike."""
        padded = sum(
            len(own) * sum(bucket) for own, bucket in zip(self.members, self.buckets, strict=True)
        )
        return 1 - int(self.examples.sizes.sum()) / padded

    def describe(self) -> Iterator[str]:
        """A line on the shapes of batches."""
        shapes = (
            f"{rows} x {'+'.join(map(str, bucket))}"
            for rows, bucket in zip(self.rows, self.buckets, strict=True)
        )
        yield (
            f"batches of {', '.join(shapes)} tokens, {self.padding:.1%} of which are padding; "
            f"an epoch has {self.steps(1.0):,}"
        )

    def steps(self, epochs: float) -> int:
        """Batches of so many epochs."""
        whole = int(epochs)
        first, then = self._batches(whole), self._batches(whole + 1)
        return first + int(np.ceil((epochs - whole) * (then - first)))

    def examples_after(self, step: int) -> int:
        """How many examples the first batches have, a copy counting as another."""
        epoch = self._epoch_of(step)
        before = sum(self._counts(epoch)[i] * rows for i, rows in enumerate(self.rows))
        order = self._order(epoch)[: step - self._batches(epoch)]
        return before + sum(self.rows[bucket] for bucket, _ in order)

    def after(self, examples_seen: int, steps: int) -> int:
        """How many examples are seen after so many more batches."""
        return self.examples_after(self.step_of(examples_seen) + steps)

    def step_of(self, examples_seen: int) -> int:
        """The batch that comes after so many examples."""
        step = self._next_step(examples_seen)
        if self.examples_after(step) != examples_seen:
            raise no_batch(examples_seen, "num_buckets")
        return step

    def next_begin(self, examples_seen: int) -> int:
        """How many examples are seen where a batch begins, there or next."""
        return self.examples_after(self._next_step(examples_seen))

    def train_batches(
        self,
        examples_seen: int = 0,
        *,
        augment: Augment | None = None,
        batch_rows: BatchRows = ALL_ROWS,
    ) -> Iterator[Row]:
        """The rows that one process holds of every global batch, without end.

        ``index`` numbers the rows of a run, modulo 2³¹.
        """
        step = self.step_of(examples_seen)

        def batches() -> Iterator[Row]:
            seen, epoch = examples_seen, self._epoch_of(step)
            skipped = step - self._batches(epoch)
            while True:
                for bucket, number in self._order(epoch)[skipped:]:
                    rows = self.rows[bucket]
                    local = batch_rows.rows(rows)
                    chosen, epochs = self._members_of(bucket, number * rows + local)
                    made = [self.examples.rows[i] for i in chosen]
                    if augment is not None:
                        keys = zip(made, chosen.tolist(), epochs.tolist(), strict=True)
                        made = [augment(row, one, at) for row, one, at in keys]
                    yield stack(self.examples, made, *self.buckets[bucket]) | index_of(seen, local)
                    seen += rows
                epoch, skipped = epoch + 1, 0

        return batches()

    def eval_batches(self, *, batch_rows: BatchRows = ALL_ROWS) -> Iterator[Row]:
        """The rows that one process holds of every batch of one pass, the longest examples first.

        ``example`` gives the number of each row's example. A bucket's last batch is filled up with
        copies, whose ``weights`` are 0 and whose ``example`` is -1.
        """
        seen = 0
        for bucket in reversed(range(len(self.buckets))):
            rows, own = self.rows[bucket], self.members[bucket]
            local = batch_rows.rows(rows)
            for start in range(0, len(own), rows):
                numbers = own[start : start + rows]
                real = (np.arange(rows) < len(numbers))[local]
                numbers = np.resize(numbers, rows)[local]
                made = [self.examples.rows[i] for i in numbers]
                batch = stack(self.examples, made, *self.buckets[bucket])
                batch["weights"][~real] = 0
                example = np.where(real, numbers, -1).astype(np.int32)
                yield batch | index_of(seen, local) | {"example": example}
                seen += rows

    def apart(self, outputs: Row) -> Iterator[tuple[int, Row]]:
        """Each example's number, and what a model gave for its row."""
        return apart(outputs)

    def _next_step(self, examples_seen: int) -> int:
        """The first batch that no fewer examples come before; their number grows with steps."""
        beyond = range(examples_seen // min(self.rows) + 2)
        return bisect.bisect_left(beyond, examples_seen, key=self.examples_after)

    def _counts(self, epoch: int) -> list[int]:
        """Batches of each bucket before an epoch."""
        return [-(-epoch * len(o) // r) for o, r in zip(self.members, self.rows, strict=True)]

    def _batches(self, epoch: int) -> int:
        return sum(self._counts(epoch))

    def _epoch_of(self, step: int) -> int:
        """The epoch that a batch is in."""
        beyond = next(e for e in (1 << i for i in range(64)) if self._batches(e) > step)
        return bisect.bisect_right(range(beyond), step, key=self._batches) - 1

    def _order(self, epoch: int) -> list[tuple[int, int]]:
        return _order(self.seed, epoch, tuple(self._counts(epoch)), tuple(self._counts(epoch + 1)))

    def _members_of(
        self, bucket: int, places: Int[np.ndarray, " rows"]
    ) -> tuple[Int[np.ndarray, " rows"], Int[np.ndarray, " rows"]]:
        """Numbers and epochs of the examples at places in the sequence of a bucket."""
        own = self.members[bucket]
        epochs, places = np.divmod(places, len(own))
        chosen = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            order = _permutation(self.seed, bucket, epoch, len(own))
            chosen[epochs == epoch] = own[order[places[epochs == epoch]]]
        return chosen, epochs


def make_plan(
    examples: Examples,
    *,
    num_buckets: int,
    batch_size: int,
    batch_tokens: int | None = None,
    max_length: int | None = None,
    seed: int = 0,
) -> Plan:
    """Batches of ``batch_size`` examples, or of so many times these as have ``batch_tokens``."""
    if not len(examples):
        raise InputError("there are no examples to make batches of")
    sizes = examples.sizes.astype(int)
    if sizes.shape[1] == 1:
        lengths = make_buckets(sizes[:, 0], num_buckets, max_length=max_length)
        buckets: tuple[Bucket, ...] = tuple((length,) for length in lengths)
    else:
        buckets = make_pair_buckets(sizes, num_buckets, max_length=max_length)
    fits = np.all(sizes[:, None] <= np.array(buckets)[None], axis=-1)
    which = fits.argmax(1)  # the first that fits is the cheapest
    members = [np.flatnonzero(which == i) for i in range(len(buckets))]
    used = [i for i, own in enumerate(members) if len(own)]
    rows = [rows_of(max(bucket), batch_size, batch_tokens) for bucket in buckets]
    return Plan(
        examples,
        tuple(buckets[i] for i in used),
        tuple(rows[i] for i in used),
        tuple(members[i] for i in used),
        seed,
    )


def rows_of(length: int, batch_size: int, batch_tokens: int | None) -> int:
    """Rows of a batch: ``batch_size``, or so many times these as have ``batch_tokens``."""
    return batch_size * max(1, (batch_tokens or 0) // length // batch_size)


def check_tokens(longest: int, batch_size: int, batch_tokens: int | None) -> None:
    """Raise where ``batch_size`` of the longest rows are more tokens than a batch is to have."""
    if batch_tokens is not None and batch_tokens < batch_size * longest:
        room = batch_tokens // longest
        ways = [f"--data.batch-tokens {batch_size * longest}"]
        ways += [f"--data.batch-size {room}"] if room else []
        raise InputError(
            f"data.batch_tokens={batch_tokens} has no room for data.batch_size={batch_size} "
            f"examples of {longest} tokens: {' or '.join(ways)}"
        )


def no_batch(examples_seen: int, *settings: str) -> InputError:
    """That a run resumes in the middle of a batch, since its data or ``settings`` are others."""
    names = ", ".join(f"data.{name}" for name in ("batch_size", "batch_tokens", *settings))
    return InputError(
        f"no batch begins after {examples_seen:,} examples: resume with the data, the seed, {names}"
        " as the run began, or go on at the next batch that begins, with --accept-changes"
    )


@functools.lru_cache(maxsize=4)
def _order(
    seed: int, epoch: int, first: tuple[int, ...], then: tuple[int, ...]
) -> list[tuple[int, int]]:
    """Bucket and number of the batches of an epoch."""
    batches = [
        (bucket, number)
        for bucket, bounds in enumerate(zip(first, then, strict=True))
        for number in range(*bounds)
    ]
    return [batches[i] for i in rng_of(seed, _ORDER, epoch).permutation(len(batches))]


@functools.lru_cache(maxsize=32)
def _permutation(seed: int, bucket: int, epoch: int, size: int) -> Int[np.ndarray, " size"]:
    return rng_of(seed, _EPOCH, bucket, epoch).permutation(size)
