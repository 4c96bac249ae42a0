"""Encoded examples, ready to be put into batches."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Shaped

Row = dict[str, np.ndarray]
NO_TOKEN = -1  # where no row is padded


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Examples of one task, encoded alike."""

    rows: list[Row]
    """For each example, the arrays of a batch without the batch axis and without padding."""
    along_length: frozenset[str]
    """Those arrays whose last axis is positions, as that of ``tokens`` is."""
    pad: int
    """The token that pads ``tokens``; all other arrays are padded with 0."""
    untruncated: Int32[np.ndarray, " examples"]
    """Tokens of each example if there were no maximal length."""
    along_target: frozenset[str] = frozenset()
    """Those arrays whose last axis is positions of a second row, as that of ``targets`` is."""
    untruncated_targets: Int32[np.ndarray, " examples"] | None = None
    """Tokens of each second row if there were no maximal length."""
    notes: tuple[str, ...] = ()
    """What a user should know of how they were encoded, a line each."""
    windowed: tuple[int, int] = (0, 0)
    """Documents that are longer than a row, and the windows that they are read in."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> Int32[np.ndarray, " examples"]:
        """Positions that each example needs in a batch."""
        return np.array([row["tokens"].shape[-1] for row in self.rows], np.int32)

    @property
    def sizes(self) -> Int32[np.ndarray, "examples sides"]:
        """The same for each side: one, or two where there are ``targets``."""
        names = ["tokens", *(["targets"] if self.along_target else [])]
        return np.array([[row[name].shape[-1] for name in names] for row in self.rows], np.int32)

    @property
    def sides(self) -> dict[str, "Examples"]:
        """These; or of pairs ``sources`` and ``targets``, each as the only side."""
        if self.untruncated_targets is None:
            return {"": self}
        one = {"along_length": frozenset({"tokens"}), "pad": NO_TOKEN}
        return {
            name: Examples(
                rows=[{"tokens": row[key]} for row in self.rows], untruncated=size, **one
            )
            for name, key, size in (
                ("sources", "tokens", self.untruncated),
                ("targets", "targets", self.untruncated_targets),
            )
        }

    def longer_than(self, max_length: int) -> int:
        """Examples with a side that would have more tokens if there were no maximal length."""
        sizes = [side.untruncated for side in self.sides.values()]
        return int((np.max(sizes, axis=0) > max_length).sum())


def pad_rows(
    rows: Sequence[np.ndarray], value: int, length: int
) -> Shaped[np.ndarray, "rows *axes {length}"]:
    """Stack arrays that differ in their last axis alone, each padded to a length."""
    stacked = np.full((len(rows), *rows[0].shape[:-1], length), value, rows[0].dtype)
    for row, into in zip(rows, stacked, strict=True):
        into[..., : row.shape[-1]] = row
    return stacked
