import flax.linen as nn
import jax
import pytest
from adapted_models import FLOATS, made, sites_of

from jaxlm.errors import InputError
from jaxlm.lora import adapt


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
    with pytest.raises(InputError, match="or was compiled before it was adapted"):
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
