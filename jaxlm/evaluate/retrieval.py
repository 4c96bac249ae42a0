"""Finding one vector among many by its cosine: how often it works, and what is nearest."""

import numpy as np
from jaxtyping import Float, Int

NAMES = ("recall@1", "recall@5", "recall@10", "mrr", "candidates")
_CHUNK = 1024  # queries at a time: all similarities at once may not fit into memory
_TIE = 1e-6


def retrieval(
    queries: Float[np.ndarray, "queries embed"],
    candidates: Float[np.ndarray, "candidates embed"],
    wanted: Int[np.ndarray, "queries"],
) -> dict[str, float]:
    """How often the wanted candidate is among the 1, 5 and 10 nearest; the mean reciprocal rank.

    Both are expectations where ties are broken at random, so that vectors that are all the same
    score no better than chance. ``candidates`` says among how many it was sought.
    """
    queries, candidates = unit(queries), unit(candidates)
    nearer, tied = [], []
    for start in range(0, len(queries), _CHUNK):
        part = slice(start, start + _CHUNK)
        cosines = queries[part] @ candidates.T
        own = np.take_along_axis(cosines, wanted[part, None], axis=1)
        nearer.append((cosines > own + _TIE).sum(1))
        tied.append((abs(cosines - own) <= _TIE).sum(1))  # itself at least
    above, same = np.concatenate(nearer), np.concatenate(tied)
    sums = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, len(candidates) + 1))])
    recall = {f"recall@{k}": float(np.clip((k - above) / same, 0, 1).mean()) for k in (1, 5, 10)}
    mrr = float(((sums[above + same] - sums[above]) / same).mean())
    return recall | {"mrr": mrr, "candidates": float(len(candidates))}


def nearest(
    query: Float[np.ndarray, "embed"], candidates: Float[np.ndarray, "candidates embed"], k: int
) -> list[tuple[int, float]]:
    """The ``k`` nearest candidates with their cosines, nearest first; the first of equal ones."""
    cosines = unit(candidates) @ unit(query[None])[0]
    return [(int(i), float(cosines[i])) for i in np.argsort(-cosines, kind="stable")[:k]]


def unit(vectors: Float[np.ndarray, "vectors embed"]) -> Float[np.ndarray, "vectors embed"]:
    """Scaled to length 1; a vector of zeros stays one."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(norms, 1e-12)
