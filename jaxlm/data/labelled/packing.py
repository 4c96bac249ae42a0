"""Short examples that share rows: each its own segment, so that little of a batch is padding.

Which lengths share a row is found once, so that there is one shape of batches, and as many in each
epoch. Which examples of these lengths those are, and the order of rows, is drawn anew in each. A
global batch is a function of (data, seed, examples seen).
"""

import bisect
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from jaxtyping import Int

from jaxlm.data.labelled.augment import Augment
from jaxlm.data.labelled.batches import index_of, rng_of
from jaxlm.data.labelled.examples import Examples, Row, pad_rows
from jaxlm.data.labelled.token_batches import no_batch, rows_of
from jaxlm.errors import InputError
from jaxlm.runtime.batch_rows import ALL_ROWS, BatchRows

_ORDER = 6  # sets these random numbers apart from those of other batches
_MULTIPLE = 8  # lengths of rows are multiples of it
_SAMPLE = 4096  # examples by which the shape of batches is chosen
_WORTH = 0.1  # less to compute, from which sharing rows is proposed


def share_rows(lengths: Sequence[int], room: int, most: int | None = None) -> list[list[int]]:
    """Which share a row, ``most`` at most: the longest first, each where it leaves least room."""
    rows: list[list[int]] = []
    left: list[tuple[int, int]] = []  # of a row, and its number, ascending
    for i in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        place = bisect.bisect_left(left, (lengths[i], -1))
        if place == len(left):
            rows.append([])
            left.append((room, len(rows) - 1))
        size, row = left.pop(place)
        rows[row].append(i)
        if len(rows[row]) != most:
            bisect.insort(left, (size - lengths[i], row))
    return rows


@dataclass(frozen=True)
class Packed:
    """Batches of equally many rows, which hold about ``batch_size`` examples."""

    examples: Examples
    members: tuple[Int[np.ndarray, " _"], ...]
    """The examples of each row, of which others of their lengths take the places."""
    row_length: int
    num_rows: int
    """Those of a batch."""
    seed: int

    @property
    def longest(self) -> int:
        """All rows are as long."""
        return self.row_length

    @property
    def padding(self) -> float:
        """The share of positions that are padding."""
        return 1 - int(self._sizes.sum()) / (len(self.members) * self.row_length)

    def describe(self) -> Iterator[str]:
        """A line on how examples share rows."""
        each = len(self.examples) / len(self.members)
        yield (
            f"{len(self.examples):,} examples share {len(self.members):,} rows of "
            f"{self.row_length} tokens, {self.padding:.1%} of which are padding; a batch of "
            f"{self.num_rows} has about {each * self.num_rows:.0f}"
        )

    def steps(self, epochs: float) -> int:
        """Batches of so many epochs."""
        return int(np.ceil(epochs * len(self.members) / self.num_rows))

    def after(self, examples_seen: int, steps: int) -> int:
        """How many examples are seen after so many more batches."""
        return self._examples_after(self.step_of(examples_seen) + steps)

    def next_begin(self, examples_seen: int) -> int:
        """How many examples are seen where a batch begins, there or next."""
        return self._examples_after(self._next_step(examples_seen))

    def step_of(self, examples_seen: int) -> int:
        """The batch that comes after so many examples."""
        step = self._next_step(examples_seen)
        if self._examples_after(step) != examples_seen:
            raise no_batch(examples_seen, "max_length", "pack")
        return step

    def train_batches(
        self,
        examples_seen: int = 0,
        *,
        augment: Augment | None = None,
        batch_rows: BatchRows = ALL_ROWS,
    ) -> Iterator[Row]:
        """The rows that one process holds of every global batch, without end.

        Arrays along the length are those of a row's examples, end to end; ``lengths`` [batch,
        texts] are theirs, 0 behind the last, and all else is [batch, examples, ...].
        """
        local = batch_rows.rows(self.num_rows)
        first = self.step_of(examples_seen) * self.num_rows
        drawn = lru_cache(maxsize=2)(self._drawn)

        def batches() -> Iterator[Row]:
            start = first
            while True:
                rows = []
                for place in (start + local).tolist():
                    epoch, number = divmod(place, len(self.members))
                    order, other = drawn(epoch)
                    chosen = other[self.members[order[number]]].tolist()
                    own = [self.examples.rows[i] for i in chosen]
                    if augment is not None:
                        own = [augment(x, i, epoch) for x, i in zip(own, chosen, strict=True)]
                    rows.append(own)
                yield self._stack(rows) | index_of(start, local)
                start += self.num_rows

        return batches()

    def eval_batches(self, *, batch_rows: BatchRows = ALL_ROWS) -> Iterator[Row]:
        """The rows that one process holds of every batch of one pass.

        ``example`` [batch, examples] gives their numbers, -1 where there is none. The last batch is
        filled up with rows of padding, whose ``weights`` are 0.
        """
        blocks = batch_rows.num_blocks
        size = -(-self.num_rows // blocks) * blocks
        local = batch_rows.rows(size)
        for start in range(0, len(self.members), size):
            numbers = np.arange(start, min(start + size, len(self.members)))
            real = (np.arange(size) < len(numbers))[local]
            chosen = [self.members[i] for i in np.resize(numbers, size)[local]]
            batch = self._stack([[self.examples.rows[i] for i in own] for own in chosen])
            batch["weights"][~real] = batch["lengths"][~real] = 0
            example = np.full((len(chosen), self._most), -1, np.int32)
            for row, own, is_real in zip(example, chosen, real.tolist(), strict=True):
                row[: len(own)] = own if is_real else -1
            yield batch | index_of(start, local) | {"example": example}

    def apart(self, outputs: Row) -> Iterator[tuple[int, Row]]:
        """Each example's number, and what a model gave for it: its part of a row's."""
        numbers, lengths = outputs["example"], outputs["lengths"]
        texts = lengths.reshape(*numbers.shape, -1).sum(-1)
        begins = np.cumsum(texts, axis=1) - texts
        for row, place in zip(*np.nonzero(numbers >= 0), strict=True):
            own = slice(begins[row, place], begins[row, place] + texts[row, place])
            yield (
                int(numbers[row, place]),
                {
                    name: x[row, own] if x.shape[1] == self.row_length else x[row, place]
                    for name, x in outputs.items()
                    if name not in ("example", "lengths")
                },
            )

    def _next_step(self, examples_seen: int) -> int:
        """The first batch that no fewer examples come before."""
        epoch, rest = divmod(examples_seen, len(self.examples))
        rows = epoch * len(self.members) + int(np.searchsorted(self._seen(epoch), rest))
        return -(-rows // self.num_rows)

    def _examples_after(self, step: int) -> int:
        epoch, place = divmod(step * self.num_rows, len(self.members))
        return epoch * len(self.examples) + int(self._seen(epoch)[place])

    @cached_property
    def _most(self) -> int:
        """Places for examples in a row; below those for tokens, which tells outputs apart."""
        return max(map(len, self.members))

    @cached_property
    def _sizes(self) -> Int[np.ndarray, " examples"]:
        return _sizes(self.examples)

    def _seen(self, epoch: int) -> Int[np.ndarray, " rows"]:
        """How many examples of an epoch come before each of its rows."""
        counts = np.array([len(own) for own in self.members])[self._drawn(epoch)[0]]
        return np.cumsum(counts) - counts

    def _drawn(self, epoch: int) -> tuple[Int[np.ndarray, " rows"], Int[np.ndarray, " examples"]]:
        """The order of an epoch's rows, and which example takes the place of each."""
        rng, sizes = rng_of(self.seed, _ORDER, epoch), self._sizes
        order, other = rng.permutation(len(self.members)), np.empty(len(sizes), int)
        other[np.argsort(sizes, kind="stable")] = np.lexsort((rng.random(len(sizes)), sizes))
        return order, other

    def _stack(self, rows: Sequence[Sequence[Row]]) -> Row:
        """A batch of rows of examples."""
        joined = [_joined(own, self.examples.along_length) for own in rows]
        texts = np.atleast_1d(self.examples.rows[0]["lengths"]).size
        batch = {}
        for name in joined[0]:
            arrays = [row[name] for row in joined]
            if name in self.examples.along_length:
                pad = self.examples.pad if name == "tokens" else 0
                batch[name] = pad_rows(arrays, pad, self.row_length)
            else:
                size = self._most * (texts if name == "lengths" else 1)
                batch[name] = np.zeros((len(arrays), size, *arrays[0].shape[1:]), arrays[0].dtype)
                for into, array in zip(batch[name], arrays, strict=True):
                    into[: len(array)] = array
        return batch


def pack(
    examples: Examples,
    *,
    batch_size: int,
    batch_tokens: int | None = None,
    longest: int | None = None,
    seed: int = 0,
    pieces: int = 1,
    for_training: bool = True,
) -> Packed:
    """Rows that hold about ``batch_size`` examples a batch.

    The number of rows divides ``batch_size``; that, and the length of rows, are such that examples
    cost least. ``longest`` is the longest row that a model reads, None any. With ``batch_tokens``
    batches have a multiple of ``batch_size`` rows, of at most so many tokens in all. Where so many
    rows cannot be shared out among ``pieces`` it raises, or, but for training, takes more.
    """
    sizes = _sizes(examples)
    if not len(sizes):
        raise InputError("there are no examples to make batches of")
    if longest is not None and sizes.max() > longest:
        raise InputError(
            f"an example of {sizes.max()} tokens does not fit the longest row that the model reads,"
            f" {longest}: lower data.max_length to {longest // 2}, or leave out data.pack"
        )
    rows, length = _shape(sizes, batch_size, longest)
    if batch_tokens is not None:
        rows = rows_of(length, batch_size, batch_tokens)
    if not for_training:
        rows = -(-rows // pieces) * pieces
    if rows % pieces:
        larger = range((batch_size // pieces + 1) * pieces, 64 * batch_size * pieces, pieces)
        enough = next(n for n in larger if not _shape(sizes, n, longest)[0] % pieces)
        raise InputError(
            f"data.pack puts data.batch_size={batch_size} examples into {rows} rows, which cannot "
            f"be shared out among {pieces} devices or micro-batches: give, "
            f"with --accept-changes where the run has begun, --data.batch-size {enough}"
        )
    members = tuple(np.array(own) for own in _shared(sizes, length))
    return Packed(examples, members, length, rows, seed)


def fits(examples: Examples, longest: int | None) -> bool:
    """Whether the longest row that a model reads, None any, has room for each of the examples."""
    return longest is None or bool((_sizes(examples) <= longest).all())


def would_save(
    examples: Examples,
    buckets: Sequence[int],
    *,
    batch_size: int,
    longest: int | None = None,
    pieces: int = 1,
) -> Iterator[str]:
    """A line where :func:`pack` would lower the cost of these ``buckets`` by a tenth or more.

    Of a sample, by positions and what attention computes of each; none where it would raise.
    """
    wide = np.asarray(buckets)[np.searchsorted(buckets, examples.lengths)]
    texts = np.atleast_1d(examples.rows[0]["lengths"]).size
    sizes, wide = _some(_sizes(examples)), _some(wide)
    if longest is not None and sizes.max() > longest:
        return
    batch_rows, length = _shape(sizes, batch_size, longest)
    rows, now = len(_shared(sizes, length)), texts * float((wide * (1 + wide / 1024)).sum())
    less = 1 - rows * length * (1 + length / 1024) / now
    if less >= _WORTH and batch_rows % pieces == 0:
        yield (
            f"{1 - sizes.sum() / (texts * wide.sum()):.0%} of the positions in batches are "
            f"padding, with --data.pack {1 - sizes.sum() / (rows * length):.0%} would be: about "
            f"{less:.0%} less to compute"
        )


def _shape(sizes: np.ndarray, batch_size: int, longest: int | None) -> tuple[int, int]:
    """How many rows, and of how many tokens: a divisor of ``batch_size`` with the least cost.

    Of those that hold ``batch_size`` examples, or, since rows are as long as the longest example
    and no longer than ``longest``, about as many.
    """
    tokens, most = float(batch_size * sizes.mean()), float(longest or math.inf)
    found: dict[float, list[tuple[int, int]]] = {}
    for rows in (n for n in range(1, batch_size + 1) if batch_size % n == 0):
        length = min(max(tokens / rows, float(sizes.max())), most)
        off = round(abs(math.log(rows * length / tokens)), 6)
        whole = int(min(-(-length // _MULTIPLE) * _MULTIPLE, most))
        found.setdefault(off, []).append((rows, whole))
    return min(found[min(found)], key=lambda shape: (_cost(sizes, shape[1]), shape))


def _cost(sizes: np.ndarray, length: int) -> float:
    """What rows of a length cost: their positions, and attention, which sees all of a row."""
    return len(_shared(_some(sizes), length)) * length * (1 + length / 1024)


def _some(values: np.ndarray) -> np.ndarray:
    return values[np.linspace(0, len(values) - 1, min(len(values), _SAMPLE)).astype(int)]


def _shared(sizes: np.ndarray, length: int) -> list[list[int]]:
    # Rows of nothing but the shortest would make room for many in all rows.
    most = min(-(-2 * length // max(int(sizes.mean()), 1)), length - 1)
    return share_rows(sizes.tolist(), length, most)


def _sizes(examples: Examples) -> Int[np.ndarray, " examples"]:
    """Positions of each example, of all its texts."""
    return np.array([int(row["lengths"].sum()) for row in examples.rows], int)


def _joined(rows: Sequence[Row], along_length: Iterable[str]) -> Row:
    """One row of several: what is along their lengths end to end, all else one after the other."""
    joined = {}
    for name in rows[0]:
        if name in along_length:
            joined[name] = np.concatenate([text for row in rows for text in _texts(row, name)])
        elif name == "lengths":
            joined[name] = np.concatenate([np.atleast_1d(row[name]) for row in rows])
        else:
            joined[name] = np.stack([row[name] for row in rows])
    return joined


def _texts(row: Row, name: str) -> Iterator[np.ndarray]:
    """An array of one text, or of each of several, without padding."""
    lengths = np.atleast_1d(row["lengths"]).tolist()
    for text, size in zip(np.atleast_2d(row[name]), lengths, strict=True):
        yield text[:size]
