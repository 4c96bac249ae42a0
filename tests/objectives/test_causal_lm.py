"""The causal loss by hand, on logits that are given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.objectives.causal_lm import make_loss
from jaxlm.objectives.masking import Vocabulary

SIZE, START, END = 10, 1, 2
VOCABULARY = Vocabulary(
    mask_id=None,
    start_id=START,
    end_id=END,
    ordinary=jnp.arange(3, SIZE),
    is_ordinary=jnp.arange(SIZE) >= 3,
    word_starts=jnp.arange(SIZE) >= 3,
)
TABLE = np.random.default_rng(0).normal(size=(SIZE, SIZE)).astype(np.float32)
TOKENS = np.array([[1, 5, 6, 2, 1, 7, 2, 1], [8, 2, 1, 9, 2, 0, 0, 0]])
VARIABLES = {"params": jnp.asarray(TABLE)}
# Pairs of neighbours of one document: (row, position of the first).
PAIRS = [(0, 0), (0, 1), (0, 2), (0, 4), (0, 5), (1, 0), (1, 2), (1, 3)]


def bigram(variables, tokens, **told):
    return variables["params"][tokens]


def make_batch(**more):
    batch = {"tokens": TOKENS, "lengths": np.array([8, 5]), "index": np.arange(2), **more}
    return {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()}


def measure(batch, **options):
    loss = make_loss(bigram, VOCABULARY, **options)
    return loss(VARIABLES, batch, jax.random.key(0), progress=jnp.zeros(()), deterministic=True)


def cost(pairs):
    log = TABLE - np.log(np.exp(TABLE).sum(-1, keepdims=True))
    return sum(-log[TOKENS[row, i], TOKENS[row, i + 1]] for row, i in pairs)


def test_the_last_token_of_a_document_predicts_nothing():
    total, sums = measure(make_batch())
    assert float(sums.weight) == len(PAIRS)
    assert float(total) == pytest.approx(cost(PAIRS), rel=1e-6)
    assert float(sums.counts["tokens"]) == 13
    joined = [*PAIRS, (0, 3), (0, 6), (1, 1)]
    total, sums = measure(make_batch(), isolate_documents=False)
    assert float(sums.weight) == len(joined)
    assert float(total) == pytest.approx(cost(joined), rel=1e-6)


def test_what_comes_before_first_does_not_count():
    total, sums = measure(make_batch(first=np.array([5, 3])))
    chosen = [(row, i) for row, i in PAIRS if i + 1 >= (5, 3)[row]]
    assert (float(sums.weight), len(chosen)) == (4, 4)
    assert float(total) == pytest.approx(cost(chosen), rel=1e-6)


def test_only_padding_is_no_loss():
    total, sums = measure(make_batch() | {"lengths": jnp.zeros(2, jnp.int32)})
    assert (float(total), float(sums.weight)) == (0, 0)


def test_the_model_is_told_of_documents():
    told = {}

    def apply(variables, tokens, **options):
        told.update(options)
        return variables["params"][tokens]

    loss = make_loss(apply, VOCABULARY)
    for deterministic in (True, False):
        loss(
            VARIABLES,
            make_batch(),
            jax.random.key(0),
            progress=jnp.zeros(()),
            deterministic=deterministic,
        )
        assert (told["rngs"] is None) == deterministic
    assert told["segment_ids"].tolist()[1] == [0, 0, 1, 1, 1, -1, -1, -1]
    assert told["positions"].tolist()[1][:5] == [0, 1, 0, 1, 2]
