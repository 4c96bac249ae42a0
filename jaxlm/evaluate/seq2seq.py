"""Texts that a model has written, compared with references by sacreBLEU (Post 2018)."""

import math
from collections.abc import Sequence

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

NAMES = ("bleu", "chrf")


def scores(written: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """``bleu`` and ``chrf`` of all texts together, from 0 to 100; NaN where there are none."""
    if not written:
        return dict.fromkeys(NAMES, math.nan)
    given = list(written), [list(references)]
    return {
        "bleu": BLEU().corpus_score(*given).score,
        "chrf": CHRF().corpus_score(*given).score,
    }


def signatures() -> dict[str, str]:
    """How they are computed, as sacreBLEU says it: scores of equal signatures compare."""
    metrics = {"bleu": BLEU(), "chrf": CHRF()}
    for metric in metrics.values():  # the number of references is only known from some
        metric.corpus_score(["a"], [["a"]])
    return {name: str(metric.get_signature()) for name, metric in metrics.items()}
