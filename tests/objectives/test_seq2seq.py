"""The loss of targets: what counts, what is smoothed, and what a model is told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import InputError
from jaxlm.objectives.seq2seq import make_loss, make_predict

VOCAB = 7
RNG = np.random.default_rng(0)
BATCH = {
    "tokens": RNG.integers(0, VOCAB, (3, 6)).astype(np.int32),
    "lengths": np.array([6, 2, 4], np.int32),
    "targets": RNG.integers(0, VOCAB, (3, 5)).astype(np.int32),
    "decoder_tokens": RNG.integers(0, VOCAB, (3, 5)).astype(np.int32),
    "target_lengths": np.array([3, 5, 4], np.int32),
    "weights": np.array([1, 1, 0], np.float32),
    "index": np.arange(3, dtype=np.int32),
}
LOGITS = RNG.normal(size=(3, 5, VOCAB)).astype(np.float32)
REAL = (np.arange(5) < BATCH["target_lengths"][:, None]) * BATCH["weights"][:, None]


def by_hand(smoothing: float):
    """The sum over the tokens of targets, and its gradient by their logits."""
    probabilities = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    wanted = (1 - smoothing) * np.eye(VOCAB)[BATCH["targets"]] + smoothing / VOCAB
    losses = -(wanted * np.log(probabilities)).sum(-1)
    return (losses * REAL).sum(), (probabilities - wanted) * REAL[..., None]


def apply(variables, tokens, decoder_tokens, **options):
    return variables["logits"]


def measure(smoothing: float):
    loss = make_loss(apply, label_smoothing=smoothing)

    def minimised(logits):
        key, zero = jax.random.key(0), jnp.zeros(())
        return loss({"logits": logits}, BATCH, key, progress=zero, deterministic=True)

    return jax.value_and_grad(minimised, has_aux=True)(jnp.asarray(LOGITS))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_and_its_gradient_by_hand(smoothing):
    (total, sums), gradient = measure(smoothing)
    expected, expected_gradient = by_hand(smoothing)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-6)
    means = sums.means()
    assert means["loss"] == pytest.approx(by_hand(0.0)[0] / 8, rel=1e-5)  # 3 and 5 tokens
    assert ("smoothed_loss" in means) == (smoothing > 0)
    if smoothing:
        assert means["smoothed_loss"] == pytest.approx(expected / 8, rel=1e-5)
    right = (LOGITS.argmax(-1) == BATCH["targets"]) * REAL
    assert means["accuracy"] == pytest.approx(right.sum() / 8)
    assert sums.counts["tokens"] == 6 + 2 + 4 + 3 + 5 + 4


def test_outputs_are_of_each_token():
    found = make_predict(apply)({"logits": jnp.asarray(LOGITS)}, BATCH)
    np.testing.assert_array_equal(found["weights"], REAL)
    np.testing.assert_allclose((found["losses"] * REAL).sum(), by_hand(0.0)[0], rtol=1e-5)
    np.testing.assert_array_equal(found["correct"], LOGITS.argmax(-1) == BATCH["targets"])


@pytest.mark.parametrize("deterministic", [True, False])
def test_what_a_model_is_told(deterministic):
    told = {}

    def apply(variables, tokens, decoder_tokens, **options):
        told.update(options, tokens=tokens, decoder_tokens=decoder_tokens)
        return jnp.asarray(LOGITS)

    loss = make_loss(apply)
    loss({}, BATCH, jax.random.key(0), progress=jnp.zeros(()), deterministic=deterministic)
    for name in ("tokens", "decoder_tokens"):
        np.testing.assert_array_equal(told[name], BATCH[name])
    for name, lengths, width in (
        ("segment_ids", "lengths", 6),
        ("decoder_segment_ids", "target_lengths", 5),
    ):
        np.testing.assert_array_equal(
            told[name], np.where(np.arange(width) < BATCH[lengths][:, None], 0, -1)
        )
    assert told["deterministic"] is deterministic
    assert (told["rngs"] is None) is deterministic


def test_smoothing_is_a_share():
    with pytest.raises(InputError, match=r"label_smoothing=1.0 is not inside \[0, 1\)"):
        make_loss(apply, label_smoothing=1.0)
