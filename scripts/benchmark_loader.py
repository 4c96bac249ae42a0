"""Speed of the loader on one core: ``python scripts/benchmark_loader.py prepared/pydocs``.

Rows are read in batches, as training reads them, and one by one, as grain alone would, in turns;
both must give the same batches. Counted is the time that this process has a core, so that other
programs disturb little. How long rows are is up to ``prepare.py --row-length``.
"""

import statistics
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import grain
import numpy as np
import tyro

from jaxlm.data.loader import DataConfig, train_batches
from jaxlm.data.prepared import Prepared, open_prepared
from jaxlm.errors import InputError, report_input_errors

WAYS = ("one by one", "in batches")


def at_once(prepared: Prepared, batch_size: int) -> Iterator[np.ndarray]:
    """Tokens of batches as training reads them."""
    config = DataConfig(paths=(str(prepared.directory),), batch_size=batch_size)
    return (batch["tokens"] for batch in train_batches([prepared], config, seed=0))


def one_by_one(prepared: Prepared, batch_size: int) -> Iterator[np.ndarray]:
    """The same by grain's own pipeline, which reads and parses each row alone."""
    (seed,) = np.random.SeedSequence([0, 0]).generate_state(1)
    rows: Any = prepared.source("train")
    endless: Any = grain.MapDataset.source(rows).seed(int(seed)).shuffle().repeat()
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)

    def batch(step: int) -> np.ndarray:
        numbers = range(step * batch_size, (step + 1) * batch_size)
        return np.stack([endless[i]["tokens"] for i in numbers])

    return iter(grain.MapDataset.range(2**40).map(batch).to_iter_dataset(options))


def main(
    data: Annotated[Path, tyro.conf.Positional] = Path("prepared/pydocs"),
    /,
    batch_size: int = 256,
    batches: int = 200,
    rounds: int = 5,
) -> None:
    """Print rows and tokens per second, padding excluded.

    Args:
        data: A folder of prepared data.
        batch_size: Rows of a batch.
        batches: Batches that are read in a turn.
        rounds: Turns of each way; the median is printed.
    """
    if min(batch_size, batches, rounds) < 1:
        raise InputError("--batch-size, --batches and --rounds must be at least 1")
    prepared = open_prepared(str(data))
    length, seconds = prepared.info.row_length, {way: [] for way in WAYS}
    for number in range(rounds):
        last = {}
        for way in WAYS[:: 1 if number % 2 else -1]:
            stream = (one_by_one if way == WAYS[0] else at_once)(prepared, batch_size)
            next(stream)
            start = time.process_time()
            *_, last[way] = islice(stream, batches)
            seconds[way].append(time.process_time() - start)
            del stream
        if not np.array_equal(last[WAYS[0]], last[WAYS[1]]):
            raise InputError(f"{data}: rows come in another order in batches than one by one")
    rows, count = batch_size * batches, prepared.info.rows["train"]
    real = prepared.info.tokens["train"] / count  # of a row, on average
    print(f"batches of {batch_size} rows of {length} tokens, of {count:,}")
    for way in WAYS:
        speed = rows / statistics.median(seconds[way])
        print(f"{way}  {speed:10,.0f} rows/s  {speed * real:12,.0f} tokens/s")
    ratios = [one / many for one, many in zip(*seconds.values(), strict=True)]
    print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})")


if __name__ == "__main__":
    with report_input_errors():
        tyro.cli(main)
