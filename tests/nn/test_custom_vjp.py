"""Every hand-written gradient is that of its equation: on one device, and inside shard_map."""

import copy
import pickle
from functools import cache, partial
from typing import Any, NamedTuple

import adapted_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxlm.models.bilstm import BilstmConfig
from jaxlm.models.heads import TokenHead, WithHead
from jaxlm.nn import custom_vjp, masks
from jaxlm.nn.attention import MultiHeadAttention, dot_product_attention
from jaxlm.nn.dropout import dropout
from jaxlm.nn.embed import attend
from jaxlm.nn.feedforward import gelu, gelu_tanh
from jaxlm.nn.linear import linear
from jaxlm.nn.recurrent import lstm
from jaxlm.objectives.cross_entropy import cross_entropy
from jaxlm.peft import lora

KEY = jax.random.key(3)
DEVICES = 8
# In bfloat16 what is compared has gone through up to four roundings, of half an eps each of what
# was largest; in float32 through sums of up to 64 terms.
TOLERANCE = {
    jnp.float32: 64 * float(jnp.finfo(jnp.float32).eps),
    jnp.bfloat16: 4 * float(jnp.finfo(jnp.bfloat16).eps),
}


def normal(*shape, seed):
    # Representable in bfloat16, so that both dtypes start equal.
    values = np.random.default_rng(seed).normal(size=shape).astype(jnp.bfloat16)
    return jnp.asarray(values.astype(np.float32))


class Case(NamedTuple):
    """A function of operands: ``axes`` says along which of theirs examples lie (None: shared)."""

    function: Any
    operands: tuple
    axes: tuple
    options: dict = {}  # noqa: RUF012
    keys: tuple = ()  # names of the operands after the first, where they are keywords

    def run(self, function, *operands):
        positional = len(operands) - len(self.keys)
        named = dict(zip(self.keys, operands[positional:], strict=True))
        return function(*operands[:positional], **named, **self.options)


RNG = np.random.default_rng(0)
HEADS = tuple(normal(16, 5, 2, 4, seed=seed) for seed in (0, 1, 2))
CASES = {
    "linear": Case(
        linear, (normal(16, 6, seed=0), normal(6, 5, seed=1), normal(5, seed=2)), (0, None, None)
    ),
    "attend": Case(
        attend, (normal(16, 6, seed=0), normal(9, 6, seed=1), normal(9, seed=2)), (0, None, None)
    ),
    "attend without a bias": Case(attend, (normal(16, 6, seed=0), normal(9, 6, seed=1)), (0, None)),
    "attention": Case(
        dot_product_attention,
        (*HEADS, jnp.asarray(RNG.random((16, 1, 5, 5)) < 0.7), normal(1, 2, 1, 5, seed=3)),
        (0, 0, 0, 0, None),
        {"dropout_rate": 0.3, "dropout_key": KEY},
        ("mask", "bias"),
    ),
    "gelu": Case(gelu, (normal(16, 6, seed=0),), (0,)),
    "gelu_tanh": Case(gelu_tanh, (normal(16, 6, seed=0),), (0,)),
    "dropout": Case(dropout, (normal(16, 6, seed=0),), (0,), {"rate": 0.25, "key": KEY}),
    "lstm": Case(
        lstm,
        (
            normal(5, 16, 4, 3, seed=0),
            normal(3, 4, 3, seed=1),
            jnp.asarray(RNG.random((5, 16)) < 0.7),
        ),
        (1, None, 1),
    ),
    "cross_entropy": Case(
        cross_entropy, (normal(16, 9, seed=0), jnp.asarray(RNG.integers(0, 9, 16))), (0, 0)
    ),
    "low_rank": Case(
        lora._low_rank,
        (normal(16, 6, seed=0), normal(6, 2, seed=1), normal(2, 7, seed=2)),
        (0, None, None),
    ),
}
LOW_PRECISION = [name for name in CASES if name not in ("lstm", "cross_entropy")]


def floats(operands):
    return [i for i, x in enumerate(operands) if jnp.issubdtype(x.dtype, jnp.floating)]


def loss_of(case, function):
    def loss(*operands):
        """Nonlinear in the result, so that a wrong cotangent shows."""
        out = case.run(function, *operands)
        out = out[0] if isinstance(out, tuple) else out
        out = out.astype(jnp.float32)
        return jnp.sum(jnp.sin(3 * out)), out

    return loss


def gradient_of(case, function):
    return jax.grad(loss_of(case, function), argnums=floats(case.operands), has_aux=True)


def assert_close(got, expected, tolerance=TOLERANCE[jnp.float32]):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(1, np.abs(y).max()))


every_case = pytest.mark.parametrize("name", CASES)
COMPARED = [(name, jnp.float32) for name in CASES]
COMPARED += [(name, jnp.bfloat16) for name in LOW_PRECISION]


@pytest.mark.parametrize(("name", "dtype"), COMPARED)
def test_value_and_gradient_are_those_of_the_equation(name, dtype):
    case = CASES[name]
    low = [
        x.astype(dtype) if i in floats(case.operands) else x for i, x in enumerate(case.operands)
    ]
    # Dropout scales by what its precision makes of the rate: a quarter is exact in either.
    tolerance = TOLERANCE[dtype]
    gradients, out = jax.jit(gradient_of(case, case.function))(*low)
    exact_gradients, exact = jax.jit(gradient_of(case, case.function.plain))(*case.operands)
    assert all(gradient.dtype == dtype for gradient in gradients)
    assert_close(out, exact, tolerance)
    # The sine turns an error of the value into one of its slope, three times three as large.
    assert_close(gradients, exact_gradients, 9 * tolerance)
    # The control: a gradient of another point is told apart.
    other, _ = jax.jit(gradient_of(case, case.function))(low[0] * 1.5, *low[1:])
    with pytest.raises(AssertionError, match="Not equal"):
        assert_close(other, exact_gradients, 9 * tolerance)


def mesh_of_all():
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))


def specs_of(axes):
    return tuple(
        PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, "data") for axis in axes
    )


def sharded_gradient(case, function, *, check_vma=True):
    where, specs = floats(case.operands), specs_of(case.axes)

    def local(*operands):
        return gradient_of(case, function)(*operands)[0]

    out_specs = tuple(specs[i] for i in where)
    run = jax.shard_map(
        local, mesh=mesh_of_all(), in_specs=specs, out_specs=out_specs, check_vma=check_vma
    )
    return jax.jit(run)(*case.operands)


def gradient_by_shard(case):
    """On one device, the examples in as many parts, for each of which masks are drawn anew."""

    def split(x, axis):
        if axis is None:
            return x
        return x.reshape(*x.shape[:axis], DEVICES, -1, *x.shape[axis + 1 :])

    def total(*operands):
        losses = jax.vmap(lambda *part: loss_of(case, case.function.plain)(*part)[0], case.axes)
        return losses(*map(split, operands, case.axes)).sum()

    return jax.jit(jax.grad(total, argnums=floats(case.operands)))(*case.operands)


@cache
def erf_can_be_differentiated():
    """Inside shard_map, by JAX itself, which 0.12 refuses: equations with an erf cannot be then."""
    rows = PartitionSpec("data")
    slope = jax.grad(lambda x: jax.lax.erf(x).sum())
    try:
        jax.shard_map(slope, mesh=mesh_of_all(), in_specs=rows, out_specs=rows)(jnp.ones(DEVICES))
    except ValueError as error:
        return "Primitive polynomial" not in str(error)
    return True


@every_case
def test_inside_shard_map(name):
    case = CASES[name]
    expected = gradient_by_shard(case)
    assert_close(sharded_gradient(case, case.function), expected)
    if name != "gelu" or erf_can_be_differentiated():
        assert_close(sharded_gradient(case, case.function.plain), expected)
    if None in case.axes:
        # The control: without the sum over devices, shared operands get a part of their gradient.
        with pytest.raises(AssertionError, match="Not equal"):
            assert_close(sharded_gradient(case, case.function, check_vma=False), expected)


@every_case
def test_forward_mode_needs_the_equation(name):
    case = CASES[name]
    where = floats(case.operands)
    tangents = tuple(normal(*case.operands[i].shape, seed=9 + i) for i in where)

    def directional(function):
        def loss(*differentiated):
            operands = list(case.operands)
            for i, x in zip(where, differentiated, strict=True):
                operands[i] = x
            return loss_of(case, function)(*operands)[0]

        return jax.jvp(loss, tuple(case.operands[i] for i in where), tangents)[1]

    with pytest.raises(TypeError, match="custom_vjp"):
        directional(case.function)
    backwards = gradient_of(case, case.function)(*case.operands)[0]
    expected = sum(jnp.vdot(g, t) for g, t in zip(backwards, tangents, strict=True))
    assert abs(float(expected)) > 0.1
    assert_close(directional(case.function.plain), expected, 1e-5)
    with custom_vjp.plain():
        assert_close(directional(case.function), expected, 1e-5)


def test_jit_sees_the_switch():
    tangent = jax.jit(lambda x: jax.jvp(gelu, (x,), (jnp.ones_like(x),))[1])
    compiled = jax.jit(gelu)
    compiled(HEADS[0])
    with custom_vjp.plain():
        tangent(HEADS[0])
        jax.jvp(compiled, (HEADS[0],), (HEADS[1],))
    with pytest.raises(TypeError, match="custom_vjp"):
        tangent(HEADS[0])
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(compiled, (HEADS[0],), (HEADS[1],))


def test_copies_are_the_function_itself():
    assert copy.deepcopy(gelu) is gelu
    assert pickle.loads(pickle.dumps(dot_product_attention)) is dot_product_attention


# Whole models. Their dropout is off: inside shard_map each device counts positions from 0.
BERT = adapted_models.CASES["bert"].module
BILSTM = WithHead(BilstmConfig(vocab_size=32, embed_dim=8, hidden_dim=8).make(), TokenHead(32))
TOKENS = jnp.asarray(RNG.integers(0, 32, (16, 6)))
SEGMENTS = jnp.asarray(np.sort(RNG.integers(0, 2, (16, 6))))


class Model(NamedTuple):
    apply: Any
    variables: Any

    def logits(self, variables, tokens, segments):
        options = {}
        if "lora" in variables:
            options["adapter_ids"] = jnp.arange(tokens.shape[0]) % 2  # two adapters, by turns
        return self.apply(variables, tokens, segment_ids=segments, **options)

    def loss(self, variables, tokens, segments):
        losses, _ = cross_entropy(self.logits(variables, tokens, segments), tokens)
        return losses.sum()


def model_of(name):
    """BERT with adapters of every kernel and of its table, all of which learn; a BiLSTM."""
    if name == "bilstm":
        shapes = jax.eval_shape(BILSTM.init, jax.random.key(0), TOKENS)
        return Model(BILSTM.apply, adapted_models.filled(shapes, 0))
    config = adapted_models.config_of("bert")
    adapters = [adapted_models.adapter_of("bert", config, seed=seed) for seed in (7, 8)]
    variables = {"params": adapted_models.params_of("bert"), "lora": lora.stack(adapters)}
    return Model(lora.adapt(BERT.apply, config), variables)


every_model = pytest.mark.parametrize(
    "name", [pytest.param("bert", marks=pytest.mark.slow), "bilstm"]
)


@every_model
def test_a_model_inside_shard_map(name):
    model = model_of(name)
    expected = jax.jit(jax.grad(model.loss))(model.variables, TOKENS, SEGMENTS)
    rows = PartitionSpec("data")

    def sharded(check_vma):
        run = jax.shard_map(
            jax.grad(model.loss),
            mesh=mesh_of_all(),
            in_specs=(PartitionSpec(), rows, rows),
            out_specs=PartitionSpec(),
            check_vma=check_vma,
        )
        return jax.jit(run)(model.variables, TOKENS, SEGMENTS)

    assert_close(sharded(True), expected, 1e-5)
    if name != "bert" or erf_can_be_differentiated():
        with custom_vjp.plain():
            assert_close(sharded(True), expected, 1e-5)
    with pytest.raises(AssertionError, match="Not equal"):  # the control
        assert_close(sharded(False), expected, 1e-5)


@every_model
def test_forward_mode_of_a_model(name):
    model = model_of(name)
    gradient = jax.grad(lambda variables: model.loss(variables, TOKENS, SEGMENTS))
    rng = np.random.default_rng(5)
    tangent = jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), model.variables)

    def backwards(variables):
        return sum(map(jnp.vdot, *map(jax.tree.leaves, (gradient(variables), tangent))))

    def forwards(variables):
        loss = lambda variables: model.loss(variables, TOKENS, SEGMENTS)
        slope = jax.jvp(loss, (variables,), (tangent,))[1]
        curvature = jax.jvp(gradient, (variables,), (tangent,))[1]  # forward over reverse

        def logits(scale):
            """Of one position, by the channels of the token table."""
            params = dict(variables["params"])
            table = params["encoder"]["token_embed"]["embedding"] * scale[None]
            params["encoder"] = {**params["encoder"], "token_embed": {"embedding": table}}
            return model.logits({**variables, "params": params}, TOKENS[:2], SEGMENTS[:2])[0, 0]

        scale = jnp.ones(variables["params"]["encoder"]["token_embed"]["embedding"].shape[1])
        return slope, curvature, jax.jacfwd(logits)(scale), jax.jacrev(logits)(scale)

    with custom_vjp.plain():
        slope, curvature, jacobian, same = jax.jit(forwards)(model.variables)
    # Reverse over reverse of the hand-written gradients.
    expected, exact_curvature = jax.jit(jax.value_and_grad(backwards))(model.variables)
    assert abs(float(expected)) > 1
    assert_close(slope, expected, 1e-4)
    assert_close(curvature, exact_curvature, 1e-4)
    assert_close(jacobian, same, 1e-5)
    assert float(jnp.abs(jacobian).max()) > 0.01
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jit(forwards)(model.variables)


# Attention with one line of its mathematics changed.


def soft_capped(query, key, value, *, mask, bias, dropout_rate, dropout_key):
    """Scores in (-2, 2), and not divided by the root of head_dim (Gemma 2, T5)."""
    assert bias is None
    scores = 2 * jnp.tanh(jnp.einsum("bqhd,bkhd->bhqk", query, key) / 2)
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e30))
    if dropout_key is not None:
        weights = dropout(weights, dropout_rate, dropout_key)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def test_an_edited_equation_trains_with_its_own_gradient():
    x, mask = normal(2, 5, 6, seed=0), masks.padding(jnp.array([5, 3]), 5)
    edited = MultiHeadAttention(2, 3, dropout_rate=0.3, attend=soft_capped)
    shapes = jax.eval_shape(partial(edited.init, mask=mask), jax.random.key(0), x)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda s: jnp.float32(rng.normal(size=s.shape) / 2), shapes)
    assert shapes == jax.eval_shape(MultiHeadAttention(2, 3).init, jax.random.key(0), x)
    direction = jax.tree.map(lambda p: jnp.float32(rng.normal(size=p.shape)), params)

    def loss(params, attend):
        module = edited.clone(attend=attend)
        out = module.apply(params, x, mask=mask, deterministic=False, rngs={"dropout": KEY})
        return jnp.square(out - jnp.flip(x, -1)).mean()

    def slope(attend):
        gradient = jax.jit(jax.grad(partial(loss, attend=attend)))(params)
        return float(sum(map(jnp.vdot, *map(jax.tree.leaves, (gradient, direction)))))

    value = jax.jit(partial(loss, attend=soft_capped))

    def moved(size):
        at = jax.tree.map(lambda p, d: p + size * d, params, direction)
        return float(value(at))

    # Central differences, of error size² and eps / size: about a thousandth of the slope.
    numeric = (moved(5e-3) - moved(-5e-3)) / 1e-2
    assert slope(soft_capped) == pytest.approx(numeric, rel=5e-3)
    assert slope(dot_product_attention) != pytest.approx(numeric, rel=0.05)  # the control

    @jax.jit
    def train(params):
        def step(params, _):
            now, gradient = jax.value_and_grad(partial(loss, attend=soft_capped))(params)
            return jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient), now

        return jax.lax.scan(step, params, None, length=60)[1]

    losses = train(params)
    assert losses[-1] < 0.5 * losses[0]
