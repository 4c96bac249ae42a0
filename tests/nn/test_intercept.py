import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapted_models import FLOATS, IDS, made, sites_of

from jaxlm.errors import InputError
from jaxlm.nn.intercept import find_sites
from jaxlm.peft.lora import adapt, merge


def test_sites_by_hand():
    layers = "encoder/layers"
    assert sites_of("bert") == {
        "encoder/token_embed/embedding": (0, 1),
        "encoder/position_embed/embedding": (0, 1),
        "encoder/token_type_embed/embedding": (0, 1),
        f"{layers}/attention/query/kernel": (1, 1),
        f"{layers}/attention/key/kernel": (1, 1),
        f"{layers}/attention/value/kernel": (1, 1),
        f"{layers}/attention/out/kernel": (1, 2),
        f"{layers}/mlp/up/kernel": (1, 1),
        f"{layers}/mlp/down/kernel": (1, 1),
        "head/transform/kernel": (0, 1),
    }
    assert sites_of("bert") == sites_of("bert without a loop")
    assert sites_of("mixer") == {
        "table/embedding": (0, 1),
        "tokens/kernel": (0, 1),
        "channels/kernel": (0, 1),
        "fold/kernel": (0, 2),
    }
    block = "MultiHeadDotProductAttention_1"
    assert len(sites_of("attention")) == 12
    assert sites_of("attention")[f"{block}/query/kernel"] == (0, 1)
    assert sites_of("attention")[f"{block}/out/kernel"] == (0, 2)


class ScansParamsOnly(nn.Module):
    @nn.compact
    def __call__(self, x):
        body = lambda block, x, _: (block(x), None)
        scan = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return scan(nn.Dense(16, name="layers"), x, None)[0]


def test_an_adapter_that_no_module_reads_raises():
    params, adapter, config = made(ScansParamsOnly(), FLOATS)
    variables = {"params": params, "lora": adapter}
    with pytest.raises(InputError, match=r"no module read the 'lora' of layers: .*\{True: 0\}"):
        adapt(ScansParamsOnly().apply, config)(variables, FLOATS)

    dense = nn.Dense(16)
    params, adapter, config = made(dense, FLOATS)
    variables, warm = {"params": params, "lora": adapter}, jax.jit(dense.apply)
    warm(variables, FLOATS)
    with pytest.raises(InputError, match=r"or was compiled or .* before it was adapted"):
        adapt(warm, config)(variables, FLOATS)
    jax.jit(adapt(dense.apply, config))(variables, FLOATS)
    with pytest.raises(InputError, match="the variables hold no collection 'lora'"):
        adapt(dense.apply, config)({"params": params}, FLOATS)


class Strange(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(16, (3,), name="conv")(x)
        x = nn.DenseGeneral(5, batch_dims=0, name="batched")(x)
        return nn.Dense(4, name="plain")(x)


@pytest.mark.parametrize(
    ("targets", "rank", "message"),
    [
        ((r"quary/kernel",), 2, "'quary/kernel' matches no parameter: .* are plain/kernel"),
        ((r"lain/kernel",), 2, "'lain/kernel' matches no parameter"),
        ((r".*/kernel",), 2, "matches conv/kernel, which the model does not apply as a linear map"),
        ((r"batched/kernel",), 2, "matches batched/kernel, which .* are plain/kernel"),
        ((r"plain/kernel",), 5, "the rank 5 is above .* plain/kernel, a matrix 5 x 4: .*plain/ker"),
        ((r"plain/bias",), 2, "'plain/bias' matches no parameter"),
    ],
)
def test_targets_that_do_not_fit_raise(targets, rank, message):
    with pytest.raises(InputError, match=message):
        made(Strange(), FLOATS, targets=targets, rank=rank)


class ScaledEmbed(nn.Embed):
    def __call__(self, ids):
        return 4.0 * super().__call__(ids)


class Shifted(ScaledEmbed):
    def __call__(self, ids):
        return 1.0 + super().__call__(ids)


class Halved(nn.Dense):
    @nn.compact
    def __call__(self, x):
        return super().__call__(x) / 2


class Normalized(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.WeightNorm(nn.Dense(8, name="inside"))(x)  # whose scale is "inside/kernel/scale"
        return nn.Dense(8, name="plain")(x)


@pytest.mark.parametrize(
    ("model", "x", "target"),
    [
        (ScaledEmbed(32, 12), IDS, "embedding"),
        (Shifted(32, 12), IDS, "embedding"),
        (nn.remat(ScaledEmbed)(32, 12), IDS, "embedding"),
        (Halved(8), FLOATS, "kernel"),
        (nn.jit(nn.Dense)(8), FLOATS, "kernel"),
        (Normalized(), FLOATS, "plain/kernel"),
    ],
)
def test_a_subclass_is_adapted_once(model, x, target):
    params, adapter, config = made(model, x, targets=(target,), rank=2)
    adapter = jax.tree.map(lambda leaf: leaf + 0.1, adapter)
    y = adapt(model.apply, config)({"params": params, "lora": adapter}, x)
    merged = model.apply({"params": merge(params, adapter, config)}, x)
    assert jnp.abs(y - model.apply({"params": params}, x)).max() > 0.01
    np.testing.assert_allclose(y, merged, atol=2e-6)


class Masked(nn.Dense):
    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", self.kernel_init, (16, 8))
        return x @ (kernel * jnp.tril(jnp.ones((16, 8))))


class Projection(nn.Module):
    num_inputs: int  # not the number of axes

    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", nn.initializers.lecun_normal(), (self.num_inputs, 8))


@pytest.mark.parametrize("model", [Masked(8), Projection(16)])
def test_what_only_looks_like_a_linear_map_is_no_site(model):
    with pytest.raises(InputError, match="matches kernel, which the model does not apply as"):
        made(model, FLOATS, targets=("kernel",), rank=2)


def test_parameters_that_are_not_where_the_call_reads_them_raise():
    first, then = nn.Dense(16), nn.Dense(8)
    params = {"first": first.init(jax.random.key(0), FLOATS)["params"]}
    params["then"] = then.init(jax.random.key(0), FLOATS)["params"]

    def call(variables):
        x = first.apply({"params": variables["params"]["first"]}, FLOATS)
        return then.apply({"params": variables["params"]["then"]}, x)

    with pytest.raises(InputError, match="hold no kernel, which the call applies: join"):
        find_sites(call, {"params": params})

    named = nn.Dense(8, kernel_init=nn.with_partitioning(nn.initializers.ones, (None, "model")))
    with pytest.raises(InputError, match=r"kernel has names of its axes: give flax\.linen\.unbox"):
        made(named, FLOATS, targets=("kernel",), rank=2)
