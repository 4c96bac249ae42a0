"""Which named values of a traced function are its arguments, or parts of them, as they are."""

from collections.abc import Sequence

import jax
from jax.extend import core
from jax.interpreters import partial_eval as pe

# These give their operands' values, or some of them, without computing anything.
MOVES = {
    "convert_element_type",
    "copy",
    "dynamic_slice",
    "name",
    "optimization_barrier",
    "reshape",
    "sharding_constraint",
    "slice",
    "squeeze",
}


def changed_names(program: core.ClosedJaxpr) -> set[str]:
    """The ``checkpoint_name`` of all values that were computed from the program's arguments.

    Those of arguments, of their slices (the layers of a scan), and of what transformations pass
    through (``jit``, ``checkpoint``, ``scan``) are left out.
    """
    return _walk(program.jaxpr, [True] * len(program.jaxpr.invars))[0]


def read_arguments(program: core.ClosedJaxpr) -> list[bool]:
    """Which of the program's arguments its results depend on."""
    return pe.dce_jaxpr(program.jaxpr, [True] * len(program.jaxpr.outvars))[1]


def _walk(jaxpr: core.Jaxpr, given: Sequence[bool]) -> tuple[set[str], list[bool]]:
    """Changed names, and which of the results are as given."""
    same = {var for var, is_given in zip(jaxpr.invars, given, strict=False) if is_given}
    changed: set[str] = set()
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        inputs = [not isinstance(x, core.Literal) and x in same for x in equation.invars]
        outputs = inputs if name in MOVES else []
        if name == "name" and not inputs[0]:
            changed.add(equation.params["name"])
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = inner.jaxpr if isinstance(inner, core.ClosedJaxpr) else inner
            if isinstance(inner, core.Jaxpr):
                # The last ones: cond has an index in front, while_loop what its condition reads.
                found, outputs = _walk(inner, inputs[-len(inner.invars) :])
                changed |= found
        same |= {x for x, is_same in zip(equation.outvars, outputs, strict=False) if is_same}
    return changed, [not isinstance(x, core.Literal) and x in same for x in jaxpr.outvars]
