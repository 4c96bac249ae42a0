"""Which parameters learn: all, a head, biases, or adapters beside frozen ones."""

import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, PyTree

from jaxlm import tree
from jaxlm.nn import stack
from jaxlm.nn.intercept import Sites, compile_target, find_sites
from jaxlm.peft import ia3, lora
from jaxlm.peft.ia3 import Ia3Config
from jaxlm.peft.lora import LoraConfig
from jaxlm.peft.quantize import Quantized, dequantize, quantize, quantize_weight
from jaxlm.typing import Apply, Params, PRNGKey, Variables


@dataclass(frozen=True, kw_only=True)
class Full:
    """All parameters learn."""


@dataclass(frozen=True, kw_only=True)
class HeadOnly:
    """The head alone learns, on the encoder as it is."""


@dataclass(frozen=True, kw_only=True)
class BitFit:
    """The head and all biases learn (Ben Zaken et al. 2021, arXiv:2106.10199).

    Those are vectors that are added to features, XLNet's of queries among them. T5's table of
    numbers by distance, which are added to scores, is none.
    """


Tuning = Full | HeadOnly | BitFit | LoraConfig | Ia3Config
FrozenDtype = Literal["float32", "bfloat16", "int8"]
HEAD = "params/head/"


def adapt(tuning: Tuning, apply: Apply) -> Apply:
    """``apply`` that reads what the tuning adds to the variables, and frozen ones of any dtype."""
    adapted = apply
    if isinstance(tuning, LoraConfig):
        adapted = lora.adapt(apply, tuning)
    elif isinstance(tuning, Ia3Config):
        adapted = ia3.adapt(apply)

    def of_plain(variables: Variables, *args: Any, **kwargs: Any) -> Any:
        return adapted(plain(variables), *args, **kwargs)

    return of_plain


def prepare(
    tuning: Tuning,
    key: PRNGKey,
    params: Params,
    call: Callable[[Variables], Any],
    frozen_dtype: FrozenDtype = "float32",
    *,
    split_layers: bool = False,
    trained: Collection[str] = (),
) -> tuple[Params, Params]:
    """The variables that learn, and the frozen ones, from a model's ``params``.

    ``call(variables)`` calls the model, to find out what can be adapted; nothing is computed.
    ``split_layers`` saves memory where the model unrolls its layers (``nn.stack.Layers``). What of
    ``params`` is :func:`kept` already stays as it is. ``trained`` are the variables of a run that
    has begun: attention's biases that it left frozen, as all runs once did, stay so.
    """
    given, params = params, plain(params)
    sites = find_sites(call, {"params": params})
    variables = {"params": params}
    if isinstance(tuning, LoraConfig):
        body = sites.only(lambda path: not f"params/{path}".startswith(HEAD))
        below = {name: leaf for name, leaf in params.items() if f"params/{name}/" != HEAD}
        variables["lora"] = lora.init_at(key, below, body, tuning)
        if tuning.init == "pissa":
            variables["params"] = lora.unmerge(params, variables["lora"], tuning)
    elif isinstance(tuning, Ia3Config):
        variables["ia3"] = ia3.init_at(params, sites, tuning)
    stays = lambda path: trained and path.endswith("_bias") and path not in trained
    trainable, frozen = tree.partition(variables, lambda x: learns(tuning, x) and not stays(x))
    if frozen_dtype == "bfloat16":
        frozen = tree.map_with_path(_to_bfloat16, frozen)
    elif frozen_dtype == "int8" and frozen:
        kept = dict(tree.leaves_with_path(frozen["params"]))
        kernels = {p: s for p, s in sites.items() if p in kept and p.endswith("/kernel")}
        frozen = frozen | {"params": quantize(frozen["params"], kernels)}
    if split_layers:
        frozen = _split(frozen, sites)
    if isinstance(tuning, LoraConfig) and tuning.init == "pissa":
        return trainable, frozen
    known = flatten_dict({"params": given})
    flat = {
        path: known[path] if _alike(known.get(path), leaf) else leaf
        for path, leaf in flatten_dict(frozen).items()
    }
    return trainable, unflatten_dict(flat)


def may_keep(tuning: Tuning, frozen_dtype: FrozenDtype) -> bool:
    """Whether frozen parameters may be :func:`kept` before :func:`prepare` has read them."""
    reads = isinstance(tuning, LoraConfig) and (tuning.kind == "dora" or tuning.init == "pissa")
    return not reads or frozen_dtype == "float32"


def kept(shapes: Any, leaf: Float[Array, "..."]) -> Any:
    """A parameter as :func:`prepare` freezes it where that gives these shapes."""
    one = shapes.layers[0] if isinstance(shapes, stack.Layers) else shapes
    axes = one.axes if isinstance(one, Quantized) else None
    dtype = leaf.dtype if isinstance(one, Quantized) else one.dtype
    if one is shapes and axes is None and dtype == leaf.dtype:
        return leaf
    return _kept(leaf, axes, dtype, one is not shapes)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _kept(leaf: Array, axes: tuple[int, ...] | None, dtype: Any, split: bool) -> Any:
    frozen = leaf.astype(dtype) if axes is None else quantize_weight(leaf, axes)
    return stack.split(frozen) if split else frozen


def _alike(one: Any, other: Any) -> bool:
    leaves = [jax.tree.leaves(x) for x in (one, other)]
    same = jax.tree.structure(one) == jax.tree.structure(other)
    return same and all(x.dtype == y.dtype for x, y in zip(*leaves, strict=True))


def learns(tuning: Tuning, path: str) -> bool:
    """Whether the variable at a path is trained."""
    if isinstance(tuning, Full) or path.startswith((HEAD, "lora/", "ia3/")):
        return True
    if not is_bias(path):
        return False
    if isinstance(tuning, LoraConfig) and tuning.bias == "lora_only":
        if not path.endswith("/bias"):
            return False  # of no map, so beside no adapter
        kernel = f"{path.removesuffix('bias')}kernel"
        return any(compile_target(target).search(kernel) for target in tuning.targets)
    return isinstance(tuning, BitFit) or (isinstance(tuning, LoraConfig) and tuning.bias == "all")


def is_bias(path: str) -> bool:
    """Whether a parameter is a bias: a map's, a norm's, or one of attention's, as XLNet's."""
    return path.endswith(("/bias", "_bias"))


def lr_factor(tuning: Tuning) -> Callable[[str], float] | None:
    """What multiplies the learning rate of a path, where it is not one for all (LoRA+)."""
    if isinstance(tuning, LoraConfig) and tuning.lr_ratio != 1:
        return partial(lora.lr_factor, config=tuning)
    return None


def merge(tuning: Tuning, variables: Variables, call: Callable[[Variables], Any]) -> Params:
    """The parameters of a plain model that computes the same: what is merged into is float32."""
    variables = plain(variables)
    if isinstance(tuning, LoraConfig):
        return lora.merge(variables["params"], variables["lora"], tuning)
    if isinstance(tuning, Ia3Config):
        sites = find_sites(call, {"params": variables["params"]})
        return ia3.merge(variables["params"], variables["ia3"], sites)
    return variables["params"]


def lost_in_bfloat16(base: Params, merged: Params) -> float:
    """What rounding merged weights changes, as a share of what was merged into those of ``base``.

    Root mean squares; 0 where nothing was merged.
    """
    weights, off, added = dict(tree.leaves_with_path(base)), 0.0, 0.0
    for path, leaf in tree.leaves_with_path(merged):
        delta = leaf.astype(jnp.float32) - weights[path].astype(jnp.float32)
        if delta.any():
            off += float(jnp.square(leaf.astype(jnp.bfloat16).astype(jnp.float32) - leaf).sum())
            added += float(jnp.square(delta).sum())
    return math.sqrt(off / added) if added else 0.0


def plain(variables: PyTree) -> PyTree:
    """Arrays, stacked where the model stacks its layers, for what :func:`prepare` made of them."""
    # Layer by layer: of a stack that is dequantized whole, each slice would be copied.
    return stack.join(dequantize(variables))


def table(trainable: PyTree, frozen: PyTree, moments: int) -> str:
    """Sizes of what is trained and what is not, and of full tuning with the same optimizer.

    ``moments`` is the optimizer's number of values for each parameter.
    """
    here = tree.num_params(trainable), tree.num_bytes(trainable), tree.num_bytes(frozen)
    whole = here[0] + tree.num_params(jax.eval_shape(plain, frozen))
    rows = [["", "parameters", "trainable", "weights", "gradients", "moments", "in all"]]
    for name, learning, weights in (
        ("this tuning", here[0], here[1] + here[2]),
        ("full tuning", whole, 4 * whole),
    ):
        sizes = weights, 4 * learning, 4 * learning * moments
        share = f"{learning:,} ({learning / whole:.2%})"
        rows.append([name, f"{whole:,}", share, *map(_megabytes, (*sizes, sum(sizes)))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{name:{widths[0]}}" + "".join(f"  {x:>{n}}" for x, n in zip(row, widths[1:], strict=True))
        for name, *row in rows
    )


def _split(frozen: Params, sites: Sites) -> Params:
    stacked = {f"params/{path}" for path, site in sites.items() if site.num_stack}
    return unflatten_dict(
        {
            path: stack.split(leaf) if "/".join(path) in stacked else leaf
            for path, leaf in flatten_dict(frozen).items()
        }
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _to_bfloat16(path: str, leaf: Any) -> Any:
    # Norms and biases are small, and what they lack in digits every activation would lack.
    return leaf.astype(jnp.bfloat16) if re.search(r"/(kernel|embedding)$", path) else leaf
