"""Above which probability each of several labels counts."""

import numpy as np
from jaxtyping import Float, Num


def best_thresholds(
    labels: Num[np.ndarray, "examples labels"],
    probabilities: Float[np.ndarray, "examples labels"],
) -> Float[np.ndarray, "labels"]:
    """For each label the threshold with the best F1, halfway between two probabilities.

    0.5 where no other is better, as for a label that no example has.
    """
    best = np.full(labels.shape[1], 0.5)
    for column, (own, scores) in enumerate(zip(labels.T > 0.5, probabilities.T, strict=True)):
        order = np.argsort(scores)
        ordered, hits = scores[order].astype(np.float64), own[order][::-1].cumsum()[::-1]
        first = np.flatnonzero(np.append(True, np.diff(ordered) > 0))  # equal ones go together
        f1 = 2 * hits[first] / (len(own) - first + own.sum())
        above = scores > 0.5
        usual = 2 * (own & above).sum() / max(own.sum() + above.sum(), 1)
        if f1.max() > usual:
            found = first[f1.argmax()]
            best[column] = (ordered[found] + (ordered[found - 1] if found else 0.0)) / 2
    return best
