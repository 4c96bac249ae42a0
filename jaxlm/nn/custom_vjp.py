"""Hand-written gradients: faster than what JAX finds, and with less kept for them.

Each stands as a decorator over the plain equation, in the file of the module that uses it::

    @custom_vjp.gelu
    def gelu(x): return x * norm.cdf(x)

To change the equation, delete the decorator, or pass a function of your own where a module takes
one (``MultiHeadAttention(attend=...)``): JAX finds the right gradient. None of them has a forward
mode (``jax.jvp``, ``jacfwd``, ``hessian``; JAX raises a ``TypeError`` that names ``custom_vjp``);
inside :func:`plain` every equation of a model, its loss and its adapters has.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax
from jaxtyping import Array

from jaxlm.nn.masks import NEGATIVE, Visible, dense
from jaxlm.nn.products import add_bias, contract, outer, product, product_gradients, sum_rows

P = ParamSpec("P")
R = TypeVar("R")

# JAX's own kind of context, which is part of the key under which jit keeps what it has traced.
_PLAIN = jax.make_user_context(False)


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Inside, JAX differentiates the equations themselves: there is a forward mode.

    What counts is where a function is traced; ``jax.jit`` traces anew what it has traced outside.
    Backwards, a step of a BERT-mini takes 1.4 times as long on a CPU.
    """
    with _PLAIN(True):
        yield


class _HandWritten(Generic[P, R]):
    """An equation that is differentiated backwards by hand; made by :func:`gradient`.

    Inside ``jax.shard_map`` operands are first made to vary over the same axes, so that the
    gradient of what all devices share, such as weights, is the sum over them.
    """

    def __init__(
        self,
        equation: Callable[P, R],
        forward: Callable[..., tuple[Any, Any]],
        backward: Callable[..., tuple[Any, ...]],
        static: tuple[int, ...] = (),
    ) -> None:
        functools.update_wrapper(self, equation)
        self._equation = equation
        self._signature = inspect.signature(equation)
        primal = lambda *operands: forward(*operands)[0]
        primal.__name__ = equation.__name__
        self._fast = jax.custom_vjp(primal, nondiff_argnums=static)
        self._fast.defvjp(forward, backward)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        operands = vary_alike(list(bound.arguments.values()))
        if not _PLAIN.value:
            return self._fast(*operands)
        bound.arguments.update(zip(bound.arguments, operands, strict=True))
        return self._equation(*bound.args, **bound.kwargs)

    def plain(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The equation, differentiated by JAX, as is every other that it calls."""
        with plain():
            return self(*args, **kwargs)

    def __reduce__(self) -> str:
        return self._equation.__qualname__  # pickled and copied as the function it stands for


def vary_alike(operands: Sequence[Any]) -> list[Any]:
    """Operands that vary over the same axes of ``shard_map``, whose gradients then do, too.

    The transpose of this, where JAX sums the gradient of what did not vary, lies outside the rule.
    """
    arrays = [x for x in operands if isinstance(x, jax.Array | np.ndarray)]
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))
    if not axes:
        return list(operands)

    def vary(x: Any) -> Any:
        if not isinstance(x, jax.Array | np.ndarray):
            return x
        missing = axes - jax.typeof(x).manual_axis_type.varying
        return lax.pcast(x, tuple(sorted(missing, key=str)), to="varying")

    return list(map(vary, operands))


def gradient(
    forward: Callable[..., tuple[Any, Any]],
    backward: Callable[..., tuple[Any, ...]],
    static: tuple[int, ...] = (),
) -> Callable[[Callable[P, R]], _HandWritten[P, R]]:
    """A decorator: ``forward`` and ``backward`` of ``jax.custom_vjp`` for the equation below it.

    All of the equation's arguments are passed to ``forward`` in their order, keyword or not;
    those numbered in ``static`` are no arrays, and come first in ``backward``.
    """
    return lambda equation: _HandWritten(equation, forward, backward, static)


def _linear_forward(
    x: Array, kernel: Array, bias: Array | None
) -> tuple[Array, tuple[Array, Array, Array | None]]:
    # The bare product, because the remat policies of stack.py do not look into a custom_vjp.
    y = contract(x, kernel, (x.ndim - 1,), (0,))
    if bias is None:
        return y, (x, kernel, bias)
    if x.dtype != y.dtype:
        # To what the result will be in any case: a GPU's product then writes half the bytes.
        rounded = lambda y: y.astype(x.dtype).astype(y.dtype)
        y = lax.platform_dependent(y, cpu=lambda y: y, default=rounded)
    return add_bias(y, bias), (x, kernel, bias)


def _linear_backward(
    residuals: tuple[Array, Array, Array | None], g: Array
) -> tuple[Array, Array, Array | None]:
    x, kernel, bias = residuals
    g = g.astype(x.dtype)
    dx = contract(g, kernel, (g.ndim - 1,), (1,)).astype(x.dtype)
    dbias = None if bias is None else sum_rows(g).astype(bias.dtype)
    return dx, outer(x, g).astype(kernel.dtype), dbias


linear = gradient(_linear_forward, _linear_backward)
"""In bfloat16 the product is rounded before the bias is added, but for CPUs."""


def _attend_forward(
    x: Array, table: Array, bias: Array | None
) -> tuple[Array, tuple[Array | None, ...]]:
    if bias is None:
        return contract(x, table, (x.ndim - 1,), (1,)), (x, table, bias)

    def narrow(x: Array, table: Array, bias: Array) -> Array:
        return add_bias(contract(x, table, (x.ndim - 1,), (1,)), bias)

    def widened(x: Array, table: Array, bias: Array) -> Array:
        # Adding to the wide logits is a pass over memory as long as the product itself.
        return contract(_append(x, 1), _append(table, bias), (x.ndim - 1,), (1,))

    logits = lax.platform_dependent(x, table, bias, cpu=widened, default=narrow)
    return logits, (x, table, bias)


def _attend_backward(residuals: tuple[Any, ...], g: Array) -> tuple[Array, Array, Array | None]:
    x, table, bias = residuals
    g = g.astype(x.dtype)
    if bias is None:
        dx = contract(g, table, (g.ndim - 1,), (0,)).astype(x.dtype)
        return dx, outer(g, x).astype(table.dtype), None

    def narrow(x: Array, table: Array, bias: Array, g: Array) -> tuple[Array, Array, Array]:
        return contract(g, table, (g.ndim - 1,), (0,)), outer(g, x), sum_rows(g)

    def widened(x: Array, table: Array, bias: Array, g: Array) -> tuple[Array, Array, Array]:
        dx = contract(g, _append(table, bias), (g.ndim - 1,), (0,))
        both = outer(g, _append(x, 1))
        return dx[..., :-1], both[:, :-1], both[:, -1]

    gradients = lax.platform_dependent(x, table, bias, g, cpu=widened, default=narrow)
    dx, dtable, dbias = (d.astype(v.dtype) for d, v in zip(gradients, residuals, strict=True))
    return dx, dtable, dbias


def _append(x: Array, column: Array | int) -> Array:
    """``x`` with one more last column."""
    column = jnp.broadcast_to(jnp.asarray(column, x.dtype), x.shape[:-1])
    return jnp.concatenate([x, column[..., None]], axis=-1)


attend = gradient(_attend_forward, _attend_backward)
"""Logits of a tied table. On CPUs the bias is rounded to the precision of the table."""


def _gelu_backward(x: Array, g: Array) -> tuple[Array]:
    x32 = x.astype(jnp.float32)
    cdf = 0.5 * (1 + lax.erf(x32 * np.float32(np.sqrt(0.5))))
    pdf = jnp.exp(-0.5 * x32 * x32) * np.float32(1 / np.sqrt(2 * np.pi))
    return ((g * (cdf + x32 * pdf)).astype(x.dtype),)


def gelu(equation: Callable[P, R]) -> _HandWritten[P, R]:
    """Only ``x`` is kept for the gradient.

    Inside ``shard_map``, JAX 0.12 cannot differentiate the equation, for it holds an ``erf``.
    """
    run: Callable[..., Any] = equation
    return _HandWritten(equation, lambda x: (run(x), x), _gelu_backward)


def _gelu_tanh_backward(x: Array, g: Array) -> tuple[Array]:
    x32 = x.astype(jnp.float32)
    slope = np.float32(np.sqrt(2 / np.pi))
    square = x32 * x32
    tanh = jnp.tanh(slope * x32 * (1 + np.float32(0.044715) * square))
    inner = slope * (1 + np.float32(3 * 0.044715) * square)
    return ((g * (0.5 * (1 + tanh) + 0.5 * x32 * (1 - tanh * tanh) * inner)).astype(x.dtype),)


def gelu_tanh(equation: Callable[P, R]) -> _HandWritten[P, R]:
    """Only ``x`` is kept for the gradient."""
    run: Callable[..., Any] = equation
    return _HandWritten(equation, lambda x: (run(x), x), _gelu_tanh_backward)


def dropout(equation: Callable[P, R]) -> _HandWritten[P, R]:
    """Only the key is kept: the mask is drawn again, for the map is linear and symmetric."""
    run: Callable[..., Any] = equation
    return _HandWritten(
        equation,
        lambda x, rate, key: (run(x, rate, key), key),
        lambda rate, key, g: (run(g, rate, key), None),
        static=(1,),
    )


SCORES, MIX = "bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd"


def attention(drop: Callable[..., Array]) -> Callable[[Callable[P, R]], _HandWritten[P, R]]:
    """Of arrays of the scores' size one is kept, in the precision of ``value``.

    ``drop(weights, rate, key)`` drops attention weights.
    """

    def scaled(scores: Array, query: Array, scale: float | None) -> Array:
        return scores * (query.shape[-1] ** -0.5 if scale is None else scale)

    def dropped(weights: Array, rate: float, key: Array | None) -> Array:
        return drop(weights, rate, key) if key is not None and rate > 0 else weights

    def forward(
        query: Array,
        key: Array,
        value: Array,
        mask: Array | Visible | None,
        bias: Array | None,
        rate: float,
        dropout_key: Array | None,
        scale: float | None,
    ) -> tuple[Array, tuple[Any, ...]]:
        scores = scaled(product(SCORES, query, key), query, scale)
        if bias is not None:
            scores += bias
        if (seen := dense(mask, *scores.shape[2:])) is not None:
            scores = jnp.where(seen, scores, NEGATIVE)
        weights = jnp.exp(scores - scores.max(-1, keepdims=True))
        total = weights.sum(-1)  # divided by after the product, which is smaller
        weights = weights.astype(value.dtype)
        out = product(MIX, dropped(weights, rate, dropout_key), value) / _per_query(total)
        residuals = query, key, value, mask, bias, dropout_key, weights, total
        return out.astype(query.dtype), residuals

    def backward(
        rate: float, scale: float | None, residuals: tuple[Any, ...], g: Array
    ) -> tuple[Array | None, ...]:
        # The barrier keeps XLA from keeping more instead: float32 scores, and what was dropped.
        residuals, g = lax.optimization_barrier((residuals, g))
        query, key, value, mask, bias, dropout_key, weights, total = residuals
        mixed = dropped(weights, rate, dropout_key)
        dweights, dvalue = product_gradients(MIX, mixed, value, g / _per_query(total))
        dweights = dropped(dweights, rate, dropout_key).astype(jnp.float32)
        weights = weights.astype(jnp.float32)
        mean = (weights * dweights).sum(-1) / total
        dscores = weights * (dweights - mean[..., None])
        if (seen := dense(mask, *dscores.shape[2:])) is not None:
            dscores = jnp.where(seen, dscores, 0)
        dbias = None
        if bias is not None:
            widen = lambda b: jnp.broadcast_to(b.astype(jnp.float32), dscores.shape)
            (dbias,) = jax.vjp(widen, bias)[1](dscores)
        dquery, dkey = product_gradients(SCORES, query, key, scaled(dscores, query, scale))
        return dquery, dkey, dvalue, None, dbias, None

    return gradient(forward, backward, static=(5, 7))


def _per_query(total: Array) -> Array:
    return jnp.swapaxes(total, 1, 2)[..., None]


def lstm(equation: Callable[P, R]) -> _HandWritten[P, R]:
    """The weight gradient is one product over all steps at the end instead of one a step.

    Forwards and backwards on a CPU: 0.8 times as long.
    """
    run: Callable[..., Any] = equation

    def forward(gates: Array, kernel: Array, continues: Array) -> tuple[Array, tuple[Any, ...]]:
        h, pull = jax.vjp(lambda gates: run(gates, kernel, continues), gates)
        return h, (h, kernel, continues, pull)

    def backward(residuals: tuple[Any, ...], g: Array) -> tuple[Array, Array, None]:
        h, kernel, continues, pull = residuals
        (dgates,) = pull(g)  # inputs and recurrence are added: it is the gradient of either
        before = jnp.concatenate([jnp.zeros_like(h[:1]), h[:-1]]) * continues[..., None]
        rows = rearrange(dgates, "length batch g state -> length batch (g state)")
        dkernel = outer(before.astype(kernel.dtype), rows.astype(kernel.dtype))
        return dgates, dkernel.astype(kernel.dtype).reshape(kernel.shape), None

    return _HandWritten(equation, forward, backward)
