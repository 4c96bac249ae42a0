"""LoRA: low-rank adapters of frozen linear maps (Hu et al. 2021, arXiv:2106.09685, section 4.1).

    y = x W + c + s (x a) b          s = alpha / rank

The factors live in a collection of their own, ``lora``, beside the kernels they adapt, and
:func:`adapt` adds them to the output of any linen module. W is never added to a b in training:
that would make the gradient of the whole W first, 2.8 instead of 2.1 times the forward pass.

    config = LoraConfig(targets=("query/kernel",), rank=8, alpha=16)
    adapter = init(key, variables, config, lambda variables: module.apply(variables, x))
    y = adapt(module.apply, config)({**variables, "lora": adapter}, x)
    params = merge(variables["params"], adapter, config)

Any other target than linear maps, convolutions and tables raises, and the error says why.
"""

import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax import lax
from jaxtyping import Array, Int, PyTree

from jaxlm import tree
from jaxlm.errors import InputError
from jaxlm.nn import custom_vjp
from jaxlm.nn.dropout import dropout
from jaxlm.nn.intercept import (
    ADAPTABLE,
    Call,
    Leaves,
    Site,
    Sites,
    compile_target,
    find_sites,
    flatten,
    intercept,
    match,
)
from jaxlm.nn.products import multiply
from jaxlm.typing import Apply, Params, PRNGKey, Variables


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Defaults are the paper's: queries and values, rank 8."""

    targets: tuple[str, ...] = (r"(query|value)/kernel",)
    """Regular expressions, matched with the end of a parameter's path; the first match counts."""
    rank: int = 8
    """Inner channels of an adapter."""
    ranks: tuple[int, ...] | None = None
    """One rank for each of `targets`; None = `rank` for all."""
    alpha: float = 16.0
    """Numerator of the scale s of what an adapter adds."""
    scaling: Literal["lora", "rslora"] = "lora"
    """s = alpha / rank, or alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732)."""
    dropout_rate: float = 0.0
    """Dropout rate of the inputs of adapters of linear maps."""
    init: Literal["zero", "pissa"] = "zero"
    """zero: adapters start without effect; pissa: as the principal part of the kernel, which must
    then be taken out of the base by `unmerge` (Meng et al. 2024, arXiv:2404.02948)."""
    kind: Literal["lora", "dora"] = "lora"
    """dora: the length of each output's weights is learned apart from their direction (Liu et al.
    2024, arXiv:2402.09353)."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases learn as well: all (as in BitFit), or those beside adapters."""
    lr_ratio: float = 1.0
    """Learning rate of b over that of a (LoRA+, Hayou et al. 2024, arXiv:2402.12354)."""

    def __post_init__(self) -> None:
        if not self.targets:
            raise InputError("targets=() adapts nothing: name parameters, such as query/kernel")
        for pattern in self.targets:
            compile_target(pattern)
        if self.ranks is not None and len(self.ranks) != len(self.targets):
            raise InputError(
                f"ranks={self.ranks} must hold one rank for each of the {len(self.targets)} targets"
            )
        for rank in (self.rank, *(self.ranks or ())):
            if rank < 1:
                raise InputError(f"the rank {rank} is not above 0; 8 is usual")
        for name in ("alpha", "lr_ratio"):
            if not 0 < vars(self)[name] < math.inf:
                raise InputError(f"{name}={vars(self)[name]} is not a number above 0")
        if not 0 <= self.dropout_rate < 1:
            raise InputError(f"dropout_rate={self.dropout_rate} is not inside [0, 1); 0 is off")
        if self.kind == "dora" and self.init == "pissa":
            raise InputError("kind='dora' cannot start from init='pissa': choose one of them")

    def scale(self, rank: int) -> float:
        """What the product of the factors is multiplied by."""
        return self.alpha / (rank if self.scaling == "lora" else math.sqrt(rank))


def init(
    key: PRNGKey, variables: Variables, config: LoraConfig, call: Callable[[Variables], Any]
) -> Params:
    """The collection; ``call(variables)`` calls the model, and is traced to find the targets."""
    return init_at(key, variables["params"], find_sites(call, variables), config)


def init_at(key: PRNGKey, params: Params, sites: Sites, config: LoraConfig) -> Params:
    """:func:`init` for sites that are known, from ``find_sites``.

    ``a`` [*stack, *inputs, rank], ``b`` [*stack, rank, *outputs], DoRA's ``magnitude`` [*stack,
    *outputs], float32. b starts at zero; of a table a, so that ids never seen keep their rows.
    """
    weights = flatten(params)
    lora = {}
    for path, number in match(config.targets, sites, params).items():
        rank = config.rank if config.ranks is None else config.ranks[number]
        parent, name = path.rpartition("/")[0], path.rpartition("/")[2]
        # By path, so that a further target leaves the others as they were.
        site_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        stack, inputs, outputs = sites[path].split(weights[path].shape)
        sides = math.prod(inputs), math.prod(outputs)
        if rank > min(sides):
            raise InputError(
                f"the rank {rank} is above the smaller side of {path}, a matrix {sides[0]} x "
                f"{sides[1]}: lower it, or choose other targets of {', '.join(sites)}"
            )
        a_shape, b_shape = (*stack, *inputs, rank), (*stack, rank, *outputs)
        if config.init == "pissa":
            matrix = weights[path].astype(jnp.float32).reshape(*stack, *sides)
            a, b = _principal(matrix, rank, config.scale(rank))
            leaves = {"a": a.reshape(a_shape), "b": b.reshape(b_shape)}
        elif name == "embedding":
            b = jax.random.normal(site_key, b_shape, jnp.float32)
            leaves = {"a": jnp.zeros(a_shape, jnp.float32), "b": b}
        else:  # Kaiming-uniform with slope sqrt(5), as in the paper's code
            bound = 1 / math.sqrt(sides[0])
            a = jax.random.uniform(site_key, a_shape, jnp.float32, -bound, bound)
            leaves = {"a": a, "b": jnp.zeros(b_shape, jnp.float32)}
        if config.kind == "dora":
            leaves["magnitude"] = jnp.sqrt(_squares(weights[path], sites[path]))
        lora |= {f"{parent}/{leaf}".lstrip("/"): value for leaf, value in leaves.items()}
    return unflatten_dict(lora, sep="/")


def adapt(apply: Apply, config: LoraConfig) -> Apply:
    """``apply`` that reads the collection ``lora`` of its variables, on any linen module.

    The result takes ``adapter_ids`` (int, [batch]) besides: for each
    example, which of the adapters joined by :func:`stack`. Every adapted call must then have the
    examples along its first axis, which nothing can check where another is as long. Dropout needs
    ``rngs={"dropout": key}``; ``deterministic=True`` turns it off. What compiles or checkpoints
    goes around the result, not into it.
    """

    def adapted(
        variables: Mapping[str, PyTree],
        *args: Any,
        adapter_ids: Int[Array, "batch"] | None = None,
        **kwargs: Any,
    ) -> Any:
        rate = 0.0 if kwargs.get("deterministic") else config.dropout_rate

        def rewrite(call: Call, leaves: Leaves) -> Array:
            return _apply_adapter(call, leaves, config, rate, adapter_ids)

        if "lora" in variables:
            variables = {**variables, "lora": _arrange(variables, many=adapter_ids is not None)}
        return intercept(apply, "lora", rewrite)(variables, *args, **kwargs)

    return adapted


def merge(params: Params, lora: Params, config: LoraConfig) -> Params:
    """The same model without ``lora``; what is added to is float32, whose digits it needs."""
    return _add(params, lora, config, sign=1)


def unmerge(params: Params, lora: Params, config: LoraConfig) -> Params:
    """The inverse of :func:`merge`; also takes from a base what PiSSA starts its adapters with."""
    if config.kind == "dora":
        raise InputError(
            "DoRA cannot be unmerged, for lengths are lost: keep the base's parameters"
        )
    return _add(params, lora, config, sign=-1)


def stack(adapters: Sequence[Params]) -> Params:
    """Several adapters of one model as one, for ``adapter_ids``; a first axis numbers them."""
    if len({str(jax.tree.map(jnp.shape, lora)) for lora in adapters}) != 1:
        raise InputError("adapters can be stacked only if they have the same targets and ranks")
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)


def select(stacked: Params, index: int) -> Params:
    """One of the adapters that :func:`stack` joined."""
    return jax.tree.map(lambda leaf: leaf[index], stacked)


def lr_factor(path: str, config: LoraConfig) -> float:
    """What multiplies the learning rate of the parameter at ``path``: ``lr_ratio`` for every b.

    Paths are those of a tree that holds the collection as ``lora``: ``lora/encoder/query/b``.
    """
    return config.lr_ratio if re.search(r"^lora/(.*/)?b$", path) else 1.0


def _principal(matrix: Array, rank: int, scale: float) -> tuple[Array, Array]:
    """Factors whose product, times ``scale``, is the closest of that rank to each matrix."""
    u, sizes, vt = jnp.linalg.svd(matrix, full_matrices=False)
    root = jnp.sqrt(sizes[..., :rank] / scale)
    return u[..., :rank] * root[..., None, :], root[..., :, None] * vt[..., :rank, :]


def _squares(weight: Array, site: Site) -> Array:
    """The squared length of each output's weights."""
    inputs = tuple(range(site.num_stack, site.num_stack + site.num_inputs))
    return jnp.square(weight.astype(jnp.float32)).sum(inputs)


def _add(params: Params, lora: Params, config: LoraConfig, sign: int) -> Params:
    merged = flatten(params)
    for path, leaves in _by_module(lora).items():
        target = _target(path, merged)
        weight, a, b = merged[target], leaves["a"], leaves["b"]
        site = _site(path, leaves, weight)
        stack, inputs, outputs = site.split(weight.shape)
        rank = a.shape[-1]
        delta = jnp.matmul(
            a.astype(jnp.float32).reshape(*stack, math.prod(inputs), rank),
            b.astype(jnp.float32).reshape(*stack, rank, math.prod(outputs)),
            precision=lax.Precision.HIGHEST,
        ).reshape(weight.shape)
        new = weight.astype(jnp.float32) + sign * config.scale(rank) * delta
        if "magnitude" in leaves:
            gain = _over_root(leaves["magnitude"], _squares(new, site))
            axes = range(site.num_stack, site.num_stack + site.num_inputs)
            new = new * jnp.expand_dims(gain, tuple(axes))
        merged[target] = new
    return tree.replace(params, merged)


def _by_module(lora: Params) -> dict[str, Leaves]:
    modules: dict[str, Leaves] = {}
    for path, leaf in flatten(lora).items():
        parent, _, name = path.rpartition("/")
        modules.setdefault(parent, {})[name] = leaf
    return modules


def _target(path: str, weights: Mapping[str, Any]) -> str:
    for name in ADAPTABLE:
        if (target := f"{path}/{name}".lstrip("/")) in weights:
            return target
    raise InputError(f"the model has no {path}/kernel and no {path}/embedding, which LoRA adapts")


def _site(path: str, leaves: Leaves, weight: Any, *, many: bool = False) -> Site:
    """How the adapted weight's axes are used, from the shapes. Raises where they do not fit."""
    a, b, shape = leaves["a"].shape[many:], leaves["b"].shape[many:], tuple(weight.shape)
    num_stack = len(a) + len(b) - 2 - len(shape)
    if num_stack < 0 or a[:-1] + b[num_stack + 1 :] != shape or a[-1] != b[num_stack]:
        raise InputError(
            f"the adapter of {path}, a {leaves['a'].shape} and b {leaves['b'].shape}, does not fit "
            f"its weight {shape}: is it of another model, or are there several, which need "
            "adapter_ids or select?"
        )
    return Site(num_stack, len(a) - 1 - num_stack)


def _arrange(variables: Mapping[str, PyTree], *, many: bool) -> Params:
    """The collection, checked; an axis of adapters goes behind those that nn.scan takes away."""
    weights, lora = flatten(variables["params"]), {}
    for path, leaves in _by_module(variables["lora"]).items():
        site = _site(path, leaves, weights[_target(path, weights)], many=many)
        for name, leaf in leaves.items():
            moved = jnp.moveaxis(leaf, 0, site.num_stack) if many else leaf
            lora[f"{path}/{name}".lstrip("/")] = moved
    return unflatten_dict(lora, sep="/")


def _apply_adapter(
    call: Call, leaves: Leaves, config: LoraConfig, rate: float, ids: Array | None
) -> Array:
    """What the module gives with its adapter; shapes here are those of one layer."""
    a, b, x, gain = leaves["a"], leaves["b"], call.x, None
    b = b * config.scale(a.shape[-1])
    if "magnitude" in leaves:
        gain_of = _gain if ids is None else jax.vmap(_gain, (None, 0, 0, 0))
        gain = gain_of(call.weight, a, b, leaves["magnitude"])
    low_rank, matmul = _low_rank, jnp.matmul
    if ids is not None:
        _check_rows(call, ids)
        a = a if call.kind == "look_up" else a[ids]
        b, gain = b[ids], None if gain is None else gain[ids]
        low_rank, matmul = jax.vmap(_low_rank), jax.vmap(jnp.matmul)

    def scaled(y: Array) -> Array:
        return y if gain is None else multiply(y, _spread(gain, y.ndim, ids))

    def biased(y: Array, delta: Array) -> Array:
        if gain is None:
            return y + delta
        bias = jnp.zeros((), y.dtype)
        if call.module.has_variable("params", "bias"):
            bias = _spread(call.module.get_variable("params", "bias"), y.ndim).astype(y.dtype)
        return scaled(y - bias + delta) + bias

    if call.kind == "attend":  # the table's transpose, and so its factors'
        x = scaled(x)
        factors = (jnp.swapaxes(factor, -1, -2).astype(x.dtype) for factor in (b, a))
        y = call.run(x)
        return y + low_rank(x, *factors).astype(y.dtype)
    y = call.run(x)
    if call.kind == "look_up":
        if ids is None:
            rows = jnp.take(a, x, axis=0, mode="clip")
        else:
            rows = a.at[jnp.expand_dims(ids, tuple(range(1, x.ndim))), x].get(mode="clip")
        return scaled(y + matmul(rows.astype(y.dtype), b.astype(y.dtype)))
    if rate > 0 and call.module.has_rng("dropout"):
        x = dropout(x.astype(y.dtype), rate, call.module.make_rng("dropout"))
    if call.kind == "conv":
        convolve = call.convolve if ids is None else jax.vmap(call.convolve)
        h = convolve(x.astype(y.dtype), a.astype(y.dtype))
        return biased(y, matmul(h, b.astype(y.dtype)))
    x = jnp.moveaxis(x, call.axes, range(-len(call.axes), 0)).astype(y.dtype)
    x = x.reshape(*x.shape[: x.ndim - len(call.axes)], -1)
    a = a.reshape(*a.shape[: ids is not None], -1, a.shape[-1]).astype(y.dtype)
    b = b.reshape(*b.shape[: 1 + (ids is not None)], -1).astype(y.dtype)
    return biased(y, low_rank(x, a, b).astype(y.dtype).reshape(y.shape))


def _check_rows(call: Call, ids: Array) -> None:
    rows = call.x.shape[0] if call.x.ndim else 0
    shared = call.kind == "look_up" and rows == 1  # such as positions, the same in every row
    if 0 in call.axes or (rows != len(ids) and not shared):
        raise InputError(
            f"{call.path} is applied to {rows} rows, for which there are {len(ids)} adapter_ids"
        )


def _spread(x: Array, ndim: int, ids: Array | None = None) -> Array:
    """With axes of size 1, after the one of examples or in front, so that there are ``ndim``."""
    first = int(ids is not None)
    return jnp.expand_dims(x, tuple(range(first, first + ndim - x.ndim)))


def _gain(weight: Array, a: Array, b: Array, magnitude: Array) -> Array:
    """``magnitude / |W + a b|`` for each output, without the product; no gradient of the length.

    |W + a b|² = |W|² + 2 Σ (aᵀ W) b + Σ b (aᵀ a b) (section 4.3 drops the gradient).
    """
    rank = a.shape[-1]
    w, a, b = (lax.stop_gradient(x).astype(jnp.float32) for x in (weight, a, b))
    a, b = a.reshape(-1, rank), b.reshape(rank, -1)
    w = w.reshape(a.shape[0], -1)
    high = lax.Precision.HIGHEST
    aw, aa = jnp.matmul(a.T, w, precision=high), jnp.matmul(a.T, a, precision=high)
    cross = 2 * aw + jnp.matmul(aa, b, precision=high)
    squares = jnp.square(w).sum(0) + (cross * b).sum(0)
    return _over_root(magnitude, squares.reshape(magnitude.shape))


def _over_root(magnitude: Array, squares: Array) -> Array:
    # A channel whose weights are all zero has no direction, and its magnitude is zero, too.
    return magnitude * lax.rsqrt(jnp.maximum(squares, jnp.finfo(jnp.float32).tiny))


def _dot(x: Array, kernel: Array) -> Array:
    return _contract(x, kernel, (x.ndim - 1,), (0,))


def _contract(x: Array, y: Array, x_axes: Sequence[int], y_axes: Sequence[int]) -> Array:
    return lax.dot_general(x, y, ((x_axes, y_axes), ((), ())), preferred_element_type=jnp.float32)


def _low_rank_forward(x: Array, a: Array, b: Array) -> tuple[Array, tuple[Array, ...]]:
    h = _dot(x, a).astype(x.dtype)
    return _dot(h, b), (x, a, b, h)


def _low_rank_backward(residuals: tuple[Array, ...], g: Array) -> tuple[Array, Array, Array]:
    x, a, b, h = residuals
    g, last, rows = g.astype(x.dtype), (x.ndim - 1,), tuple(range(x.ndim - 1))
    dh = _contract(g, b, last, (1,)).astype(x.dtype)
    dx = _contract(dh, a, last, (1,)).astype(x.dtype)
    # The narrow operand first, for XLA:CPU transposes the first. The barrier keeps it from taking
    # the transpose into the product, which it then cannot compute in bfloat16.
    da = lax.optimization_barrier(_contract(dh, x, rows, rows)).T
    db = _contract(h, g, rows, rows)
    return dx, da.astype(a.dtype), db.astype(b.dtype)


@custom_vjp.gradient(_low_rank_forward, _low_rank_backward)
def _low_rank(x: Array, a: Array, b: Array) -> Array:
    """``(x a) b``, [..., outputs], in float32; its gradient's products, too, keep x's precision."""
    return _dot(_dot(x, a).astype(x.dtype), b)
