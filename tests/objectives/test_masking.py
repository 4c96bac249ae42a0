from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxlm.errors import InputError
from jaxlm.objectives.masking import MaskingConfig, Vocabulary, corrupt

PAD, START, END, MASK, FIRST, SIZE = 0, 1, 2, 3, 4, 60  # ordinary ids: 4 to 59; even: word starts
VOCABULARY = Vocabulary(
    mask_id=MASK,
    start_id=START,
    end_id=END,
    ordinary=jnp.arange(FIRST, SIZE),
    is_ordinary=jnp.arange(SIZE) >= FIRST,
    word_starts=jnp.arange(SIZE) % 2 == 0,
)
ROWS, LENGTH = 256, 64


def make_rows(seed=0):
    """Two documents a row, of any length, with the mask token itself here and there."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(FIRST, SIZE, (ROWS, LENGTH))
    tokens[:, 0] = START
    tokens[np.arange(ROWS), rng.integers(1, LENGTH, ROWS)] = END
    tokens[np.arange(ROWS), rng.integers(1, LENGTH, ROWS)] = START
    tokens[rng.random(tokens.shape) < 0.02] = MASK
    lengths = rng.integers(0, LENGTH + 1, ROWS)
    lengths[:6] = [0, 1, 2, LENGTH, LENGTH, 3]
    return tokens, lengths  # behind the lengths stand ordinary tokens, not padding


TOKENS, LENGTHS = make_rows()
INDEX = np.arange(ROWS) + 1000
ALLOWED = (TOKENS >= FIRST) & (np.arange(LENGTH)[None] < LENGTHS[:, None])


@partial(jax.jit, static_argnums=0)
def corrupt_jit(config, key, tokens, lengths, index, progress):
    return corrupt(key, tokens, lengths, index, VOCABULARY, config, progress=progress)


def run(config, *, seed=0, tokens=TOKENS, lengths=LENGTHS, index=INDEX, progress=0.0):
    arrays = (jnp.asarray(x, jnp.int32) for x in (tokens, lengths, index))
    out = corrupt_jit(config, jax.random.key(seed), *arrays, jnp.float32(progress))
    return jax.tree.map(np.asarray, out)


# Few configs, because each is a compilation.
TOKEN, WORD, SPAN = (MaskingConfig(rate=0.3, unit=unit) for unit in ("token", "word", "span"))


def chosen_of(out, shape=TOKENS.shape):
    """As a table, [rows, length]."""
    chosen = np.zeros(shape, bool)
    np.put_along_axis(chosen, out.predicted, out.weights > 0, axis=1)
    return chosen


def target(rate, allowed=ALLOWED):
    count = allowed.sum(1).astype(np.float32)
    return np.minimum(np.maximum(np.round(np.float32(rate) * count), 1), count)


@pytest.mark.parametrize("config", [TOKEN, MaskingConfig(rate=0.15)])
def test_exact_counts(config):
    out = run(config)
    np.testing.assert_array_equal(out.weights.sum(1), target(config.rate))
    assert out.overflow == 0
    assert (out.weights.sum(1)[ALLOWED.sum(1) > 0] >= 1).all()
    assert {0, 1} < set(ALLOWED.sum(1))  # rows without and with a single ordinary token


@pytest.mark.parametrize("config", [TOKEN, WORD, SPAN])
def test_only_ordinary_tokens_inside_the_row(config):
    out = run(config)
    chosen = chosen_of(out)
    assert chosen.sum() == out.weights.sum()  # no position is predicted twice
    assert not (chosen & ~ALLOWED).any()
    assert 0.28 < chosen[ALLOWED].mean() < 0.4  # what is left of a last span comes on top
    np.testing.assert_array_equal(out.tokens[~chosen], TOKENS[~chosen])
    np.testing.assert_array_equal(out.labels, np.take_along_axis(TOKENS, out.predicted, axis=1))
    assert set(np.unique(out.weights)) == {0, 1}


@pytest.mark.parametrize("config", [TOKEN, WORD, SPAN])
def test_every_place_is_equally_likely(config):
    full = [LENGTH] * ROWS
    tokens = np.random.default_rng(3).integers(FIRST, SIZE, TOKENS.shape)
    chosen = sum(
        chosen_of(run(config, seed=seed, tokens=tokens, lengths=full)) for seed in range(8)
    )
    shares = chosen.mean(0) / 8
    standard_error = (0.3 * 0.7 / 8 / ROWS) ** 0.5
    assert np.abs(shares - shares.mean()).max() < 4.5 * standard_error


def test_what_is_shown():
    shown, labels = [], []
    for seed in range(8):
        out = run(TOKEN, seed=seed)
        places = out.weights > 0
        shown.append(np.take_along_axis(out.tokens, out.predicted, axis=1)[places])
        labels.append(out.labels[places])
    shown, labels = np.concatenate(shown), np.concatenate(labels)
    num_ordinary = SIZE - FIRST
    unchanged = 0.1 + 0.1 / num_ordinary  # a random token is sometimes the right one

    def within(found, expected):
        assert abs(found - expected) < 4 * (expected * (1 - expected) / shown.size) ** 0.5

    within((shown == MASK).mean(), 0.8)
    within((shown == labels).mean(), unchanged)
    within(((shown != MASK) & (shown != labels)).mean(), 0.2 - unchanged)
    drawn = shown[(shown != MASK) & (shown != labels)]
    assert drawn.min() >= FIRST
    counts = np.bincount(drawn, minlength=SIZE)[FIRST:]
    expected = drawn.size / num_ordinary
    chi_squared = ((counts - expected) ** 2 / expected).sum()  # mean 55, deviation 10.5
    assert chi_squared < 55 + 4 * 10.5


def words(row):
    """Which word each position belongs to: special tokens end words, and belong to none."""
    begins = (row % 2 == 0) | (row < FIRST) | (np.concatenate([[START], row[:-1]]) < FIRST)
    return np.cumsum(begins)


def test_whole_words():
    out = run(WORD)
    assert out.overflow == 0
    chosen, longest = chosen_of(out), 0
    for row, picked, allowed in zip(TOKENS, chosen, ALLOWED, strict=True):
        word = words(row)
        for number in np.unique(word[allowed]):
            inside = picked[(word == number) & allowed]
            assert inside.all() or not inside.any(), (row, picked)
            longest = max(longest, inside.size)
    assert longest > 3
    excess = out.weights.sum(1) - target(WORD.rate)
    assert excess.min() >= 0
    assert 0 < excess.max() < longest
    # A special token ends a word: what follows it is another, even where no word starts.
    before, special, after = TOKENS[:, :-2], TOKENS[:, 1:-1], TOKENS[:, 2:]
    around = (
        (before >= FIRST) & np.isin(special, (START, MASK)) & (after >= FIRST) & (after % 2 == 1)
    )
    assert (chosen[:, :-2] != chosen[:, 2:])[around & ALLOWED[:, 2:]].any()
    # The control: tokens chosen one by one do cut words.
    picked, word = chosen_of(run(TOKEN))[3], words(TOKENS[3])
    assert any(0 < picked[word == number].mean() < 1 for number in np.unique(word))


def test_the_budget_and_what_overflows():
    roomy = run(WORD)
    tight = run(replace(WORD, budget=12, mask_share=0.0, random_share=1.0))
    assert tight.predicted.shape == (ROWS, 12)
    wanted = roomy.weights.sum(1)
    np.testing.assert_array_equal(tight.weights.sum(1), np.minimum(wanted, 12))
    assert tight.overflow == np.maximum(wanted - 12, 0).sum() > 0
    cut = chosen_of(tight)
    assert not (cut & ~chosen_of(roomy)).any()
    np.testing.assert_array_equal(tight.tokens[~cut], TOKENS[~cut])  # what is over is left alone
    assert (tight.tokens[cut] >= FIRST).all()  # and random_share=1 means none is masked
    assert (tight.tokens[cut] != TOKENS[cut]).mean() == pytest.approx(0.98, abs=0.02)


@pytest.mark.parametrize("mean_span", [2.0, 3.8])
def test_mean_length_of_spans(mean_span):
    tokens = np.random.default_rng(0).integers(FIRST, SIZE, (ROWS, 512))
    config = MaskingConfig(rate=0.06, unit="span", mean_span=mean_span, budget=128)
    out = run(config, tokens=tokens, lengths=[512] * ROWS)
    chosen = chosen_of(out, tokens.shape)
    assert out.overflow == 0
    starts = chosen & ~np.pad(chosen, ((0, 0), (1, 0)))[:, :-1]
    # Spans that happen to touch look like one: a share of them as large as that of the tokens.
    found = chosen.sum() / starts.sum() * (1 - chosen.mean())
    assert found == pytest.approx(mean_span, rel=0.05)


def test_the_budget_is_seldom_too_small():
    tokens = np.random.default_rng(1).integers(FIRST, SIZE, TOKENS.shape)
    for config in (WORD, SPAN):
        out = run(config, tokens=tokens, lengths=[LENGTH] * ROWS)
        assert out.overflow / out.weights.sum() < 0.005


@pytest.mark.parametrize("config", [TOKEN, WORD, SPAN])
def test_a_row_depends_on_key_and_index_alone(config):
    whole = run(config)
    order = np.random.default_rng(0).permutation(ROWS)
    shuffled = run(config, tokens=TOKENS[order], lengths=LENGTHS[order], index=INDEX[order])
    for a, b in zip(whole[:4], shuffled[:4], strict=True):
        np.testing.assert_array_equal(a[order], b)
    among_others, lengths, index = TOKENS[::-1].copy(), 1 + LENGTHS // 2, INDEX + 7
    for x, own in ((among_others, TOKENS), (lengths, LENGTHS), (index, INDEX)):
        x[5] = own[5]
    other = run(config, tokens=among_others, lengths=lengths, index=index)
    for a, b in zip(whole[:4], other[:4], strict=True):
        np.testing.assert_array_equal(a[5], b[5])
    # Controls: another key or another index is another choice, for the same row.
    assert not np.array_equal(run(config, seed=1).tokens, whole.tokens)
    same = run(config, tokens=TOKENS[[3] * ROWS], lengths=LENGTHS[[3] * ROWS])
    assert not np.array_equal(same.tokens[0], same.tokens[1])


def test_rows_do_not_depend_on_the_sharding():
    whole = run(SPAN)
    mesh = jax.make_mesh((4, 2), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    both = NamedSharding(mesh, PartitionSpec("data", "sequence"))
    arguments = [
        jax.device_put(jnp.asarray(x, jnp.int32), place)
        for x, place in ((TOKENS, both), (LENGTHS, rows), (INDEX, rows))
    ]
    sharded = corrupt_jit(SPAN, jax.random.key(0), *arguments, jnp.float32(0))
    for a, b in zip(whole, sharded, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_rate_moves_from_rate_to_final_rate():
    config = MaskingConfig(rate=0.25, final_rate=0.75, mask_share=1.0, random_share=0.0)
    for progress, rate in ((0.0, 0.25), (0.25, 0.375), (1.0, 0.75)):
        out = run(config, progress=progress)
        np.testing.assert_array_equal(out.weights.sum(1), target(rate))
        assert out.overflow == 0
        chosen = chosen_of(out)
        np.testing.assert_array_equal(out.tokens, np.where(chosen, MASK, TOKENS))
    np.testing.assert_array_equal(run(TOKEN, progress=1.0).tokens, run(TOKEN).tokens)


@pytest.mark.parametrize("length", [1, 7, 64, 100, 512])
@pytest.mark.parametrize("rates", [(0.15, None), (0.3, 0.15), (0.15, 0.3), (0.999, None)])
def test_room_for_all_tokens(length, rates):
    config = MaskingConfig(rate=rates[0], final_rate=rates[1])
    highest = max(rate for rate in rates if rate is not None)
    room = config.num_predicted(length)
    counts = np.arange(1, length + 1)
    assert np.maximum(np.round(np.float32(highest) * counts), 1).max() <= room <= length
    assert room <= highest * length + 1  # and no more than that


def test_budgets_by_hand():
    assert MaskingConfig(budget=20).num_predicted(128) == 20
    assert MaskingConfig(budget=20).num_predicted(16) == 16
    assert MaskingConfig(rate=0.15).num_predicted(128) == 20
    assert MaskingConfig(rate=0.15, unit="word").num_predicted(128) == 28
    assert MaskingConfig(rate=0.15, unit="span").num_predicted(128) == 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rate": 0.0}, r"rate=0.0 is not inside \(0, 1\)"),
        ({"rate": 1.0}, r"rate=1.0 is not inside \(0, 1\)"),
        ({"rate": 15.0}, r"rate=15.0 is not inside \(0, 1\)"),
        ({"rate": float("nan")}, r"rate=nan is not inside \(0, 1\)"),
        ({"final_rate": -0.1}, r"final_rate=-0.1 is not inside \(0, 1\)"),
        (
            {"mask_share": 0.8, "random_share": 0.3},
            "mask_share=0.8 and random_share=0.3 are shares",
        ),
        ({"mask_share": 0.9, "random_share": -0.1}, "random_share=-0.1"),
        ({"mask_share": -0.1}, "mask_share=-0.1"),
        ({"mean_span": 0.5}, "mean_span=0.5 is shorter than one token"),
        ({"budget": 0}, "budget=0 has no room"),
    ],
)
def test_bad_configs(change, message):
    with pytest.raises(InputError, match=message):
        MaskingConfig(**change)
