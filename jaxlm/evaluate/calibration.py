"""Whether a model is right as often as it says."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """Predictions in bins of equal width by their probability; an empty bin holds zeros."""

    counts: Int[np.ndarray, "bins"]
    confidence: Float[np.ndarray, "bins"]
    """The mean probability of the bin's predictions."""
    accuracy: Float[np.ndarray, "bins"]
    """The share of them that is right."""

    @property
    def error(self) -> float:
        """The expected calibration error, Σ counts/examples · |accuracy − confidence|."""
        return float(np.average(np.abs(self.accuracy - self.confidence), weights=self.counts))


def reliability(
    labels: Int[np.ndarray, "examples"],
    probabilities: Float[np.ndarray, "examples labels"],
    *,
    num_bins: int = 15,
) -> Reliability:
    """Compare probability and accuracy as in Guo et al. (2017, section 2); bins are (low, high]."""
    confidence = probabilities.max(axis=1).astype(np.float64)
    right = probabilities.argmax(axis=1) == labels
    bins = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    divisor = np.maximum(counts, 1)
    return Reliability(
        counts=counts,
        confidence=np.bincount(bins, confidence, num_bins) / divisor,
        accuracy=np.bincount(bins, right, num_bins) / divisor,
    )
