"""Everything a run carries from step to step. No key lives here: keys follow from seed and step."""

import flax.struct
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from jaxlm import tree
from jaxlm.typing import Params, Variables


@flax.struct.dataclass
class TrainState:
    """Parameters and moments.

    Attributes:
        step: steps done, those whose update was skipped included.
        trainable: collections of the leaves that learn.
        frozen: collections of the others: they get no gradient and no moments.
        opt_state: moments of ``trainable``.
    """

    step: Int[Array, ""]
    trainable: Params
    frozen: Params
    opt_state: PyTree

    @classmethod
    def create(
        cls, trainable: Params, frozen: Params, optimizer: optax.GradientTransformation
    ) -> "TrainState":
        """Step 0."""
        return cls(jnp.zeros((), jnp.int32), trainable, frozen, optimizer.init(trainable))

    @property
    def variables(self) -> Variables:
        """All collections, as ``apply`` takes them."""
        return tree.combine(self.trainable, self.frozen)
