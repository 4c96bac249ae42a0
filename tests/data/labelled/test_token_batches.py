"""Batches of about as many tokens each, of pairs and of single texts."""

from collections import Counter
from dataclasses import replace
from itertools import combinations, islice, product

import numpy as np
import pytest

from jaxlm.data.labelled.batching import Batching, Even, make_batching
from jaxlm.data.labelled.dataset import LabelledConfig
from jaxlm.data.labelled.examples import Examples
from jaxlm.data.labelled.records import JsonLines
from jaxlm.data.labelled.token_batches import (
    Plan,
    check_tokens,
    make_pair_buckets,
    make_plan,
)
from jaxlm.errors import InputError
from jaxlm.runtime.batch_rows import BatchRows

PAD = 9


def make_examples(count: int = 150, *, sides: int = 2, seed: int = 0) -> Examples:
    """Example i has lengths of its own, the sides alike, and i everywhere."""
    rng = np.random.default_rng(seed)
    source = rng.geometric(0.08, count) + 2
    target = np.maximum(source + rng.integers(-3, 4, count), 2)
    rows = []
    for i, sizes in enumerate(zip(source.tolist(), target.tolist(), strict=True)):
        row = {name: np.full(n, i, np.int32) for name, n in zip(NAMES[:sides], sizes, strict=False)}
        row |= {"lengths": np.array(sizes[0], np.int32), "weights": np.ones((), np.float32)}
        rows.append(row)
    return Examples(
        rows=rows,
        along_length=frozenset({"tokens"}),
        along_target=frozenset({"targets"} if sides == 2 else ()),
        pad=PAD,
        untruncated=source.astype(np.int32),
    )


NAMES = ("tokens", "targets")
PAIRS, TEXTS = make_examples(), make_examples(sides=1)
SIZES = {"num_buckets": 3, "batch_size": 2, "batch_tokens": 160}
PLAN = make_plan(PAIRS, **SIZES)
EPOCH = PLAN.steps(1.0)
each_kind = pytest.mark.parametrize("plan", [PLAN, make_plan(TEXTS, **SIZES)], ids=["2", "1"])


def take(plan: Plan, count: int, examples_seen: int = 0, **settings):
    return list(islice(plan.train_batches(examples_seen, **settings), count))


def same(one, two) -> bool:
    return len(one) == len(two) and all(
        a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
        for a, b in zip(one, two, strict=True)
    )


def seen(batches) -> Counter:
    """How often each example comes."""
    return Counter(int(i) for batch in batches for i in batch["tokens"][:, 0])


@each_kind
def test_a_batch_has_as_many_rows_as_its_tokens_allow(plan):
    batches = take(plan, EPOCH)
    shapes = {
        (len(b["tokens"]), *(b[name].shape[1] for name in NAMES if name in b)) for b in batches
    }
    assert shapes == {(r, *bucket) for r, bucket in zip(plan.rows, plan.buckets, strict=True)}
    assert len(shapes) == 3
    for rows, *sides in shapes:
        assert rows * max(sides) <= 160 < (rows + 2) * max(sides)
        assert rows % 2 == 0
    for batch in batches:
        for row, length in zip(batch["tokens"], batch["lengths"], strict=True):
            assert row.tolist() == [row[0]] * length + [PAD] * (len(row) - length)
        for row in batch.get("targets", ()):  # padded by 0, which lengths tell from a token
            assert {*row[row != row[0]].tolist()} <= {0}


@each_kind
def test_every_example_once_an_epoch(plan):
    """Up to those by which its last batches reach into the next."""
    for epochs in (1.0, 2.0):
        times = seen(take(plan, plan.steps(epochs)))
        assert set(times) == set(range(150))
        assert {min(times.values()), max(times.values())} <= {epochs, epochs + 1}
        assert sum(times.values()) - epochs * 150 < sum(plan.rows)
    first, second = take(plan, EPOCH), take(plan, plan.steps(2.0))[EPOCH:]
    assert not same(first, second[: len(first)])


def test_batches_depend_on_the_seed_alone():
    again = make_plan(make_examples(), **SIZES)
    assert same(take(PLAN, 30), take(again, 30))
    assert not same(take(PLAN, 30), take(make_plan(PAIRS, **SIZES, seed=1), 30))


@each_kind
def test_resuming_is_going_on(plan):
    """After any step of three epochs, by the number of examples seen alone."""
    steps = plan.steps(3.0)
    batches = take(plan, steps)
    total = 0
    for step, batch in enumerate(batches):
        assert plan.after(0, step) == total
        assert plan.step_of(total) == step
        assert batch["index"].tolist() == list(range(total, total + len(batch["tokens"])))
        if step in (1, EPOCH - 1, EPOCH, EPOCH + 5):
            assert same(take(plan, 6, total), batches[step : step + 6])
            assert plan.after(total, 4) == plan.after(0, step + 4)
        total += len(batch["tokens"])
    inside = next(n for n in range(1, 99) if n not in {plan.after(0, i) for i in range(steps)})
    with pytest.raises(InputError, match=f"no batch begins after {inside} examples: resume with"):
        plan.step_of(inside)


@each_kind
def test_where_the_next_batch_begins(plan):
    """As many examples may be the middle of a batch of other data, in the order of another seed."""
    begins = [plan.after(0, step) for step in range(plan.steps(3.0))]
    for seen in range(begins[-1]):
        assert plan.next_begin(seen) == next(begin for begin in begins if begin >= seen)
    even = Even(TEXTS, 4, (64,), 0)
    assert [even.next_begin(seen) for seen in range(6)] == [0, 4, 4, 4, 4, 8]


def test_half_an_epoch_is_half_of_its_batches():
    assert PLAN.steps(0.5) == -(-EPOCH // 2)
    assert EPOCH - 3 <= PLAN.steps(2.0) - EPOCH <= EPOCH  # one less where a batch is shared


@pytest.mark.parametrize("num_parts", [2, 4])
def test_any_number_of_processes_gives_the_same_global_batches(num_parts):
    plan = make_plan(PAIRS, num_buckets=3, batch_size=4, batch_tokens=128)
    every = lambda **own: [*take(plan, 20, **own), *plan.eval_batches(**own)]
    parts = [every(batch_rows=BatchRows((i,), num_parts)) for i in range(num_parts)]
    joined = [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]
    assert same(joined, every())


@each_kind
def test_evaluation_sees_every_example_once(plan):
    batches = list(plan.eval_batches())
    example = np.concatenate([batch["example"] for batch in batches])
    weights = np.concatenate([batch["weights"] for batch in batches])
    first = np.concatenate([batch["tokens"][:, 0] for batch in batches])
    assert sorted(example[example >= 0].tolist()) == list(range(150))
    assert (weights == (example >= 0)).all()
    assert (first[example >= 0] == example[example >= 0]).all()
    assert plan.examples.rows[0]["weights"] == 1


def test_augmentation_sees_example_and_epoch():
    calls = []

    def augment(row, example, epoch):
        calls.append((example, epoch))
        return row | {"weights": np.array(epoch, np.float32)}

    batches = take(PLAN, PLAN.steps(2.0), augment=augment)
    assert len(set(calls)) == len(calls)
    assert {epoch for _, epoch in calls} == {0, 1, 2}
    assert same(take(PLAN, 5, PLAN.after(0, 20), augment=augment), batches[20:25])


def price(buckets, sizes) -> int:
    """What padded examples cost, those of the target twice."""
    return sum(min(s + 2 * t for s, t in buckets if s >= a and t >= b) for a, b in sizes.tolist())


@pytest.mark.parametrize("seed", range(3))
def test_buckets_of_pairs_pad_about_as_little_as_can_be(seed):
    sizes = make_examples(120, seed=seed).sizes.astype(int)
    sizes = np.minimum(sizes, 24)
    found = make_pair_buckets(sizes, 3)
    sides = [np.unique(-(-side // 4) * 4).tolist() for side in sizes.T]
    largest, others = (sides[0][-1], sides[1][-1]), list(product(*sides))
    least = min(price((*two, largest), sizes) for two in combinations(others, 2))
    assert found[-1] == largest
    assert price(found, sizes) <= 1.03 * least
    assert price(found, sizes) < 0.8 * price([largest], sizes)
    assert make_pair_buckets(sizes, 1) == (largest,)


def test_the_share_of_padding_is_counted_and_said():
    empty = total = 0
    for batch in PLAN.eval_batches():
        real = batch["example"] >= 0
        numbers = batch["example"][real]
        total += real.sum() * sum(batch[name].shape[1] for name in NAMES)
        empty += PAIRS.sizes[numbers].sum()
    assert PLAN.padding == pytest.approx(1 - empty / total)
    assert 0.05 < PLAN.padding < 0.45  # one bucket alone has more
    assert make_plan(PAIRS, **SIZES | {"num_buckets": 1}).padding > 0.6
    (said,) = PLAN.describe()
    rows, bucket = PLAN.rows[0], PLAN.buckets[0]
    assert f"batches of {rows} x {bucket[0]}+{bucket[1]}, " in said
    assert f"{PLAN.padding:.1%} of which are padding; an epoch has {EPOCH}" in said


def test_buckets_are_no_longer_than_rows_may_be():
    sizes = np.array([[3, 5], [50, 50]])
    assert make_pair_buckets(sizes, 2, max_length=50) == ((4, 8), (50, 50))
    assert make_pair_buckets(sizes[:1], 4) == ((4, 8),)


def test_which_batches_a_data_set_is_read_in():
    config = LabelledConfig(train=JsonLines(path="x"), batch_size=2)
    by_tokens = replace(config, batch_tokens=128)
    assert isinstance(make_batching(TEXTS, config, 64), Even)
    plain, pairs, texts = (
        make_batching(examples, own, 64)
        for examples, own in ((PAIRS, config), (PAIRS, by_tokens), (TEXTS, by_tokens))
    )
    for batching in (plain, pairs, texts):
        assert isinstance(batching, Plan)
        assert isinstance(batching, Batching)
    assert isinstance(plain, Plan)
    assert set(plain.rows) == {2}


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("tokens", [None, 512])
def test_the_longest_rows_that_a_model_gets(pack, tokens):
    config = LabelledConfig(train=JsonLines(path="x"), batch_size=8, batch_tokens=tokens, pack=pack)
    batching = make_batching(TEXTS, config, int(TEXTS.lengths.max()))
    lengths = {batch["tokens"].shape[1] for batch in batching.eval_batches()}
    assert batching.longest == max(lengths)


@pytest.mark.parametrize("pack", [False, True])
def test_what_is_answered_in_parts_has_few_shapes(pack):
    """Each of them is compiled once: questions that come one by one must not make more."""
    config = LabelledConfig(train=JsonLines(path="x"), batch_size=8, pack=pack)
    shapes = set()
    for seed in range(20):
        some = replace(TEXTS, rows=TEXTS.rows[seed : 2 * seed + 1])
        batching = make_batching(some, config, 256, in_parts=True, longest=256)
        shapes |= {batch["tokens"].shape for batch in batching.eval_batches()}
    assert len(shapes) <= 8


def test_parts_of_a_file_have_the_same_shapes_by_tokens():
    """Thousands of records at a time, of whatever lengths; none has more tokens than allowed."""
    config = LabelledConfig(train=JsonLines(path="x"), batch_size=4, batch_tokens=1024)
    shapes: list[set[tuple[int, ...]]] = []
    for seed in range(3):
        part = make_examples(2048, sides=1, seed=seed)
        short = [row for row in part.rows if len(row["tokens"]) <= 64]
        part = replace(part, rows=(short * 2)[:2048])
        batching = make_batching(part, config, 128, in_parts=True)
        shapes.append({batch["tokens"].shape for batch in batching.eval_batches()})
    assert {rows for found in shapes for rows, _ in found} == {8}
    assert len(set.union(*shapes)) <= max(map(len, shapes)) + 2


def test_batches_that_cannot_be_made():
    with pytest.raises(InputError, match="there are no examples to make batches of"):
        make_plan(make_examples(0), **SIZES)
    longest = PLAN.longest
    with pytest.raises(InputError, match="batch_tokens=200 has no room") as error:
        check_tokens(longest, 8, 200)
    room = 200 // longest
    assert str(error.value).endswith(
        f"8 examples of {longest} tokens: --data.batch-tokens {8 * longest} or --data.batch-size "
        f"{room}"
    )
    check_tokens(longest, room, 200)
    check_tokens(longest, 8, 8 * longest)
    check_tokens(longest, 8, None)
    with pytest.raises(InputError, match=rf"tokens: --data.batch-tokens {8 * longest}$"):
        check_tokens(longest, 8, longest - 1)
