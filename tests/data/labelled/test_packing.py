"""Examples that share rows: which, in which batches, and again after a stop."""

import re
from itertools import islice
from typing import Any

import numpy as np
import pytest

from jaxlm.data.labelled.batching import Even, make_batching
from jaxlm.data.labelled.dataset import LabelledConfig
from jaxlm.data.labelled.examples import Examples
from jaxlm.data.labelled.packing import Packed, share_rows, would_save
from jaxlm.data.labelled.records import JsonLines
from jaxlm.errors import InputError
from jaxlm.runtime.batch_rows import BatchRows

COUNT, PAD = 100, 9
SIZES = np.random.default_rng(0).integers(3, 20, COUNT)
CONFIG = {"train": JsonLines(path="x"), "batch_size": 16, "pack": True}


def make_examples(sizes=SIZES) -> Examples:
    """Example i holds tokens of i alone."""
    rows = [
        {
            "tokens": np.full(size, number, np.int32),
            "token_type_ids": np.zeros(size, np.int32),
            "lengths": np.array(size, np.int32),
            "labels": np.array(number, np.int32),
            "weights": np.ones((), np.float32),
        }
        for number, size in enumerate(sizes.tolist())
    ]
    along = frozenset({"tokens", "token_type_ids"})
    return Examples(rows=rows, along_length=along, pad=PAD, untruncated=sizes.astype(np.int32))


def batching(sizes=SIZES, *, longest: int | None = 64, pieces: int = 1, **changes: int) -> Packed:
    config: dict[str, Any] = CONFIG | changes
    made = make_batching(
        make_examples(sizes),
        LabelledConfig(**config),
        20,
        longest=longest,
        pieces=pieces,
        for_training=True,
    )
    assert isinstance(made, Packed)
    return made


def labels_of(batch):
    return batch["labels"][batch["weights"] > 0].tolist()


@pytest.mark.parametrize("longest", [20, 24, 40, None])
@pytest.mark.parametrize("size", [4, 16, 32])
@pytest.mark.parametrize("largest", [8, 20])
def test_a_batch_has_about_as_many_examples_as_are_asked_for(longest, size, largest):
    """However few fit a row: the rate of learning was chosen for so many."""
    sizes = np.append(np.minimum(SIZES, largest), largest)
    plan = batching(sizes, longest=longest, batch_size=size)
    assert len(sizes) / len(plan.members) * plan.num_rows == pytest.approx(size, rel=0.35)


def test_rows_are_filled_and_nothing_is_cut():
    plan = batching()
    (line,) = plan.describe()
    numbers = [float(number) for number in re.findall(r"\d+(?:\.\d)?", line)]
    _, rows, length, padding, rows_of_batch, each = numbers
    assert rows_of_batch == plan.num_rows
    assert padding < 5
    assert abs(each - 16) < 4
    assert rows * length * (1 - padding / 100) == pytest.approx(SIZES.sum(), rel=0.01)
    batch = next(plan.train_batches(0))
    assert 16 % len(batch["tokens"]) == 0
    for tokens, lengths, labels, weights in zip(
        *(batch[name] for name in ("tokens", "lengths", "labels", "weights")), strict=True
    ):
        assert (weights == (lengths > 0)).all()
        counted = labels[lengths > 0]
        np.testing.assert_array_equal(lengths[lengths > 0], SIZES[counted])
        real = np.repeat(counted, lengths[lengths > 0])
        np.testing.assert_array_equal(tokens[: len(real)], real)
        assert (tokens[len(real) :] == PAD).all()


def test_an_epoch_has_each_example_once_and_another_has_other_neighbours():
    plan = batching()
    rows = []
    for batch in islice(plan.train_batches(0), 2 * plan.steps(1.0) + 1):
        rows += [
            sorted(own[size > 0])
            for own, size in zip(batch["labels"], batch["lengths"], strict=True)
        ]
    sizes = np.cumsum([len(row) for row in rows])
    epoch = int(np.flatnonzero(sizes == COUNT)[0]) + 1
    first, second = rows[:epoch], rows[epoch : 2 * epoch]
    for one in (first, second):
        assert sorted(number for row in one for number in row) == list(range(COUNT))
    assert len({tuple(row) for row in first} & {tuple(row) for row in second}) < epoch // 3
    assert plan.steps(1.0) == -(-epoch // len(batch["tokens"]))


@pytest.mark.parametrize("changes", [{}, {"batch_tokens": 2048}])
def test_a_run_goes_on_where_it_stopped_on_any_number_of_processes(changes):
    plan = batching(**changes)
    whole = list(islice(plan.train_batches(0), 12))
    seen = 0
    for step, batch in enumerate(whole):
        assert plan.after(0, step) == seen
        again = next(plan.train_batches(seen))
        parts = [BatchRows((block,), 2) for block in (0, 1)]
        halves = [next(plan.train_batches(seen, batch_rows=part)) for part in parts]
        for name, expected in batch.items():
            np.testing.assert_array_equal(again[name], expected)
            joined = np.concatenate([half[name] for half in halves])
            np.testing.assert_array_equal(joined, expected)
        assert plan.after(seen, 3) == plan.after(0, step + 3)
        seen += len(labels_of(batch))
    with pytest.raises(InputError, match=r"no batch begins after 1 examples: .*data\.pack"):
        plan.train_batches(1)
    with pytest.raises(InputError, match=r"with the data, the seed, .* with --accept-changes$"):
        plan.train_batches(1)


@pytest.mark.parametrize("changes", [{}, {"batch_tokens": 2048}])
def test_where_the_next_batch_begins(changes):
    """As many examples may be the middle of a row of other data, in the order of another seed."""
    plan = batching(**changes)
    begins = [plan.after(0, step) for step in range(40)]
    for seen in range(begins[-1]):
        assert plan.next_begin(seen) == next(begin for begin in begins if begin >= seen)


@pytest.mark.parametrize("parts", [1, 3])
def test_evaluation_sees_each_example_once(parts):
    plan, found = batching(), []
    for block in range(parts):
        for batch in plan.eval_batches(batch_rows=BatchRows((block,), parts)):
            found += labels_of(batch)
            real = batch["example"] >= 0
            assert (real == (batch["weights"] > 0)).all()
            np.testing.assert_array_equal(batch["labels"][real], batch["example"][real])
            assert batch["lengths"].sum() == SIZES[batch["example"][real]].sum()
    assert sorted(found) == list(range(COUNT))


def test_rows_that_cannot_be_shared_out():
    """The way out that is named is one."""
    with pytest.raises(InputError, match=r"16 examples into \d rows, .* 16 devices or") as error:
        batching(pieces=16)
    enough = int(str(error.value).split()[-1])
    batch = next(batching(pieces=16, batch_size=enough).train_batches(0))
    assert len(batch["tokens"]) % 16 == 0
    config = LabelledConfig(**CONFIG)
    evaluated = make_batching(make_examples(), config, 20, longest=64, pieces=16)
    assert len(next(evaluated.eval_batches())["tokens"]) == 16


def test_examples_that_are_longer_than_rows():
    with pytest.raises(InputError, match=r"19 tokens .* reads, 18: lower data\.max_length to 9"):
        batching(longest=18)
    config = LabelledConfig(**CONFIG)
    alone = make_batching(make_examples(), config, 20, longest=18, pieces=3)  # of a trained run
    assert isinstance(alone, Even)
    assert alone.batch_size == 18
    assert sum(int((batch["example"] >= 0).sum()) for batch in alone.eval_batches()) == COUNT
    with pytest.raises(InputError, match=r"batch_tokens=100 has no room"):
        batching(batch_tokens=100)
    one = next(batching(np.array([5]), longest=None).train_batches(0))
    assert one["tokens"].shape[0] in (1, 2, 4, 8, 16)
    assert (one["labels"][one["weights"] > 0] == 0).all()
    with pytest.raises(InputError, match="there are no examples"):
        batching(np.zeros(0, int))


def test_who_shares_a_row():
    assert share_rows([2, 7, 3, 5], 10) == [[1, 2], [3, 0]]
    assert share_rows([1, 1, 1, 1], 10, 2) == [[0, 1], [2, 3]]


def test_sharing_rows_is_proposed_where_less_is_computed():
    def lines(sizes=SIZES, **changes):
        given = {"batch_size": 16, "longest": 64} | changes
        return list(would_save(make_examples(sizes), (24,), **given))

    (line,) = lines()
    now, then, less = map(int, re.findall(r"(\d+)%", line))
    assert now == round(100 - 100 * SIZES.sum() / (24 * COUNT))
    assert then == round(100 * batching().padding)
    assert less == pytest.approx(100 - 100 * (1 - now / 100) / (1 - then / 100), abs=6)  # attention
    assert lines(np.full(COUNT, 24)) == []  # nothing is padding
    assert lines(longest=16) == []  # some examples are longer
    assert lines(pieces=7) == []  # which no number of rows can be shared out among
