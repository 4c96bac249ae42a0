"""Everything a run carries from step to step. No key lives here: keys follow from seed and step."""

from dataclasses import replace
from typing import Any

import flax.struct
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from jaxlm import tree
from jaxlm.typing import Params, Variables


@flax.struct.dataclass
class TrainState:
    """Parameters and moments; also their shapes or shardings, hence no array types here.

    Attributes:
        step: steps done, an int32 scalar; those whose update was skipped included.
        trainable: collections of the leaves that learn.
        frozen: collections of the others: they get no gradient and no moments.
        opt_state: moments of ``trainable``.
    """

    step: Any
    trainable: PyTree
    frozen: PyTree
    opt_state: PyTree

    @classmethod
    def create(
        cls, trainable: Params, frozen: Params, optimizer: optax.GradientTransformation
    ) -> "TrainState":
        """Step 0."""
        return cls(jnp.zeros((), jnp.int32), trainable, frozen, optimizer.init(trainable))

    @property
    def learned(self) -> "TrainState":
        """All but the frozen leaves, which are read from where they came from: what is saved."""
        return replace(self, frozen={})

    @property
    def variables(self) -> Variables:
        """All collections, as ``apply`` takes them."""
        return tree.combine(self.trainable, self.frozen)
