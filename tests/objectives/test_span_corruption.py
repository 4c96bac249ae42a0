"""Span corruption: masks as published, both sides by hand, and leaks of a real model."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxlm.errors import InputError
from jaxlm.models.heads import EncoderDecoderLm
from jaxlm.models.t5 import T5Config
from jaxlm.models.transformer import TransformerConfig
from jaxlm.objectives import packing
from jaxlm.objectives.masking import SpanTokens, Vocabulary
from jaxlm.objectives.span_corruption import SpanConfig, corrupt, draw, make_loss, shifted

PAD, START, END, FIRST, SIZE, LENGTH = 0, 1, 2, 3, 40, 24
SPANS = SpanTokens(PAD, END, tuple(range(SIZE - 1, SIZE - 9, -1)))
VOCABULARY = Vocabulary(
    mask_id=None,
    start_id=START,
    end_id=END,
    ordinary=jnp.arange(FIRST, SIZE - 8),
    is_ordinary=(jnp.arange(SIZE) >= FIRST) & (jnp.arange(SIZE) < SIZE - 8),
    word_starts=None,
    spans=SPANS,
)
CONFIG = SpanConfig(noise_density=0.3, mean_span=2.0)
KEY = jax.random.key(0)


def published_counts(length, density, mean):
    """Of hidden tokens and spans: Raffel et al.'s random_spans_noise_mask."""
    noise = min(max(int(np.round(length * density)), 1), length - 1)
    return noise, max(int(np.round(noise / mean)), 1)


def published_mask(rng, length, density, mean):
    """The rest of it, with numpy's shuffle."""
    noise, spans = published_counts(length, density, mean)

    def segmentation(items, segments):
        first = np.arange(items - 1) < segments - 1
        rng.shuffle(first)
        return np.bincount(np.cumsum(np.pad(first, (1, 0))))

    pieces = segmentation(length - noise, spans), segmentation(noise, spans)
    starts = np.cumsum(np.stack(pieces, axis=1).ravel())[:-1]
    return np.cumsum(np.isin(np.arange(length), starts)) % 2 == 1


@partial(jax.jit, static_argnums=2)
def sides(batch, key, config=CONFIG):
    given = batch["tokens"], batch["lengths"], batch["index"]
    ids = packing.documents(*given[:2], VOCABULARY).segment_ids
    found = corrupt(key, *given, ids, SPANS, config)
    return found, shifted(found, SPANS.start_id)


def make_batch(lengths=(LENGTH, 11, 2, 1, 0), start=0):
    rng = np.random.default_rng(1)
    tokens = rng.integers(FIRST, SIZE - 8, (len(lengths), LENGTH))
    tokens[:, 0], tokens[:, 9], tokens[:, 10] = START, END, START
    index = np.arange(len(lengths)) + start
    batch = {"tokens": tokens, "lengths": np.array(lengths), "index": index}
    return {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()}


@pytest.mark.parametrize(("density", "mean"), [(0.15, 3.0), (0.5, 1.5), (0.15, 1.0)])
def test_as_much_is_hidden_as_published(density, mean):
    config = SpanConfig(noise_density=density, mean_span=mean)
    for length in range(2, 600):
        noise, spans = config.counts(length)
        assert (noise, spans) == published_counts(length, density, mean)
        assert config.inputs_length(length) == length - noise + spans + 1
        assert config.targets_length(length) == noise + spans + 2
    # Of 568 tokens, inputs of 512 and targets of 114, with a last sentinel 115.
    usual = SpanConfig()
    assert (usual.inputs_length(568), usual.targets_length(568)) == (512, 115)


def test_masks_are_distributed_as_published():
    rows, length = 4000, 40
    config = SpanConfig(noise_density=0.25, mean_span=2.5)
    drawn = jax.jit(partial(draw, length=length, config=config))
    masks = np.asarray(drawn(KEY, jnp.full(rows, length), jnp.arange(rows)))
    rng = np.random.default_rng(0)
    theirs = np.stack([published_mask(rng, length, 0.25, 2.5) for _ in range(rows)])
    noise, spans = config.counts(length)
    assert (noise, spans) == (10, 4)
    begins = lambda x: (x & ~np.roll(x, 1, axis=1)).sum(1)
    for mask in (masks, theirs):
        assert (mask.sum(1) == noise).all()
        assert (begins(mask) == spans).all()
        assert not mask[:, 0].any()
        assert mask[:, -1].all()
    # How often each place is hidden, and each length of the first span is seen.
    error = 4 * 0.5 / rows**0.5 * 2**0.5
    np.testing.assert_allclose(masks.mean(0), theirs.mean(0), atol=error)
    first = lambda x: np.cumprod(
        x[np.arange(rows)[:, None], x.argmax(1)[:, None] + np.arange(8)], 1
    )
    np.testing.assert_allclose(first(masks).mean(0), first(theirs).mean(0), atol=error)
    # Rows differ, and so do keys.
    assert len(np.unique(masks, axis=0)) > rows * 0.9
    other = drawn(jax.random.key(1), jnp.full(rows, length), jnp.arange(rows))
    assert (np.asarray(other) != masks).any(1).mean() > 0.9


def restored(tokens, ids, targets, target_ids):
    """The row of which these are the sides."""
    source, target = tokens[ids >= 0], targets[target_ids >= 0]
    assert source[-1] == END
    assert target[-1] == END
    places = np.flatnonzero(np.isin(target, SPANS.sentinels))
    assert target[places].tolist() == list(SPANS.sentinels[: len(places)])
    assert places[-1] == len(target) - 2  # a last one, behind which there is nothing
    spans = dict(zip(target[places], np.split(target, places)[1:], strict=True))
    shown = [i for i in source[:-1] if i in SPANS.sentinels]
    assert shown == list(SPANS.sentinels[: len(places) - 1])
    return [j for i in source[:-1] for j in (spans[i][1:] if i in spans else [i])]


def test_both_sides_give_the_row():
    batch = make_batch()
    found, decoder_tokens = jax.tree.map(np.asarray, sides(batch, KEY))
    assert found.tokens.shape == (5, CONFIG.inputs_length(LENGTH))
    assert found.targets.shape == (5, CONFIG.targets_length(LENGTH))
    assert (found.segment_ids[0] >= 0).all()  # nothing is padding in a full row
    assert (found.target_segment_ids[0] >= 0).all()
    for i in range(3):
        size = int(batch["lengths"][i])
        assert restored(*(side[i] for side in found)) == batch["tokens"][i, :size].tolist()
        assert (found.segment_ids[i] >= 0).sum() == CONFIG.inputs_length(size)
        assert (found.target_segment_ids[i] >= 0).sum() == CONFIG.targets_length(size)
    # Of one token or none nothing can be hidden.
    assert (found.segment_ids[3:] == -1).all()
    assert (found.target_segment_ids[3:] == -1).all()
    # Documents are those of the tokens; each begins anew in what the decoder reads.
    ids = found.target_segment_ids[0]
    second = int((ids == ids[0]).sum())
    assert set(ids) == {1, 2}
    assert decoder_tokens[0, [0, second]].tolist() == [PAD, PAD]
    before = np.delete(np.arange(len(ids)), [0, second])
    np.testing.assert_array_equal(decoder_tokens[0, before], found.targets[0, before - 1])


def test_the_same_on_any_mesh():
    batch = make_batch((LENGTH,) * 8)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    whole = sides(batch, KEY)
    jax.tree.map(np.testing.assert_array_equal, sides(split, KEY), whole)
    turned = sides(jax.tree.map(lambda x: x[::-1], batch), KEY)
    np.testing.assert_array_equal(turned[0].tokens[::-1], whole[0].tokens)


def run(apply, *, deterministic=True, **options):
    """The sums, and what the model was told."""
    told = {}

    def kept(variables, tokens, decoder_tokens, **given):
        told.update(given, tokens=tokens, decoder_tokens=decoder_tokens)
        return apply(decoder_tokens)

    loss = make_loss(kept, VOCABULARY, CONFIG, **options)

    @jax.jit
    def arrays(batch):
        total, sums = loss({}, batch, KEY, progress=jnp.zeros(()), deterministic=deterministic)
        return total, sums, {n: x for n, x in told.items() if isinstance(x, jax.Array)}

    total, sums, found = arrays(make_batch())
    return float(total), sums, told | found


def test_sums_and_what_the_model_is_told():
    even = lambda tokens: jnp.zeros((*tokens.shape, SIZE))
    total, sums, mixed = run(even)
    weight = sum(CONFIG.targets_length(size) for size in (LENGTH, 11, 2))
    assert float(sums.weight) == weight
    assert total == pytest.approx(weight * np.log(SIZE), rel=1e-5)
    assert {name: float(count) for name, count in sums.counts.items()} == {"tokens": LENGTH + 14}
    assert mixed["rngs"] is None
    assert mixed["positions"] is None
    assert mixed["segment_ids"][0].tolist() == [0] * CONFIG.inputs_length(LENGTH)
    _, _, apart = run(even, isolate_documents=True, deterministic=False)
    assert list(apart["rngs"]) == ["dropout"]
    np.testing.assert_array_equal(apart["tokens"], mixed["tokens"])  # the same spans
    ids, places = np.asarray(apart["segment_ids"][0]), np.asarray(apart["positions"][0])
    assert places.tolist() == [*range((ids == 1).sum()), *range((ids == 2).sum())]


MODELS = {
    "t5": T5Config(
        vocab_size=SIZE, num_layers=1, hidden_dim=16, num_heads=2, head_dim=8, mlp_dim=16
    ),
    "transformer": TransformerConfig(
        vocab_size=SIZE, num_layers=1, hidden_dim=16, num_heads=2, mlp_dim=16
    ),
}


@pytest.mark.parametrize(("name", "isolate_documents"), [("t5", False), ("transformer", True)])
def test_no_prediction_has_seen_its_token(name, isolate_documents):
    """Of a real model: what is hidden changes only what is written behind it."""
    config = MODELS[name]
    model = EncoderDecoderLm(config.make(), config.make_lm_head())
    inputs = jnp.zeros((1, 4), jnp.int32)
    shapes = jax.eval_shape(model.init, KEY, inputs, inputs)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda s: jnp.float32(rng.normal(size=s.shape) / 3), shapes)
    told = {}

    def kept(*args, **given):
        told.update(logits=model.apply(*args, **given), ids=given["decoder_segment_ids"])
        return told["logits"]

    loss = make_loss(kept, VOCABULARY, CONFIG, isolate_documents=isolate_documents)
    batch = make_batch((LENGTH,))

    @jax.jit
    def look(tokens):
        given = batch | {"tokens": tokens}
        loss(variables, given, KEY, progress=jnp.zeros(()), deterministic=True)
        return told

    found = look(batch["tokens"])
    mask = np.asarray(draw(KEY_OF_SPANS, batch["lengths"], batch["index"], LENGTH, CONFIG))[0]
    targets = np.asarray(sides(batch, KEY_OF_SPANS)[0].targets[0])
    document = np.where(np.arange(LENGTH) < 10, 1, 2)
    written = np.flatnonzero(~np.isin(targets, SPANS.sentinels))
    for place, at in zip(np.flatnonzero(mask), written, strict=False):
        if place in (9, 10):
            continue  # borders
        token = jnp.where(batch["tokens"][0, place] == FIRST, FIRST + 1, FIRST)
        changed = look(batch["tokens"].at[0, place].set(token))
        moved = np.abs(changed["logits"][0] - found["logits"][0]).max(-1) > 1e-5
        assert not moved[: at + 1].any()
        later = np.arange(len(moved)) > at
        if isolate_documents:
            later &= np.asarray(found["ids"][0]) == document[place]
        np.testing.assert_array_equal(moved, later)
    # What is shown is seen by all, or by its own document.
    shown = np.flatnonzero(~mask & (np.arange(LENGTH) < 9) & (np.arange(LENGTH) > 0))[0]
    changed = look(batch["tokens"].at[0, shown].set(FIRST))
    moved = np.abs(changed["logits"][0] - found["logits"][0]).max(-1) > 1e-5
    everyone = np.asarray(found["ids"][0]) == 1 if isolate_documents else np.ones(len(moved), bool)
    np.testing.assert_array_equal(moved, everyone)


KEY_OF_SPANS = jax.random.split(KEY)[0]  # as the loss splits it


@pytest.mark.parametrize(
    ("changes", "length", "vocabulary", "message"),
    [
        ({}, 16, VOCABULARY, "mean_span=3.0 is more than the 2 tokens that noise_density=0.15 hid"),
        ({}, 64, replace(VOCABULARY, spans=None), "has no sentinels <extra_id_0>, <extra_id_1>, …"),
        ({"mean_span": 1.0}, 64, VOCABULARY, "has 10 hidden spans, which with a last one need 11 "),
    ],
)
def test_rows_that_cannot_be(changes, length, vocabulary, message):
    with pytest.raises(InputError, match=message) as raised:
        SpanConfig(**changes).check(length, vocabulary)
    assert "\n" not in str(raised.value)


def test_the_ways_out():
    SpanConfig(mean_span=2.0).check(16, VOCABULARY)
    SpanConfig().check(64, VOCABULARY)
    more = replace(VOCABULARY, spans=SPANS._replace(sentinels=tuple(range(11))))
    SpanConfig(mean_span=1.0).check(64, more)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_density": 1.0}, r"noise_density=1.0 is not inside \(0, 1\); 0.15"),
        ({"mean_span": 0.5}, "mean_span=0.5 is not a number from 1 up; 3"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(InputError, match=message):
        SpanConfig(**changes)
