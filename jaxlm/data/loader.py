"""Batches of rows: a global batch is a pure function of (data, seed, examples seen)."""

import math
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from grain.experimental import index_shuffle

from jaxlm.data.prepared import Prepared
from jaxlm.data.rows import Rows
from jaxlm.errors import InputError
from jaxlm.runtime.batch_rows import ALL_ROWS, BatchRows
from jaxlm.typing import HostBatch


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a run reads."""

    paths: tuple[str, ...]
    """Folders of prepared data, all with the same tokenizer and row length."""
    weights: tuple[float, ...] | None = None
    """Weight of each folder in the mixture of rows; None: in proportion to their sizes."""
    batch_size: int = 256
    """Rows in a global batch, over all processes."""
    ramp_sizes: tuple[int, ...] = ()
    """Batch sizes of the stages before `batch_size`, such as 32 64 128; none: no ramp."""
    ramp_steps: tuple[int, ...] = ()
    """Steps of each of those stages."""
    num_threads: int = 1
    """Threads that prefetch batches; more of them help only if storage is slow."""
    prefetch: int = 4
    """Number of batches to prefetch."""

    def __post_init__(self) -> None:
        if not self.paths:
            raise InputError("paths is empty; name at least one folder of prepared data")
        if self.weights is not None and len(self.weights) != len(self.paths):
            raise InputError(
                f"{len(self.weights)} weights for {len(self.paths)} paths; give one each"
            )
        if self.weights is not None and min(self.weights) <= 0:
            raise InputError(f"weights {self.weights} are not all positive; drop the path instead")
        if min(self.batch_size, self.num_threads, self.prefetch) < 1:
            raise InputError(
                f"batch_size={self.batch_size}, num_threads={self.num_threads} and "
                f"prefetch={self.prefetch} must be positive"
            )
        if len(self.ramp_sizes) != len(self.ramp_steps):
            raise InputError(
                f"data.ramp_sizes has {len(self.ramp_sizes)} batch sizes and data.ramp_steps "
                f"{len(self.ramp_steps)} numbers of steps; give one each"
            )
        for name, values in (("sizes", self.ramp_sizes), ("steps", self.ramp_steps)):
            if any(value < 1 for value in values):
                raise InputError(f"data.ramp_{name}={values} are not all positive; leave it out")

    def after(self, examples_seen: int, steps: int) -> tuple[int, int]:
        """Rows that are seen where there were some before, and so many batches followed; and the
        size of the next batch. A size is a function of the rows seen alone."""
        end = 0
        for size, of_stage in zip(self.ramp_sizes, self.ramp_steps, strict=True):
            end += size * of_stage
            left = max(0, math.ceil((end - examples_seen) / size))
            if steps < left:
                return examples_seen + steps * size, size
            examples_seen, steps = examples_seen + left * size, steps - left
        return examples_seen + steps * self.batch_size, self.batch_size

    def steps_to(self, examples: int) -> int:
        """The batches that reach so many rows."""
        steps = seen = 0
        for size, of_stage in zip(self.ramp_sizes, self.ramp_steps, strict=True):
            if examples <= seen + size * of_stage:
                return steps + math.ceil((examples - seen) / size)
            seen, steps = seen + size * of_stage, steps + of_stage
        return steps + math.ceil((examples - seen) / self.batch_size)


def train_batches(
    datasets: Sequence[Prepared],
    config: DataConfig,
    *,
    seed: int,
    examples_seen: int = 0,
    batch_rows: BatchRows = ALL_ROWS,
    before: int = 0,
) -> Iterator[HostBatch]:
    """The rows that one process holds of every global batch, without end, prefetched by threads.

    A batch is ``{"tokens": [local_batch, row_length], "lengths": int32 [local_batch], "index":
    int32 [local_batch]}``; the index numbers the rows of a run, modulo 2³¹. Blocks, put together in
    their order, are the same global batch however many there are. Row k of a run is the same row
    for every batch size, so ``examples_seen`` is all there is to save, while the size grows, too.
    Each data set is shuffled again for every epoch. With ``before``, there are the last so many
    tokens of the row before each in the text, too, [local_batch, before], and ``before_lengths``
    int32 [local_batch]: 0 of a first row.
    """
    check_before(datasets, before)
    check_alike(datasets)
    for size in (*config.ramp_sizes, config.batch_size):
        batch_rows.rows(size)  # raises where it cannot be split
    sources = [dataset.source("train") for dataset in datasets]
    order = _Order(list(map(len, sources)), config.weights, seed)

    def batch(step: int) -> HostBatch:
        seen, size = config.after(examples_seen, step)
        numbers = seen + batch_rows.rows(size)
        owners, rows = order.at(numbers.tolist())
        ahead = _read(sources, owners, np.maximum(rows - 1, 0)) if before else None
        return _stack(_read(sources, owners, rows), numbers) | _before(ahead, rows, before)

    steps = sys.maxsize // config.batch_size - examples_seen
    return _read_ahead(batch, steps, config.num_threads, config.prefetch)


def eval_batches(
    dataset: Prepared,
    batch_size: int,
    *,
    split: str = "validation",
    batch_rows: BatchRows = ALL_ROWS,
    max_rows: int | None = None,
    before: int = 0,
) -> Iterator[HostBatch]:
    """A process's rows of each batch of one pass in fixed order, as for :func:`train_batches`.

    The last global batch is filled up with rows of length 0 (all padding), so that every process
    has the same number of full batches. ``max_rows`` takes only the first so many rows.
    """
    check_before([dataset], before)
    local = batch_rows.rows(batch_size)
    rows = dataset.source(split)
    num_rows = len(rows) if max_rows is None else min(max_rows, len(rows))

    def batch(step: int) -> HostBatch:
        numbers = step * batch_size + local
        there = np.minimum(numbers, num_rows - 1)
        found, beyond = rows.read(there), numbers >= num_rows
        ahead = rows.read(np.maximum(there - 1, 0)) if before else None
        found["tokens"] = np.where(beyond[:, None], dataset.info.special.pad, found["tokens"])
        found["length"] = np.where(beyond, 0, found["length"])
        return _stack(found, numbers) | _before(ahead, there, before)

    return _read_ahead(batch, -(-num_rows // batch_size), num_threads=1, prefetch=2)


def check_alike(datasets: Sequence[Prepared]) -> None:
    """:class:`InputError` unless all have the same row length, tokenizer and frame of texts."""
    first, *others = datasets
    for other in others:
        for what in ("row_length", "tokenizer_sha256"):
            here, there = (getattr(data.info, what) for data in (first, other))
            if here != there:
                raise InputError(
                    f"{first.directory} has {what} {here!s:.12} and {other.directory} "
                    f"{there!s:.12}: prepare the second anew, with scripts/prepare.py "
                    f"--row-length {first.info.row_length} --tokenizer.path {first.tokenizer_path}"
                )
        here, there = ((one.info.special.cls, one.info.special.sep) for one in (first, other))
        if here != there:
            raise InputError(
                f"{first.directory} frames its texts by the tokens {here[0]} and {here[1]}, and "
                f"{other.directory} by {there[0]} and {there[1]}, though their tokenizer is the "
                "same: one is of an older version; prepare both anew"
            )


class _Order:
    """Which row of which data set each row of a run is, without end.

    It is that of grain's ``MapDataset.mix`` of ``source.seed(own_seed).shuffle().repeat()``, which
    would call several Python functions for every row.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None, seed: int):
        self._sizes, self._seeds = sizes, []
        for i in range(len(sizes)):
            (own_seed,) = np.random.SeedSequence([seed, i]).generate_state(1)
            (shuffled,) = np.random.SeedSequence([int(own_seed), 1]).generate_state(1)
            self._seeds.append(int(shuffled))
        endless = [grain.MapDataset.source(_Endless(i)) for i in range(len(sizes))]
        self._mixed = None
        if len(sizes) > 1:
            self._mixed = grain.MapDataset.mix(endless, weights=weights or list(sizes))

    def at(self, numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The data set and the row in it, of each of those rows of the run."""
        mixed = self._mixed
        owners = [0] * len(numbers) if mixed is None else []
        if mixed is not None:
            owners, numbers = zip(*(mixed[number] for number in numbers), strict=True)
        rows = []
        for owner, number in zip(owners, numbers, strict=True):
            size = self._sizes[owner]
            epoch, place = divmod(number, size)  # every epoch is shuffled in another way
            seed = (self._seeds[owner] + epoch) % 2**32
            rows.append(index_shuffle(place, max_index=size - 1, seed=seed, rounds=4))
        return np.array(owners), np.array(rows)


class _Endless(Sequence[tuple[int, int]]):
    """The rows of a data set, epoch after epoch, by number."""

    def __init__(self, owner: int):
        self._owner = owner

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, number: Any) -> Any:
        return self._owner, number


def _read(
    sources: Sequence[Rows], owners: np.ndarray, numbers: np.ndarray
) -> dict[str, np.ndarray]:
    """Rows of several data sets, in the order given."""
    present = np.unique(owners)
    parts = [sources[owner].read(numbers[owners == owner]) for owner in present]
    back = np.argsort(np.argsort(owners, kind="stable"))
    return {name: np.concatenate([part[name] for part in parts])[back] for name in parts[0]}


def _stack(rows: dict[str, np.ndarray], numbers: np.ndarray) -> HostBatch:
    return {
        "tokens": rows["tokens"],
        "lengths": rows["length"].astype(np.int32),
        "index": (numbers % 2**31).astype(np.int32),
    }


def check_before(datasets: Sequence[Prepared], before: int) -> None:
    """Raises where a row has not so many tokens."""
    if before > (length := datasets[0].info.row_length):
        raise InputError(
            f"task.memory={before} is more than the {length} tokens of the row before: lower it to "
            f"{length}, or prepare longer rows"
        )


def _before(ahead: dict[str, np.ndarray] | None, rows: np.ndarray, before: int) -> HostBatch:
    """The ends of the rows ``ahead`` of these, which are full: only a split's last is not."""
    if ahead is None:
        return {}
    lengths = np.where(rows > 0, before, 0).astype(np.int32)
    return {"before": ahead["tokens"][:, -before:], "before_lengths": lengths}


def _read_ahead(
    batch: Callable[[int], HostBatch], steps: int, num_threads: int, prefetch: int
) -> Iterator[HostBatch]:
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    iterator = iter(grain.MapDataset.range(steps).map(batch).to_iter_dataset(options))

    def batches() -> Iterator[HostBatch]:
        try:
            yield from iterator
        finally:
            iterator.close()

    result = batches()
    weakref.finalize(result, iterator.close)  # also if never begun, or still open at exit
    return result
