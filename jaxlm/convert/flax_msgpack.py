"""Checkpoints of transformers' Flax classes, which version 5 removed: ``flax_model.msgpack``.

Their trees have the names of the PyTorch classes' tensors, but for the last part, and their kernels
the other layout. Only msgpack's own types and numpy's buffers are read: nothing is unpickled.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.serialization import msgpack_restore
from flax.traverse_util import flatten_dict
from jaxtyping import Shaped

from jaxlm.errors import InputError

WEIGHTS = "flax_model.msgpack"
_ENDS = {"kernel": "weight", "embedding": "weight", "scale": "weight"}


class FlaxTensors(Mapping[str, Shaped[np.ndarray, "..."]]):
    """The tensors of a file under the names, and in the layout, of PyTorch's classes."""

    def __init__(self, path: Path) -> None:
        try:
            tree = msgpack_restore(path.read_bytes())
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        except Exception as error:  # msgpack's, and those of what it finds
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise InputError(
                f"{path} is not a complete file of msgpack ({reason}); download it again"
            ) from error
        flat: dict[tuple[str, ...], Any] = flatten_dict(tree) if isinstance(tree, dict) else {}
        wrong = next((k for k, x in flat.items() if not isinstance(x, np.ndarray)), None)
        if not flat or wrong is not None:
            raise InputError(f"{path} holds no tree of arrays{f' at {wrong}' if wrong else ''}")
        self._arrays = {
            ".".join([*path[:-1], _ENDS.get(path[-1], path[-1])]): (path[-1], x)
            for path, x in ((tuple(map(str, key)), x) for key, x in flat.items())
        }

    def __getitem__(self, name: str) -> Shaped[np.ndarray, "..."]:
        kind, array = self._arrays[name]
        return array.T if kind == "kernel" else array

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)
