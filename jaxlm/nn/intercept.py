"""Finding the linear maps and tables of a linen module, and changing what they compute.

The modules know nothing of it: linen lets a function stand between a call and the method called.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PyTree

from jaxlm.errors import InputError
from jaxlm.nn.dataflow import changed_names, read_arguments
from jaxlm.tree import leaves_with_path
from jaxlm.typing import Apply, Params

Leaves = dict[str, Array]  # what a collection holds for one module
ADAPTABLE = ("kernel", "embedding")


class Site(NamedTuple):
    """How a parameter's axes are used: ``[*stack, *inputs, *outputs]``; a table's input is the id.

    Attributes:
        num_stack: leading axes over which blocks are scanned.
        num_inputs: the axes after those that the module contracts.
    """

    num_stack: int
    num_inputs: int

    def split(
        self, shape: Sequence[int]
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The sizes of stack, inputs and outputs."""
        end = self.num_stack + self.num_inputs
        return tuple(shape[: self.num_stack]), tuple(shape[self.num_stack : end]), (*shape[end:],)


Sites = Mapping[str, Site]  # by the parameter's path


class Found(dict[str, Site]):
    """Sites by the parameter's path.

    Attributes:
        refused: the other parameters, each with the reason why it cannot be adapted.
    """

    def __init__(self, sites: Sites, refused: Mapping[str, str]) -> None:
        super().__init__(sites)
        self.refused = refused

    def only(self, keep: Callable[[str], bool]) -> "Found":
        """Those whose path is kept."""
        return Found({path: site for path, site in self.items() if keep(path)}, self.refused)


Kind = Literal["linear", "conv", "look_up", "attend"]


class Call(NamedTuple):
    """A module about to apply its kernel or table.

    Attributes:
        path: of the module.
        kind: a linear map, a convolution, or a table that looks ids up or scores vectors against
            its rows.
        x: what it is applied to.
        axes: those of ``x`` that are contracted with the kernel's inputs: of a convolution, the
            channels; of a table, none.
        run: the module's own computation.
        arguments: what the method was given beside ``x``, such as the bias of ``attend``.
    """

    path: str
    module: nn.Module
    kind: Kind
    x: Float[Array, "..."] | Int[Array, "..."]
    axes: tuple[int, ...]
    run: Callable[[Array], Array]
    arguments: tuple[Any, ...] = ()

    @property
    def weight(self) -> Float[Array, "..."]:
        """The kernel or the table, without the stack's axes."""
        name = "kernel" if self.kind in ("linear", "conv") else "embedding"
        return self.module.get_variable("params", name)

    def convolve(self, x: Float[Array, "..."], kernel: Float[Array, "..."]) -> Float[Array, "..."]:
        """What a convolution gives with another kernel, of any number of outputs; no bias."""
        base = nn.Conv if isinstance(self.module, nn.Conv) else nn.ConvTranspose
        other = self.module.clone(features=kernel.shape[-1], use_bias=False)
        # The base's method, and not that of a subclass, which may do more.
        return nn.apply(lambda module, x: base.__call__(module, x), other)(
            {"params": {"kernel": kernel}}, x
        )


@runtime_checkable
class _Linear(Protocol):
    """Like ``jaxlm.nn.linear.Linear``: contracts the last ``num_inputs`` axes."""

    num_inputs: int


@runtime_checkable
class _Table(Protocol):
    """Like the ``Embed`` of jaxlm and of flax."""

    num_embeddings: int

    def attend(self, *args: Any) -> Any: ...


def flatten(tree: PyTree) -> dict[str, Any]:
    """The leaves of a nested dict by path."""
    return dict(flatten_dict(tree, sep="/"))


def find_sites(call: Callable[[Any], Any], variables: Mapping[str, PyTree]) -> Found:
    """Every kernel and table that ``call(variables)`` applies, by path; nothing is computed.

    Found are ``Linear``, ``Dense``, ``DenseGeneral``, ``Conv``, ``ConvTranspose``, ``Einsum`` and
    ``Embed``, of jaxlm and flax, and what is built like them; of their subclasses, what these leave
    to them. What is not, such as a kernel for each position or group, is refused with the reason.
    ``variables`` may be shapes.
    """
    params = flatten(variables["params"])
    for path, leaf in params.items():
        if isinstance(leaf, nn.meta.AxisMetadata):
            raise InputError(f"{path} has names of its axes: give flax.linen.unbox(variables)")
    sites: dict[str, Site] = {}
    refused: dict[str, str] = {}

    def see(call: Call) -> Array:
        weight = call.weight
        path = _join(call.path, "embedding" if call.kind in ("look_up", "attend") else "kernel")
        if path not in params:
            raise InputError(
                f"the variables hold no {path}, which the call applies: join what it calls in one "
                "module, whose parameters these are"
            )
        # To be found again in the program, which tells whether it is the parameter as it is.
        checkpoint_name(weight, path)
        num_inputs = weight.ndim - 1 if call.kind == "conv" else len(call.axes) or 1
        site = Site(params[path].ndim - weight.ndim, num_inputs)
        # Only a stack in front is supported: nn.scan and nn.vmap can put it elsewhere.
        if params[path].shape[site.num_stack :] == weight.shape:
            sites[path] = site
        else:
            refused[path] = (
                f"its module applies {weight.shape} of {params[path].shape}, and layers are "
                "supported along the first axis only (nn.scan with variable_axes={True: 0})"
            )
        # Nothing of the result, so that whatever else reads the parameter stands out.
        return jnp.zeros_like(call.run(call.x))

    def pass_over(module: nn.Module, reason: str) -> None:
        path = "/".join(module.path)
        for name in module.variables.get("params", ()):
            refused.setdefault(_join(path, name), reason)  # a layer's helpers know less than it

    def inside(variables: Mapping[str, PyTree]) -> list[Any]:  # a new function: no trace is cached
        with nn.intercept_methods(_interceptor(see, pass_over)):
            return [x for x in jax.tree.leaves(call(variables)) if isinstance(x, jax.Array)]

    # nn.jit keeps the traces of its modules by the settings they were made under. One made here
    # computes nothing and must not be used again: a setting that is not the caller's sets it apart.
    used = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    own = "bfloat16" if used == "float32" else "float32"
    with jax.default_matmul_precision(own):
        program = jax.make_jaxpr(inside)(variables)
    for (path, _), is_read in zip(
        leaves_with_path(variables), read_arguments(program), strict=True
    ):
        name = path.removeprefix("params/")
        if is_read and name != path and sites.pop(name, None) is not None:
            refused[name] = (
                "it is read beside the calls of its module, too, as where it is used transposed, "
                "and no adapter would be seen there"
            )
    for path in changed_names(program):
        if sites.pop(path, None) is not None:
            refused[path] = (
                "its module applies what is computed from it, as under nn.WeightNorm, "
                "nn.SpectralNorm and nn.map_variables, so that no adapter could be merged into it"
            )
    for path in sites:
        bias = _join(path.rpartition("/")[0], "bias")
        refused[bias] = f"adapters stand beside kernels and tables: name {path}"
    others = dict.fromkeys(params, "nothing that was called reads it") | refused
    return Found(sites, {path: why for path, why in others.items() if path not in sites})


def _join(path: str, name: str) -> str:
    return f"{path}/{name}".lstrip("/")


def compile_target(pattern: str) -> re.Pattern[str]:
    """What finds the paths that end like the pattern."""
    try:
        return re.compile(rf"(^|/)({pattern})$")
    except re.error as error:
        raise InputError(f"the target {pattern!r} is no regular expression: {error}") from error


def match(patterns: Sequence[str], sites: Sites, params: Params) -> dict[str, int]:
    """The paths of ``sites`` that end like a pattern, each with the first such pattern's number.

    Raises where a pattern matches nothing, or a kernel or table that is no site.
    """
    found: dict[str, int] = {}
    known = f"those that can be adapted are {', '.join(sites) or 'none'}"
    refused = sites.refused if isinstance(sites, Found) else {}
    for number, pattern in enumerate(patterns):
        ends = compile_target(pattern)
        paths = [path for path in flatten(params) if ends.search(path)]
        matched = [path for path in paths if path in sites]
        for path in paths:
            # Beside a kernel, a pattern may match its bias; alone, it is not what was meant.
            if path not in sites and (path.rpartition("/")[2] in ADAPTABLE or not matched):
                why = refused.get(path, "the model does not apply it as a linear map or a table")
                raise InputError(
                    f"the target {pattern!r} matches {path}, which cannot be adapted: {why}; "
                    f"{known}"
                )
        if not matched:
            raise InputError(f"the target {pattern!r} matches no parameter: {known}")
        for path in matched:
            found.setdefault(path, number)
    return found


def intercept(
    apply: Apply,
    collection: str,
    rewrite: Callable[[Call, Leaves], Array],
    *,
    needs_use: bool = True,
) -> Apply:
    """``apply`` in which ``rewrite`` replaces the calls of modules that have a ``collection``.

    Raises where a part of the collection is used by no module: it would silently have no effect.
    A ``method`` of the model may use a part of it, such as a decoder's: then only if none is used,
    and with ``needs_use=False`` not even then.
    """

    def intercepted(variables: Mapping[str, PyTree], *args: Any, **kwargs: Any) -> Any:
        leaves: dict[str, list[str]] = {}
        for path in flatten(variables.get(collection, {})):
            parent, _, leaf = path.rpartition("/")
            leaves.setdefault(parent, []).append(leaf)
        if not leaves:
            raise InputError(f"the variables hold no collection {collection!r}: add what init made")
        unread = set(leaves)

        def replace(call: Call) -> Array:
            names = leaves.get(call.path, [])
            if not names or not all(call.module.has_variable(collection, name) for name in names):
                return call.run(call.x)
            unread.discard(call.path)
            values = {name: call.module.get_variable(collection, name) for name in names}
            return rewrite(call, values)

        # Here, and not around it: a function already compiled would not notice.
        with nn.intercept_methods(_interceptor(replace)):
            y = apply(variables, *args, **kwargs)
        useless = needs_use and len(unread) == len(leaves)
        if unread and (kwargs.get("method") is None or useless):
            raise InputError(
                f"no module read the {collection!r} of {', '.join(sorted(unread))}: the model has "
                "no such linear map or table, or does not call it, or scans it without "
                "variable_axes={True: 0} (nn.scan) or variable_broadcast=True (nn.RNN), or was "
                "compiled or checkpointed before it was adapted"
            )
        return y

    return intercepted


def _interceptor(
    function: Callable[[Call], Array],
    pass_over: Callable[[nn.Module, str], None] = lambda module, reason: None,
) -> Callable[..., Any]:
    """``function`` in place of calls that can be adapted; of others, ``pass_over`` is told why."""

    def interceptor(
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        module = context.module
        kind = _kind(module, context.method_name)
        own = f"{type(module).__name__} reads it itself, and not through nn.Dense or the like, "
        own += "whose calls alone can be changed: let it call one"
        if kind is None or not _is_innermost(module, context):
            pass_over(module, _why_not(module) or own)
            return next_fun(*args, **kwargs)
        if args:
            x, run = args[0], lambda x: next_fun(x, *args[1:], **kwargs)
        else:
            name, x = next(iter(kwargs.items()))
            run = lambda x: next_fun(**{**kwargs, name: x})
        axes: tuple[int, ...] | None = ()
        if kind == "linear":
            text = kwargs.get("einsum_str", args[1] if len(args) > 1 else None)
            axes = _contracted(module, np.ndim(x), text)
        elif kind == "conv":
            axes = (x.ndim - 1,)
        if axes is None:
            pass_over(module, "its einsum is not '...inputs,inputs outputs->...outputs'")
            return run(x)
        others = (*args[1:], *kwargs.values()) if args else ()
        call = Call("/".join(module.path), module, kind, x, axes, run, others)
        sizes = [x.shape[axis] for axis in axes if axis >= 0]
        shape = call.weight.shape[-2:] if kind == "conv" else call.weight.shape
        if sizes != list(shape[: len(axes)]):
            pass_over(module, own)
            return run(x)  # whatever num_inputs and kernel mean there, it is not this
        return function(call)

    return interceptor


def _is_innermost(module: nn.Module, context: nn.module.InterceptorContext) -> bool:
    """Whether the method is the one that its overrides in subclasses call: they may do more."""
    name = context.method_name
    owner = [cls for cls in type(module).__mro__ if name in vars(cls)][-1]
    called: Any = context.orig_method
    return inspect.unwrap(vars(owner)[name]) is inspect.unwrap(called.func)


def _kind(module: nn.Module, method: str) -> Kind | None:
    if method == "__call__" and module.has_variable("params", "kernel"):
        if isinstance(module, nn.Conv | nn.ConvTranspose):
            return None if _why_not(module) else "conv"
        known = isinstance(module, nn.Dense | nn.DenseGeneral | nn.Einsum | _Linear)
        return "linear" if known and not _why_not(module) else None
    if method not in ("__call__", "attend") or not module.has_variable("params", "embedding"):
        return None
    if not isinstance(module, _Table):
        return None
    return "look_up" if method == "__call__" else "attend"


def _why_not(module: nn.Module) -> str | None:
    """Why a layer of flax cannot be adapted, where its attributes tell."""
    if isinstance(module, nn.DenseGeneral) and np.size(module.batch_dims):  # 0 is an axis
        return f"batch_dims={module.batch_dims} gives each of their indices a kernel of its own"
    if isinstance(module, nn.ConvLocal):
        return "nn.ConvLocal has a kernel for each position"
    if isinstance(module, nn.Conv | nn.ConvTranspose) and module.mask is not None:
        return "the mask of its convolution takes out a part of it"
    if isinstance(module, nn.Conv) and module.feature_group_count != 1:
        return f"feature_group_count={module.feature_group_count} keeps its channels apart"
    if isinstance(module, nn.ConvTranspose) and module.transpose_kernel:
        return "transpose_kernel=True puts its outputs before its inputs"
    if isinstance(module, nn.recurrent.DenseParams):
        return (
            "nn.OptimizedLSTMCell joins it with others: nn.LSTMCell, with the same parameters, "
            "can be adapted"
        )
    return None


def _contracted(module: Any, ndim: int, einsum: str | None) -> tuple[int, ...] | None:
    """The axes of x that the kernel's first ones meet, in their order; None if they are not."""
    if isinstance(module, nn.Einsum):
        x, kernel, y = (
            re.findall(r"\.\.\.|\w", term)
            for term in re.split(",|->", einsum or module.einsum_str or ",->")
        )
        inputs = [letter for letter in x if letter not in y]
        outputs = [letter for letter in kernel if letter not in x]
        rest = [letter for letter in x if letter in y]
        if not inputs or kernel != inputs + outputs or y != rest + outputs:
            return None
        # After an ellipsis, axes are counted from the end.
        gap = x.index("...") if "..." in x else len(x)
        places = [(letter, i if i < gap else i - len(x) + ndim) for i, letter in enumerate(x)]
        return tuple(axis for letter, axis in places if letter in inputs)
    if isinstance(module, nn.DenseGeneral):
        axes = (module.axis,) if isinstance(module.axis, int) else module.axis
        return tuple(sorted(axis % ndim for axis in axes))  # in the kernel's order, too
    num_inputs = module.num_inputs if isinstance(module, _Linear) else 1
    return tuple(range(ndim - num_inputs, ndim))
