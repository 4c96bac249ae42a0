from collections.abc import Callable
from functools import partial
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapted_models import FLOATS, IDS, filled, made, sites_of

from jaxlm.errors import InputError
from jaxlm.nn.intercept import find_sites
from jaxlm.peft.lora import adapt, merge, stack


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
    with pytest.raises(
        InputError, match=r"no module read the 'lora' of layers: .*\{True: 0\} \(nn.s"
    ):
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
        x = nn.ConvLocal(16, (3,), name="local")(x)
        x = nn.DenseGeneral(5, batch_dims=0, name="batched")(x)
        return nn.Dense(4, name="plain")(x)


@pytest.mark.parametrize(
    ("targets", "rank", "message"),
    [
        ((r"quary/kernel",), 2, "'quary/kernel' matches no parameter: those .* are plain/kernel"),
        ((r"lain/kernel",), 2, "'lain/kernel' matches no parameter"),
        ((r".*/kernel",), 2, "matches local/kernel, .*: nn.ConvLocal has a kernel for each pos"),
        (
            (r"batched/kernel",),
            2,
            "matches batched/kernel, .*: batch_dims=0 gives .* are plain/kernel",
        ),
        ((r"plain/kernel",), 5, "the rank 5 is above .* plain/kernel, a matrix 5 x 4: .*plain/ker"),
        ((r"plain/bias",), 2, "matches plain/bias, .*: adapters stand .*: name plain/kernel"),
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
    name = type(model).__name__
    with pytest.raises(
        InputError, match=rf"matches kernel, .*: {name} reads it itself, .* are none"
    ):
        made(model, FLOATS, targets=("kernel",), rank=2)


class Stack(nn.Module):
    block: Callable[[], nn.Module]
    variable_axes: Any = flax.core.freeze({True: 0})

    @nn.compact
    def __call__(self, x):
        body = lambda block, x, _: (block(x), None)
        scan = nn.scan(
            body, variable_axes=self.variable_axes, split_rngs={"params": True}, length=2
        )
        return scan(self.block(), x, None)[0]


class Wrapped(nn.Module):
    """What a wrapper such as WeightNorm makes of a map, and a map beside it."""

    wrapper: Callable[[nn.Module], Callable[[Any], Any]]

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="plain")(self.wrapper(nn.Dense(16, name="inside"))(x))


class Normed(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        return nn.WeightNorm(nn.Dense(self.features))(x)


def transposed(dense):
    turn = lambda variables: jax.tree.map(lambda leaf: leaf.T, variables)
    read = nn.map_variables(
        lambda dense, x: dense(x), "params", turn, turn, init=dense.is_initializing()
    )
    return lambda x: read(dense, x)


def spectral(dense):
    return lambda x: nn.SpectralNorm(dense)(x, update_stats=False)


class Tied(nn.Module):
    """A map that is called twice: by itself both times, or once otherwise."""

    second: Callable[[nn.Module, Any], Any]
    first: Callable[[], nn.Module] = partial(nn.Dense, 16, name="tied")

    @nn.compact
    def __call__(self, x):
        tied = self.first()
        return self.second(tied, nn.tanh(tied(x)))


class Shared(nn.Module):
    """One module, given to two others."""

    @nn.compact
    def __call__(self, x):
        shared = nn.Dense(16, name="shared")
        return Calls(shared)(nn.tanh(Calls(shared)(x)))


class Calls(nn.Module):
    inner: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.inner(x)


def kernel_of(module):
    return module.variables["params"]["kernel"]


def batched(variable_axes, in_axes=0):
    """A map for each example, or one for all."""
    return nn.vmap(
        nn.Dense,
        variable_axes=variable_axes,
        split_rngs={"params": True not in variable_axes or variable_axes[True] is not None},
        in_axes=in_axes,
    )


class Recurrent(nn.Module):
    cell: Callable[[], nn.Module]
    variable_broadcast: Any = True

    @nn.compact
    def __call__(self, x):
        return nn.RNN(self.cell(), variable_broadcast=self.variable_broadcast)(x)


class Raw(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="plain")(x @ self.param("w", nn.initializers.normal(), (16, 16)))


class GivenEinsum(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Einsum((16, 2, 3))(x, einsum_str="btd, dnh -> btnh")


IMAGES = jnp.asarray(np.random.default_rng(2).normal(size=(2, 6, 6, 4)), jnp.float32)
VOLUMES = jnp.asarray(np.random.default_rng(3).normal(size=(2, 4, 4, 4, 3)), jnp.float32)
IMAGE_ROWS = jnp.stack([IMAGES, IMAGES[::-1]], axis=1)  # [batch, time, height, width, channels]
# Every layer of flax with a kernel: it is adapted, exactly as if merged, or the error says why not.
ADAPTED = {
    "Dense": (nn.Dense(8), FLOATS),
    "DenseGeneral": (nn.DenseGeneral((2, 3), axis=(-2, -1)), FLOATS),
    "Einsum": (nn.Einsum((16, 2, 3), "...d,dnh->...nh"), FLOATS),
    "Einsum over two axes": (nn.Einsum((6, 16, 5), "btd,tdo->bo", use_bias=False), FLOATS),
    "Einsum in front": (nn.Einsum((6, 5), "bt...,to->b...o"), FLOATS),
    "Einsum given in the call": (GivenEinsum(), FLOATS),
    "Conv 1d": (nn.Conv(8, (3,), strides=2), FLOATS),
    "Conv 1d, causal": (nn.Conv(8, (3,), padding="CAUSAL", kernel_dilation=2), FLOATS),
    "Conv 1d, unbatched": (nn.Conv(8, (3,)), FLOATS[0]),
    "Conv 2d": (nn.Conv(8, (3, 2), padding="VALID", use_bias=False), IMAGES),
    "Conv 2d, circular": (nn.Conv(8, (3, 3), padding="CIRCULAR"), IMAGES),
    "Conv 3d": (nn.Conv(5, (2, 2, 2)), VOLUMES),
    "ConvTranspose": (nn.ConvTranspose(8, (3, 3), strides=(2, 2)), IMAGES),
    "Embed": (nn.Embed(32, 8), IDS),
    "attention": (nn.MultiHeadDotProductAttention(2), FLOATS),
    "LSTMCell": (Recurrent(partial(nn.LSTMCell, 5)), FLOATS),
    "GRUCell": (Recurrent(partial(nn.GRUCell, 5), ("params", "lora")), FLOATS),
    "MGUCell": (Recurrent(partial(nn.MGUCell, 5)), FLOATS),
    "SimpleCell": (Recurrent(partial(nn.SimpleCell, 5)), FLOATS),
    "ConvLSTMCell": (Recurrent(partial(nn.ConvLSTMCell, 5, (3, 3))), IMAGE_ROWS),
    "remat": (nn.remat(nn.Dense)(8), FLOATS),
    "scan": (Stack(partial(nn.Dense, 16)), FLOATS),
    "scan of remat": (Stack(partial(nn.remat(nn.Dense), 16)), FLOATS),
    "scan of convolutions": (Stack(partial(nn.Conv, 16, (3,))), FLOATS),
    "bfloat16": (nn.Dense(8, dtype=jnp.bfloat16), FLOATS),
    "two calls of one module": (Tied(lambda tied, x: tied(x)), FLOATS),
    "a module that two share": (Shared(), FLOATS),
    "a table and its scores": (
        Tied(lambda tied, x: tied.attend(x), partial(nn.Embed, 32, 8, name="tied")),
        IDS,
    ),
    "vmap with a map for each": (batched({True: 0})(8), FLOATS),
    "vmap with one for all": (batched({True: None})(8), FLOATS),
    "remat of a call": (Tied(lambda tied, x: nn.remat(lambda m, x: m(x))(tied, x)), FLOATS),
    "map_variables that changes nothing": (
        Wrapped(
            lambda dense: (
                lambda x: nn.map_variables(
                    lambda dense, x: dense(x), "params", init=dense.is_initializing()
                )(dense, x)
            )
        ),
        FLOATS,
    ),
}
BESIDE = "it is read beside the calls of its module"
OF_OTHERS = "applies what is computed from it, as under nn.WeightNorm"
REFUSED = {
    "DenseGeneral": (nn.DenseGeneral(5, batch_dims=(0,)), FLOATS, "kernel", r"batch_dims=\(0,\)"),
    "Einsum": (nn.Einsum((8, 16), "bti,oi->bto"), FLOATS, "kernel", "its einsum is not"),
    "Einsum by head": (nn.Einsum((6, 16, 5), "btd,tdo->bto"), FLOATS, "kernel", "its einsum is"),
    "groups": (nn.Conv(8, (3,), feature_group_count=4), FLOATS, "kernel", "feature_group_count=4"),
    "mask": (nn.Conv(8, (3,), mask=jnp.ones((3, 16, 8))), FLOATS, "kernel", "the mask of its conv"),
    "ConvLocal": (nn.ConvLocal(8, (3,)), FLOATS, "kernel", "ConvLocal has a kernel for each"),
    "ConvTranspose": (
        nn.ConvTranspose(16, (3,), transpose_kernel=True),
        FLOATS,
        "kernel",
        "transpose_kernel=True puts",
    ),
    "OptimizedLSTMCell": (
        Recurrent(partial(nn.OptimizedLSTMCell, 5)),
        FLOATS,
        "OptimizedLSTMCell_0/hf/kernel",
        "nn.LSTMCell, with the same parameters, can be adapted",
    ),
    "scan along another axis": (
        Stack(partial(nn.Dense, 16), flax.core.freeze({True: 1})),
        FLOATS,
        "Dense_0/kernel",
        r"applies \(16, 16\) of \(16, 2, 16\), and layers are",
    ),
    "WeightNorm": (Wrapped(nn.WeightNorm), FLOATS, "inside/kernel", OF_OTHERS),
    "WeightNorm in a scan": (
        Stack(partial(nn.remat(Normed), 16)),
        FLOATS,
        "kernel",
        OF_OTHERS,
    ),
    "SpectralNorm": (Wrapped(spectral), FLOATS, "inside/kernel", OF_OTHERS),
    "WeightNorm at one of two calls": (
        Tied(lambda tied, x: nn.WeightNorm(tied)(x)),
        FLOATS,
        "tied/kernel",
        OF_OTHERS,
    ),
    "used transposed": (
        Tied(lambda tied, x: x @ kernel_of(tied).T),
        FLOATS,
        "tied/kernel",
        BESIDE,
    ),
    "used transposed in a loop": (
        Stack(partial(Tied, lambda tied, x: x @ kernel_of(tied).T)),
        FLOATS,
        "tied/kernel",
        BESIDE,
    ),
    "a table used transposed": (
        Tied(lambda tied, x: x @ tied.embedding.T, partial(nn.Embed, 32, 8, name="tied")),
        IDS,
        "tied/embedding",
        BESIDE,
    ),
    "a norm of the kernel": (
        Tied(lambda tied, x: x + jnp.sum(kernel_of(tied) ** 2)),
        FLOATS,
        "tied/kernel",
        BESIDE,
    ),
    "vmap along another axis": (
        batched({True: 1})(8),
        FLOATS,
        "kernel",
        "layers are supported along the first axis",
    ),
    "map_variables": (Wrapped(transposed), FLOATS, "inside/kernel", OF_OTHERS),
    "read without a module": (Raw(), FLOATS, "w", "Raw reads it itself, and not through nn.Dense"),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "lora") for name in ADAPTED]
    + [(name, "dora") for name in ("Einsum", "Conv 2d, circular", "ConvTranspose", "scan")],
)
def test_layers_that_are_adapted(name, kind):
    module, x = ADAPTED[name]
    params, adapter, config = made(module, x, targets=(r"(.*/)?(kernel|embedding)",), kind=kind)
    adapter = filled(adapter, 1)
    y = jax.jit(adapt(module.apply, config))({"params": params, "lora": adapter}, x)
    apply = jax.jit(module.apply)
    merged = apply({"params": merge(params, adapter, config)}, x)
    atol = 0.02 if y.dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(y, merged, atol=atol * max(1, np.abs(merged).max()))
    assert np.abs(y - apply({"params": params}, x)).max() > 0.05


@pytest.mark.parametrize("name", REFUSED)
def test_layers_that_are_refused(name):
    module, x, path, reason = REFUSED[name]
    with pytest.raises(InputError, match=f"matches .*{path}, which cannot be adapted: .*{reason}"):
        made(module, x, targets=(rf"(.*/)?{path}",))


def test_several_adapters_of_a_convolution():
    conv = nn.Conv(5, (3, 3))
    params, adapter, config = made(conv, IMAGES)
    adapters = [filled(adapter, seed) for seed in range(2)]
    variables = {"params": params, "lora": stack(adapters)}
    y = adapt(conv.apply, config)(variables, IMAGES, adapter_ids=jnp.array([1, 0]))
    for row, which in enumerate([1, 0]):
        alone = adapt(conv.apply, config)({"params": params, "lora": adapters[which]}, IMAGES)
        np.testing.assert_allclose(y[row], alone[row], atol=1e-5)


def test_adapters_of_a_cell_that_is_not_broadcast_raise():
    params, adapter, config = made(Recurrent(partial(nn.LSTMCell, 5)), FLOATS)
    plain = Recurrent(partial(nn.LSTMCell, 5), "params")  # flax's default
    with pytest.raises(InputError, match=r"or variable_broadcast=True \(nn.RNN\)"):
        adapt(plain.apply, config)({"params": params, "lora": adapter}, FLOATS)


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
