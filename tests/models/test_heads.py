from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from tiny_models import BERT

from jaxlm import tree
from jaxlm.models.heads import ClassificationHead, EmbeddingHead, TokenHead, WithHead
from jaxlm.models.pooling import bert_pooler, last_pool, mean_pool
from jaxlm.sharding import axes_of

GOLDEN = Path(__file__).parent.parent / "golden" / "classifier_tiny.npz"
ENCODER = replace(BERT, vocab_size=20, num_layers=1, max_length=10)
HIDDEN = np.float32(np.random.default_rng(0).normal(size=(3, 5, 4)))
LENGTHS = np.array([5, 2, 0])
SEGMENTS = np.where(np.arange(5)[None] < LENGTHS[:, None], 0, -1)


def variables_of(module, *args):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda s: jnp.float32(rng.normal(size=s.shape)), shapes)


def paths_of(variables):
    return {path: leaf.shape for path, leaf in tree.leaves_with_path(variables)}


def test_equals_hugging_face():
    golden = dict(np.load(GOLDEN))
    params = {path[7:]: leaf for path, leaf in golden.items() if path.startswith("params/")}
    variables = {"params": unflatten_dict({k: jnp.asarray(v) for k, v in params.items()}, sep="/")}
    model = WithHead(ENCODER.make(), ClassificationHead(3))
    tokens, types = jnp.asarray(golden["tokens"]), jnp.asarray(golden["token_type_ids"])
    place = np.arange(tokens.shape[1])[None]
    segments = np.where(place < golden["lengths"][:, None], 0, -1)

    @jax.jit
    def run(types, segments):
        return model.apply(variables, tokens, token_type_ids=types, segment_ids=segments)

    assert paths_of(variables) == paths_of(jax.eval_shape(model.init, jax.random.key(0), tokens))
    assert np.abs(golden["logits"]).max() > 1
    np.testing.assert_allclose(run(types, segments), golden["logits"], rtol=0, atol=1e-5)
    # Controls: each input is felt.
    assert np.abs(run(1 - types, segments) - golden["logits"]).max() > 0.01
    assert np.abs(run(types, 0 * segments)[1:] - golden["logits"][1:]).max() > 0.01


def test_classification_by_hand():
    head = ClassificationHead(2)
    variables = variables_of(head, jnp.asarray(HIDDEN))
    assert paths_of(variables) == {
        "params/pooler/kernel": (4, 4),
        "params/pooler/bias": (4,),
        "params/classifier/kernel": (4, 2),
        "params/classifier/bias": (2,),
    }
    p = jax.tree.map(np.asarray, variables["params"])
    pooled = np.tanh(HIDDEN[:, 0] @ p["pooler"]["kernel"] + p["pooler"]["bias"])
    expected = pooled @ p["classifier"]["kernel"] + p["classifier"]["bias"]
    logits = jax.jit(head.apply)(variables, jnp.asarray(HIDDEN), SEGMENTS)
    np.testing.assert_allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize(
    "head", [ClassificationHead(3), ClassificationHead(3, pool=mean_pool), TokenHead(2)]
)
def test_every_parameter_has_a_place_and_a_kind(head):
    shapes = jax.eval_shape(head.init, jax.random.key(0), jnp.asarray(HIDDEN))
    for path, leaf in tree.leaves_with_path(shapes):
        assert axes_of(path, leaf.ndim).inputs == path.endswith("kernel")


def test_mean_pool_by_hand():
    found = jax.jit(mean_pool)(HIDDEN, SEGMENTS)
    np.testing.assert_allclose(found[0], HIDDEN[0].mean(0), atol=1e-6)
    np.testing.assert_allclose(found[1], HIDDEN[1, :2].mean(0), atol=1e-6)
    assert np.abs(found[2]).max() == 0
    np.testing.assert_allclose(jax.jit(mean_pool)(HIDDEN), HIDDEN.mean(1), atol=1e-6)
    # All documents of a packed row count.
    packed = jax.jit(mean_pool)(HIDDEN, np.abs(SEGMENTS))
    np.testing.assert_allclose(packed, HIDDEN.mean(1), atol=1e-6)


def test_last_pool_by_hand():
    """Padding on either side; a row without tokens is 0."""
    sides = jnp.asarray(np.array([[0] * 3 + [-1] * (HIDDEN.shape[1] - 3)]))
    hidden = jnp.asarray(HIDDEN)
    np.testing.assert_array_equal(last_pool(hidden[:1], sides)[0], HIDDEN[0, 2])
    np.testing.assert_array_equal(last_pool(hidden[:1], sides[:, ::-1])[0], HIDDEN[0, -1])
    assert not last_pool(hidden[:1], jnp.full_like(sides, -1)).any()
    np.testing.assert_array_equal(last_pool(hidden), HIDDEN[:, -1])


def test_pools_without_parameters_have_none():
    head = ClassificationHead(2, pool=mean_pool)
    variables = variables_of(head, jnp.asarray(HIDDEN))
    assert set(variables["params"]) == {"classifier"}
    p = variables["params"]["classifier"]
    logits = jax.jit(head.apply)(variables, jnp.asarray(HIDDEN), SEGMENTS)
    expected = mean_pool(jnp.asarray(HIDDEN), jnp.asarray(SEGMENTS)) @ p["kernel"] + p["bias"][None]
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_tokens_by_hand():
    head = TokenHead(3)
    variables = variables_of(head, jnp.asarray(HIDDEN))
    p = jax.tree.map(np.asarray, variables["params"]["classifier"])
    logits = jax.jit(head.apply)(variables, jnp.asarray(HIDDEN), SEGMENTS)
    np.testing.assert_allclose(logits, HIDDEN @ p["kernel"] + p["bias"], atol=1e-5)


def test_embeddings_have_length_one_and_finite_gradients():
    head = EmbeddingHead()
    assert jax.eval_shape(head.init, jax.random.key(0), jnp.asarray(HIDDEN)) == {}

    @jax.jit
    def both(hidden):
        def total(hidden):
            embeddings = head.apply({}, hidden, jnp.asarray(SEGMENTS))
            return jnp.sum(jnp.sin(embeddings)), embeddings

        return jax.grad(total, has_aux=True)(hidden)

    gradient, embeddings = both(HIDDEN)
    mean = HIDDEN[1, :2].mean(0)
    np.testing.assert_allclose(embeddings[1], mean / np.linalg.norm(mean), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=-1), [1, 1, 0], atol=1e-6)
    assert np.isfinite(gradient).all()
    real = SEGMENTS >= 0
    assert np.abs(gradient[real]).max() > 0
    assert np.abs(gradient[~real]).max() == 0


@pytest.mark.parametrize("head", [ClassificationHead(2, 0.5), TokenHead(2, 0.5)])
def test_dropout_follows_its_rate(head):
    variables = variables_of(head, jnp.asarray(HIDDEN))

    @jax.jit
    def drawn(key):
        return head.apply(
            variables, jnp.asarray(HIDDEN), deterministic=False, rngs={"dropout": key}
        )

    assert np.abs(drawn(jax.random.key(0)) - drawn(jax.random.key(1))).max() > 0.01


@pytest.mark.parametrize(
    "head", [ClassificationHead(2), ClassificationHead(2, pool=mean_pool), TokenHead(2)]
)
def test_logits_are_float32(head):
    variables = variables_of(head, jnp.asarray(HIDDEN))
    low = jax.jit(head.apply)(variables, jnp.bfloat16(HIDDEN))
    assert low.dtype == jnp.float32
    assert np.abs(low - jax.jit(head.apply)(variables, HIDDEN)).max() < 0.1
    # Not just widened: more digits than a bfloat16 holds.
    assert (low != low.astype(jnp.bfloat16).astype(jnp.float32)).any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_pooler_computes_in_the_type_of_its_input(dtype):
    seen = []

    def spy(hidden, segment_ids):
        seen.append(bert_pooler(hidden, segment_ids))
        return seen[-1]

    head = ClassificationHead(2, pool=spy)
    jax.eval_shape(head.init, jax.random.key(0), jnp.asarray(HIDDEN, dtype))
    assert [pooled.dtype for pooled in seen] == [dtype]


def test_what_an_encoder_and_a_head_are_told():
    told = {}

    class Spy(EmbeddingHead):
        def __call__(self, *args, **options):
            told[self.name] = (args, options)
            return jnp.zeros((1, 2, 4))

    model = WithHead(Spy(), Spy())
    tokens, ids = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), jnp.int32)
    model.apply({}, tokens, token_type_ids=ids, segment_ids=ids, deterministic=True)
    assert told["encoder"] == (
        (tokens,),
        {"token_type_ids": ids, "positions": None, "segment_ids": ids, "deterministic": True},
    )
    assert told["head"][0][1] is ids
    assert told["head"][1] == {"deterministic": True}
