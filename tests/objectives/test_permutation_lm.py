"""Permutation language modelling: orders, the loss by hand, and leaks of a real model."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxlm.models.heads import WithLmHead
from jaxlm.models.xlnet import XlnetConfig
from jaxlm.nn import masks
from jaxlm.objectives.masking import ChoiceConfig, Vocabulary, choose
from jaxlm.objectives.permutation_lm import draw_order, make_loss

START, END, FIRST, SIZE, LENGTH = 1, 2, 3, 32, 12
VOCABULARY = Vocabulary(
    mask_id=None,
    start_id=START,
    end_id=END,
    ordinary=jnp.arange(FIRST, SIZE),
    is_ordinary=jnp.arange(SIZE) >= FIRST,
    word_starts=jnp.arange(SIZE) >= 0,
)
CHOICE = ChoiceConfig(rate=0.4)
SPANS = ChoiceConfig(rate=0.4, unit="span", mean_span=2.2)
KEY = jax.random.key(0)


def make_batch(lengths=(12, 5, 1, 0), start=0):
    rng = np.random.default_rng(1)
    tokens = rng.integers(FIRST, SIZE, (len(lengths), LENGTH))
    tokens[:, 6] = START
    index = np.arange(len(lengths)) + start
    batch = {"tokens": tokens, "lengths": np.array(lengths), "index": index}
    return {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()}


BATCH = make_batch()


def run(apply, choice=CHOICE, *, batch=BATCH, deterministic=True, **options):
    """The sums, and what the model was told."""
    told = {}

    def kept(variables, tokens, predicted, **given):
        told.update(given, tokens=tokens, predicted=predicted)
        return apply(predicted)

    loss = make_loss(kept, VOCABULARY, choice, **options)

    @jax.jit
    def arrays():
        total, sums = loss({}, batch, KEY, progress=jnp.zeros(()), deterministic=deterministic)
        return total, sums, {n: x for n, x in told.items() if isinstance(x, jax.Array)}

    total, sums, found = arrays()
    return float(total), sums, told | found


def even(predicted):
    return jnp.zeros((*predicted.shape, SIZE))


def test_sums_of_a_perfect_model():
    def perfect(predicted):
        labels = jnp.take_along_axis(BATCH["tokens"], predicted, axis=1)
        return 2 * jax.nn.one_hot(labels, SIZE)

    total, sums, _ = run(perfect)
    # round(0.4 * 11), round(0.4 * 5), at least one, none.
    assert float(sums.weight) == 4 + 2 + 1 + 0
    assert float(sums.totals["accuracy"]) == 7
    assert total == pytest.approx(7 * (np.log(np.exp(2) + SIZE - 1) - 2), rel=1e-5)
    counts = {name: float(count) for name, count in sums.counts.items()}
    assert counts == {"tokens": 18, "overflow": 0}
    total, sums, _ = run(even, batch=make_batch((0, 0)))
    assert (total, float(sums.weight)) == (0, 0)


def test_what_the_model_is_told():
    _, _, mixed = run(even)
    assert mixed["method"] == "predict"
    assert mixed["rngs"] is None
    assert mixed["predicted"].shape == (4, CHOICE.num_predicted(LENGTH))
    np.testing.assert_array_equal(mixed["tokens"], BATCH["tokens"])  # nothing is hidden in them
    real = np.arange(LENGTH)[None] < np.asarray(BATCH["lengths"])[:, None]
    np.testing.assert_array_equal(mixed["segment_ids"], np.where(real, 0, -1))
    _, _, apart = run(even, isolate_documents=True, deterministic=False)
    assert apart["segment_ids"][0].tolist() == [0] * 6 + [1] * 6
    assert list(apart["rngs"]) == ["dropout"]
    # The same choice for a key, whatever else is asked; and another for another row.
    np.testing.assert_array_equal(apart["mask"], mixed["mask"])
    other = run(even, batch=make_batch(start=4))[2]
    assert (other["mask"] != mixed["mask"]).any()


def test_what_was_before_is_passed_on():
    assert "before" not in run(even)[2]
    before = {"before": BATCH["tokens"][:, :4].astype(jnp.uint16)}
    before["before_lengths"] = jnp.array([4, 4, 0, 4])
    told = run(even, batch=BATCH | before)[2]
    for given, expected in zip(told["before"], before.values(), strict=True):
        assert given.dtype == jnp.int32
        assert given.shape == expected.shape


@partial(jax.jit, static_argnums=0)
def orders(choice, key, batch):
    given = batch["tokens"], batch["lengths"], batch["index"]
    chosen = choose(key, *given, VOCABULARY, choice, progress=jnp.zeros(()))
    return chosen, draw_order(key, batch["tokens"], batch["index"], chosen)


@pytest.mark.parametrize("choice", [CHOICE, SPANS])
def test_the_order_is_one_of_what_is_predicted(choice):
    rows = 400
    batch = make_batch((LENGTH,) * rows)
    batch["tokens"] = batch["tokens"].at[:].set(batch["tokens"][0])
    chosen, order = jax.tree.map(np.asarray, orders(choice, KEY, batch))
    table = np.zeros(order.shape)
    np.put_along_axis(table, chosen.predicted, chosen.weights, axis=1)
    np.testing.assert_array_equal(order > 0, table > 0)
    for row in order:
        drawn = row[row > 0]
        assert len(set(drawn)) == len(drawn)
    # Of two neighbours that are both predicted, either comes first as often: also inside spans.
    both = (order[:, :-1] > 0) & (order[:, 1:] > 0)
    share = (order[:, :-1] < order[:, 1:])[both].mean()
    assert both.sum() > 200
    assert abs(share - 0.5) < 3 * 0.5 / both.sum() ** 0.5
    assert order[:, 6].max() == 0  # special tokens are given


def test_the_same_orders_on_any_mesh():
    batch = make_batch((LENGTH,) * 8)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    np.testing.assert_array_equal(orders(SPANS, KEY, split)[1], orders(SPANS, KEY, batch)[1])
    halves = [jax.tree.map(lambda x, i=i: x[4 * i : 4 * i + 4], batch) for i in range(2)]
    parts = [orders(SPANS, KEY, half)[1] for half in halves]
    np.testing.assert_array_equal(np.concatenate(parts), orders(SPANS, KEY, batch)[1])


def test_masks_by_hand():
    seen = masks.permutation(jnp.asarray(np.array([[0, 2, 0, 1]])))
    assert seen[0, 0].astype(int).tolist() == [
        [1, 0, 1, 0],
        [1, 0, 1, 1],
        [1, 0, 1, 0],
        [1, 0, 1, 0],
    ]


@pytest.mark.slow
def test_the_rate_may_change_as_training_goes_on():
    choice = replace(CHOICE, final_rate=0.8)
    loss = make_loss(lambda variables, tokens, predicted, **_: even(predicted), VOCABULARY, choice)
    weight = lambda share: float(
        loss({}, BATCH, KEY, progress=jnp.float32(share), deterministic=True)[1].weight
    )
    assert weight(0.0) == 7
    assert weight(1.0) == 9 + 4 + 1  # of 11, 5 and 1


@pytest.mark.parametrize("isolate_documents", [False, True])
def test_what_is_predicted_has_not_been_seen(isolate_documents):
    """Of a real model: the first prediction knows no predicted token, the last all others."""
    config = XlnetConfig(vocab_size=SIZE, num_layers=1, hidden_dim=16, num_heads=2, mlp_dim=16)
    model = WithLmHead(config.make(), config.make_lm_head())
    shapes = jax.eval_shape(model.init, KEY, jnp.zeros((1, LENGTH), jnp.int32))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda s: jnp.float32(rng.normal(size=s.shape) / 3), shapes)
    told = {}

    def kept(*args, **given):
        told.update(logits=model.apply(*args, **given), predicted=args[2], mask=given["mask"])
        return told["logits"]

    loss = make_loss(kept, VOCABULARY, CHOICE, isolate_documents=isolate_documents)

    @jax.jit
    def look(tokens):
        loss(variables, BATCH | {"tokens": tokens}, KEY, progress=jnp.zeros(()), deterministic=True)
        return told

    found = look(BATCH["tokens"])
    predicted = np.asarray(found["predicted"][0][:4])  # the first row predicts four
    seen = np.asarray(found["mask"][0, 0])[predicted].sum(1)
    first, last = seen.argmin(), seen.argmax()
    assert seen[last] == seen[first] + 3

    def changed(*places):
        tokens = BATCH["tokens"].at[0, jnp.asarray(places)].add(1)
        tokens = jnp.where(tokens == SIZE, FIRST, tokens)
        return np.abs(look(tokens)["logits"][0] - found["logits"][0]).max(-1)

    assert changed(*predicted)[first] == 0
    assert changed(predicted[last])[:4].max() == 0
    before = [place for i, place in enumerate(predicted) if i != last]
    same = [place // 6 == predicted[last] // 6 for place in before]  # document
    for place, of_same in zip(before, same, strict=True):
        assert (changed(place)[last] > 1e-4) == (of_same or not isolate_documents)
