"""Batches of rows: a global batch is a pure function of (data, seed, examples seen)."""

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from jaxlm.data.prepared import Prepared
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


def train_batches(
    datasets: Sequence[Prepared],
    config: DataConfig,
    *,
    seed: int,
    examples_seen: int = 0,
    batch_rows: BatchRows = ALL_ROWS,
) -> Iterator[HostBatch]:
    """The rows that one process holds of every global batch, without end, prefetched by threads.

    A batch is ``{"tokens": [local_batch, row_length], "lengths": int32 [local_batch], "index":
    int32 [local_batch]}``; the index numbers the rows of a run, modulo 2³¹. Blocks, put together in
    their order, are the same global batch however many there are. Row k of a run is the same row
    for every batch size, so ``examples_seen`` is all there is to save. Each data set is shuffled
    again for every epoch.
    """
    _check_alike(datasets)
    local = batch_rows.rows(config.batch_size)
    rows = _endless(datasets, config.weights, seed)

    def batch(step: int) -> HostBatch:
        numbers = examples_seen + step * config.batch_size + local
        return _stack([rows[i] for i in numbers.tolist()], numbers)

    steps = sys.maxsize // config.batch_size - examples_seen
    return _read_ahead(batch, steps, config.num_threads, config.prefetch)


def eval_batches(
    dataset: Prepared,
    batch_size: int,
    *,
    split: str = "validation",
    batch_rows: BatchRows = ALL_ROWS,
    max_rows: int | None = None,
) -> Iterator[HostBatch]:
    """A process's rows of each batch of one pass in fixed order, as for :func:`train_batches`.

    The last global batch is filled up with rows of length 0 (all padding), so that every process
    has the same number of full batches. ``max_rows`` takes only the first so many rows.
    """
    local = batch_rows.rows(batch_size)
    rows = dataset.source(split)
    num_rows = len(rows) if max_rows is None else min(max_rows, len(rows))
    padding = dict(rows[0])
    padding["tokens"] = np.full_like(padding["tokens"], dataset.info.special.pad)
    padding["length"] = np.int32(0)

    def batch(step: int) -> HostBatch:
        numbers = step * batch_size + local
        found = [rows[i] if i < num_rows else padding for i in numbers.tolist()]
        return _stack(found, numbers)

    return _read_ahead(batch, -(-num_rows // batch_size), num_threads=1, prefetch=2)


def _check_alike(datasets: Sequence[Prepared]) -> None:
    first, *others = datasets
    for other in others:
        for what in ("row_length", "tokenizer_sha256"):
            here, there = (getattr(data.info, what) for data in (first, other))
            if here != there:
                raise InputError(
                    f"{first.directory} has {what} {here} and {other.directory} has {there}; "
                    "prepare them alike to train on both"
                )


def _endless(
    datasets: Sequence[Prepared], weights: Sequence[float] | None, seed: int
) -> grain.MapDataset:
    sources = [dataset.source("train") for dataset in datasets]
    endless = []
    for i, source in enumerate(sources):
        (own_seed,) = np.random.SeedSequence([seed, i]).generate_state(1)
        dataset = grain.MapDataset.source(source).seed(int(own_seed))
        endless.append(dataset.shuffle().repeat())  # repeat reseeds the shuffle in every epoch
    if len(endless) == 1:
        return endless[0]
    return grain.MapDataset.mix(endless, weights=weights or [len(source) for source in sources])


def _stack(records: list[Any], numbers: np.ndarray) -> HostBatch:
    return {
        "tokens": np.stack([record["tokens"] for record in records]),
        "lengths": np.array([record["length"] for record in records], np.int32),
        "index": (numbers % 2**31).astype(np.int32),
    }


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
