import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.optim import OptimizerConfig, make_optimizer
from jaxlm.sums import Sums
from jaxlm.train.state import TrainState
from jaxlm.train.step import make_eval_step, make_train_step

# A linear map with squared error: every row has a weight, and rows of very unequal weight.
RNG = np.random.default_rng(0)
PARAMS = {
    "up": {"kernel": RNG.normal(size=(4, 3)), "bias": RNG.normal(size=3)},
    "down": {"kernel": RNG.normal(size=(3, 2))},
}
BATCH = {
    "x": RNG.normal(size=(8, 4)),
    "y": RNG.normal(size=(8, 2)),
    "weights": np.array([100, 0, 3, 0, 1, 0, 1, 50]),
}
SGD = optax.scale(-1.0)
ADAMW = make_optimizer(OptimizerConfig(weight_decay=0.1))


def as_jax(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def loss(variables, batch, key, *, progress, deterministic):
    params = variables["params"]
    up = batch["x"] @ params["up"]["kernel"] + params["up"]["bias"][None, :]
    error = jnp.tanh(up) @ params["down"]["kernel"] - batch["y"]
    total = jnp.sum(jnp.square(error).sum(-1) * batch["weights"])
    counts = {
        "rows": jnp.float32(batch["x"].shape[0]),
        "draw": jax.random.uniform(key),
        "progress": progress,
        "deterministic": jnp.float32(deterministic),
    }
    return total, Sums({"loss": total}, batch["weights"].sum(), counts)


def make_state(optimizer=SGD, frozen=()):
    trainable = {"params": as_jax({k: v for k, v in PARAMS.items() if k not in frozen})}
    rest = {"params": as_jax({k: v for k, v in PARAMS.items() if k in frozen})} if frozen else {}
    return TrainState.create(trainable, rest, optimizer)


def make_step(optimizer=SGD, **options):
    return jax.jit(make_train_step(loss, optimizer, lambda progress: 0.1 * progress, **options))


@pytest.fixture(scope="module")
def sgd_step():
    return make_step(seed=0)


@pytest.fixture(scope="module")
def adamw_step():
    return make_step(ADAMW, seed=0)


ONE = jnp.ones(())


def difference(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in pairs)


def mean_gradient(params, batch):
    def mean(params):
        total, sums = loss(
            {"params": params}, batch, jax.random.key(0), progress=ONE, deterministic=False
        )
        return total / sums.weight

    return jax.jit(jax.value_and_grad(mean))(params)


def test_one_step_by_hand(sgd_step):
    state, sums = sgd_step(make_state(), as_jax(BATCH), jnp.float32(0.5))
    value, gradient = mean_gradient(as_jax(PARAMS), as_jax(BATCH))
    expected = jax.tree.map(lambda p, g: p - 0.05 * g, as_jax(PARAMS), gradient)
    assert difference(state.trainable["params"], expected) < 1e-6
    assert int(state.step) == 1
    assert sums.means()["loss"] == pytest.approx(float(value), rel=1e-5)
    counts = {name: float(count) for name, count in sums.counts.items()}
    assert counts["grad_norm"] == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-5)
    assert counts["lr"] == pytest.approx(0.05)
    names = ("steps", "skipped", "rows", "progress", "deterministic")
    assert [counts[name] for name in names] == [1, 0, 8, 0.5, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_gradients_that_are_not_finite_skip_the_update(adamw_step, bad):
    before, _ = adamw_step(make_state(ADAMW), as_jax(BATCH), ONE)
    poisoned = as_jax(BATCH)
    poisoned["y"] = poisoned["y"].at[0, 0].set(bad)
    after, sums = adamw_step(before, poisoned, ONE)
    assert difference((after.trainable, after.opt_state), (before.trainable, before.opt_state)) == 0
    assert (int(after.step), float(sums.counts["skipped"]), float(sums.counts["steps"])) == (
        2,
        1,
        1,
    )
    # The run continues, as if the bad batch had not been.
    later, sums = adamw_step(after, as_jax(BATCH), ONE)
    straight, _ = adamw_step(before, as_jax(BATCH), ONE)
    assert difference(later.trainable, straight.trainable) == 0
    assert float(sums.counts["skipped"]) == 0
    assert difference(later.trainable, before.trainable) > 1e-3


def test_a_batch_without_weight_changes_nothing(adamw_step):
    before, _ = adamw_step(make_state(ADAMW), as_jax(BATCH), ONE)
    empty = as_jax(BATCH | {"weights": np.zeros(8)})
    after, sums = adamw_step(before, empty, ONE)
    assert difference((after.trainable, after.opt_state), (before.trainable, before.opt_state)) == 0
    assert (int(after.step), float(sums.counts["skipped"]), float(sums.weight)) == (2, 0, 0)
    assert np.isnan(sums.means()["loss"])
    # The control: momentum and decay would have moved it.
    faint, _ = adamw_step(before, as_jax(BATCH | {"weights": np.full(8, 1e-6)}), ONE)
    assert difference(faint.trainable, before.trainable) > 1e-3


def test_weights_below_one_still_give_a_mean(sgd_step):
    state, _ = sgd_step(make_state(), as_jax(BATCH), ONE)
    small, _ = sgd_step(make_state(), as_jax(BATCH | {"weights": BATCH["weights"] / 1000}), ONE)
    assert difference(small.trainable, state.trainable) < 1e-5


@pytest.mark.parametrize("num_micro_batches", [2, 4, 8])
def test_accumulated_equals_one_big_batch(sgd_step, num_micro_batches):
    step = make_step(seed=0, num_micro_batches=num_micro_batches)
    whole = parts = make_state()
    for _ in range(3):
        whole, whole_sums = sgd_step(whole, as_jax(BATCH), ONE)
        parts, parts_sums = step(parts, as_jax(BATCH), ONE)
    assert difference(whole.trainable, parts.trainable) < 1e-5
    assert difference(whole.trainable, make_state().trainable) > 1e-2
    assert float(parts_sums.totals["loss"]) == pytest.approx(float(whole_sums.totals["loss"]))
    assert float(parts_sums.weight) == float(whole_sums.weight)
    assert float(parts_sums.counts["rows"]) == 8
    assert float(parts_sums.counts["steps"]) == 1


def test_gradients_of_bfloat16_parameters_add_up_in_float32():
    # Each row's is 1: a sum in bfloat16 would stop at 256.
    def loss(variables, batch, key, *, progress, deterministic):
        total = jnp.sum(variables["shift"].astype(jnp.float32) * batch["x"])
        return total, Sums({"loss": total}, batch["x"].sum())

    state = TrainState.create({"shift": jnp.zeros((), jnp.bfloat16)}, {}, SGD)
    step = jax.jit(make_train_step(loss, SGD, num_micro_batches=1024))
    after, _ = step(state, {"x": jnp.ones(1024)}, ONE)
    assert float(after.trainable["shift"]) == -1
    assert after.trainable["shift"].dtype == jnp.bfloat16


def test_a_mean_of_means_would_differ(sgd_step):
    # The control: the halves weigh 104 and 51, so the mean of their gradients is another.
    state, _ = sgd_step(make_state(), as_jax(BATCH), ONE)
    params, halves = as_jax(PARAMS), []
    for part in (slice(0, 4), slice(4, 8)):
        half = as_jax({name: x[part] for name, x in BATCH.items()})
        halves.append(mean_gradient(params, half)[1])
    wrong = jax.tree.map(lambda p, a, b: p - 0.1 * (a + b) / 2, params, *halves)
    assert difference(wrong, state.trainable["params"]) > 1e-2


def test_frozen_leaves_stay_and_have_no_moments(adamw_step):
    state = make_state(ADAMW, frozen=("up",))
    assert jax.tree.structure(state.variables) == jax.tree.structure({"params": as_jax(PARAMS)})
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert [leaf.shape for leaf in moments] == [(3, 2)] * 2
    after, _ = adamw_step(state, as_jax(BATCH), ONE)
    assert difference(after.frozen, state.frozen) == 0
    assert difference(after.trainable, state.trainable) > 1e-3
    everything, _ = adamw_step(make_state(ADAMW), as_jax(BATCH), ONE)
    assert difference(everything.trainable["params"]["up"], PARAMS["up"]) > 1e-3


def test_randomness_follows_from_seed_and_step(sgd_step):
    def draws(step):
        state, found = make_state(), []
        for _ in range(3):
            state, sums = step(state, as_jax(BATCH), ONE)
            found.append(float(sums.counts["draw"]))
        return found

    first = draws(sgd_step)
    assert len(set(first)) == 3
    assert draws(sgd_step) == first
    resumed = make_state().replace(step=jnp.int32(2))
    assert float(sgd_step(resumed, as_jax(BATCH), ONE)[1].counts["draw"]) == first[2]
    assert not set(draws(make_step(seed=1))) & set(first)


def test_evaluation_is_the_same_at_every_step():
    evaluate = jax.jit(make_eval_step(loss, seed=0))
    state = make_state()
    sums = evaluate(state, as_jax(BATCH))
    later = evaluate(state.replace(step=jnp.int32(7)), as_jax(BATCH))
    assert difference(sums, later) == 0
    assert float(sums.counts["deterministic"]) == 1
    assert sums.means()["loss"] == pytest.approx(
        float(mean_gradient(as_jax(PARAMS), as_jax(BATCH))[0]), rel=1e-5
    )


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adam(1e-2),
        optax.chain(optax.clip(1.0), optax.lion(1e-2)),
        optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau(patience=1)),
        optax.noisy_sgd(1e-2, key=jax.random.key(0)),
    ],
    ids=["adam", "lion", "reduce_on_plateau", "noisy_sgd"],
)
def test_any_transformation_of_optax_can_be_passed(optimizer):
    step = jax.jit(make_train_step(loss, optimizer, num_micro_batches=2))
    state, losses = make_state(optimizer), []
    for _ in range(10):
        state, sums = step(state, as_jax(BATCH), ONE)
        losses.append(sums.means()["loss"])
    assert "lr" not in sums.counts  # it is the transformation's
    assert losses[-1] < 0.97 * losses[0]


def test_updates_are_those_of_optax():
    optimizer = optax.adamw(1e-2)
    state, _ = jax.jit(make_train_step(loss, optimizer))(make_state(optimizer), as_jax(BATCH), ONE)
    gradient = {"params": mean_gradient(as_jax(PARAMS), as_jax(BATCH))[1]}
    before = make_state(optimizer)
    updates, _ = optimizer.update(gradient, before.opt_state, before.trainable)
    assert difference(state.trainable, optax.apply_updates(before.trainable, updates)) < 1e-6
    # A schedule multiplies them.
    half = make_train_step(loss, optimizer, lambda progress: 0.5)
    state, sums = jax.jit(half)(before, as_jax(BATCH), ONE)
    updates = jax.tree.map(lambda update: update / 2, updates)
    assert difference(state.trainable, optax.apply_updates(before.trainable, updates)) < 1e-6
    assert float(sums.counts["lr"]) == 0.5


def test_parameters_keep_their_precision():
    state = make_state(ADAMW)
    low = TrainState.create(
        jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state.trainable), {}, ADAMW
    )
    after, _ = make_step(ADAMW, seed=0)(low, as_jax(BATCH), ONE)
    assert {leaf.dtype for leaf in jax.tree.leaves(after.trainable)} == {jnp.dtype(jnp.bfloat16)}
    assert difference(after.trainable, low.trainable) > 1e-3
