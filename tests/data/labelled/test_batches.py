from collections import Counter
from itertools import combinations, islice

import numpy as np
import pytest

from jaxlm.data.labelled.batches import (
    buckets_of_many,
    eval_batches,
    make_buckets,
    train_batches,
)
from jaxlm.data.labelled.examples import Examples
from jaxlm.errors import InputError
from jaxlm.runtime.batch_rows import BatchRows

PAD = 9


def make_examples(count: int, seed: int = 0, choices: tuple[int, ...] = ()) -> Examples:
    """Example i has a length of its own and the label i."""
    lengths = np.random.default_rng(seed).integers(3, 40, count)
    rows = [
        {
            "tokens": np.full((*choices, length), i, np.int32),
            "lengths": np.full(choices, length, np.int32),
            "labels": np.array(i, np.int32),
            "weights": np.ones((), np.float32),
        }
        for i, length in enumerate(lengths)
    ]
    return Examples(
        rows=rows,
        along_length=frozenset({"tokens"}),
        pad=PAD,
        untruncated=lengths.astype(np.int32),
    )


EXAMPLES = make_examples(101)
BUCKETS = make_buckets(EXAMPLES.lengths, 3)


def take(count: int, examples: Examples = EXAMPLES, batch_size: int = 4, **settings):
    settings = {"seed": 0} | settings
    return list(islice(train_batches(examples, batch_size, BUCKETS, **settings), count))


def same(one, two) -> bool:
    return len(one) == len(two) and all(
        a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
        for a, b in zip(one, two, strict=True)
    )


def test_a_batch(framer):
    (batch,) = take(1)
    assert {name: (array.dtype, array.shape) for name, array in batch.items()} == {
        "tokens": (np.int32, (4, batch["tokens"].shape[1])),
        "lengths": (np.int32, (4,)),
        "labels": (np.int32, (4,)),
        "weights": (np.float32, (4,)),
        "index": (np.int32, (4,)),
    }
    for tokens, length, label in zip(
        batch["tokens"], batch["lengths"], batch["labels"], strict=True
    ):
        assert tokens.tolist() == [label] * length + [PAD] * (len(tokens) - length)


def test_few_shapes_and_the_smallest_bucket_that_fits():
    batches = take(200)
    assert {batch["tokens"].shape[1] for batch in batches} == set(BUCKETS)
    for batch in batches:
        fitting = [bucket for bucket in BUCKETS if bucket >= batch["lengths"].max()]
        assert batch["tokens"].shape[1] == fitting[0]
    padded = np.mean([batch["tokens"].size for batch in batches]) / 4
    ideal = np.mean([min(b for b in BUCKETS if b >= n) for n in EXAMPLES.lengths])
    assert padded < 1.1 * ideal  # rows of a batch are of like length


def test_every_example_once_an_epoch():
    # 101 examples in batches of 4: chunks are 25 batches, and 3 of them 2 epochs and most of a 3rd.
    labels = np.concatenate([batch["labels"] for batch in take(75)])
    assert Counter(Counter(labels.tolist()).values()) == {2: 3, 3: 98}
    assert len(set(labels[:100].tolist())) == 100
    assert labels[:100].tolist() != labels[100:200].tolist()
    labels = np.concatenate([batch["labels"] for batch in take(50, make_examples(100))])
    assert set(labels[:100].tolist()) == set(labels[100:].tolist()) == set(range(100))


def test_batches_depend_on_the_seed_alone():
    assert same(take(60, seed=3), take(60, seed=3))
    assert not same(take(60, seed=3), take(60, seed=4))


@pytest.mark.parametrize("step", [1, 25, 37])
def test_resuming_is_going_on(step):
    assert same(take(60 - step, examples_seen=4 * step), take(60)[step:])


def test_the_index_numbers_the_rows_of_a_run():
    batches = take(2, examples_seen=2**31 - 4)
    assert np.concatenate([b["index"] for b in batches]).tolist() == [
        *range(2**31 - 4, 2**31),
        *range(4),
    ]


@pytest.mark.parametrize("num_parts", [2, 4])
def test_any_number_of_processes_gives_the_same_global_batches(num_parts):
    for make in (take, evaluate):
        parts = [make(30, batch_rows=BatchRows((i,), num_parts)) for i in range(num_parts)]
        joined = [
            {name: np.concatenate([part[name] for part in step]) for name in step[0]}
            for step in zip(*parts, strict=True)
        ]
        assert same(joined, make(30))


def test_fewer_examples_than_rows():
    (batch,) = take(1, make_examples(3), batch_size=8)
    assert sorted(Counter(batch["labels"].tolist()).values()) == [2, 3, 3]


def test_choices_are_padded_along_their_length():
    (batch,) = take(1, make_examples(9, choices=(2,)))
    assert batch["tokens"].shape[:2] == (4, 2)
    assert batch["lengths"].shape == (4, 2)


def test_augmentation_sees_example_and_epoch():
    calls = []

    def augment(row, example, epoch):
        calls.append((example, epoch))
        return row | {"labels": np.array(100 * epoch, np.int32)}

    batches = take(75, augment=augment)
    assert len(set(calls)) == 300
    assert Counter(epoch for _, epoch in calls) == {0: 101, 1: 101, 2: 98}
    assert {int(label) for batch in batches for label in batch["labels"]} == {0, 100, 200}
    assert same(take(35, augment=augment, examples_seen=4 * 40), batches[40:])


def evaluate(count: int = 100, examples: Examples = EXAMPLES, batch_size: int = 4, **settings):
    return list(islice(eval_batches(examples, batch_size, BUCKETS, **settings), count))


def test_evaluation_sees_every_example_once():
    batches = evaluate(batch_size=8)
    example = np.concatenate([batch["example"] for batch in batches])
    weights = np.concatenate([batch["weights"] for batch in batches])
    labels = np.concatenate([batch["labels"] for batch in batches])
    assert sorted(example[example >= 0].tolist()) == list(range(101))
    assert (weights == (example >= 0)).all()
    assert (labels[example >= 0] == example[example >= 0]).all()
    assert all(batch["tokens"].shape[0] == 8 for batch in batches)
    assert all((batch["lengths"] > 0).all() for batch in batches)  # copies can harm no softmax
    assert EXAMPLES.rows[0]["weights"] == 1


def test_evaluation_pads_little():
    lengths = [batch["lengths"].max() for batch in evaluate()]
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("num_buckets", [1, 2, 3, 4, 10])
@pytest.mark.parametrize("seed", range(3))
def test_buckets_pad_least(num_buckets, seed):
    lengths = np.random.default_rng(seed).geometric(0.04, 200)
    sizes = np.unique(-(-lengths // 8) * 8)

    def cost(buckets):
        return np.asarray(buckets)[np.searchsorted(buckets, lengths)].sum()

    buckets = make_buckets(lengths, num_buckets)
    others = min(num_buckets, len(sizes)) - 1
    if len(sizes) <= 12:
        every = [(*chosen, sizes[-1]) for chosen in combinations(sizes[:-1].tolist(), others)]
        assert cost(buckets) == min(map(cost, every))
    assert len(buckets) <= num_buckets
    assert buckets[-1] == sizes[-1]
    assert all(bucket % 8 == 0 for bucket in buckets)


def test_buckets_do_not_exceed_the_maximal_length():
    assert make_buckets(np.array([3, 50]), 2, max_length=50) == (8, 50)
    assert make_buckets(np.array([5, 5]), 4) == (8,)


def test_bad_batches():
    with pytest.raises(InputError, match="batch_size=4 is not divisible by the 3 blocks"):
        train_batches(EXAMPLES, 4, BUCKETS, seed=0, batch_rows=BatchRows((0,), 3))
    with pytest.raises(InputError, match="examples_seen=6 is not a multiple of batch_size=4"):
        train_batches(EXAMPLES, 4, BUCKETS, seed=0, examples_seen=6)
    with pytest.raises(InputError, match=r"an example of 39 tokens does not fit .* 16"):
        eval_batches(EXAMPLES, 4, (8, 16))
    with pytest.raises(InputError, match="no examples"):
        eval_batches(make_examples(0), 4, BUCKETS)


@pytest.mark.parametrize("longest", [5, 8, 100, 512, 8192])
def test_buckets_of_many_are_close_to_any_length(longest):
    buckets = np.array(buckets_of_many(longest))
    assert buckets[-1] == longest
    assert (np.diff(buckets) > 0).all()
    lengths = np.arange(17, longest + 1)
    assert all(buckets[np.searchsorted(buckets, lengths)] <= 1.25 * lengths)
    assert len(buckets) <= 40
