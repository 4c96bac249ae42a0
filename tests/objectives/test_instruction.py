"""The loss of responses: what counts, and that dialogues that share a row do not see each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models.gpt2 import Gpt2Config
from jaxlm.objectives.instruction import make_loss, make_predict
from jaxlm.objectives.packing import positions_within
from jaxlm.tasks.instruction import Instruction

MODEL = Instruction().make_model(
    Gpt2Config(
        vocab_size=16, num_layers=1, hidden_dim=8, num_heads=2, mlp_dim=8, max_length=32
    ).with_dropout(0.0),
    (),
    0.0,
)
LENGTHS = [5, 7, 4]
RNG = np.random.default_rng(0)
PARTS = [
    {
        "tokens": RNG.integers(0, 16, n),
        "dialogues": np.full(n, number),
        "weights": np.array([0, 0, 1, 1, 0, 1, 1][:n], np.float32),
    }
    for number, n in enumerate(LENGTHS, start=1)
]


def batch(*rows):
    """Rows of parts."""
    length = max(sum(len(part["tokens"]) for part in row) for row in rows) + 1
    made = {name: np.zeros((len(rows), length), x.dtype) for name, x in PARTS[0].items()}
    for i, row in enumerate(rows):
        for name, into in made.items():
            values = np.concatenate([part[name] for part in row])
            into[i, : len(values)] = values
    lengths = np.array([sum(len(part["tokens"]) for part in row) for row in rows])
    return made | {"lengths": lengths, "index": np.arange(len(rows))}


APART = batch(*([part] for part in PARTS))
SHARED = batch(PARTS)


@jax.jit
def measure(variables, batch):
    loss = make_loss(MODEL.apply)
    value = lambda v: loss(v, batch, jax.random.key(0), progress=jnp.zeros(()), deterministic=True)
    return jax.value_and_grad(value, has_aux=True)(variables)


def test_sharing_a_row_changes_nothing():
    variables = MODEL.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    variables = jax.tree.map(lambda x: x + 0.3, variables)  # so that positions matter
    (apart, sums), gradient = measure(variables, APART)
    (shared, packed), same = measure(variables, SHARED)
    assert float(sums.weight) == float(packed.weight) == sum(p["weights"].sum() for p in PARTS)
    assert float(shared) == pytest.approx(float(apart), rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), gradient, same
    )
    # As one dialogue, they see each other.
    (mixed, _), _ = measure(variables, SHARED | {"dialogues": np.minimum(SHARED["dialogues"], 1)})
    assert abs(float(mixed) - float(apart)) > 1e-3


@pytest.mark.parametrize("rows", [APART, SHARED], ids=["apart", "shared"])
def test_only_responses_have_a_gradient(rows):
    """By logits that are given: those at a position predict the next token."""
    logits = RNG.normal(size=(*rows["tokens"].shape, 16))
    given = lambda variables, tokens, **told: variables["logits"]

    def gradient(rows):
        loss = make_loss(given)
        value = lambda x: loss(
            {"logits": x}, rows, jax.random.key(0), progress=jnp.zeros(()), deterministic=True
        )
        return np.abs(jax.grad(lambda x: value(x)[0])(jnp.asarray(logits, jnp.float32))).sum(-1)

    learned = np.roll(rows["weights"], -1, axis=1) > 0
    found = gradient(rows)
    assert (found[~learned] == 0).all()
    assert (found[learned] > 0).all()
    everywhere = gradient(rows | {"weights": np.ones_like(rows["weights"])})
    assert (everywhere[:, :-1] > 0).all()


def test_losses_of_tokens_add_up():
    table = jnp.asarray(RNG.normal(size=(16, 16)), jnp.float32)
    apply = lambda variables, tokens, **told: variables["table"][tokens]
    variables = {"table": table}
    outputs = make_predict(apply)(variables, SHARED)
    total, sums = make_loss(apply)(
        variables, SHARED, jax.random.key(0), progress=jnp.zeros(()), deterministic=True
    )
    log = jax.nn.log_softmax(table)
    tokens, weights = SHARED["tokens"][0], SHARED["weights"][0]
    by_hand = -sum(log[tokens[i], tokens[i + 1]] for i in np.flatnonzero(weights) - 1)
    assert float(total) == pytest.approx(float(by_hand), rel=1e-5)
    assert float((outputs["losses"] * outputs["weights"]).sum()) == pytest.approx(float(total))
    hits = float((outputs["correct"] * outputs["weights"]).sum())
    assert hits == float(sums.totals["accuracy"])
    assert float(sums.counts["tokens"]) == sum(LENGTHS)


def test_positions_begin_with_each_dialogue():
    found = positions_within(jnp.asarray(SHARED["dialogues"]) - 1)
    assert found[0, : sum(LENGTHS)].tolist() == [i for n in LENGTHS for i in range(n)]
