"""Which batches a data set is read in, by its configuration."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from jaxlm.data.labelled.augment import Augment
from jaxlm.data.labelled.batches import (
    apart,
    buckets_read_once,
    eval_batches,
    make_buckets,
    train_batches,
)
from jaxlm.data.labelled.dataset import LabelledConfig
from jaxlm.data.labelled.examples import Examples, Row
from jaxlm.data.labelled.packing import fits, pack
from jaxlm.data.labelled.token_batches import check_tokens, make_plan, rows_of
from jaxlm.runtime.batch_rows import ALL_ROWS, BatchRows


@runtime_checkable
class Batching(Protocol):
    """The batches of a data set; each is a function of (data, seed, examples seen)."""

    @property
    def examples(self) -> Examples:
        """What is in them."""
        ...

    @property
    def longest(self) -> int:
        """Tokens of the longest rows."""
        ...

    def steps(self, epochs: float) -> int:
        """Batches of so many epochs."""
        ...

    def after(self, examples_seen: int, steps: int) -> int:
        """How many examples are seen after so many more batches."""
        ...

    def next_begin(self, examples_seen: int) -> int:
        """How many examples are seen where a batch begins, there or next."""
        ...

    def train_batches(
        self, examples_seen: int, *, augment: Augment | None, batch_rows: BatchRows
    ) -> Iterator[Row]:
        """The rows that one process holds of every batch from there on, without end."""
        ...

    def eval_batches(self, *, batch_rows: BatchRows = ALL_ROWS) -> Iterator[Row]:
        """The rows that one process holds of every batch of one pass, with ``example``."""
        ...

    def apart(self, outputs: Row) -> Iterator[tuple[int, Row]]:
        """Each example's number, and what a model gave for it, of what it gave for a batch."""
        ...

    def describe(self) -> Iterator[str]:
        """Lines on what a user should know of them."""
        ...


@dataclass(frozen=True)
class Even:
    """Batches of equally many examples, of one side."""

    examples: Examples
    batch_size: int
    buckets: Sequence[int]
    seed: int

    @property
    def longest(self) -> int:
        """The last bucket."""
        return max(self.buckets)

    def steps(self, epochs: float) -> int:
        """Batches of so many epochs."""
        return math.ceil(epochs * len(self.examples) / self.batch_size)

    def after(self, examples_seen: int, steps: int) -> int:
        """How many examples are seen after so many more batches."""
        return examples_seen + steps * self.batch_size

    def next_begin(self, examples_seen: int) -> int:
        """The next multiple of ``batch_size``."""
        return -(-examples_seen // self.batch_size) * self.batch_size

    def train_batches(
        self,
        examples_seen: int,
        *,
        augment: Augment | None = None,
        batch_rows: BatchRows = ALL_ROWS,
    ) -> Iterator[Row]:
        """As :func:`~jaxlm.data.labelled.batches.train_batches` makes them."""
        return train_batches(
            self.examples,
            self.batch_size,
            self.buckets,
            seed=self.seed,
            examples_seen=examples_seen,
            augment=augment,
            batch_rows=batch_rows,
        )

    def eval_batches(self, *, batch_rows: BatchRows = ALL_ROWS) -> Iterator[Row]:
        """As :func:`~jaxlm.data.labelled.batches.eval_batches` makes them."""
        return eval_batches(self.examples, self.batch_size, self.buckets, batch_rows=batch_rows)

    def apart(self, outputs: Row) -> Iterator[tuple[int, Row]]:
        """Its row."""
        return apart(outputs)

    def describe(self) -> Iterator[str]:
        """Nothing."""
        yield from ()


def make_batching(
    examples: Examples,
    config: LabelledConfig,
    max_length: int,
    *,
    seed: int = 0,
    lengths: Int[np.ndarray, " _"] | None = None,
    for_training: bool = False,
    in_parts: bool = False,
    longest: int | None = None,
    pieces: int = 1,
) -> Batching:
    """By tokens where the configuration says so, or examples have two sides, and else even.

    ``lengths`` are those that buckets are made for, where there are more than of ``examples``.
    ``in_parts``: others of the same file follow, of which many shall have the same shapes; they
    share no rows, nor have those of one side more rows where they are shorter: such shapes would be
    those of these examples.
    ``for_training`` batches of no more tokens than are allowed are insisted on. For examples that
    share rows ``longest`` is the longest row that the model reads, None any, and ``pieces`` are
    what rows are shared out among.
    """
    size, tokens = config.batch_size, config.batch_tokens
    # What is only evaluated may be longer than what the run was trained on: it shares no rows then.
    if config.pack and not in_parts and (for_training or fits(examples, longest)):
        packed = pack(
            examples,
            batch_size=size,
            batch_tokens=tokens,
            longest=longest,
            seed=seed,
            pieces=pieces,
            for_training=for_training,
        )
        if for_training:
            check_tokens(packed.longest, size, tokens)
        return packed
    size = size if for_training else -(-size // pieces) * pieces
    if (tokens is None or in_parts) and not examples.along_target:
        lengths = examples.lengths if lengths is None else lengths
        make = buckets_read_once if in_parts else make_buckets
        buckets = make(lengths, config.num_buckets, max_length=max_length)
        # In parts, as many rows of any length as have ``tokens`` of the longest.
        return Even(examples, rows_of(max_length, size, tokens), buckets, seed)
    plan = make_plan(
        examples,
        num_buckets=config.num_buckets,
        batch_size=size,
        batch_tokens=tokens,
        max_length=max_length,
        seed=seed,
    )
    if for_training:
        check_tokens(plan.longest, size, tokens)
    return plan
