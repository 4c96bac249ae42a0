"""``Sums``: the only currency of losses and metrics."""

from functools import reduce
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Sums:
    """Numerators over one weight, divided once, at the end.

    Devices and micro-batches hold different numbers of predicted tokens, so a mean of means is
    wrong; sums add up exactly (as far as floats do), in any order and on any mesh.

    Attributes:
        totals: numerators, such as ``loss`` (nats) and ``accuracy`` (hits), over what counts.
        weight: their common denominator: the number of predicted tokens or examples.
        counts: plain counters that are reported as they are, such as ``overflow``.
    """

    totals: dict[str, Any]  # scalars: on a device, on the host, or shapes alone
    weight: Any
    counts: dict[str, Any] = flax.struct.field(default_factory=dict)

    def __add__(self, other: "Sums") -> "Sums":
        return jax.tree.map(jnp.add, self, other)

    def means(self) -> dict[str, float]:
        """Host floats: every total over the weight. Empty sums give NaN, never zero."""
        weight = float(self.weight)
        return {
            name: float(total) / weight if weight else float("nan")
            for name, total in self.totals.items()
        }


def add_all(sums: list[Sums]) -> Sums:
    """The sum of at least one."""
    return reduce(Sums.__add__, sums)
