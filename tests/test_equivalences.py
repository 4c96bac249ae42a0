"""One device = any mesh = pmap (law 7). SGD, because Adam hides a gradient of the wrong scale."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from rounding import BLOCK, DTYPES, tolerance
from tiny_models import BERT

from jaxlm import sharding, tree
from jaxlm.models.heads import MlmHead, WithLmHead
from jaxlm.objectives.masked_lm import make_loss
from jaxlm.objectives.masking import MaskingConfig, Vocabulary
from jaxlm.optim import OptimizerConfig, make_optimizer
from jaxlm.sharding import MeshConfig
from jaxlm.train.placement import Placement, jit_placement, pmap_placement
from jaxlm.train.state import TrainState
from jaxlm.train.step import make_eval_step, make_train_step

ROWS, LENGTH, START, END, MASK, FIRST, SIZE = 16, 16, 1, 2, 3, 4, 64
CONFIG = replace(
    BERT,
    vocab_size=SIZE,
    hidden_dim=32,
    mlp_dim=32,
    max_length=LENGTH,
    unroll=1,
    dtype="float32",
)
LOW = replace(CONFIG, dtype="bfloat16")
DROPS = replace(CONFIG, dropout_rate=0.3, attention_dropout_rate=0.3)
VOCABULARY = Vocabulary(
    mask_id=MASK,
    start_id=START,
    end_id=END,
    ordinary=jnp.arange(FIRST, SIZE),
    is_ordinary=jnp.arange(SIZE) >= FIRST,
    word_starts=jnp.arange(SIZE) >= 0,
)
MESHES = {
    "fsdp": MeshConfig(data=1, fsdp=8),
    "data*fsdp*tensor": MeshConfig(data=2, fsdp=2, tensor=2),
    "tensor*sequence": MeshConfig(data=1, tensor=2, sequence=4),
}
# By mesh: the lengths of rows where the part of the batch on its last devices is lost.
LOST = {
    "fsdp": lambda lengths: jnp.where(jnp.arange(ROWS) < ROWS * 7 // 8, lengths, 0),
    "data*fsdp*tensor": lambda lengths: jnp.where(jnp.arange(ROWS) < ROWS * 3 // 4, lengths, 0),
    "tensor*sequence": lambda lengths: jnp.minimum(lengths, LENGTH * 3 // 4),
}
SGD = optax.scale(-1.0)


def make_batch(step):
    """Rows that predict 8 tokens beside rows that predict 1 or none."""
    rng = np.random.default_rng(step)
    tokens = rng.integers(FIRST, SIZE, (ROWS, LENGTH)).astype(np.int32)
    tokens[:, 5] = START
    lengths = np.where(np.arange(ROWS) % 8 < 2, LENGTH, np.arange(ROWS) % 4).astype(np.int32)
    return {
        "tokens": tokens,
        "lengths": lengths,
        "index": np.arange(ROWS, dtype=np.int32) + step * ROWS,
    }


def make_functions(config, optimizer=SGD, *, axis_name=None, num_micro_batches=1, lost=None):
    """What a placement takes: init, train step, eval step.

    With ``lost`` the sum over devices leaves a part out, though it is divided by all weights.
    """
    model = WithLmHead(config.make(), MlmHead(initializer_std=0.2, dtype=jnp.dtype(config.dtype)))
    loss = make_loss(model.apply, VOCABULARY, MaskingConfig(rate=0.5), isolate_documents=True)

    def broken(variables, batch, *args, **options):
        part = batch | {"lengths": lost(batch["lengths"])}
        total, _ = loss(variables, part, *args, **options)
        return total, loss(variables, batch, *args, **options)[1]

    def init(key):
        variables = model.init(key, jnp.zeros((1, LENGTH), jnp.int32))
        return TrainState.create(variables, {}, optimizer)

    train_step = make_train_step(
        broken if lost else loss,
        optimizer,
        lambda progress: 0.5 * progress,
        seed=0,
        num_micro_batches=num_micro_batches,
        axis_name=axis_name,
    )
    return init, train_step, make_eval_step(loss, seed=0, axis_name=axis_name)


def on_mesh(config, mesh, **options):
    return jit_placement(*make_functions(config, **options), sharding.make_mesh(mesh))


def on_one_device(config, **options):
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    return jit_placement(*make_functions(config, **options), mesh)


def first_state(placement: Placement):
    """The same numbers everywhere, made without compiling anything."""
    rng = np.random.default_rng(0)

    def one(path, leaf):
        values = np.ones if path.endswith("scale") else np.zeros
        values = values(leaf.shape) + 0.2 * rng.normal(size=leaf.shape)
        return jax.device_put(values.astype(leaf.dtype) if leaf.ndim else 0, leaf.sharding)

    return tree.map_with_path(one, placement.abstract_state)


def train(placement: Placement):
    """Parameters after three steps, and the sums of each."""
    state, found = first_state(placement), []
    batches = [placement.put_batch(make_batch(step)) for step in range(3)]
    for batch in batches:
        state, sums = placement.train_step(state, batch, np.float32(1))
        found.append(jax.tree.map(np.asarray, sums))
    return jax.tree.map(np.asarray, state.trainable), found


def difference(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(x - y).max()) for x, y in pairs)


@cache
def reference(config):
    return train(on_one_device(config))


def changes_of(config):
    before = jax.tree.map(np.asarray, first_state(on_one_device(config)).trainable)
    return jax.tree.map(lambda a, b: float(np.abs(a - b).max()), reference(config)[0], before)


def assert_equal_runs(found, config):
    """Equal to the run on one device."""
    (params, sums), expected = found, reference(config)
    # Parameters are float32; what is added to them was computed in the model's dtype.
    depth = BLOCK * config.num_layers
    limit = tolerance(config.dtype, depth=depth)
    exact = tolerance("float32", depth=depth)
    moved = max(jax.tree.leaves(changes_of(config)))
    assert difference(params, expected[0]) < exact + limit * moved
    for ours, theirs in zip(sums, expected[1], strict=True):
        assert float(ours.weight) == float(theirs.weight)
        assert ours.totals["loss"] == pytest.approx(float(theirs.totals["loss"]), rel=limit)
        # Of few predictions one may be a tie, which rounding decides.
        hits = [float(each.totals["accuracy"]) for each in (ours, theirs)]
        assert abs(hits[0] - hits[1]) <= (config.dtype == "bfloat16")
        assert ours.totals.keys() == theirs.totals.keys() == {"loss", "accuracy"}
        assert ours.counts.keys() == theirs.counts.keys()
        rel = tolerance(config.dtype, depth=depth, terms=1000)  # a norm, of all parameters
        for name, count in theirs.counts.items():
            assert float(ours.counts[name]) == pytest.approx(float(count), rel=rel)


@pytest.mark.parametrize("config", [CONFIG, LOW], ids=DTYPES)
def test_the_reference_really_learns(config):
    changes, (_, sums) = changes_of(config), reference(config)
    moved = {path for path, change in tree.leaves_with_path(changes) if change > 1e-3}
    still = {path for path, _ in tree.leaves_with_path(changes)} - moved
    # A key's bias has no gradient: softmax takes it away.
    assert still <= {"params/encoder/layers/attention/key/bias"}
    # Half of 15, 15, 2, 3, 0, 1, 2, 3 ordinary tokens, at least one of any.
    assert sums[0].weight == 2 * (8 + 8 + 1 + 2 + 0 + 1 + 1 + 2)
    assert sums[0].counts["skipped"] == 0


# In bfloat16, too, on two that have all four axes between them.
RUNS = [(mesh, CONFIG) for mesh in MESHES]
RUNS += [(mesh, LOW) for mesh in ("data*fsdp*tensor", "tensor*sequence")]
IDS = [f"{mesh}-{config.dtype}" for mesh, config in RUNS]


@pytest.mark.parametrize(("mesh", "config"), RUNS, ids=IDS)
def test_any_mesh_equals_one_device(mesh, config):
    # One of them with micro-batches, which must make no difference either.
    num_micro_batches = 2 if mesh == "data*fsdp*tensor" else 1
    placement = on_mesh(config, MESHES[mesh], num_micro_batches=num_micro_batches)
    assert_equal_runs(train(placement), config)


@pytest.mark.parametrize(("mesh", "config"), RUNS[:4], ids=IDS[:4])
def test_a_sum_that_leaves_devices_out_differs(mesh, config):
    # The control of the test above.
    found = train(on_mesh(config, MESHES[mesh], lost=LOST[mesh]))
    with pytest.raises(AssertionError):
        assert_equal_runs(found, config)


def test_the_way_of_other_platforms_is_the_same(monkeypatch):
    # Some products are written in another way for CPUs: the other one holds on a mesh, too.
    monkeypatch.setattr(lax, "platform_dependent", lambda *args, default, cpu: default(*args))
    assert_equal_runs(train(on_mesh(CONFIG, MESHES["data*fsdp*tensor"])), CONFIG)


@pytest.mark.parametrize("config", [CONFIG, LOW], ids=DTYPES)
def test_pmap_equals_one_device(config):
    placement = pmap_placement(*make_functions(config, axis_name="data"), "data")
    assert_equal_runs(train(placement), config)


def test_pmap_without_the_axis_name_differs():
    # The control: without the sums over devices each trains on its own rows, without a word.
    placement = pmap_placement(*make_functions(CONFIG), "data")
    assert difference(train(placement)[0], reference(CONFIG)[0]) > 1e-2


@pytest.mark.parametrize(
    "mesh", ["data*fsdp*tensor", pytest.param("tensor*sequence", marks=pytest.mark.slow)]
)
def test_dropout_is_the_same_on_any_mesh(mesh):
    assert difference(reference(DROPS)[0], reference(CONFIG)[0]) > 1e-2
    assert_equal_runs(train(on_mesh(DROPS, MESHES[mesh])), DROPS)


def test_evaluation_is_the_same_everywhere():
    found = []
    for placement in (
        on_one_device(CONFIG),
        on_mesh(CONFIG, MESHES["tensor*sequence"]),
        pmap_placement(*make_functions(CONFIG, axis_name="data"), "data"),
    ):
        batch = placement.put_batch(make_batch(0))
        state = first_state(placement)
        sums = placement.eval_step(state, batch)
        found.append(jax.tree.map(float, sums))
    for sums in found[1:]:
        assert sums.weight == found[0].weight
        assert sums.means() == pytest.approx(found[0].means(), rel=1e-5)
        assert sums.counts == found[0].counts


def test_init_and_where_everything_lies():
    adamw = make_optimizer(OptimizerConfig())
    placement = on_mesh(CONFIG, MESHES["data*fsdp*tensor"], optimizer=adamw)
    key = jax.random.key(0)
    state = placement.init(key)
    same = on_one_device(CONFIG, optimizer=adamw).init(key)
    assert difference(*(jax.tree.map(np.asarray, s.trainable) for s in (state, same))) < 1e-6

    params = dict(tree.leaves_with_path(state.trainable))
    query = params["params/encoder/layers/attention/query/kernel"]
    assert query.addressable_shards[0].data.shape == (2, 16, 1, 16)
    found = 0
    for path, leaf in tree.leaves_with_path(state.opt_state):
        owner = next((name for name in params if path.endswith(name)), None)
        if owner is not None:
            assert leaf.sharding == params[owner].sharding
            found += 1
    assert found == 2 * len(params)
    # What the abstract state says, for checkpoints to restore into, is what init gives.
    for (path, leaf), (_, abstract) in zip(
        tree.leaves_with_path(state), tree.leaves_with_path(placement.abstract_state), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(abstract.sharding, leaf.ndim), path
        assert (leaf.shape, leaf.dtype) == (abstract.shape, abstract.dtype)


def test_the_state_stays_where_it_lies():
    placement = on_mesh(CONFIG, MESHES["fsdp"])
    state = first_state(placement)
    batch = placement.put_batch(make_batch(0))
    text = placement.train_step.lower(state, batch, np.float32(1)).as_text()
    assert "tf.aliasing_output" in text or "jax.buffer_donor" in text  # the state is donated
    assert batch["tokens"].addressable_shards[0].data.shape == (2, LENGTH)
