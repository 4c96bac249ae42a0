"""What each of several processes holds of a global batch."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxlm.errors import InputError


class BatchRows(NamedTuple):
    """Some of the ``num_blocks`` equal blocks of rows that a global batch is split into.

    On TPUs the blocks of a host need not be neighbours.
    """

    blocks: tuple[int, ...]
    num_blocks: int

    @property
    def count(self) -> int:
        """How many sets of blocks of this size make the batch."""
        return self.num_blocks // len(self.blocks)

    def rows(self, batch_size: int) -> Int[np.ndarray, " rows"]:
        """Their numbers in a global batch of that size."""
        if batch_size < 1 or batch_size % self.num_blocks:
            raise InputError(
                f"batch_size={batch_size} is not divisible by the {self.num_blocks} blocks of rows "
                "that devices hold"
            )
        return np.arange(batch_size).reshape(self.num_blocks, -1)[list(self.blocks)].ravel()


ALL_ROWS = BatchRows((0,), 1)
