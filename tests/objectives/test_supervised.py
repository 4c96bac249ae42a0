"""Fine-tuning's objectives, each by hand and each with what must not change it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from rounding import DTYPES, tolerance

from jaxlm.objectives import (
    classification,
    contrastive,
    multi_label,
    question_answering,
    rdrop,
    regression,
    supervised,
)
from jaxlm.sharding import MeshConfig, make_mesh

BATCH, LENGTH, VOCAB = 4, 6, 11


def draws(seed=0):
    return np.random.default_rng(seed)


TABLE = jnp.float32(draws().normal(size=(VOCAB, 3)))
VARIABLES = {"params": {"table": TABLE}}
KEY = jax.random.key(0)


def apply_tokens(variables, tokens, *, token_type_ids, segment_ids, deterministic, rngs):
    """Three numbers for each position: its table row, plus the mean of the row's real ones."""
    hidden = variables["params"]["table"][tokens]
    if token_type_ids is not None:
        hidden = hidden * (1 + token_type_ids[..., None])
    if not deterministic:
        keep = jax.random.bernoulli(rngs["dropout"], 0.5, hidden.shape)
        hidden = jnp.where(keep, hidden, 0)
    real = (segment_ids >= 0)[..., None]
    mean = (hidden * real).sum(1, keepdims=True) / jnp.maximum(real.sum(1, keepdims=True), 1)
    return hidden + mean


def apply_rows(*args, **options):
    return apply_tokens(*args, **options)[:, 0]


def apply_one(*args, **options):
    return apply_rows(*args, **options)[:, :1]


def apply_two(*args, **options):
    return apply_tokens(*args, **options)[..., :2]


def apply_unit(*args, **options):
    rows = apply_rows(*args, **options)
    return rows / jnp.sqrt(jnp.maximum(jnp.square(rows).sum(-1, keepdims=True), 1e-12))


def make_batch(*members, **labels):
    rng = draws(1)
    batch = {
        "tokens": rng.integers(0, VOCAB, (BATCH, *members, LENGTH)),
        "lengths": rng.integers(2, LENGTH, (BATCH, *members)),
        "token_type_ids": rng.integers(0, 2, (BATCH, *members, LENGTH)),
        "index": np.arange(BATCH),
        "weights": np.float32([1, 1, 0, 1]),
    }
    return {name: jnp.asarray(value) for name, value in (batch | labels).items()}


ALLOWED = np.arange(LENGTH)[None] < np.array([[6], [5], [3], [4]])
TASKS = {
    "classification": (
        classification.make_loss(apply_rows),
        make_batch(labels=np.array([0, 2, 1, 1])),
    ),
    "smoothed": (
        classification.make_loss(apply_rows, label_smoothing=0.2),
        make_batch(labels=np.array([0, 2, 1, 1])),
    ),
    "tagging": (
        classification.make_loss(apply_tokens),
        make_batch(
            labels=draws(2).integers(0, 3, (BATCH, LENGTH)),
            weights=np.float32(draws(3).random((BATCH, LENGTH)) < 0.4)
            * np.float32([[1], [1], [0], [1]]),
        ),
    ),
    "choice": (
        classification.make_loss(classification.choices(apply_one)),
        make_batch(3, labels=np.array([0, 2, 1, 1])),
    ),
    "multi_label": (
        multi_label.make_loss(apply_rows),
        make_batch(labels=np.float32(draws(4).random((BATCH, 3)) < 0.5)),
    ),
    "regression": (
        regression.make_loss(apply_one),
        make_batch(labels=np.float32(draws(5).normal(size=BATCH))),
    ),
    "span": (
        question_answering.make_loss(apply_two),
        make_batch(
            starts=np.array([0, 1, 2, 1]),
            ends=np.array([0, 4, 2, 3]),
            allowed=ALLOWED,
            lengths=ALLOWED.sum(1),
        ),
    ),
    "contrastive": (contrastive.make_loss(apply_unit, temperature=0.5), make_batch(2)),
    "rdrop": (
        rdrop.make_loss(apply_rows, classification.score, alpha=2.0),
        make_batch(labels=np.array([0, 2, 1, 1])),
    ),
}
TASKS["rdrop_tagging"] = (
    rdrop.make_loss(apply_tokens, classification.score, alpha=2.0),
    TASKS["tagging"][1],
)


@partial(jax.jit, static_argnames=("loss", "deterministic", "dtype"))
def value_and_gradient(loss, batch, *, deterministic, dtype):
    """The model's outputs are of the dtype; its parameters are float32."""

    def summed(variables):
        low = jax.tree.map(lambda x: x.astype(dtype), variables)
        return loss(low, batch, KEY, progress=jnp.zeros(()), deterministic=deterministic)

    return jax.value_and_grad(summed, has_aux=True)(VARIABLES)


def run(loss, batch, *, deterministic=True, dtype="float32"):
    (total, sums), gradient = value_and_gradient(
        loss, batch, deterministic=deterministic, dtype=dtype
    )
    assert float(total) == float(sums.totals["loss"])
    assert {x.dtype for x in jax.tree.leaves(sums)} == {jnp.dtype("float32")}
    return sums, np.asarray(gradient["params"]["table"])


def same(a, b, dtype="float32"):
    # The row, the mean, their sum, what an objective makes of it, and as many on the way back.
    limit = tolerance(dtype, depth=8)
    np.testing.assert_allclose(a[1], b[1], rtol=0, atol=limit * max(1, np.abs(b[1]).max()))
    for x, y in zip(jax.tree.leaves(a[0]), jax.tree.leaves(b[0]), strict=True):
        np.testing.assert_allclose(x, y, rtol=limit)


# What holds of every objective.


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("deterministic", [True, False])
def test_a_batch_of_padding_is_nothing(task, deterministic):
    loss, batch = TASKS[task]
    empty = batch | {name: jnp.zeros_like(batch[name]) for name in ("lengths", "weights")}
    if "allowed" in batch:
        empty["allowed"] = jnp.zeros_like(batch["allowed"])
    sums, gradient = run(loss, empty, deterministic=deterministic)
    assert float(sums.weight) == 0
    assert {float(total) for total in sums.totals.values()} == {0.0}
    assert np.abs(gradient).max() == 0
    assert float(sums.counts["tokens"]) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("task", TASKS)
def test_padding_and_rows_without_weight_change_nothing(task, dtype):
    (loss, batch), measure = TASKS[task], partial(run, dtype=dtype)
    found = measure(loss, batch)
    assert np.abs(found[1]).max() > 0.01

    row = np.arange(BATCH) == 2  # of weight 0
    tokens, lengths = np.array(batch["tokens"]), np.asarray(batch["lengths"])
    tokens[np.arange(LENGTH) >= lengths[..., None]] = VOCAB - 1
    changed = {"tokens": tokens}
    if task.endswith("tagging"):  # whose padding has no weight
        changed["weights"] = batch["weights"] * (np.arange(LENGTH)[None] < lengths[:, None])
        found = measure(loss, batch | {"weights": changed["weights"]})
    same(measure(loss, batch | changed), found, dtype)
    changed["tokens"] = tokens.copy()
    changed["tokens"][row] = 3
    same(measure(loss, batch | changed), found, dtype)
    # The control: a real token of a row that counts.
    changed["tokens"] = tokens.copy()
    changed["tokens"][0, ..., 0] = 3 + (tokens[0, ..., 0] == 3)
    with pytest.raises(AssertionError):
        same(measure(loss, batch | changed), found, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("task", [task for task in TASKS if task != "contrastive"])
def test_sums_add_up(task, dtype):
    (loss, batch), measure = TASKS[task], partial(run, dtype=dtype)
    halves = [
        measure(loss, {name: x[part] for name, x in batch.items()})
        for part in (slice(0, 2), slice(2, 4))
    ]
    same((halves[0][0] + halves[1][0], halves[0][1] + halves[1][1]), measure(loss, batch), dtype)


# By hand.


def outputs_of(apply, batch):
    return np.float64(supervised.call(apply, VARIABLES, batch, None))


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def check(task, losses, hits=None):
    loss, batch = TASKS[task]
    sums, _ = run(loss, batch)
    weights = np.asarray(batch["weights"])
    assert float(sums.weight) == weights.sum()
    assert float(sums.totals["loss"]) == pytest.approx((losses * weights).sum(), rel=1e-5)
    if hits is None:
        assert set(sums.totals) == {"loss"}
    else:
        assert float(sums.totals["accuracy"]) == pytest.approx((hits * weights).sum())
    assert float(sums.counts["tokens"]) == np.asarray(batch["lengths"]).sum()


@pytest.mark.parametrize(
    ("task", "apply", "smoothing"),
    [
        ("classification", apply_rows, 0.0),
        ("smoothed", apply_rows, 0.2),
        ("tagging", apply_tokens, 0.0),
    ],
)
def test_classification_and_tagging(task, apply, smoothing):
    batch = TASKS[task][1]
    log_p, labels = log_softmax(outputs_of(apply, batch)), np.asarray(batch["labels"])
    target = (1 - smoothing) * np.eye(3)[labels] + smoothing / 3
    check(task, -(target * log_p).sum(-1), log_p.argmax(-1) == labels)


def test_choice():
    batch = TASKS["choice"][1]
    scores = np.zeros((BATCH, 3))
    for choice in range(3):
        names = ("tokens", "lengths", "token_type_ids")
        alone = batch | {name: batch[name][:, choice] for name in names}
        scores[:, choice] = outputs_of(apply_one, alone)[:, 0]
    log_p, labels = log_softmax(scores), np.asarray(batch["labels"])
    check("choice", -log_p[np.arange(BATCH), labels], log_p.argmax(-1) == labels)
    predict = classification.make_predict(classification.choices(apply_one))
    np.testing.assert_allclose(predict(VARIABLES, batch)["probabilities"], np.exp(log_p), atol=1e-6)


def test_multi_label():
    batch = TASKS["multi_label"][1]
    p, labels = 1 / (1 + np.exp(-outputs_of(apply_rows, batch))), np.asarray(batch["labels"])
    losses = -(labels * np.log(p) + (1 - labels) * np.log(1 - p)).mean(-1)
    check("multi_label", losses, ((p > 0.5) == (labels == 1)).mean(-1))


def test_regression():
    batch = TASKS["regression"][1]
    values = outputs_of(apply_one, batch)[:, 0]
    check("regression", (values - np.asarray(batch["labels"])) ** 2)
    predicted = regression.make_predict(apply_one)(VARIABLES, batch)
    np.testing.assert_allclose(predicted["values"], values, atol=1e-6)


def test_span():
    batch = TASKS["span"][1]
    logits = np.where(ALLOWED[..., None], outputs_of(apply_two, batch), -np.inf)
    rows, losses, hits = np.arange(BATCH), np.zeros(BATCH), np.ones(BATCH, bool)
    for side, name in enumerate(("starts", "ends")):
        log_p, labels = log_softmax(logits[..., side]), np.asarray(batch[name])
        losses -= log_p[rows, labels] / 2
        hits &= log_p.argmax(-1) == labels
    check("span", losses, hits)
    predicted = question_answering.make_predict(apply_two)(VARIABLES, batch)
    for side, name in enumerate(("start_logits", "end_logits")):
        np.testing.assert_allclose(predicted[name][ALLOWED], logits[ALLOWED][:, side], atol=1e-6)
        assert np.asarray(predicted[name])[~ALLOWED].max() == -1e9


def embedded(batch):
    """[batch, 2, embed]"""
    predict = contrastive.make_predict(apply_unit)
    names = ("tokens", "lengths", "token_type_ids")
    members = [
        predict(VARIABLES, batch | {name: batch[name][:, member] for name in names})["embeddings"]
        for member in (0, 1)
    ]
    return np.float64(np.stack(members, axis=1))


def test_contrastive():
    batch = TASKS["contrastive"][1]
    embeddings = embedded(batch)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=-1), 1, atol=1e-6)
    similarity = embeddings[:, 0] @ embeddings[:, 1].T / 0.5
    similarity[:, 2] = -np.inf  # a row without weight is no negative
    losses, hits = np.zeros(BATCH), np.zeros(BATCH)
    for row in (0, 1, 3):
        losses[row] = -log_softmax(similarity[row])[row]
        hits[row] = similarity[row].argmax() == row
    check("contrastive", losses, hits)


def test_negatives_come_from_all_devices():
    loss, batch = TASKS["contrastive"]
    mesh = make_mesh(MeshConfig(), jax.devices()[:4])
    rows = NamedSharding(mesh, PartitionSpec("data"))
    spread = {name: jax.device_put(x, rows) for name, x in batch.items()}
    same(run(loss, spread), run(loss, batch))
    # The control: the parts alone are an easier task.
    parts = [
        run(loss, {name: x[row : row + 1] for name, x in batch.items()})[0] for row in range(BATCH)
    ]
    assert sum(float(part.totals["loss"]) for part in parts) == 0


# R-Drop.


@pytest.mark.parametrize(
    ("task", "apply"), [("rdrop", apply_rows), ("rdrop_tagging", apply_tokens)]
)
def test_rdrop(task, apply):
    batch = TASKS[task][1]
    seen = []

    def spy(*args, **options):
        seen.append(np.float64(apply(*args, **options)))
        return jnp.float32(seen[-1])

    _, sums = rdrop.make_loss(spy, classification.score, alpha=2.0)(
        VARIABLES, batch, KEY, progress=jnp.zeros(()), deterministic=False
    )
    (logits,) = seen
    first, second = logits[::2], logits[1::2]  # of each row both, one after the other
    assert np.abs(first - second).max() > 0.1
    labels, weights = np.asarray(batch["labels"]), np.asarray(batch["weights"])
    log_p, log_q = log_softmax(first), log_softmax(second)
    nll = [-(np.eye(3)[labels] * x).sum(-1) for x in (log_p, log_q)]
    kl = ((np.exp(log_p) - np.exp(log_q)) * (log_p - log_q)).sum(-1) / 2
    equation_4 = (nll[0] + nll[1] + 2.0 * kl) * weights
    assert float(sums.totals["kl"]) == pytest.approx((kl * weights).sum(), rel=1e-4)
    assert float(sums.totals["loss"]) == pytest.approx(equation_4.sum() / 2, rel=1e-4)
    assert float(sums.weight) == weights.sum()
    assert float(sums.counts["tokens"]) == np.asarray(batch["lengths"]).sum()


def test_rdrop_without_dropout_is_the_plain_loss():
    batch = TASKS["rdrop"][1]
    plain = run(TASKS["classification"][0], batch)
    same(run(TASKS["rdrop"][0], batch), plain)  # in evaluation

    def undropped(*args, **options):
        return apply_rows(*args, **options | {"deterministic": True})

    loss = rdrop.make_loss(undropped, classification.score, alpha=2.0)
    sums, gradient = run(loss, batch, deterministic=False)
    assert float(sums.totals.pop("kl")) == pytest.approx(0, abs=1e-6)
    same((sums, gradient), plain)


# What the model is told.


def test_what_the_model_is_told():
    told = {}

    def spy(variables, tokens, **options):
        told.update(options, tokens=tokens)
        return jnp.zeros((BATCH, 3))

    batch = TASKS["classification"][1]
    loss = classification.make_loss(spy)
    loss(VARIABLES, batch, KEY, progress=jnp.zeros(()), deterministic=True)
    real = np.arange(LENGTH)[None] < np.asarray(batch["lengths"])[:, None]
    np.testing.assert_array_equal(told["segment_ids"], np.where(real, 0, -1))
    np.testing.assert_array_equal(told["token_type_ids"], batch["token_type_ids"])
    assert (told["deterministic"], told["rngs"]) == (True, None)

    def dropout_key(first):
        other = {name: x for name, x in batch.items() if name != "token_type_ids"}
        other["index"] = batch["index"] + first
        loss(VARIABLES, other, KEY, progress=jnp.zeros(()), deterministic=False)
        return jax.random.key_data(told["rngs"]["dropout"]).tolist()

    # Splits of a batch, under pmap and in micro-batches, drop differently.
    assert dropout_key(0) == dropout_key(0) != dropout_key(4)
    assert told["token_type_ids"] is None
    assert not told["deterministic"]
