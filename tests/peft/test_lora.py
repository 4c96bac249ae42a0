import re
from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapted_models import (
    BERT,
    CASES,
    FLOATS,
    IDS,
    LINEAR,
    adapter_of,
    assert_close,
    config_of,
    filled,
    made,
    new_adapter,
    outputs,
    params_of,
    sites_of,
)

from jaxlm import tree
from jaxlm.errors import InputError
from jaxlm.nn.intercept import find_sites
from jaxlm.nn.linear import Linear
from jaxlm.peft import lora
from jaxlm.peft.lora import LoraConfig, adapt, init_at, merge, select, stack, unmerge
from jaxlm.sharding import MeshConfig, make_mesh, tree_shardings, use_mesh

every_case = pytest.mark.parametrize("name", CASES)


def test_shapes_by_hand():
    config = LoraConfig(targets=(r"out/kernel", r"query/kernel"), ranks=(2, 3), kind="dora")
    made = init_at(jax.random.key(0), params_of("bert"), sites_of("bert"), config)
    shapes = {path: leaf.shape for path, leaf in tree.leaves_with_path(made)}
    attention = "encoder/layers/attention"
    assert shapes == {
        f"{attention}/out/a": (2, 2, 8, 2),
        f"{attention}/out/b": (2, 2, 16),
        f"{attention}/out/magnitude": (2, 16),
        f"{attention}/query/a": (2, 16, 3),
        f"{attention}/query/b": (2, 3, 2, 8),
        f"{attention}/query/magnitude": (2, 2, 8),
    }


def test_init_draws_one_factor():
    targets = (r"query/kernel", r"token_embed/embedding")
    make = partial(init_at, params=params_of("bert"), sites=sites_of("bert"))
    made = make(jax.random.key(0), config=LoraConfig(targets=targets))
    a, b = (made["encoder"]["layers"]["attention"]["query"][leaf] for leaf in "ab")
    assert not b.any()
    assert 0.9 / 4 < np.abs(a).max() <= 1 / 4  # uniform up to 1 / sqrt(16)
    assert not np.array_equal(a[0], a[1])
    table = made["encoder"]["token_embed"]
    assert not table["a"].any()
    assert 0.7 < table["b"].std() < 1.3
    # A target gets the same however many others there are.
    alone = make(jax.random.key(0), config=LoraConfig(targets=targets[:1]))["encoder"]["layers"]
    assert_close(alone, {"attention": {"query": {"a": a, "b": b}}}, 0)


def limit_of(name):
    """The share by which what two layers give may differ: 32 roundings, of which few add up."""
    rounding = CASES[name].rounding
    return 32 * rounding if rounding < 1e-6 else 8 * rounding


def without_effect(name):
    return adapter_of(name, config_of(name), zero=r"embed/a|table/a|(?<!embed)(?<!table)/b$")


@pytest.mark.parametrize("name", ["bert", "attention", "mixer"])
def test_an_adapter_without_effect_changes_no_bit(name):
    config, params = config_of(name), params_of(name)
    base = outputs(name, params)
    np.testing.assert_array_equal(outputs(name, params, without_effect(name), config), base)
    # The control: a trained one does.
    assert np.abs(outputs(name, params, adapter_of(name, config), config) - base).max() > 0.1


def test_an_adapter_without_effect_changes_no_bit_outside_a_loop():
    name = "bert without a loop"
    # Operation by operation: where XLA fuses across layers, it sums in another order (by 1e-6).
    with jax.disable_jit():
        base = outputs(name, params_of(name))
        y = outputs(name, params_of(name), without_effect(name), config_of(name))
    np.testing.assert_array_equal(y, base)


def test_outputs_whose_weights_are_zero_stay_finite_in_dora():
    params, _, config = made(nn.Dense(16), FLOATS, kind="dora")
    params["kernel"] = params["kernel"].at[:, 3].set(0)
    sites = find_sites(lambda v: nn.Dense(16).apply(v, FLOATS), {"params": params})
    new = init_at(jax.random.key(0), params, sites, config)

    def loss(adapter):
        y = adapt(nn.Dense(16).apply, config)({"params": params, "lora": adapter}, FLOATS)
        return jnp.square(y).sum(), y

    gradient, y = jax.grad(loss, has_aux=True)(new)
    np.testing.assert_allclose(y, nn.Dense(16).apply({"params": params}, FLOATS), atol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert_close(merge(params, new, config), params, 1e-6)


@pytest.mark.parametrize(
    ("name", "kind"),
    [(n, "lora") for n in CASES] + [(n, "dora") for n in ("bert", "bert in bfloat16", "mixer")],
)
def test_adapted_is_merged(name, kind):
    config = config_of(name, kind=kind, scaling="rslora")
    params, adapter = params_of(name), adapter_of(name, config)
    merged = jax.jit(merge, static_argnums=2)(params, adapter, config)
    expected = outputs(name, merged)
    scale = max(1, np.abs(expected).max())
    limit = limit_of(name) * scale
    assert_close(outputs(name, params, adapter, config), expected, limit)
    if kind == "lora":
        assert_close(jax.jit(unmerge, static_argnums=2)(merged, adapter, config), params, 1e-6)
    # The control: half a percent in one factor is seen, and a quarter in bfloat16.
    more = 1.005 if limit < 1e-3 else 1.25
    near = tree.map_with_path(lambda p, x: x * more if p.endswith("b") else x, adapter)
    assert np.abs(outputs(name, params, near, config) - expected).max() > 10 * limit


def loss_of(name, config, merged=False):
    case = CASES[name]

    def loss(adapter, params, inputs=case.inputs):
        if merged:
            y = case.apply({"params": merge(params, adapter, config)}, inputs)
        else:
            y = adapt(case.apply, config)({"params": params, "lora": adapter}, inputs)
        return jnp.square(y).mean()

    return loss


@every_case
def test_gradients_are_those_of_merging(name):
    config = config_of(name)
    params, adapter = params_of(name), adapter_of(name, config)
    by_adapter = jax.jit(jax.grad(loss_of(name, config)))(adapter, params)
    by_merging = jax.jit(jax.grad(loss_of(name, config, merged=True)))(adapter, params)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(by_merging))
    assert_close(by_adapter, by_merging, max(1e-5, limit_of(name)) * max(1, scale))
    assert all(np.abs(leaf).max() > 1e-4 * scale for leaf in jax.tree.leaves(by_merging))


# Sizes that nothing else has: a matrix of kernel shape in the program is a weight or its gradient.
WIDE = replace(BERT, hidden_dim=96, mlp_dim=160, max_length=32, initializer_std=0.02)


def compiled(unroll, merged):
    model = replace(WIDE, unroll=unroll).make()
    config = LoraConfig(targets=(LINEAR,), rank=1)
    shape = jax.ShapeDtypeStruct((8, 32), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), shape)
    sites = find_sites(lambda v: model.apply(v, jnp.zeros((8, 32), jnp.int32)), variables)
    make = partial(init_at, sites=sites, config=config)
    adapter = jax.eval_shape(make, jax.random.key(0), variables["params"])

    def loss(adapter, params, tokens):
        if merged:
            return model.apply({"params": merge(params, adapter, config)}, tokens).sum()
        return adapt(model.apply, config)({"params": params, "lora": adapter}, tokens).sum()

    gradient = jax.jit(jax.grad(loss)).lower(adapter, variables["params"], shape).compile()
    forward = jax.jit(model.apply).lower(variables, shape).compile()
    return gradient, forward


def weight_products(program):
    """Matrix products whose result has the shape of a feed-forward kernel, either way round."""
    found = re.findall(r"= f32\[(?:96,160|160,96)\]\S* (?:dot|custom-call)\(", program.as_text())
    return len(found)


@pytest.mark.parametrize("unroll", [None, 1])
def test_no_gradient_of_a_whole_weight(unroll):
    gradient, forward = compiled(unroll, merged=False)
    assert weight_products(gradient) == 0
    assert gradient.cost_analysis()["flops"] < 2.3 * forward.cost_analysis()["flops"]
    # The control: merging inside the gradient makes them.
    gradient, forward = compiled(unroll, merged=True)
    assert weight_products(gradient) >= 2
    assert gradient.cost_analysis()["flops"] > 2.3 * forward.cost_analysis()["flops"]


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", ["bert", "mixer"])
def test_several_adapters_in_one_batch(name, kind):
    targets = (LINEAR, r"(token_embed|position_embed|table)/embedding")
    if name == "mixer":
        targets = CASES[name].targets
    config = config_of(name, targets=targets, kind=kind)
    adapters = [adapter_of(name, config, seed) for seed in range(3)]
    ids, params, stacked = jnp.array([2, 0, 2, 1]), params_of(name), stack(adapters)
    together = outputs(name, params, stacked, config, adapter_ids=ids)
    assert_close(select(stacked, 1), adapters[1], 0)
    for row, which in enumerate(np.asarray(ids)):
        alone = outputs(name, params, adapters[which], config)[row]
        assert_close(together[row], alone, 2e-6 * max(1, np.abs(alone).max()))
    assert np.abs(outputs(name, params, adapters[0], config)[0] - together[0]).max() > 0.1


@pytest.mark.parametrize("name", ["bert", "mixer"])
def test_dora_starts_as_the_base(name):
    config = config_of(name, kind="dora")
    new = new_adapter(name, config)
    base = outputs(name, params_of(name))
    scale = max(1, np.abs(base).max())
    assert_close(outputs(name, params_of(name), new, config), base, 1e-6 * scale)
    assert_close(merge(params_of(name), new, config), params_of(name), 1e-6)


def test_dora_has_no_gradient_of_the_length():
    rng = np.random.default_rng(0)
    x, w, c = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((5, 4), (4, 3), (3,)))
    config, params = LoraConfig(targets=("kernel",), rank=2, kind="dora"), {"kernel": w, "bias": c}
    dense = nn.Dense(3)
    sites = find_sites(lambda v: dense.apply(v, x), {"params": params})
    adapter = filled(init_at(jax.random.key(0), params, sites, config), 1)

    def by_adapter(adapter):
        y = adapt(dense.apply, config)({"params": params, "lora": adapter}, x)
        return jnp.sin(y).sum()

    def by_hand(adapter):
        v = w + 8 * adapter["a"] @ adapter["b"]
        length = jax.lax.stop_gradient(jnp.sqrt(jnp.square(v).sum(0)))
        return jnp.sin(x @ ((adapter["magnitude"] / length)[None] * v) + c[None]).sum()

    assert_close(jax.grad(by_adapter)(adapter), jax.grad(by_hand)(adapter), 1e-5)


@pytest.mark.parametrize("name", ["bert", "attention"])
def test_pissa_splits_the_base(name):
    config = config_of(name, init="pissa", targets=(LINEAR,))
    params = params_of(name)
    adapter = init_at(jax.random.key(0), params, sites_of(name), config)
    base = unmerge(params, adapter, config)
    original = outputs(name, params)
    scale = max(1, np.abs(original).max())
    assert_close(outputs(name, base, adapter, config), original, 4e-6 * scale)
    assert_close(merge(base, adapter, config), params, 1e-6)
    # Nothing of rank 3 is closer: what is left starts with the fourth singular value.
    path = sorted(path for path in sites_of(name) if "query" in path)[0]
    left, whole = (
        dict(tree.leaves_with_path(p))[path].reshape(-1, 16, 16)[-1] for p in (base, params)
    )
    sizes = [np.linalg.svd(np.asarray(m), compute_uv=False) for m in (left, whole)]
    np.testing.assert_allclose(sizes[0][0], sizes[1][3], rtol=1e-4)


def test_dropout_needs_a_key_and_leave():
    dense, x = nn.Dense(4, use_bias=False), jnp.ones((8, 4))
    config = LoraConfig(targets=("kernel",), rank=4, alpha=4.0, dropout_rate=0.5)
    eye = jnp.eye(4)
    variables = {"params": {"kernel": jnp.zeros((4, 4))}, "lora": {"a": eye, "b": eye}}
    adapted = adapt(dense.apply, config)
    np.testing.assert_array_equal(adapted(variables, x), x)
    dropped = adapted(variables, x, rngs={"dropout": jax.random.key(0)})
    assert set(np.unique(dropped)) == {0.0, 2.0}

    def apply(variables, x, *, deterministic, rngs):
        return dense.apply(variables, x, rngs=rngs)

    adapted, rngs = adapt(apply, config), {"dropout": jax.random.key(0)}
    np.testing.assert_array_equal(adapted(variables, x, deterministic=False, rngs=rngs), dropped)
    np.testing.assert_array_equal(adapted(variables, x, deterministic=True, rngs=rngs), x)


def test_the_mean_of_dropped_inputs_is_kept_in_bfloat16():
    dense, x = nn.Dense(64, use_bias=False, dtype=jnp.bfloat16), jnp.ones((20_000, 64))
    config = LoraConfig(targets=("kernel",), rank=64, alpha=64.0, dropout_rate=0.1)
    variables = {
        "params": {"kernel": jnp.zeros((64, 64))},
        "lora": {"a": jnp.eye(64), "b": jnp.eye(64)},
    }
    y = adapt(dense.apply, config)(variables, x, rngs={"dropout": jax.random.key(0)})
    standard_error = (0.1 / 0.9 / y.size) ** 0.5
    assert abs(float(y.astype(jnp.float32).mean()) - 1) < 4 * standard_error  # of 3e-4


# In bfloat16 the next number above 1 is 1.0078.
NEAR_ONE = 1 + 0.003 * jnp.asarray(np.random.default_rng(3).choice([-1.0, 1.0], 24), jnp.float32)


def test_gains_near_1_have_their_effect_in_bfloat16():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4096, 16)), jnp.bfloat16)
    map_ = Linear(24, dtype=jnp.bfloat16)
    params, new, config = made(map_, x, kind="dora")
    params = params | {"bias": jnp.zeros(24)}
    base = map_.apply({"params": params}, x).astype(jnp.float32)
    adapter = new | {"magnitude": new["magnitude"] * NEAR_ONE}
    y = adapt(map_.apply, config)({"params": params, "lora": adapter}, x).astype(jnp.float32)
    gains = (y * base).sum(0) / jnp.square(base).sum(0)
    # Each product is rounded, by 2^-8 at most, and of 4096 the errors are not all alike.
    np.testing.assert_allclose(gains, NEAR_ONE, atol=2**-8 / 4)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_small_adapter_is_not_lost_on_a_bfloat16_base(kind):
    params, new, config = made(nn.Dense(24), FLOATS, kind=kind)
    low = {"kernel": params["kernel"].astype(jnp.bfloat16), "bias": params["bias"]}
    adapter = filled(new, 1) | {"b": 1e-3 * filled(new, 1)["b"]}
    merged = merge(low, adapter, config)
    y = adapt(nn.Dense(24).apply, config)({"params": low, "lora": adapter}, FLOATS)
    np.testing.assert_allclose(nn.Dense(24).apply({"params": merged}, FLOATS), y, atol=2e-6)
    # The control: in the base's own precision it would be.
    rounded = merged | {"kernel": merged["kernel"].astype(jnp.bfloat16)}
    assert np.abs(nn.Dense(24).apply({"params": rounded}, FLOATS) - y).max() > 1e-3


def test_low_precision_stays_low():
    x = jnp.asarray(FLOATS, jnp.bfloat16)
    map_ = Linear(24, dtype=jnp.bfloat16)
    params = map_.init(jax.random.key(0), x)["params"]
    config = LoraConfig(targets=("kernel",), rank=4)
    sites = find_sites(lambda v: map_.apply(v, x), {"params": params})
    new = init_at(jax.random.key(0), params, sites, config)

    def loss(adapter, map_, x):
        y = adapt(map_.apply, config)({"params": params, "lora": adapter}, x)
        return jnp.sin(y.astype(jnp.float32)).sum(), y

    (_, y), gradient = jax.value_and_grad(loss, has_aux=True)(new, map_, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, map_.apply({"params": params}, x))
    exact = jax.grad(loss, has_aux=True)(filled(new, 1), Linear(24), x.astype(jnp.float32))[0]
    near = jax.grad(loss, has_aux=True)(filled(new, 1), map_, x)[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}
    size = max(np.abs(leaf).max() for leaf in jax.tree.leaves(exact))
    assert_close(near, exact, 0.05 * size)
    program = jax.make_jaxpr(jax.grad(loss, has_aux=True), static_argnums=1)
    assert operands_of_products(program(new, map_, x).jaxpr) == {jnp.dtype(jnp.bfloat16)}
    wide = program(new, Linear(24), x.astype(jnp.float32))
    assert operands_of_products(wide.jaxpr) == {jnp.dtype(jnp.float32)}


def test_low_precision_compiles_at_full_size():
    # XLA:CPU takes another way for large products, and cannot compute all of them in bfloat16.
    x, map_ = jnp.ones((16, 128, 256), jnp.bfloat16), Linear((4, 64), dtype=jnp.bfloat16)
    params = map_.init(jax.random.key(0), x)["params"]
    config = LoraConfig(targets=("kernel",), rank=8)
    sites = find_sites(lambda v: map_.apply(v, x), {"params": params})
    new = init_at(jax.random.key(0), params, sites, config)

    def loss(adapter):
        y = adapt(map_.apply, config)({"params": params, "lora": adapter}, x)
        return jnp.square(y.astype(jnp.float32)).sum()

    gradient = jax.jit(jax.grad(loss))(filled(new, 1))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def operands_of_products(jaxpr):
    found = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found |= {operand.aval.dtype for operand in equation.invars}
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = inner.jaxpr if hasattr(inner, "jaxpr") else inner
            found |= operands_of_products(inner) if hasattr(inner, "eqns") else set()
    return found


def test_any_mesh_is_one_device():
    name = "bert"
    config = config_of(name, rank=4)
    params, adapter = params_of(name), adapter_of(name, config)
    gradient = jax.grad(loss_of(name, config))
    alone = jax.jit(gradient)(adapter, params, IDS)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    places = tree_shardings({"params": params, "lora": adapter}, mesh)
    query = places["lora"]["encoder"]["layers"]["attention"]["query"]
    assert [tuple(query[leaf].spec) for leaf in "ab"] == [
        (None, "fsdp", None),
        (None, None, "tensor", None),
    ]

    def inside(adapter, params, ids):
        with use_mesh(mesh):
            return gradient(adapter, params, ids)

    together = jax.jit(inside, out_shardings=places["lora"])(
        *jax.device_put((adapter, params), (places["lora"], places["params"])), IDS
    )
    assert_close(together, alone, 2e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "the rank 0 is not above 0"),
        ({"ranks": (8, 0), "targets": ("a", "b")}, "the rank 0 is not above 0"),
        ({"ranks": (8, 8)}, r"ranks=\(8, 8\) must hold one rank for each of the 1 targets"),
        ({"alpha": 0.0}, "alpha=0.0 is not a number above 0"),
        ({"lr_ratio": float("nan")}, "lr_ratio=nan is not a number above 0"),
        ({"dropout_rate": 1.0}, r"dropout_rate=1.0 is not inside \[0, 1\)"),
        ({"targets": ()}, r"targets=\(\) adapts nothing"),
        ({"targets": ("(?i)query",)}, r"'\(\?i\)query' is no regular expression"),
        ({"kind": "dora", "init": "pissa"}, "cannot start from init='pissa'"),
    ],
)
def test_bad_settings_raise(changes, message):
    with pytest.raises(InputError, match=message):
        LoraConfig(**changes)


def test_adapters_of_other_models_raise():
    params, adapter, config = made(nn.Dense(16), FLOATS)
    other = {"kernel": jnp.zeros((16, 17)), "bias": jnp.zeros(17)}
    for use in (
        lambda: merge(other, adapter, config),
        lambda: adapt(nn.Dense(17).apply, config)({"params": other, "lora": adapter}, FLOATS),
        lambda: merge(params, stack([adapter, adapter]), config),
        lambda: adapt(nn.Dense(16).apply, config)(
            {"params": params, "lora": adapter}, FLOATS, adapter_ids=jnp.zeros(4, jnp.int32)
        ),
    ):
        with pytest.raises(InputError, match=r"does not fit its weight .* adapter_ids or select"):
            use()
    with pytest.raises(InputError, match="the model has no stray/kernel"):
        merge(params, {"stray": adapter}, config)
    with pytest.raises(InputError, match="is applied to 4 rows, for which there are 3 adapter_ids"):
        adapt(nn.Dense(16).apply, config)(
            {"params": params, "lora": stack([adapter])},
            FLOATS,
            adapter_ids=jnp.zeros(3, jnp.int32),
        )
    with pytest.raises(InputError, match="only if they have the same targets and ranks"):
        stack([adapter, made(nn.Dense(16), FLOATS, rank=3)[1]])
    with pytest.raises(InputError, match="DoRA cannot be unmerged"):
        unmerge(params, adapter, replace(config, kind="dora"))


def test_the_learning_rate_of_b():
    config = LoraConfig(lr_ratio=16.0)
    factors = [
        lora.lr_factor(path, config)
        for path in ("lora/encoder/query/b", "lora/b", "lora/encoder/query/a", "params/b")
    ]
    assert factors == [16.0, 16.0, 1.0, 1.0]
