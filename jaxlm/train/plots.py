"""``loss.png``: what the run has learned so far, against what is known without learning."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from jaxlm.runtime.storage import whole
from jaxlm.train.metrics import read_jsonl

TRAIN, VALIDATION, REFERENCE = "#2b6cb0", "#dd6b20", "#4a5568"


def plot_loss(
    metrics_jsonl: Path, out_png: Path, reference: Mapping[str, float] | None = None
) -> None:
    """Draw training and validation loss over steps and tokens; the picture is replaced at once.

    Args:
        metrics_jsonl: lines with ``step`` and any of ``train/loss``, ``eval/loss``, ``tokens``.
        reference: losses (nats) drawn as dashed lines, such as ``{"unigram entropy": 6.1}``.
    """
    records = read_jsonl(metrics_jsonl)
    # A figure of its own, not pyplot's: no global state, no window, whatever the caller plots.
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    steps, losses = _series(records, "train/loss")
    if steps.size:
        axes.plot(steps, losses, color=TRAIN, alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smooth(losses), color=TRAIN, linewidth=2, label="training")
    eval_steps, eval_losses = _series(records, "eval/loss")
    if eval_steps.size:
        axes.plot(
            eval_steps,
            eval_losses,
            color=VALIDATION,
            marker="o",
            markersize=4,
            linewidth=1.2,
            label=f"validation, {eval_losses[-1]:.2f} at the end",
        )
    for name, loss in (reference or {}).items():
        axes.axhline(loss, color=REFERENCE, linestyle="--", linewidth=1)
        axes.annotate(
            f"{name} {loss:.2f}",
            (1, loss),
            xycoords=axes.get_yaxis_transform(),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            va="bottom",
            color=REFERENCE,
            fontsize=9,
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    token_steps, tokens = _series(records, "tokens")
    if token_steps.size and token_steps[-1] > 0:
        rate = tokens[-1] / token_steps[-1]
        second = axes.secondary_xaxis("top", functions=(lambda s: s * rate, lambda t: t / rate))
        second.set_xlabel("tokens")
        second.xaxis.set_major_formatter(EngFormatter(sep=""))
    if steps.size or eval_steps.size:
        axes.legend(frameon=False)
    with whole(out_png) as unfinished:
        FigureCanvasAgg(figure).print_png(unfinished)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Average with weights that fall off on both sides, so that a falling curve is not delayed."""
    decay = math.exp(-1 / max(1.0, len(values) / 60))

    def one_sided(values: np.ndarray) -> np.ndarray:
        total, sums = 0.0, []
        for value in values:
            total = decay * total + value
            sums.append(total)
        return np.array(sums)

    def both_sides(values: np.ndarray) -> np.ndarray:
        return one_sided(values) + one_sided(values[::-1])[::-1] - values

    return both_sides(values) / both_sides(np.ones_like(values))


def _series(records: list[dict[str, float | int]], name: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(r["step"], r[name]) for r in records if np.isfinite(r.get(name, np.nan))]
    steps, values = np.array(points).reshape(-1, 2).T
    return steps, values
