"""Finding the linear maps and tables of a linen module, and changing what they compute.

The modules know nothing of it: linen lets a function stand between a call and the method called.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float, Int, PyTree

from jaxlm.errors import InputError
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


class Call(NamedTuple):
    """A module about to apply its kernel or table.

    Attributes:
        path: of the module.
        kind: a linear map, or a table that looks ids up or scores vectors against its rows.
        x: what it is applied to.
        axes: those of ``x`` that are contracted with the kernel's inputs; of a table, none.
        run: the module's own computation.
    """

    path: str
    module: nn.Module
    kind: Literal["linear", "look_up", "attend"]
    x: Float[Array, "..."] | Int[Array, "..."]
    axes: tuple[int, ...]
    run: Callable[[Array], Array]

    @property
    def weight(self) -> Float[Array, "..."]:
        """The kernel or the table, without the stack's axes."""
        name = "kernel" if self.kind == "linear" else "embedding"
        return self.module.get_variable("params", name)


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


def find_sites(call: Callable[[Any], Any], variables: Mapping[str, PyTree]) -> dict[str, Site]:
    """Every kernel and table that ``call(variables)`` applies, by path; nothing is computed.

    Found are ``Linear``, ``Dense``, ``DenseGeneral`` (no ``batch_dims``) and ``Embed``, of jaxlm
    and flax, and what is built like them; of their subclasses, what these leave to them.
    ``variables`` may be shapes.
    """
    params = flatten(variables["params"])
    for path, leaf in params.items():
        if isinstance(leaf, nn.meta.AxisMetadata):
            raise InputError(f"{path} has names of its axes: give flax.linen.unbox(variables)")
    sites = {}

    def see(call: Call) -> Array:
        y, weight = call.run(call.x), call.weight
        name = "kernel" if call.kind == "linear" else "embedding"
        path = f"{call.path}/{name}".lstrip("/")
        if path not in params:
            raise InputError(
                f"the variables hold no {path}, which the call applies: join what it calls in one "
                "module, whose parameters these are"
            )
        site = Site(params[path].ndim - weight.ndim, len(call.axes) or 1)
        # Only a stack in front is supported: nn.scan and nn.vmap can put it elsewhere.
        if params[path].shape[site.num_stack :] == weight.shape:
            sites[path] = site
        return y

    def inside(variables: Mapping[str, PyTree]) -> None:  # a new function: no trace is cached
        with nn.intercept_methods(_interceptor(see)):
            call(variables)

    jax.eval_shape(inside, variables)
    return sites


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
    for number, pattern in enumerate(patterns):
        ends = compile_target(pattern)
        paths = [path for path in flatten(params) if ends.search(path)]
        for path in paths:
            if path not in sites and path.rpartition("/")[2] in ADAPTABLE:
                raise InputError(
                    f"the target {pattern!r} matches {path}, which the model does not apply as a "
                    f"linear map or a table: {known}"
                )
        matched = [path for path in paths if path in sites]
        if not matched:
            raise InputError(f"the target {pattern!r} matches no parameter: {known}")
        for path in matched:
            found.setdefault(path, number)
    return found


def intercept(apply: Apply, collection: str, rewrite: Callable[[Call, Leaves], Array]) -> Apply:
    """``apply`` in which ``rewrite`` replaces the calls of modules that have a ``collection``.

    Raises where a part of the collection is used by no module: it would silently have no effect.
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
        if unread:
            raise InputError(
                f"no module read the {collection!r} of {', '.join(sorted(unread))}: the model has "
                "no such linear map or table, or does not call it, or scans it without "
                "variable_axes={True: 0}, or was compiled or checkpointed before it was adapted"
            )
        return y

    return intercepted


def _interceptor(function: Callable[[Call], Array]) -> Callable[..., Any]:
    def interceptor(
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        module = context.module
        kind = _kind(module, context.method_name)
        if kind is None or not _is_innermost(module, context):
            return next_fun(*args, **kwargs)
        if args:
            x, run = args[0], lambda x: next_fun(x, *args[1:], **kwargs)
        else:
            name, x = next(iter(kwargs.items()))
            run = lambda x: next_fun(**{**kwargs, name: x})
        axes = _contracted(module, np.ndim(x)) if kind == "linear" else ()
        call = Call("/".join(module.path), module, kind, x, axes, run)
        sizes = [x.shape[axis] for axis in axes if axis >= 0]
        if sizes != list(call.weight.shape[: len(axes)]):
            return run(x)  # whatever num_inputs and kernel mean there, it is not this
        return function(call)

    return interceptor


def _is_innermost(module: nn.Module, context: nn.module.InterceptorContext) -> bool:
    """Whether the method is the one that its overrides in subclasses call: they may do more."""
    name = context.method_name
    owner = [cls for cls in type(module).__mro__ if name in vars(cls)][-1]
    called: Any = context.orig_method
    return inspect.unwrap(vars(owner)[name]) is inspect.unwrap(called.func)


def _kind(module: nn.Module, method: str) -> Literal["linear", "look_up", "attend"] | None:
    if method == "__call__" and module.has_variable("params", "kernel"):
        if isinstance(module, nn.DenseGeneral) and np.size(module.batch_dims):  # 0 is an axis
            return None
        return "linear" if isinstance(module, nn.Dense | nn.DenseGeneral | _Linear) else None
    if method not in ("__call__", "attend") or not module.has_variable("params", "embedding"):
        return None
    if not isinstance(module, _Table):
        return None
    return "look_up" if method == "__call__" else "attend"


def _contracted(module: Any, ndim: int) -> tuple[int, ...]:
    if isinstance(module, nn.DenseGeneral):
        axes = (module.axis,) if isinstance(module.axis, int) else module.axis
        return tuple(sorted(axis % ndim for axis in axes))  # in the kernel's order, too
    num_inputs = module.num_inputs if isinstance(module, _Linear) else 1
    return tuple(range(ndim - num_inputs, ndim))
