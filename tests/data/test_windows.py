"""Windows: each token counts once, and is seen as in the text."""

import numpy as np
import pytest

from jaxlm.data.windows import window_batches
from jaxlm.errors import InputError
from jaxlm.runtime.batch_rows import BatchRows


def counted(batches):
    """The tokens that count, in order, and all windows."""
    found = []
    for batch in batches:
        for tokens, length, first in zip(
            batch["tokens"], batch["lengths"], batch["first"], strict=True
        ):
            found += tokens[first:length].tolist()
    return found


@pytest.mark.parametrize(("length", "stride"), [(16, 16), (24, 7), (5, 1), (64, 63), (10**4, 1)])
def test_each_token_counts_once(prepared, length, stride):
    rows = prepared.source("validation").read(np.arange(prepared.info.rows["validation"]))
    line = rows["tokens"].reshape(-1)[: prepared.info.tokens["validation"]].tolist()
    batches = list(window_batches(prepared, 4, length=length, stride=stride))
    assert counted(batches) == line
    assert all(batch["tokens"].shape == (4, length) for batch in batches)
    few = window_batches(prepared, 4, length=length, stride=stride, max_rows=2)
    assert counted(few) == line[:32]


def test_processes_share_a_batch(prepared):
    whole = list(window_batches(prepared, 4, length=24, stride=7))
    halves = [
        list(window_batches(prepared, 4, length=24, stride=7, batch_rows=BatchRows((i,), 2)))
        for i in range(2)
    ]
    for batch, *parts in zip(whole, *halves, strict=True):
        for name, values in batch.items():
            np.testing.assert_array_equal(values, np.concatenate([part[name] for part in parts]))


@pytest.mark.parametrize("stride", [0, 17])
def test_bad_strides(prepared, stride):
    with pytest.raises(InputError, match=f"--stride {stride} is not from 1 to 16"):
        list(window_batches(prepared, 4, length=16, stride=stride))
