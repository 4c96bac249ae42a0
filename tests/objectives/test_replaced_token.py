"""Replaced-token detection: the loss by hand, what is sampled, and where gradients go."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import BERT

from jaxlm.objectives.masking import MaskingConfig, Vocabulary, corrupt
from jaxlm.objectives.replaced_token import make_loss, put, sample
from jaxlm.tasks.replaced_token import ReplacedToken

START, MASK, FIRST, SIZE, ROWS, LENGTH = 1, 3, 4, 32, 3, 12  # the table has 40 rows
VOCABULARY = Vocabulary(
    mask_id=MASK,
    start_id=START,
    end_id=2,
    ordinary=jnp.arange(FIRST, SIZE),
    is_ordinary=jnp.arange(SIZE) >= FIRST,
    word_starts=jnp.arange(SIZE) >= 0,
)
MASKING = MaskingConfig(rate=0.4, mask_share=1.0, random_share=0.0)
KEY, NOW = jax.random.key(0), jnp.zeros(())
LENGTHS = np.array([12, 5, 0])


def make_batch(lengths=LENGTHS):
    tokens = np.random.default_rng(1).integers(FIRST, SIZE, (ROWS, LENGTH))
    tokens[:, 6] = START
    batch = {"tokens": tokens, "lengths": lengths, "index": np.arange(ROWS)}
    return {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()}


BATCH = make_batch()
CALLED = partial(make_loss, vocabulary=VOCABULARY, masking=MASKING, detection_weight=50.0)


def next_token(tokens):
    return jnp.where(tokens + 1 == SIZE, FIRST, tokens + 1)


def fake(told, guess, scores):
    """A generator that is sure of its guesses, and a discriminator whose scores are given."""

    def apply(variables, tokens, predicted=None, *, method=None, **options):
        if predicted is None:
            told.update(shown=tokens, options=options)
            return scores
        labels = jnp.take_along_axis(BATCH["tokens"], predicted, axis=1)
        return 30.0 * jax.nn.one_hot(guess(labels), 40)

    return apply


@pytest.mark.parametrize("right", [True, False])
def test_the_loss_by_hand(right):
    scores = np.random.default_rng(0).normal(size=(ROWS, LENGTH)).astype(np.float32)
    told = {}
    apply = fake(told, (lambda x: x) if right else next_token, jnp.asarray(scores))
    loss = CALLED(apply)
    total, sums = loss({}, BATCH, KEY, progress=NOW, deterministic=True)
    real = np.arange(LENGTH)[None] < LENGTHS[:, None]
    hidden = 4 + 2  # round(0.4 * 11), round(0.4 * 5)
    replaced = np.asarray(told["shown"] != BATCH["tokens"])
    # What is sampled right is not replaced, and nothing else is.
    assert replaced.sum() == (0 if right else hidden)
    assert not (replaced & ~real).any()
    signed = np.where(replaced, scores, -scores)
    detection = np.log1p(np.exp(-signed))[real].sum()
    generation = hidden * (np.log(np.exp(30) + 39) - (30 if right else 0)) / 0.4
    assert float(total) == pytest.approx(generation + 50 * detection, rel=1e-5)
    means = sums.means()
    assert means["discriminator"] == pytest.approx(detection / 17, rel=1e-5)
    assert means["generator"] == pytest.approx(generation / 17, rel=1e-5, abs=1e-6)
    assert means["accuracy"] == pytest.approx((signed > 0)[real].mean())
    assert means["replaced"] == pytest.approx(replaced.sum() / 17)
    assert float(sums.weight) == float(sums.counts["tokens"]) == 17
    none = make_batch(np.array([0, 0, 0]))
    total, sums = loss({}, none, KEY, progress=NOW, deterministic=True)
    assert (float(total), float(sums.weight)) == (0, 0)


def test_samples_are_ordinary_and_as_likely_as_the_generator_has_them():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=40), jnp.float32)
    logits = logits.at[MASK].set(9).at[35].set(9)  # no ordinary token, and none at all
    index = jnp.arange(40)
    drawn = jax.jit(lambda i: sample(KEY, jnp.broadcast_to(logits, (40, 100, 40)), i, VOCABULARY))
    counts = np.bincount(np.asarray(drawn(index)).ravel(), minlength=40)
    assert counts[:FIRST].sum() == counts[SIZE:].sum() == 0
    expected = np.asarray(jax.nn.softmax(logits[FIRST:SIZE])) * 4000
    deviation = (counts[FIRST:SIZE] - expected) / np.sqrt(expected)
    assert np.abs(deviation).max() < 4
    assert np.square(deviation).sum() < 2 * (SIZE - FIRST)
    # A row's samples are its own, whatever else is in the batch.
    alone = sample(KEY, jnp.broadcast_to(logits, (2, 100, 40)), index[5:7], VOCABULARY)
    np.testing.assert_array_equal(drawn(index)[5:7], alone)


def test_only_what_is_hidden_is_replaced():
    given = BATCH["tokens"], BATCH["lengths"], BATCH["index"]
    corrupted = corrupt(KEY, *given, VOCABULARY, MASKING, progress=NOW)
    shown, replaced = put(BATCH["tokens"], corrupted, next_token(corrupted.labels))
    hidden = np.asarray(corrupted.tokens == MASK)
    np.testing.assert_array_equal(replaced, hidden)
    expected = np.where(hidden, next_token(BATCH["tokens"]), BATCH["tokens"])
    np.testing.assert_array_equal(shown, expected)


CONFIG = replace(BERT, vocab_size=40, num_layers=1, max_length=LENGTH, mlp_dim=16)
TASK = ReplacedToken(masking=MASKING)
MODEL = TASK.make_model(CONFIG)


def make_variables():
    shapes = jax.eval_shape(MODEL.init, KEY, jnp.zeros((1, LENGTH), jnp.int32))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.float32(rng.normal(size=s.shape) / 2), shapes)


def test_no_gradient_passes_from_the_discriminator_to_the_generator():
    variables = make_variables()
    params = variables["params"]
    assert params.keys() == {"encoder", "head", "generator"}
    assert params["generator"]["encoder"].keys() == {"embed_norm", "layers"}  # the tables are one

    segments = jnp.where(jnp.arange(LENGTH)[None] < BATCH["lengths"][:, None], 0, -1)

    def total(params):
        loss = CALLED(MODEL.apply)
        return loss({"params": params}, BATCH, KEY, progress=NOW, deterministic=True)[0]

    def generation(params):
        """The generator's own loss, on what the same key hides."""
        given = BATCH["tokens"], BATCH["lengths"], BATCH["index"]
        key = jax.random.split(KEY, 4)[0]
        hidden = corrupt(key, *given, VOCABULARY, MASKING, progress=NOW)
        shown = hidden.tokens, hidden.predicted
        told = {"segment_ids": segments, "method": "generate"}
        logs = jax.nn.log_softmax(MODEL.apply({"params": params}, *shown, **told))
        losses = -jnp.take_along_axis(logs, hidden.labels[..., None], axis=-1)[..., 0]
        return (losses * hidden.weights).sum() / 0.4

    both, alone = jax.jit(lambda p: (jax.grad(total)(p), jax.grad(generation)(p)))(params)
    largest = lambda tree: max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))
    differ = lambda a, b: largest(jax.tree.map(jnp.subtract, a, b))
    size = largest(alone["generator"])
    assert size > 0.1
    assert differ(both["generator"], alone["generator"]) < 1e-5 * size
    # The discriminator learns, too, and the tables from both.
    assert min(largest(both["head"]), largest(both["encoder"]["layers"])) > 0.1
    table = lambda gradients: gradients["encoder"]["token_embed"]
    assert min(largest(table(alone)), differ(table(both), table(alone))) > 0.1


def test_both_are_told_the_same_and_drop_out_each_by_itself():
    def told(*, deterministic, isolate_documents=False):
        calls = []

        def apply(variables, tokens, predicted=None, *, method=None, **options):
            calls.append(options)
            shape = tokens.shape if predicted is None else (*predicted.shape, 40)
            return jnp.zeros(shape)

        loss = CALLED(apply, isolate_documents=isolate_documents)
        loss({}, BATCH, KEY, progress=NOW, deterministic=deterministic)
        return calls

    for mixed in told(deterministic=True):
        assert (mixed["rngs"], mixed["positions"]) == (None, None)
        assert mixed["segment_ids"][1].tolist() == [0] * 5 + [-1] * 7
    first, second = told(deterministic=False, isolate_documents=True)
    for apart in (first, second):
        assert apart["segment_ids"][0].tolist() == [0] * 6 + [1] * 6
        assert apart["positions"][0].tolist() == [*range(6)] * 2
    words = [jax.random.key_data(one["rngs"]["dropout"]).tolist() for one in (first, second)]
    assert words[0] != words[1]
