from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import tree
from jaxlm.errors import InputError
from jaxlm.models.bilstm import BilstmConfig
from jaxlm.models.heads import ClassificationHead, WithHead
from jaxlm.models.pooling import mean_pool
from jaxlm.nn.intercept import find_sites
from jaxlm.peft import lora
from jaxlm.sharding import axes_of

CONFIG = BilstmConfig(vocab_size=30, embed_dim=6, hidden_dim=8, num_layers=2, max_length=9)
MODEL = CONFIG.make()
TOKENS = np.random.default_rng(0).integers(0, 30, (3, 7))


def random_like(shapes):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.float32(rng.normal(size=s.shape)), shapes)


def shapes_of(model):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(TOKENS))


VARIABLES = random_like(shapes_of(MODEL))


@jax.jit
def run(tokens, token_type_ids=None, segment_ids=None):
    return MODEL.apply(VARIABLES, tokens, token_type_ids=token_type_ids, segment_ids=segment_ids)


def test_shapes_by_hand():
    found = {path: leaf.shape for path, leaf in tree.leaves_with_path(shapes_of(MODEL))}
    expected = {
        "params/token_embed/embedding": (30, 6),
        "params/token_type_embed/embedding": (2, 6),
    }
    for direction in ("forward", "backward"):
        for layer, inputs in enumerate((6, 8)):
            path = f"params/layers_{layer}/{direction}"
            expected[f"{path}/input/kernel"] = (inputs, 4, 4)
            expected[f"{path}/input/bias"] = (4, 4)
            expected[f"{path}/recurrent_kernel"] = (4, 4, 4)
    assert found == expected
    linear = {path for path, shape in found.items() if axes_of(path, len(shape)).inputs}
    assert linear == {path for path in found if not path.endswith("bias")}
    assert run(TOKENS).shape == (3, 7, 8)


def test_padding_changes_nothing():
    lengths = np.array([7, 4, 1])
    real = np.arange(7)[None] < lengths[:, None]
    hidden = run(np.where(real, TOKENS, 29), None, np.where(real, 0, -1))
    for row, length in enumerate(lengths):
        alone = run(TOKENS[row : row + 1, :length])
        np.testing.assert_allclose(hidden[row, :length], alone[0], atol=1e-5)
    unmasked = run(np.where(real, TOKENS, 29))  # the control
    assert np.abs(unmasked[1, :4] - hidden[1, :4]).max() > 0.01


def test_token_types_are_felt():
    types = np.arange(7)[None].repeat(3, 0) // 4
    plain = run(TOKENS)
    np.testing.assert_allclose(run(TOKENS, 0 * types), plain, atol=1e-6)
    assert np.abs(run(TOKENS, types) - plain).max() > 0.01


def test_dropout_follows_its_rate():
    def drawn(rate, seed):
        model = replace(CONFIG, dropout_rate=rate).make()
        key = jax.random.key(seed)
        return jax.jit(
            lambda: model.apply(
                VARIABLES, jnp.asarray(TOKENS), deterministic=False, rngs={"dropout": key}
            )
        )()

    np.testing.assert_allclose(drawn(0.0, 0), run(TOKENS), atol=1e-6)
    assert np.abs(drawn(0.5, 0) - drawn(0.5, 1)).max() > 0.01


def test_it_learns_the_order_of_tokens():
    # Is there a 1 before a 2? No bag of words knows.
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 30, (64, 7))
    labels = rng.integers(0, 2, 64)
    tokens[:, 1], tokens[:, 5] = 1 + labels, 2 - labels
    model = WithHead(
        replace(CONFIG, num_layers=1, dropout_rate=0.0).make(),
        ClassificationHead(2, 0.0, mean_pool),
    )

    adam = optax.adam(0.05)

    def loss(variables):
        logits = model.apply(variables, jnp.asarray(tokens))
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(labels)[:, None], 1)
        return -chosen.mean()

    @jax.jit
    def train(variables):
        def body(carry, _):
            variables, state = carry
            value, gradient = jax.value_and_grad(loss)(variables)
            updates, state = adam.update(gradient, state)
            return (optax.apply_updates(variables, updates), state), value

        return jax.lax.scan(body, (variables, adam.init(variables)), None, length=60)[1]

    losses = train(jax.jit(model.init)(jax.random.key(0), jnp.asarray(tokens)))
    assert losses[0] == pytest.approx(np.log(2), abs=0.05)
    assert losses[-1] < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_dim": 7}, "hidden_dim=7 is odd"),
        ({"embed_dim": 0}, "embed_dim=0 is not above 0"),
        ({"max_length": 0}, "max_length=0 is not above 0; None = no limit"),
        ({"dropout_rate": 1.0}, "dropout_rate=1.0 is not inside"),
    ],
)
def test_impossible_configs(change, message):
    with pytest.raises(InputError, match=message):
        BilstmConfig(**change)


def test_the_vocabulary_must_be_known():
    with pytest.raises(InputError, match="vocab_size=None"):
        BilstmConfig().make()


def test_rows_that_are_too_long():
    long = jnp.zeros((1, 10), jnp.int32)
    with pytest.raises(InputError, match="rows of 10 tokens do not fit max_length=9"):
        jax.eval_shape(MODEL.apply, VARIABLES, long)
    free = replace(CONFIG, max_length=None).make()
    assert jax.eval_shape(free.apply, VARIABLES, long).shape == (1, 10, 8)


def test_each_example_has_its_adapter_in_a_batch_as_long_as_its_rows():
    config = lora.LoraConfig(targets=("input/kernel",), rank=2)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 30, (7, 7)))
    sites = find_sites(lambda variables: MODEL.apply(variables, tokens), VARIABLES)
    one = lora.init_at(jax.random.key(0), VARIABLES["params"], sites, config)
    rng = np.random.default_rng(2)
    two = [jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), one) for _ in range(2)]
    ids = jnp.array([0, 1, 1, 0, 1, 0, 0])

    @jax.jit
    def both():
        apply = lora.adapt(MODEL.apply, config)
        together = apply(VARIABLES | {"lora": lora.stack(two)}, tokens, adapter_ids=ids)
        return together, [apply(VARIABLES | {"lora": adapter}, tokens) for adapter in two]

    together, apart = both()
    expected = jnp.where((ids == 0)[:, None, None], *apart)
    np.testing.assert_allclose(together, expected, atol=1e-5)
    assert float(jnp.abs(apart[0] - apart[1]).max()) > 0.1
