"""Windows over the line of tokens that rows were cut from: each token is predicted from many."""

from collections.abc import Iterator

import numpy as np

from jaxlm.data.prepared import Prepared
from jaxlm.data.rows import Rows
from jaxlm.errors import InputError
from jaxlm.runtime.batch_rows import ALL_ROWS, BatchRows
from jaxlm.typing import HostBatch


def window_batches(
    dataset: Prepared,
    batch_size: int,
    *,
    length: int,
    stride: int,
    split: str = "validation",
    max_rows: int | None = None,
    batch_rows: BatchRows = ALL_ROWS,
) -> Iterator[HostBatch]:
    """Batches as those of :func:`~jaxlm.data.loader.eval_batches`, of windows of ``length`` tokens.

    Each window begins ``stride`` tokens after the one before; of all but the first only these last
    tokens count: ``first`` int32 [local_batch] is the position of the first that does. So every
    token of the split, or of its first ``max_rows`` rows, counts once, however rows were cut.
    """
    if not 0 < stride <= length:
        raise InputError(
            f"--stride {stride} is not from 1 to {length}, the tokens that the model reads at once"
        )
    rows, info = dataset.source(split), dataset.info
    total = info.tokens[split] if max_rows is None else max_rows * info.row_length
    total = min(total, info.tokens[split])
    num_windows = 1 + max(0, -(-(total - length) // stride))
    for begin in range(0, num_windows, batch_size):
        numbers = begin + batch_rows.rows(batch_size)
        starts = numbers * stride
        lengths = np.where(numbers < num_windows, np.clip(total - starts, 0, length), 0)
        tokens = np.full((len(numbers), length), info.special.pad, np.int32)
        for into, start, count in zip(tokens, starts.tolist(), lengths.tolist(), strict=True):
            into[:count] = _read(rows, info.row_length, start, count)
        yield {
            "tokens": tokens,
            "lengths": lengths.astype(np.int32),
            "index": (numbers % 2**31).astype(np.int32),
            "first": np.where(numbers > 0, length - stride, 0).astype(np.int32),
        }


def _read(rows: Rows, row_length: int, start: int, count: int) -> np.ndarray:
    """``count`` tokens of the line of all rows."""
    if not count:
        return np.zeros(0, np.int32)
    numbers = np.arange(start // row_length, (start + count - 1) // row_length + 1)
    line = rows.read(numbers)["tokens"].reshape(-1)
    return line[start % row_length :][:count]
