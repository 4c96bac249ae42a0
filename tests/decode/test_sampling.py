"""Rules of sampling, against definitions that sort, and frequencies against probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxlm.decode import sampling as rules_of
from jaxlm.decode.sampling import Sampling, inverse_cdf

choose, truncated = jax.jit(rules_of.choose), jax.jit(rules_of.truncated)
VOCAB, ROWS = 300, 20_000
LOGITS = np.random.default_rng(0).normal(size=VOCAB).astype(np.float32) * 2


def rules(batch: int, vocab: int = VOCAB, **given) -> Sampling:
    """Plain sampling, with the changes."""
    off = dict(
        temperature=1.0,
        top_k=vocab,
        top_p=1.0,
        min_p=0.0,
        repetition_penalty=1.0,
        min_tokens=0,
        max_tokens=100,
        seed=0,
    )
    whole = {"top_k": np.int32, "min_tokens": np.int32, "max_tokens": np.int32, "seed": np.uint32}
    arrays = {
        name: jnp.full(batch, given.pop(name, value), whole.get(name, np.float32))
        for name, value in off.items()
    }
    none = np.zeros((batch, vocab), bool)
    banned, stops = (jnp.asarray(none | given.pop(name, False)) for name in ("banned", "stops"))
    number = jnp.asarray(given.pop("number", np.arange(batch)), jnp.int32)
    assert not given
    return Sampling(**arrays, banned=banned, stops=stops, number=number)


def expected(
    logits,
    *,
    temperature=1.0,
    top_k=VOCAB,
    top_p=1.0,
    min_p=0.0,
    repetition_penalty=1.0,
    banned=False,
    seen=False,
):
    """Probabilities by a sort of the vocabulary, in float64, one rule after the other."""
    x = logits.astype(np.float64)
    x = np.where(seen, np.where(x > 0, x / repetition_penalty, x * repetition_penalty), x)
    x = np.where(banned, -np.inf, x) / temperature
    order = np.argsort(-x, kind="stable")
    p = np.exp(x[order] - x.max())
    p[top_k:] = 0
    p /= p.sum()
    p[np.cumsum(p) - p >= top_p] = 0  # those before which the sum has reached it
    p[p < min_p * p.max()] = 0
    result = np.zeros_like(p)
    result[order] = p / p.sum()
    return result


def draws(**given) -> np.ndarray:
    """One token for each of many rows with the same logits."""
    seen = given.pop("seen", np.zeros(VOCAB, bool))
    sampling = rules(ROWS, **given)
    many = jnp.broadcast_to(LOGITS, (ROWS, VOCAB))
    index = jnp.zeros(ROWS, jnp.int32)
    seen = jnp.broadcast_to(seen, (ROWS, VOCAB))
    return np.asarray(choose(many, sampling, index, seen)[0])


def p_value(tokens: np.ndarray, probabilities: np.ndarray) -> float:
    """Of Pearson's chi-square; tokens expected fewer than ten times count as one."""
    counts, means = np.bincount(tokens, minlength=VOCAB), probabilities * len(tokens)
    if counts[means == 0].any():
        return 0.0
    rare = means < 10
    counts = np.append(counts[~rare], counts[rare].sum())
    means = np.append(means[~rare], means[rare].sum())
    kept = means > 0
    return float(stats.chisquare(counts[kept], means[kept]).pvalue)


EVERY_THIRD = np.arange(VOCAB) % 3 == 0
# Each with another value of the same rule, by which the frequencies must not be explained.
CASES = {
    "plain": ({}, {"temperature": 1.1}),
    "temperature": ({"temperature": 0.7}, {}),
    "hot": ({"temperature": 1.7}, {"temperature": 1.6}),
    "top_k": ({"top_k": 7}, {"top_k": 8}),
    "top_p": ({"top_p": 0.6}, {"top_p": 0.63}),
    "min_p": ({"min_p": 0.1}, {"min_p": 0.13}),
    "repetition": (
        {"repetition_penalty": 1.3, "seen": EVERY_THIRD},
        {"repetition_penalty": 1.2, "seen": EVERY_THIRD},
    ),
    "banned": ({"banned": EVERY_THIRD}, {}),
    "all": (
        {
            "temperature": 1.5,
            "top_k": 60,
            "top_p": 0.8,
            "min_p": 0.05,
            "repetition_penalty": 1.2,
            "seen": EVERY_THIRD,
            "banned": np.arange(VOCAB) % 7 == 0,
        },
        {"temperature": 1.5, "top_k": 60, "top_p": 0.8, "min_p": 0.05},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_frequencies_are_the_probabilities(name):
    given, other = CASES[name]
    tokens = draws(**given)
    assert p_value(tokens, expected(LOGITS, **given)) > 0.01
    assert p_value(tokens, expected(LOGITS, **other)) < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_probabilities_are_those_of_a_sort(name):
    given = dict(CASES[name][0])
    want = expected(LOGITS, **given)
    given.pop("seen", None)
    given.pop("repetition_penalty", None)
    banned = given.pop("banned", False)
    logits = jnp.where(jnp.asarray(banned), -jnp.inf, LOGITS)[None]
    if name not in ("repetition", "all"):  # those are of choose
        got = truncated(logits, rules(1, **given))[0]
        np.testing.assert_allclose(got / got.sum(), want, rtol=1e-5, atol=1e-9)


def test_the_token_that_crosses_top_p_is_kept():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]] * 4))
    sampling = rules(4, 4)._replace(top_p=jnp.array([0.49, 0.51, 0.81, 1e-9]))
    kept = np.asarray(truncated(logits, sampling) > 0).sum(axis=1)
    assert kept.tolist() == [1, 2, 3, 1]


def test_ties_at_the_border_are_kept():
    logits = jnp.array([[2.0, 1.0, 1.0, 1.0, 0.0]] * 2)
    sampling = rules(2, 5)._replace(top_k=jnp.array([2, 5]), top_p=jnp.array([1.0, 0.6]))
    assert (truncated(logits, sampling) > 0).tolist() == [[True] * 4 + [False]] * 2


def test_top_k_1_and_a_tiny_top_p_are_greedy():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(64, VOCAB)), jnp.float32)
    index, seen = jnp.zeros(64, jnp.int32), jnp.zeros((64, VOCAB), bool)
    greedy, _ = choose(logits, rules(64, temperature=0.0), index, seen)
    assert (greedy == logits.argmax(axis=1)).all()
    for given in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-6}):
        assert (choose(logits, rules(64, **given), index, seen)[0] == greedy).all()
        if given != {"temperature": 1e-6}:
            assert (truncated(logits, rules(64, **given)) > 0).sum() == 64
    assert (choose(logits, rules(64, top_k=2), index, seen)[0] != greedy).any()  # the control


def test_of_equal_logits_the_first_is_greedy():
    logits, seen = jnp.array([[0.0, 3.0, 3.0, 1.0]]), jnp.zeros((1, 4), bool)
    for given in ({"temperature": 0.0}, {"top_k": 1}):
        tokens, _ = choose(logits, rules(1, 4, **given), jnp.zeros(1, jnp.int32), seen)
        assert tokens.tolist() == [1]


def test_log_probabilities_are_the_models_own():
    logits = jnp.broadcast_to(LOGITS, (8, VOCAB))
    sampling = rules(
        8, temperature=0.5, top_k=20, min_p=0.01, repetition_penalty=2.0, banned=EVERY_THIRD
    )
    seen = jnp.ones((8, VOCAB), bool)
    tokens, log_probabilities = choose(logits, sampling, jnp.zeros(8, jnp.int32), seen)
    want = jax.nn.log_softmax(jnp.asarray(LOGITS))[tokens]
    np.testing.assert_allclose(log_probabilities, want, rtol=1e-5)


def test_stop_tokens_wait_for_the_fewest():
    best = int(LOGITS.argmax())
    sampling = rules(2, temperature=0.0, min_tokens=3, stops=np.arange(VOCAB) == best)
    logits, seen = jnp.broadcast_to(LOGITS, (2, VOCAB)), jnp.zeros((2, VOCAB), bool)
    tokens, _ = choose(logits, sampling, jnp.array([2, 3]), seen)
    assert tokens[0] != best
    assert tokens[1] == best


def test_each_row_has_its_own_rules():
    """Together as alone, whatever the others ask for."""
    every = [case for case, _ in CASES.values()] + [{"temperature": 0.0}, {"top_k": 1}]
    numbered = [
        {k: v for k, v in case.items() if k != "seen"} | {"number": [i], "seed": i}
        for i, case in enumerate(every)
    ]
    alone = [rules(1, **case) for case in numbered]
    together = jax.tree.map(lambda *rows: jnp.concatenate(rows), *alone)
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(len(every), VOCAB)), jnp.float32)
    index, seen = jnp.full(len(every), 5), jnp.broadcast_to(EVERY_THIRD, logits.shape)
    tokens, _ = choose(logits, together, index, seen)
    for i, one in enumerate(alone):
        row = slice(i, i + 1)
        assert choose(logits[row], one, index[row], seen[row])[0] == tokens[i]


@pytest.mark.parametrize("vocab", [3, 256, 257, 1000])
def test_inverse_cdf(vocab):
    rng = np.random.default_rng(vocab)
    weights = (rng.random((400, vocab)) * (rng.random((400, vocab)) < 0.3)).astype(np.float32)
    weights[:, vocab // 2] += 1e-6  # of which a row has at least one
    uniform = rng.random(400).astype(np.float32)
    uniform[:3] = 0, 1 - 2**-24, 1 - 2**-23
    got = np.asarray(inverse_cdf(jnp.asarray(weights), jnp.asarray(uniform)))
    assert (np.take_along_axis(weights, got[:, None], axis=1) > 0).all()
    running = np.cumsum(weights.astype(np.float64), axis=1)
    target = uniform * running[:, -1].astype(np.float64)
    slack = 1e-5 * running[:, -1]
    at = np.take_along_axis(running, got[:, None], axis=1)[:, 0]
    before = at - np.take_along_axis(weights, got[:, None], axis=1)[:, 0]
    assert (at > target - slack).all()
    assert (before <= target + slack).all()
