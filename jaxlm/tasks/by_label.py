"""Numbers for labels, as a configuration gives them: ``("neg=1", "pos=5")``."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from jaxlm.errors import InputError
from jaxlm.tasks.task import Labels


def pairs(given: Sequence[str], what: str) -> dict[str, float]:
    """Numbers by name, from texts such as neg=1."""
    found = {}
    for pair in given:
        name, _, text = pair.rpartition("=")
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not name or not 0 <= value < float("inf"):
            raise InputError(f"{what}: {pair!r} is no label and its number, such as pos=0.5")
        found[name] = value
    return found


def by_label(
    given: Sequence[str], labels: Labels, default: float, what: str
) -> Float[np.ndarray, "labels"]:
    """The number of each label; names that are none of the labels raise."""
    numbers = pairs(given, what)
    unknown = [name for name in numbers if name not in labels]
    if unknown:
        raise InputError(f"{what}: {unknown[0]!r} is none of the labels {', '.join(labels[:20])}")
    return np.array([numbers.get(label, default) for label in labels])
