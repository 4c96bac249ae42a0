import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import sharding, tree
from jaxlm.errors import InputError
from jaxlm.optim import OptimizerConfig, make_optimizer, make_schedule
from jaxlm.train.placement import state_shardings
from jaxlm.train.state import TrainState

NAMES = ["adamw", "stable_adamw", "lamb", "adafactor", "muon"]


def normal(*shape, seed=0):
    return jnp.float32(np.random.default_rng(seed).normal(size=shape))


SHAPES = {
    "encoder/token_embed/embedding": (12, 8),
    "encoder/position_embed/embedding": (6, 8),
    "encoder/embed_norm/scale": (8,),
    "encoder/layers/attention/query/kernel": (3, 8, 2, 4),
    "encoder/layers/attention/query/bias": (3, 2, 4),
    "encoder/layers/attention/out/kernel": (3, 2, 4, 8),
    "encoder/layers/attention/out/bias": (3, 8),
    "encoder/layers/mlp/up/kernel": (3, 8, 16),
    "encoder/layers/mlp/down/kernel": (3, 16, 8),
    "encoder/layers/mlp_norm/scale": (3, 8),
    "encoder/layers/mlp_norm/bias": (3, 8),
    "head/transform/kernel": (8, 8),
    "head/bias": (12,),
}
PARAMS = {path: normal(*shape, seed=seed) for seed, (path, shape) in enumerate(SHAPES.items())}
GRADS = {path: normal(*leaf.shape, seed=100 + leaf.size) for path, leaf in PARAMS.items()}
LINEAR = {path for path in PARAMS if path.endswith(("kernel", "embedding"))}


def update_of(config, params=PARAMS, grads=GRADS, num_steps=1, growth=None):
    """The last of several updates, as numpy; positive where it is to be subtracted.

    ``growth`` multiplies the gradients after each step.
    """

    @jax.jit
    def run(params, grads):
        optimizer = make_optimizer(config)
        state = optimizer.init(params)
        for _ in range(num_steps):
            updates, state = optimizer.update(grads, state, params)
            grads = grads if growth is None else jax.tree.map(jnp.multiply, grads, growth)
        return updates

    return jax.tree.map(lambda update: -np.asarray(update), run(params, grads))


# Schedules: warm-up over a tenth of the run, then down to a fifth of the peak.


@pytest.mark.parametrize(
    ("schedule", "middle", "late", "end"),
    [
        ("linear", 1 - 0.8 * 0.5, 1 - 0.8 * 0.75, 0.2),
        ("cosine", 0.2 + 0.8 / 2, 0.2 + 0.8 * (1 + np.cos(0.75 * np.pi)) / 2, 0.2),
        ("wsd", 1.0, 1 - 0.8 * np.sqrt(0.55), 0.2),
        ("inverse_sqrt", np.sqrt(0.1 / 0.55), np.sqrt(0.1 / 0.775), np.sqrt(0.1)),
        ("constant", 1.0, 1.0, 1.0),
    ],
)
def test_schedules_by_value(schedule, middle, late, end):
    config = OptimizerConfig(
        peak_lr=3.0, schedule=schedule, warmup_share=0.1, decay_share=0.5, final_lr_share=0.2
    )
    points = [0.0, 0.05, 0.1, 0.55 if schedule != "wsd" else 0.5, 0.775, 1.0]
    found = jax.jit(jax.vmap(make_schedule(config)))(jnp.float32(np.array(points)))
    expected = 3 * np.array([0, 0.5, 1, middle, late, end])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_default_schedule_ends_at_zero_and_stays_there():
    schedule = make_schedule(OptimizerConfig())
    assert float(schedule(jnp.float32(1.0))) == 0
    assert float(schedule(jnp.float32(1.5))) == 0  # a run that overshoots its time does not climb
    assert float(schedule(jnp.float32(0.06))) == pytest.approx(5e-4)


def test_schedules_without_warmup_start_at_the_peak():
    for schedule in ("linear", "cosine", "wsd", "inverse_sqrt", "constant"):
        config = OptimizerConfig(peak_lr=1.0, warmup_share=0.0, schedule=schedule)
        assert float(make_schedule(config)(jnp.float32(0.0))) == pytest.approx(1)


def test_a_schedule_of_warmup_alone():
    schedule = make_schedule(OptimizerConfig(peak_lr=1.0, warmup_share=1.0))
    assert [float(schedule(jnp.float32(p))) for p in (0.25, 1.0)] == pytest.approx([0.25, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"warmup_share": 1.2}, "warmup_share=1.2"),
        ({"warmup_share": -0.1}, "warmup_share=-0.1"),
        ({"decay_share": 0.0}, "decay_share=0.0"),
        ({"peak_lr": 0.0}, "peak_lr=0.0 is not a number above 0"),
        ({"peak_lr": math.nan}, "peak_lr=nan is not a number above 0"),
        ({"clip_norm": -1.0}, "clip_norm=-1.0 is not a number above 0"),
        ({"b2": 1.5}, r"b2=1.5 is not inside \[0, 1\)"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 is not 0 or above"),
        ({"final_lr_share": -5.0}, "final_lr_share=-5.0 is a share"),
        ({"layer_decay": 0.0}, "layer_decay=0.0 is not inside"),
        ({"layer_decay": 1.1}, "layer_decay=1.1 is not inside"),
    ],
)
def test_bad_configs(change, message):
    with pytest.raises(InputError, match=message):
        OptimizerConfig(**change)


# Optimizers.


@pytest.mark.parametrize("name", NAMES)
def test_decay_touches_linear_maps_and_embeddings_alone(name):
    config = OptimizerConfig(name=name, weight_decay=0.5)
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    updates = update_of(config, grads=zero)
    assert {path for path, update in updates.items() if np.abs(update).max() > 0} == LINEAR
    if name != "lamb":  # which scales it to the norm of the weights
        for path in LINEAR:
            np.testing.assert_allclose(updates[path], 0.5 * PARAMS[path], rtol=1e-5)
    off = update_of(replace(config, weight_decay=0.0), grads=zero)
    assert max(np.abs(update).max() for update in off.values()) == 0


def test_adamw_by_hand():
    config = OptimizerConfig(b1=0.9, b2=0.98, epsilon=0.1, weight_decay=0.01, clip_norm=None)
    updates = update_of(config, num_steps=2)
    path = "encoder/layers/mlp/up/kernel"
    grad, param = np.asarray(GRADS[path]), np.asarray(PARAMS[path])
    # A gradient that stays the same is its own corrected mean.
    expected = grad / (np.abs(grad) + 0.1) + 0.01 * param
    np.testing.assert_allclose(updates[path], expected, rtol=1e-5)
    bias = np.asarray(GRADS["head/bias"])
    np.testing.assert_allclose(updates["head/bias"], bias / (np.abs(bias) + 0.1), rtol=1e-5)


@pytest.mark.parametrize("gradient_grows", [True, False])
def test_stable_adamw_by_its_algorithm(gradient_grows):
    """By Wortsman et al. (2023), whose means are unbiased as they are updated."""
    rate, b1, b2, epsilon, decay = 0.1, 0.9, 0.98, 1e-3, 0.05
    config = OptimizerConfig(
        name="stable_adamw", b1=b1, b2=b2, epsilon=epsilon, weight_decay=decay, clip_norm=None
    )
    optimizer = make_optimizer(config)
    sizes = (0.1, 1.0, 30.0, 2.0) if gradient_grows else (1.0, 1.0, 0.5, 0.1)
    params = {"mlp/up/kernel": normal(4, 6), "norm/scale": normal(4, seed=1)}
    steps = [
        {path: size * normal(*leaf.shape, seed=2) for path, leaf in params.items()}
        for size in sizes
    ]
    expected, clipped = {}, []
    for path, theta in params.items():
        theta, v, u = np.asarray(theta, np.float64), 0.0, 0.0
        for t, grads in enumerate(steps, start=1):
            g = np.asarray(grads[path], np.float64)
            beta1, beta2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in (b1, b2))
            v = beta1 * v + (1 - beta1) * g
            u = beta2 * u + (1 - beta2) * g**2
            rms = np.sqrt((g**2 / np.maximum(u, epsilon**2)).mean())
            clipped.append(rms > 1 + 1e-6)
            eta = rate / max(1.0, rms)
            own_decay = decay * theta if path.endswith("kernel") else 0.0
            theta = theta - eta * (v / (np.sqrt(u) + epsilon) + own_decay)
        expected[path] = theta
    assert any(clipped) == gradient_grows  # the control: both sides of the maximum are seen

    state = optimizer.init(params)
    for grads in steps:
        updates, state = optimizer.update(grads, state, params)
        params = jax.tree.map(lambda p, u: p + rate * u, params, updates)
    for path, value in expected.items():
        np.testing.assert_allclose(params[path], value, rtol=2e-5, atol=1e-6)


def test_clipping_scales_all_gradients_together():
    # Adam does not see the scale of its gradients, unless epsilon is large.
    config = OptimizerConfig(epsilon=1e5, weight_decay=0.0)
    norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in GRADS.values()))
    clipped = update_of(replace(config, clip_norm=norm / 4))
    free = update_of(replace(config, clip_norm=None))
    loose = update_of(replace(config, clip_norm=norm * 1.01))
    for path in PARAMS:
        np.testing.assert_allclose(clipped[path], free[path] / 4, rtol=1e-4)
        np.testing.assert_allclose(loose[path], free[path], rtol=1e-4)


def unstacked(leaves):
    """The three layers as parameters of their own."""
    flat = {}
    for path, leaf in leaves.items():
        if "/layers/" in path:
            flat |= {path.replace("layers", f"layer_{i}"): leaf[i] for i in range(3)}
        else:
            flat[path] = leaf
    return flat


@pytest.mark.parametrize("name", NAMES)
def test_a_stack_is_updated_as_its_layers_one_by_one(name):
    config = OptimizerConfig(name=name, weight_decay=0.1, clip_norm=None)

    def spread(leaf, path, scale):
        return leaf * scale.reshape(3, *[1] * (leaf.ndim - 1)) if "/layers/" in path else leaf

    # Layers of different size, of which one grows: one norm for the whole stack would be another.
    sizes, growing = jnp.float32(np.array([1.0, 10.0, 0.1])), jnp.float32(np.array([1.0, 5.0, 1.0]))
    params = {path: spread(leaf, path, sizes) for path, leaf in PARAMS.items()}
    growth = {path: spread(jnp.ones_like(leaf), path, growing) for path, leaf in PARAMS.items()}
    given = params, GRADS, growth
    stacked, apart = (
        update_of(config, params, grads, num_steps=2, growth=growth)
        for params, grads, growth in (given, map(unstacked, given))
    )
    stacked = unstacked(stacked)
    for path, update in apart.items():
        np.testing.assert_allclose(stacked[path], update, rtol=2e-4, atol=1e-5)


def test_lamb_gives_each_matrix_an_update_of_its_own_norm():
    updates = unstacked(update_of(OptimizerConfig(name="lamb")))
    for path, param in unstacked(PARAMS).items():
        if path.endswith(("kernel", "embedding")):
            norms = np.linalg.norm(updates[path]), np.linalg.norm(param)
            assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    # A matrix of zeros must be able to leave zero.
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    updates = update_of(OptimizerConfig(name="lamb"), params=zero)
    assert min(np.abs(update).max() for update in updates.values()) > 0.5


def matrices(leaves):
    """Every hidden matrix of every layer, flattened to [inputs, outputs]."""
    for path, leaf in unstacked(leaves).items():
        if path.endswith("kernel"):
            inputs = 2 if "out/kernel" in path else 1
            sides = np.prod(leaf.shape[:inputs]), np.prod(leaf.shape[inputs:])
            yield path, np.asarray(leaf).reshape(sides)


def test_muon_updates_are_nearly_orthogonal():
    updates = update_of(OptimizerConfig(name="muon", weight_decay=0.0))
    for path, matrix in matrices(updates):
        values = np.linalg.svd(matrix, compute_uv=False) / (0.2 * np.sqrt(max(matrix.shape)))
        assert values.min() > 0.6, path
        assert values.max() < 1.3, path
        assert np.sqrt((matrix**2).mean()) == pytest.approx(0.2, rel=0.2)
    # The control: the gradients are far from it.
    gradients = [np.linalg.svd(matrix, compute_uv=False) for _, matrix in matrices(GRADS)]
    assert max(values.max() / values.min() for values in gradients) > 10


def test_muon_leaves_embeddings_norms_and_biases_to_adam():
    muon = update_of(OptimizerConfig(name="muon"))
    adam = update_of(OptimizerConfig(name="adamw"))
    same = {path for path in PARAMS if np.allclose(muon[path], adam[path], atol=1e-6)}
    assert same == {path for path in PARAMS if not path.endswith("kernel")}


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_lowers_a_loss(name):
    config = OptimizerConfig(name=name, weight_decay=0.0)
    optimizer = make_optimizer(config)

    def loss(params):
        return sum(jnp.sum((leaf - 1) ** 2) for leaf in params.values())

    @jax.jit
    def run(params):
        def body(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(grads, state, params)
            return (jax.tree.map(lambda p, u: p + 0.05 * u, params, updates), state), value

        return jax.lax.scan(body, (params, optimizer.init(params)), None, length=30)[1]

    values = run(PARAMS)
    assert np.isfinite(values).all()
    assert values[-1] < 0.7 * values[0]


# Learning rates of their own.


def ratios(updates, plain):
    """How often the plain update, layer by layer of a stack."""
    found = {}
    for path, update in updates.items():
        layers = range(len(update)) if "/layers/" in path else [...]
        per_layer = [update[layer] / plain[path][layer] for layer in layers]
        assert max(np.ptp(ratio) for ratio in per_layer) < 1e-5  # one factor for all of a layer
        found[path] = [pytest.approx(float(ratio.mean()), rel=1e-5) for ratio in per_layer]
    return found


def test_layer_decay_by_hand():
    plain = update_of(OptimizerConfig(weight_decay=0.5))  # decay is scaled as well
    found = ratios(update_of(OptimizerConfig(weight_decay=0.5, layer_decay=0.5)), plain)
    stacked, embeddings = [0.125, 0.25, 0.5], [0.0625]  # three layers; the head keeps its rate
    for path, factors in found.items():
        part = path.split("/")[1]
        assert factors == (stacked if part == "layers" else embeddings if "embed" in part else [1])


def test_layer_decay_of_layers_that_are_not_stacked():
    shapes = {
        "encoder/token_embed/embedding": (12, 8),
        "encoder/layers_0/forward/input/bias": (4, 4),
        "encoder/layers_1/backward/recurrent_kernel": (4, 4, 4),
        "head/classifier/kernel": (8, 3),
        "final_norm/scale": (8,),
    }
    params = {path: normal(*shape) for path, shape in shapes.items()}
    grads = {path: normal(*shape, seed=1) for path, shape in shapes.items()}
    plain = update_of(OptimizerConfig(), params=params, grads=grads)
    found = ratios(update_of(OptimizerConfig(layer_decay=0.5), params=params, grads=grads), plain)
    factors = [found[path][0] for path in shapes]
    assert factors == [0.125, 0.25, 0.5, 1, 1]


def test_lr_factor():
    config = OptimizerConfig()
    optimizer = make_optimizer(config, lambda path: 16.0 if path.endswith("bias") else 1.0)
    updates = jax.jit(lambda: optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS)[0])()
    found = ratios(jax.tree.map(lambda x: -np.asarray(x), updates), update_of(config))
    for path, factors in found.items():
        assert all(factor == (16 if path.endswith("bias") else 1) for factor in factors)


# A model of somebody else, without rows: what is decayed follows from names.

FOREIGN = {
    "params/Dense_0/kernel": (8, 16),
    "params/Dense_0/bias": (16,),
    "params/Attention_0/qkv/kernel": (8, 2, 4),
    "params/Embed_0/embedding": (12, 8),
    "params/LayerNorm_0/scale": (8,),
    "params/cls": (1, 8),
    "lora/Dense_0/a": (8, 2),
    "lora/Dense_0/b": (2, 16),
}
FOREIGN_LINEAR = {path for path in FOREIGN if path.endswith(("kernel", "embedding", "/a", "/b"))}


@pytest.mark.parametrize("name", NAMES)
def test_parameters_without_rows_are_decayed_by_name(name):
    params = {path: normal(*shape) for path, shape in FOREIGN.items()}
    zero = jax.tree.map(jnp.zeros_like, params)
    config = OptimizerConfig(name=name, weight_decay=0.5)
    updates = update_of(config, params=params, grads=zero)
    assert {path for path, x in updates.items() if np.abs(x).max() > 0} == FOREIGN_LINEAR
    if name == "muon":
        grads = {path: normal(*shape, seed=1) for path, shape in FOREIGN.items()}
        muon, adam = (
            update_of(replace(config, name=n), params=params, grads=grads) for n in (name, "adamw")
        )
        other = {path for path in params if not np.allclose(muon[path], adam[path], atol=1e-6)}
        assert other == {"params/Dense_0/kernel", "lora/Dense_0/a", "lora/Dense_0/b"}


def test_rows_of_ones_own_go_before_names():
    axes = ((r"Dense_0/kernel", "norm norm"), (r"cls", "table -> embed"))
    params = {path: normal(*shape) for path, shape in FOREIGN.items() if "lora" not in path}
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.5), axes=axes)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates = optimizer.update(zero, optimizer.init(params), params)[0]
    decayed = {path for path, x in updates.items() if np.abs(x).max() > 0}
    linear = {path for path in FOREIGN_LINEAR if "lora" not in path}
    assert decayed == linear - {"params/Dense_0/kernel"} | {"params/cls"}


def test_layer_decay_needs_rows():
    params = {path: normal(*shape) for path, shape in FOREIGN.items()}
    with pytest.raises(InputError, match=r"no row .* Dense_0/kernel, .*Embed_0/embedding"):
        update_of(OptimizerConfig(layer_decay=0.9), params=params, grads=params)


# Where the moments lie.

WIDE = {
    path: jax.ShapeDtypeStruct(
        tuple(16 * n if n in (8, 12, 16) else n for n in leaf.shape), "float32"
    )
    for path, leaf in PARAMS.items()
}


@pytest.mark.parametrize("name", NAMES)
def test_moments_lie_where_their_parameters_do(name):
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    optimizer = make_optimizer(OptimizerConfig(name=name))
    trainable = {"params": WIDE}
    state = jax.eval_shape(lambda params: TrainState.create(params, {}, optimizer), trainable)
    places = state_shardings(state, mesh)
    params = dict(tree.leaves_with_path(places.trainable))
    found = {path: 0 for path in params}
    replicated = 0
    for (path, leaf), (_, place) in zip(
        tree.leaves_with_path(state.opt_state),
        tree.leaves_with_path(places.opt_state),
        strict=True,
    ):
        owner = next((name for name in params if path.endswith(name)), None)
        if owner is not None and leaf.shape == WIDE[owner.removeprefix("params/")].shape:
            assert place == params[owner], path
            found[owner] += 1
        else:
            assert place.is_fully_replicated
            replicated += leaf.size
    moments = {"muon": {1, 2}, "adafactor": {1, 2}}.get(name, {2})
    assert set(found.values()) == moments
    # What every device holds is small: counters, and Adafactor's rows and columns.
    assert replicated < 0.05 * tree.num_params(WIDE)
    split = {path for path, place in params.items() if not place.is_fully_replicated}
    assert {path.removeprefix("params/") for path in split} >= LINEAR
