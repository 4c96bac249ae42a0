from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounding import BLOCK, DTYPES, tolerance
from tiny_models import BERT

from jaxlm.models.heads import MlmHead, WithLmHead
from jaxlm.objectives.masked_lm import make_loss
from jaxlm.objectives.masking import MaskingConfig, Vocabulary, corrupt

START, END, MASK, FIRST, SIZE, LENGTH = 1, 2, 3, 4, 32, 12
VOCABULARY = Vocabulary(
    mask_id=MASK,
    start_id=START,
    end_id=END,
    ordinary=jnp.arange(FIRST, SIZE),
    is_ordinary=jnp.arange(SIZE) >= FIRST,
    word_starts=jnp.arange(SIZE) >= 0,
)
MASKING = MaskingConfig(rate=0.4)
ENCODER = replace(BERT, vocab_size=SIZE, num_layers=1, mlp_dim=16, max_length=LENGTH)
MODELS = {
    dtype: WithLmHead(replace(ENCODER, dtype=dtype).make(), MlmHead(dtype=jnp.dtype(dtype)))
    for dtype in DTYPES
}
MODEL = MODELS["float32"]


def make_variables():
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, LENGTH), jnp.int32))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.float32(rng.normal(size=s.shape) / 2), shapes)


def make_batch(lengths=(12, 5, 1, 0)):
    rng = np.random.default_rng(1)
    tokens = rng.integers(FIRST, SIZE, (len(lengths), LENGTH))
    tokens[:, 6] = START
    batch = {"tokens": tokens, "lengths": np.array(lengths), "index": np.arange(len(lengths))}
    return {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()}


VARIABLES, BATCH, KEY = make_variables(), make_batch(), jax.random.key(0)


def fake_apply(told, logits_of):
    """Keeps what it is called with."""

    def apply(variables, tokens, predicted, **options):
        told.update(options, tokens=tokens, predicted=predicted)
        return logits_of(predicted)

    return apply


def run(loss, *, deterministic=True):
    return loss(VARIABLES, BATCH, KEY, progress=jnp.zeros(()), deterministic=deterministic)


def test_sums_of_a_perfect_model():
    def logits_of(predicted):
        labels = jnp.take_along_axis(BATCH["tokens"], predicted, axis=1)
        return 2 * jax.nn.one_hot(labels, SIZE)

    total, sums = jax.jit(lambda: run(make_loss(fake_apply({}, logits_of), VOCABULARY, MASKING)))()
    # round(0.4 * 11), round(0.4 * 5), at least one, none.
    assert float(sums.weight) == 4 + 2 + 1 + 0
    assert float(sums.totals["accuracy"]) == 7
    nats = np.log(np.exp(2) + SIZE - 1) - 2
    assert float(total) == float(sums.totals["loss"]) == pytest.approx(7 * nats, rel=1e-5)
    assert {name: float(count) for name, count in sums.counts.items()} == {
        "tokens": 18,
        "overflow": 0,
    }


def test_what_the_model_is_told():
    def told(*, deterministic=True, **options):
        seen = {}
        apply = fake_apply(seen, lambda predicted: jnp.zeros((*predicted.shape, SIZE)))

        def arrays():
            run(make_loss(apply, VOCABULARY, MASKING, **options), deterministic=deterministic)
            return {name: x for name, x in seen.items() if isinstance(x, jax.Array)}

        found = jax.jit(arrays)()
        return seen | found

    real = np.arange(LENGTH)[None] < np.asarray(BATCH["lengths"])[:, None]
    mixed = told()
    assert mixed["positions"] is None
    np.testing.assert_array_equal(mixed["segment_ids"], np.where(real, 0, -1))
    assert mixed["rngs"] is None
    assert mixed["deterministic"]

    apart = told(isolate_documents=True, deterministic=False)
    assert apart["positions"][0].tolist() == [*range(6)] * 2
    assert apart["segment_ids"][0].tolist() == [0] * 6 + [1] * 6
    assert apart["segment_ids"][1].tolist() == [0] * 5 + [-1] * 7
    assert list(apart["rngs"]) == ["dropout"]
    # The same choice for a key, whatever else is asked.
    np.testing.assert_array_equal(apart["tokens"], mixed["tokens"])
    assert (mixed["tokens"] != BATCH["tokens"]).any()


def test_parts_of_a_batch_drop_differently():
    # Under pmap and in micro-batches every part has the same key; its rows tell it apart.
    def dropout_key(index):
        seen = {}
        apply = fake_apply(seen, lambda predicted: jnp.zeros((*predicted.shape, SIZE)))
        loss = make_loss(apply, VOCABULARY, MASKING)

        def run():
            batch = BATCH | {"index": BATCH["index"] + index}
            loss(VARIABLES, batch, KEY, progress=jnp.zeros(()), deterministic=False)
            return jax.random.key_data(seen["rngs"]["dropout"])

        return jax.jit(run)().tolist()

    assert dropout_key(0) == dropout_key(0)
    assert dropout_key(0) != dropout_key(4)


def dense_loss(model, variables, batch, key):
    """All logits, by the textbook; what is predicted is scattered into a table."""
    shown = corrupt(
        jax.random.split(key)[0],
        batch["tokens"],
        batch["lengths"],
        batch["index"],
        VOCABULARY,
        MASKING,
        progress=jnp.zeros(()),
    )
    rows = jnp.arange(batch["tokens"].shape[0])[:, None]
    weights = jnp.zeros(batch["tokens"].shape).at[rows, shown.predicted].set(shown.weights)
    segments = jnp.where(jnp.arange(LENGTH)[None, :] < batch["lengths"][:, None], 0, -1)
    logits = model.apply(variables, shown.tokens, segment_ids=segments)
    labels = batch["tokens"][..., None]
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels, axis=-1)[..., 0]
    return (losses * weights).sum(), weights.sum()


def both_losses(masking, model=MODEL):
    """Their largest difference, over the largest number of the array that it is in."""
    loss = make_loss(model.apply, VOCABULARY, masking)

    def ours(variables):
        return loss(variables, BATCH, KEY, progress=jnp.zeros(()), deterministic=True)

    @jax.jit
    def both(variables):
        dense = partial(dense_loss, model)
        dense = jax.value_and_grad(dense, has_aux=True)(variables, BATCH, KEY)
        return jax.value_and_grad(ours, has_aux=True)(variables), dense

    ((total, sums), gradient), ((dense_total, dense_weight), dense_gradient) = both(VARIABLES)
    pairs = [(total, dense_total), (sums.weight, dense_weight)]
    pairs += zip(jax.tree.leaves(gradient), jax.tree.leaves(dense_gradient), strict=True)
    weight = float(dense_weight)
    differences = [(float(np.abs(a - b).max()), float(np.abs(b).max())) for a, b in pairs]
    return max(x / max(weight, size) for x, size in differences), gradient


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_only_equals_dense(dtype):
    difference, gradient = both_losses(MASKING, MODELS[dtype])
    assert difference < tolerance(dtype, depth=BLOCK)
    assert all(float(np.abs(g).max()) > 0 for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_budget_that_is_too_small_is_not_dense(dtype):
    # The control: with one place a row the sums are others, and are seen to be.
    difference, _ = both_losses(MaskingConfig(rate=0.4, budget=1), MODELS[dtype])
    assert difference > 4 * tolerance(dtype, depth=BLOCK)


@pytest.mark.parametrize("isolate_documents", [False, True])
def test_a_batch_of_padding_is_nothing(isolate_documents):
    batch = make_batch((0, 0))
    loss = make_loss(MODEL.apply, VOCABULARY, MASKING, isolate_documents=isolate_documents)

    @jax.jit
    def both(variables):
        def run(variables):
            return loss(variables, batch, KEY, progress=jnp.zeros(()), deterministic=True)

        return jax.value_and_grad(run, has_aux=True)(variables)

    (total, sums), gradient = both(VARIABLES)
    assert (float(total), float(sums.weight), float(sums.totals["accuracy"])) == (0, 0, 0)
    assert float(sums.counts["tokens"]) == 0
    assert all(float(np.abs(g).max()) == 0 for g in jax.tree.leaves(gradient))
