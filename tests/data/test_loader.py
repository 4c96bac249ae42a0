import dataclasses
import importlib
import itertools
import subprocess
import sys
from itertools import islice
from pathlib import Path

import grain
import numpy as np
import pytest

from jaxlm.data.loader import DataConfig, eval_batches, train_batches
from jaxlm.data.prepare import TokenizerConfig, prepare
from jaxlm.data.prepared import Prepared, open_prepared
from jaxlm.data.rows import Rows
from jaxlm.errors import InputError
from jaxlm.runtime.batch_rows import BatchRows

CONFIG = DataConfig(paths=("words",), batch_size=8)


def take(count: int, *args, **kwargs) -> list[dict[str, np.ndarray]]:
    batches = train_batches(*args, **kwargs)
    taken = list(islice(batches, count))
    batches.close()
    return taken


def keys(batches: list[dict[str, np.ndarray]]) -> list[bytes]:
    return [row.tobytes() for batch in batches for row in batch["tokens"]]


def all_rows(dataset: Prepared, split: str = "train") -> list[bytes]:
    source = dataset.source(split)
    return [source[i]["tokens"].tobytes() for i in range(len(source))]


def same(one: list[dict[str, np.ndarray]], two: list[dict[str, np.ndarray]]) -> bool:
    return len(one) == len(two) and all(
        np.array_equal(a[name], b[name]) for a, b in zip(one, two, strict=True) for name in a
    )


def test_shapes_and_types(prepared):
    (batch,) = take(1, [prepared], CONFIG, seed=0)
    assert set(batch) == {"tokens", "lengths", "index"}
    assert (batch["tokens"].shape, batch["tokens"].dtype) == ((8, 16), np.uint16)
    for name in ("lengths", "index"):
        assert (batch[name].shape, batch[name].dtype) == ((8,), np.int32)


def test_the_index_numbers_the_rows_of_a_run(prepared):
    batches = take(2, [prepared], CONFIG, seed=0, examples_seen=2**31 - 8)
    assert np.concatenate([b["index"] for b in batches]).tolist() == [
        *range(2**31 - 8, 2**31),
        *range(8),
    ]
    last = list(eval_batches(prepared, 12, batch_rows=BatchRows((1,), 2)))[-1]
    assert last["index"].tolist() == list(range(102, 108))


@pytest.mark.parametrize("num_threads", [1, 3])
def test_batches_depend_on_the_seed_alone(prepared, num_threads):
    config = dataclasses.replace(CONFIG, num_threads=num_threads, prefetch=2)
    reference = take(5, [prepared], CONFIG, seed=3)
    assert same(take(5, [prepared], config, seed=3), reference)
    assert not same(take(5, [prepared], config, seed=4), reference)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("num_parts", [2, 4])
def test_any_number_of_processes_gives_the_same_global_batches(prepared, other, num_parts, mixed):
    datasets = [prepared, other] if mixed else [prepared]
    whole = take(6, datasets, CONFIG, seed=1)
    parts = [
        take(6, datasets, CONFIG, seed=1, batch_rows=BatchRows((i,), num_parts))
        for i in range(num_parts)
    ]
    joined = [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]
    assert same(joined, whole)


def test_the_text_before_each_row(prepared, other):
    """Of its own data set, however many processes read it; in other respects nothing changes."""
    datasets, places = [prepared, other], {}
    for dataset in datasets:
        rows = dataset.source("train")
        rows = rows.read(np.arange(len(rows)))["tokens"]
        places |= {row.tobytes(): (rows, number) for number, row in enumerate(rows)}
    config = dataclasses.replace(CONFIG, batch_size=64)
    steps = -(-len(places) // 64)
    whole = take(steps, datasets, config, seed=1)
    parts = [
        take(steps, datasets, config, seed=1, before=5, batch_rows=BatchRows((i,), 2))
        for i in range(2)
    ]
    joined = [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]
    assert same([{name: batch[name] for name in whole[0]} for batch in joined], whole)
    firsts = 0
    for batch in joined:
        found = zip(*(batch[name] for name in ("tokens", "before", "before_lengths")), strict=True)
        for tokens, before, length in found:
            rows, number = places[tokens.tobytes()]
            firsts += number == 0
            assert length == (5 if number else 0)
            assert not number or np.array_equal(before, rows[number - 1][-5:])
    assert firsts


def test_the_text_before_each_row_that_is_evaluated(prepared):
    tokens, before, lengths = (
        np.concatenate([batch[name] for batch in eval_batches(prepared, 12, before=16)])
        for name in ("tokens", "before", "before_lengths")
    )
    size = len(prepared.source("validation"))
    np.testing.assert_array_equal(before[1:size], tokens[: size - 1])
    assert (lengths[0], set(lengths[1:].tolist())) == (0, {16})
    with pytest.raises(InputError, match=r"task\.memory=17 is more than the 16 tokens of the row"):
        eval_batches(prepared, 12, before=17)
    with pytest.raises(InputError, match="lower it to 16, or prepare longer rows"):
        take(1, [prepared], CONFIG, seed=0, before=17)


RAMP = dataclasses.replace(CONFIG, ramp_sizes=(2, 4), ramp_steps=(3, 2))
SIZES = [2, 2, 2, 4, 4, 8, 8]


@pytest.mark.parametrize("num_parts", [1, 2])
def test_a_batch_that_grows_has_the_same_rows_wherever_it_resumes(prepared, num_parts):
    whole = take(len(SIZES), [prepared], RAMP, seed=1)
    assert [len(batch["tokens"]) for batch in whole] == SIZES
    assert keys(whole)[:24] == keys(take(3, [prepared], CONFIG, seed=1))
    for done in range(len(SIZES)):
        parts = [BatchRows((i,), num_parts) for i in range(num_parts)]
        seen = sum(SIZES[:done])
        rest = [
            take(len(SIZES) - done, [prepared], RAMP, seed=1, examples_seen=seen, batch_rows=part)
            for part in parts
        ]
        joined = [np.concatenate([b["tokens"] for b in step]) for step in zip(*rest, strict=True)]
        assert all(map(np.array_equal, joined, [batch["tokens"] for batch in whole[done:]]))


def test_steps_and_rows_of_a_batch_that_grows():
    ends = [0, *itertools.accumulate(SIZES)]
    for step, seen in enumerate(ends):
        assert RAMP.after(0, step)[0] == seen
        assert RAMP.steps_to(seen) == step
        for earlier in range(step):
            assert RAMP.after(ends[earlier], step - earlier) == RAMP.after(0, step)
    assert [RAMP.steps_to(rows) for rows in (1, 3, 7, 15, 23)] == [1, 2, 4, 6, 7]
    # Of a run that was resumed with another ramp: the stage is that of the rows seen.
    assert [RAMP.after(seen, 0)[1] for seen in (0, 5, 6, 13, 14, 100)] == [2, 2, 4, 4, 8, 8]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ramp_sizes": (2,)}, "1 batch sizes and data.ramp_steps 0 numbers of steps"),
        ({"ramp_sizes": (2, 0), "ramp_steps": (1, 1)}, r"ramp_sizes=\(2, 0\) are not all positive"),
        ({"ramp_sizes": (2,), "ramp_steps": (-1,)}, r"ramp_steps=\(-1,\) are not all positive"),
    ],
)
def test_bad_ramps(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, **changes)


class OneByOne:
    """The rows of a split, each read alone."""

    def __init__(self, dataset: Prepared):
        self._rows = dataset.source("train")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> bytes:
        return self._rows[int(index)]["tokens"].tobytes()


@pytest.mark.parametrize("weights", [None, (3.0, 1.0)])
@pytest.mark.parametrize("mixed", [False, True])
def test_the_order_is_that_of_grain_row_by_row(prepared, other, mixed, weights):
    """In which rows came before they were read in batches, also after resuming, and far on."""
    datasets = [prepared, other] if mixed else [prepared]
    config = dataclasses.replace(CONFIG, paths=tuple("ab"[: len(datasets)]))
    if mixed:
        config = dataclasses.replace(config, weights=weights)
    endless = []
    for i, dataset in enumerate(datasets):
        (own,) = np.random.SeedSequence([3, i]).generate_state(1)
        source = grain.MapDataset.source(OneByOne(dataset)).seed(int(own))
        endless.append(source.shuffle().repeat())
    sizes = [len(all_rows(dataset)) for dataset in datasets]
    whole = grain.MapDataset.mix(endless, weights or sizes) if mixed else endless[0]
    for start in (0, 3208, 2**40):
        batches = take(40, datasets, config, seed=3, examples_seen=start)
        assert keys(batches) == [whole[start + i] for i in range(40 * 8)]


def test_the_benchmark_compares_the_two(prepared, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    benchmark = importlib.import_module("benchmark_loader")
    options = {"batch_size": 4, "batches": 3, "rounds": 2}
    benchmark.main(prepared.directory, **options)
    first, *speeds, ratio = capsys.readouterr().out.splitlines()
    assert first.startswith("batches of 4 rows of 16 tokens, of ")
    assert [line.split("  ")[0] for line in speeds] == ["one by one", "in batches"]
    assert ratio.startswith("ratio ")
    monkeypatch.setattr(benchmark, "at_once", lambda *_: iter(np.zeros((9, 4, 16))))
    with pytest.raises(InputError, match="rows come in another order in batches"):
        benchmark.main(prepared.directory, **options)


def test_rows_at_once_are_rows_one_by_one(prepared, monkeypatch):
    for split in ("train", "validation"):
        source = prepared.source(split)
        indices = np.random.default_rng(0).permutation(len(source))
        alone = [source[i] for i in indices.tolist()]
        for part in (slice(None), slice(0, 1)):  # the last row, which is not full, among them
            found = source.read(indices[part])
            for name in ("tokens", "length"):
                expected = np.stack([row[name] for row in alone[part]])
                np.testing.assert_array_equal(found[name], expected)
                assert found[name].dtype == expected.dtype
    full = np.arange(20)
    source.read(full)
    with monkeypatch.context() as patch:
        patch.setattr(Rows, "__getitem__", None)  # full rows are not read one by one
        source.read(full[::-1])
        with pytest.raises(TypeError):
            prepared.source("train").read(full)  # but for the first, which tells their layout
    with pytest.raises(IndexError):
        source.read(np.array([0, len(source)]))


def test_resuming_is_going_on_even_with_another_batch_size(prepared, other):
    datasets = [prepared, other]
    whole = take(100, datasets, CONFIG, seed=5)  # beyond the first epoch
    assert same(take(20, datasets, CONFIG, seed=5, examples_seen=80 * 8), whole[80:])
    config = dataclasses.replace(CONFIG, batch_size=4)
    assert keys(take(6, datasets, config, seed=5, examples_seen=16)) == keys(whole)[16:40]


def test_every_epoch_has_every_row_once_in_another_order(prepared):
    rows = all_rows(prepared)
    config = dataclasses.replace(CONFIG, batch_size=1)
    seen = keys(take(2 * len(rows), [prepared], config, seed=0))
    first, second = seen[: len(rows)], seen[len(rows) :]
    assert sorted(first) == sorted(second) == sorted(rows)
    assert rows != first != second


@pytest.mark.parametrize(("weights", "share"), [((3.0, 1.0), 0.75), ((0.2, 0.2), 0.5)])
def test_mixtures_have_their_proportions(prepared, other, weights, share):
    config = DataConfig(paths=("a", "b"), weights=weights, batch_size=8)
    members = set(all_rows(prepared))
    drawn = [row in members for row in keys(take(50, [prepared, other], config, seed=0))]
    assert np.mean(drawn) == pytest.approx(share, abs=0.01)
    assert np.mean(drawn[:40]) == pytest.approx(share, abs=0.05)  # evenly, not one by one


def test_without_weights_every_row_is_as_frequent(prepared, other):
    sizes = [len(all_rows(dataset)) for dataset in (prepared, other)]
    members = set(all_rows(prepared))
    drawn = [row in members for row in keys(take(50, [prepared, other], CONFIG, seed=0))]
    assert np.mean(drawn) == pytest.approx(sizes[0] / sum(sizes), abs=0.02)


@pytest.mark.parametrize("num_parts", [1, 2, 4])
@pytest.mark.parametrize("max_rows", [None, 5])
def test_evaluation_sees_every_row_once(prepared, num_parts, max_rows):
    parts = [
        list(eval_batches(prepared, 12, batch_rows=BatchRows((i,), num_parts), max_rows=max_rows))
        for i in range(num_parts)
    ]
    batches = [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]
    assert all(batch["tokens"].shape == (12, 16) for batch in batches)
    lengths = np.concatenate([batch["lengths"] for batch in batches])
    rows = all_rows(prepared, "validation")[:max_rows]
    assert len(rows) % 12 != 0  # so that there is something to fill up
    assert keys(batches)[: len(rows)] == rows
    assert (lengths[: len(rows)] > 0).all()
    assert (lengths[len(rows) :] == 0).all()
    pad = prepared.info.special.pad
    assert (np.concatenate([b["tokens"] for b in batches])[len(rows) :] == pad).all()


def test_data_sets_must_be_alike(prepared, config, tmp_path):
    prepare(dataclasses.replace(config, row_length=32), tmp_path / "long")
    with pytest.raises(InputError, match=r"row_length 16 and .* 32: prepare"):
        train_batches([prepared, open_prepared(tmp_path / "long")], CONFIG, seed=0)
    tokenizer = TokenizerConfig(vocab_size=200)
    prepare(dataclasses.replace(config, tokenizer=tokenizer), tmp_path / "small")
    with pytest.raises(InputError, match="tokenizer_sha256"):
        train_batches([prepared, open_prepared(tmp_path / "small")], CONFIG, seed=0)


def test_indivisible_batch(prepared):
    with pytest.raises(InputError, match="batch_size=8 is not divisible by the 3 blocks"):
        train_batches([prepared], CONFIG, seed=0, batch_rows=BatchRows((0,), 3))
    with pytest.raises(InputError, match="batch_size=8 is not divisible by the 3 blocks"):
        eval_batches(prepared, 8, batch_rows=BatchRows((0,), 3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"paths": ()}, "paths is empty"),
        ({"paths": ("a",), "weights": (1.0, 2.0)}, "2 weights for 1 paths"),
        ({"paths": ("a", "b"), "weights": (1.0, 0.0)}, "not all positive"),
        ({"paths": ("a",), "batch_size": 0}, "batch_size=0.* must be positive"),
    ],
)
def test_bad_configuration(settings, message):
    with pytest.raises(InputError, match=message):
        DataConfig(**settings)


def test_iterators_left_open_are_silent_at_exit(prepared):
    script = f"""
from jaxlm.data.loader import DataConfig, train_batches
from jaxlm.data.prepared import open_prepared
dataset = open_prepared({str(prepared.directory)!r})
begun, untouched = (
    train_batches([dataset], DataConfig(paths=("x",), batch_size=2), seed=0) for _ in range(2)
)
next(begun)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
