"""Examples that share rows give what they give in rows of their own: loss, gradients, outputs."""

import dataclasses
from collections.abc import Sequence
from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny_models import BERT

from jaxlm.data.labelled.batches import eval_batches
from jaxlm.data.labelled.batching import make_batching
from jaxlm.data.labelled.classification import TextFields
from jaxlm.data.labelled.dataset import LabelledConfig
from jaxlm.data.labelled.packing import Packed
from jaxlm.data.labelled.records import JsonLines
from jaxlm.runtime.batch_rows import ALL_ROWS
from jaxlm.sharding import MeshConfig, make_mesh
from jaxlm.tasks.classification import Classification
from jaxlm.tasks.embedding import Embedding
from jaxlm.tasks.tagging import Tagging


class Mixer(nn.Module):
    """What is quick to compile: each token sees where it is, and the mean of its segment."""

    @nn.compact
    def __call__(self, tokens, *, token_type_ids=None, positions=None, segment_ids=None, **_):
        x = nn.Embed(32, 16)(tokens)
        if positions is None:
            positions = jnp.arange(tokens.shape[1])[None]
        if token_type_ids is not None:
            x = x * (1 + token_type_ids[..., None])
        if segment_ids is None:
            segment_ids = jnp.zeros_like(tokens)
        same = segment_ids[:, :, None] == segment_ids[:, None]
        mean = jnp.einsum("bqk,bke->bqe", same / same.sum(-1, keepdims=True), x)
        return jnp.tanh(x + mean + jnp.sin(positions)[..., None])


def model_of(task, labels):
    return task.make_model(BERT, labels, 0.0).clone(encoder=Mixer())


POOLINGS = ("bert", "cls", "last", "mean", "max")
PAIR = TextFields(pair="pair")
TASKS = {
    **{f"class, {own}": Classification(pooling=own) for own in POOLINGS},
    "smoothed": Classification(label_smoothing=0.2, class_weights=("balanced",)),
    "r-drop": Classification(r_drop=1.0),
    "pair": Classification(fields=PAIR),
    "labels": Classification(fields=TextFields(label="labels", target="labels")),
    "number": Classification(fields=TextFields(label="number", target="number"), scale=(1.0, 2.0)),
    "tags": Tagging(),
    "embedding": Embedding(
        pooling="mean", temperature=0.5, fields=TextFields(pair="pair", label=None)
    ),
}
DATA = LabelledConfig(train=JsonLines(path="x"), batch_size=12)


@cache
def drawn() -> list[dict]:
    rng, rows = np.random.default_rng(0), []
    for i in range(12):
        words, pair = (rng.choice([*"abcdefgh"], rng.integers(1, 7)).tolist() for _ in range(2))
        tags = rng.choice(["O", "B-x"], len(words)).tolist()
        label = "yes" if i % 3 else "no"
        labels = ["u", "v"][: i % 3]
        rows.append(
            {"text": " ".join(words), "pair": " ".join(pair), "label": label, "labels": labels}
            | {"number": float(i), "tokens": words, "tags": tags}
        )
    return rows


def encoded(task, framer, records):
    examples = task.read(records(*drawn()))
    labels = task.labels(examples)
    return labels, task.encode(framer, examples, labels)


@partial(jax.jit, static_argnums=0)
def run(functions, params, batch):
    loss, predict = functions

    def total(params):
        key = jax.random.key(0)
        return loss({"params": params}, batch, key, progress=jnp.zeros(()), deterministic=False)

    (_, sums), gradient = jax.value_and_grad(total, has_aux=True)(params)
    about = {name: batch[name] for name in ("example", "lengths")}
    return sums, gradient, {**predict({"params": params}, batch), **about}


def variables_of(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.float32(rng.normal(size=s.shape) / 2), shapes)


def assert_close(tree, other, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), tree, other)


@pytest.mark.parametrize("kind", TASKS)
def test_packed_examples_are_the_same(kind, framer, records):
    task = TASKS[kind]
    labels, examples = encoded(task, framer, records)
    model = model_of(task, labels)
    params = variables_of(model)
    functions = (task.make_loss(model.apply), task.make_predict(model.apply))
    (batch,) = eval_batches(examples, 12, [16])
    config = dataclasses.replace(DATA, pack=True)
    packed = make_batching(examples, config, 12, longest=32)
    assert isinstance(packed, Packed)
    packed = dataclasses.replace(packed, num_rows=len(packed.members))
    (shared,) = packed.eval_batches()
    assert len(shared["tokens"]) < 12
    sums, gradient, outputs = jax.device_get(run(functions, params, batch))
    others = jax.device_get(run(functions, params, shared))
    assert_close(sums, others[0], 1e-4)
    assert_close(gradient, others[1], 1e-4)
    single = make_batching(examples, DATA, 12)
    found, expected = dict(packed.apart(others[2])), dict(single.apart(outputs))
    assert sorted(found) == list(range(12))
    for number, own in expected.items():
        for name, x in found[number].items():
            size = len(x) if kind == "tags" and x.ndim else None
            np.testing.assert_allclose(x, own[name][:size] if size else own[name], atol=1e-4)
    # The control: other lengths would be other texts.
    moved = shared | {"lengths": np.roll(shared["lengths"], 1, axis=1)}
    assert abs(run(functions, params, moved)[0].totals["loss"] - sums.totals["loss"]) > 1e-2


@pytest.mark.parametrize("kind", ["class, mean", "embedding"])
def test_rows_that_devices_share_out(kind, framer, records):
    task = TASKS[kind]
    labels, examples = encoded(task, framer, records)
    model = model_of(task, labels)
    functions = (task.make_loss(model.apply), task.make_predict(model.apply))
    config = dataclasses.replace(DATA, pack=True)
    packed = make_batching(examples, config, 12, longest=64, pieces=2)
    batch = next(packed.train_batches(0, augment=None, batch_rows=ALL_ROWS))
    batch |= {"example": batch["weights"]}
    params = variables_of(model)
    sums, gradient, _ = run(functions, params, batch)
    mesh = make_mesh(MeshConfig(), jax.devices()[:2])
    sharded = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    others = run(functions, params, sharded)
    assert_close(sums, others[0], 1e-4)
    assert_close(gradient, others[1], 1e-4)


def test_texts_without_labels(framer, records):
    """Single texts to be embedded, by a task that is learnt from pairs."""
    task = TASKS["embedding"]
    texts: Sequence = task.read(records(*drawn()), labelled=False)
    examples = task.encode(framer, texts, ())
    model = model_of(task, ())
    predict, params = task.make_predict(model.apply), {"params": variables_of(model)}
    config = dataclasses.replace(DATA, pack=True)
    packed = make_batching(examples, config, 12, longest=32)
    assert isinstance(packed, Packed)
    packed = dataclasses.replace(packed, num_rows=len(packed.members))
    (shared,), (batch,) = packed.eval_batches(), eval_batches(examples, 12, [16])
    found = np.asarray(predict(params, shared)["embeddings"])
    assert found.shape == (*shared["example"].shape, 16)
    expected = dict(
        zip(batch["example"].tolist(), predict(params, batch)["embeddings"], strict=True)
    )
    about = {name: shared[name] for name in ("example", "lengths")}
    for number, own in packed.apart({"embeddings": found, **about}):
        np.testing.assert_allclose(own["embeddings"], expected[number], atol=1e-5)
