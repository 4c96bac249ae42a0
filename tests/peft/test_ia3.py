from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from adapted_models import filled

from jaxlm import tree
from jaxlm.errors import InputError
from jaxlm.nn.intercept import find_sites
from jaxlm.peft.ia3 import Ia3Config, adapt, init, merge
from jaxlm.sharding import axes_of

BERT = replace(tiny_models.BERT, unroll=1).make()
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (4, 8)), jnp.int32)


def learned(scales):
    """As after some steps: no scale is one any more."""
    return jax.tree.map(lambda x: 1 + x, filled(scales, 1))


def made(module, x, config):
    """Parameters, sites and a new collection."""
    params = filled(jax.eval_shape(module.init, jax.random.key(0), x)["params"], 0)
    call = lambda variables: module.apply(variables, x)
    sites = find_sites(call, {"params": params})
    return params, sites, init({"params": params}, config, call)


def test_defaults_on_bert():
    params, _, scales = made(BERT, IDS, Ia3Config())
    found = {path: leaf.shape for path, leaf in tree.leaves_with_path(scales)}
    layers = "layers"
    assert found == {
        f"{layers}/attention/key/output": (2, 2, 8),
        f"{layers}/attention/value/output": (2, 2, 8),
        f"{layers}/mlp/down/input": (2, 24),
    }
    assert axes_of(f"{layers}/attention/key/output", 3) == (("layers", "heads", "head_dim"), 0)
    assert axes_of(f"{layers}/mlp/down/input", 2) == (("layers", "mlp"), 0)
    base = jax.jit(BERT.apply)({"params": params}, IDS)
    new = jax.jit(adapt(BERT.apply))({"params": params, "ia3": scales}, IDS)
    np.testing.assert_allclose(new, base, atol=1e-6)


def test_by_hand():
    dense, x = nn.Dense(2), jnp.array([[1.0, 2.0]])
    params = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "bias": jnp.array([1.0, -1.0])}
    scales = {"input": jnp.array([2.0, 0.5]), "output": jnp.array([10.0, 100.0])}
    y = adapt(dense.apply)({"params": params, "ia3": scales}, x)
    np.testing.assert_allclose(y, [[10 * (2 + 3 + 1), 100 * (4 + 4 - 1)]])


class TwoAxes(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.DenseGeneral((2, 3), axis=1, name="first")(x)
        return nn.DenseGeneral(4, axis=(1, -1), name="second")(x)


LOW = replace(tiny_models.BERT, unroll=1, dtype="bfloat16").make()
CONFIGS = {
    "bert in bfloat16": (LOW, IDS, Ia3Config(inputs=(r"(mlp/down|attention/out)/kernel",))),
    "bert": (BERT, IDS, Ia3Config(inputs=(r"(mlp/down|attention/out)/kernel",))),
    "two axes": (
        TwoAxes(),
        jnp.asarray(np.random.default_rng(1).normal(size=(4, 5, 6)), jnp.float32),
        Ia3Config(outputs=(r".*/kernel",), inputs=(r".*/kernel",)),
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_adapted_is_merged(name):
    module, x, config = CONFIGS[name]
    params, sites, scales = made(module, x, config)
    scales = learned(scales)
    adapted = jax.jit(adapt(module.apply))({"params": params, "ia3": scales}, x)
    apply = jax.jit(module.apply)
    size = np.abs(adapted).max()
    merged = apply({"params": merge(params, scales, sites)}, x)
    # Two layers' roundings: of 2^-24 each in float32, of 2^-8 in bfloat16, where few add up.
    limit = 32 * 2**-24 if adapted.dtype == jnp.float32 else 8 * 2**-8
    adapted, merged = (np.asarray(y, np.float32) for y in (adapted, merged))
    np.testing.assert_allclose(adapted, merged, atol=limit * size)
    assert np.abs(adapted - apply({"params": params}, x)).max() > 1e-3 * size


def test_outputs_of_convolutions_are_scaled_but_not_their_inputs():
    conv = nn.Conv(5, (3, 3), strides=2)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8, 8, 4)), jnp.float32)
    params, sites, scales = made(conv, x, Ia3Config(outputs=("kernel",), inputs=()))
    scales = learned(scales)
    adapted = adapt(conv.apply)({"params": params, "ia3": scales}, x)
    merged = conv.apply({"params": merge(params, scales, sites)}, x)
    np.testing.assert_allclose(adapted, merged, atol=1e-5)
    params, _, scales = made(conv, x, Ia3Config(outputs=(), inputs=("kernel",)))
    with pytest.raises(InputError, match="no inputs of a convolution"):
        adapt(conv.apply)({"params": params, "ia3": scales}, x)


def test_scales_near_1_have_their_effect_in_bfloat16():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4096, 24)), jnp.bfloat16)
    dense = nn.Dense(24, use_bias=False, dtype=jnp.bfloat16)
    # In bfloat16 the next number above 1 is 1.0078.
    near_one = 1 + 0.003 * jnp.asarray(rng.choice([-1.0, 1.0], 24), jnp.float32)
    params = {"kernel": jnp.eye(24)}
    for name in ("input", "output"):
        y = adapt(dense.apply)({"params": params, "ia3": {name: near_one}}, x)
        found = (y.astype(jnp.float32) * x).sum(0) / jnp.square(x.astype(jnp.float32)).sum(0)
        # Each product is rounded, by 2^-8 at most, and of 4096 the errors are not all alike.
        np.testing.assert_allclose(found, near_one, atol=2**-8 / 4)


def test_scales_are_not_lost_on_a_bfloat16_base():
    dense, x = nn.Dense(24), jnp.ones((4, 16))
    params, sites, scales = made(dense, x, Ia3Config(outputs=("kernel",), inputs=()))
    low = params | {"kernel": params["kernel"].astype(jnp.bfloat16)}
    scales = jax.tree.map(lambda s: 1 + 1e-3 * filled({"s": s}, 1)["s"], scales)
    merged = merge(low, scales, sites)
    y = adapt(dense.apply)({"params": low, "ia3": scales}, x)
    np.testing.assert_allclose(dense.apply({"params": merged}, x), y, atol=2e-6)


def test_misuse_raises():
    with pytest.raises(InputError, match=r"'quay/kernel' matches no parameter: .*mlp/up/kernel"):
        made(BERT, IDS, Ia3Config(outputs=("quay/kernel",)))
    with pytest.raises(InputError, match="'token_embed/embedding' matches token_embed/embedding"):
        made(BERT, IDS, Ia3Config(outputs=("token_embed/embedding",)))
    with pytest.raises(InputError, match="has no targets"):
        made(BERT, IDS, Ia3Config(outputs=(), inputs=()))
    params, sites, scales = made(BERT, IDS, Ia3Config())
    stray = {"stray": {"output": jnp.ones(3)}}
    with pytest.raises(InputError, match="scales stray/kernel, which is not a linear map"):
        merge(params, stray, sites)
    with pytest.raises(InputError, match="no module read the 'ia3' of stray"):
        adapt(BERT.apply)({"params": params, "ia3": scales | stray}, IDS)
