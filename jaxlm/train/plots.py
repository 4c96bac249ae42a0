"""``loss.png``: what the run has learned so far, against what is known without learning."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from jaxlm.runtime.storage import whole
from jaxlm.train.metrics import read_jsonl

TRAIN, VALIDATION, REFERENCE = "#2b6cb0", "#dd6b20", "#4a5568"


@dataclass(frozen=True)
class Reference:
    """What losses are compared with."""

    losses: Mapping[str, float] = field(default_factory=dict)
    """Those of what needs no learning, such as ``{"unigram entropy": 6.1}``: dashed lines."""
    deviation: float | None = None
    """Losses are squared errors of numbers divided by it: their roots are drawn, in the unit of the
    numbers. None: losses are in nats."""


def plot_loss(metrics_jsonl: Path, out_png: Path, reference: Reference) -> None:
    """Draw training and validation loss over steps and tokens; the picture is replaced at once.

    Args:
        metrics_jsonl: lines with ``step`` and any of ``train/loss``, ``eval/loss``, ``tokens``.
    """
    records, deviation = read_jsonl(metrics_jsonl), reference.deviation
    # A figure of its own, not pyplot's: no global state, no window, whatever the caller plots.
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    shown = _as_it_is if deviation is None else lambda loss: np.sqrt(loss) * deviation
    form = "{:.2f}" if deviation is None else "{:,.4g}"
    steps, losses = _series(records, "train/loss")
    if steps.size:
        axes.plot(steps, shown(losses), color=TRAIN, alpha=0.25, linewidth=0.8)
        smooth = _smooth(losses, np.diff(steps, prepend=0))
        axes.plot(steps, shown(smooth), color=TRAIN, linewidth=2, label="training")
    eval_steps, eval_losses = _series(records, "eval/loss")
    if eval_steps.size:
        axes.plot(
            eval_steps,
            shown(eval_losses),
            color=VALIDATION,
            marker="o",
            markersize=4,
            linewidth=1.2,
            label=f"validation, {form.format(shown(eval_losses)[-1])} at the end",
        )
    for name, loss in reference.losses.items():
        axes.axhline(shown(loss), color=REFERENCE, linestyle="--", linewidth=1)
        axes.annotate(
            f"{name} {form.format(shown(loss))}",
            (1, shown(loss)),
            xycoords=axes.get_yaxis_transform(),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            va="bottom",
            color=REFERENCE,
            fontsize=9,
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats)" if deviation is None else "root mean squared error")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    token_steps, tokens = _series(records, "tokens")
    if token_steps.size and token_steps[-1] > 0:
        token_steps, tokens = np.append(0.0, token_steps), np.append(0.0, tokens)
        ways = (
            lambda x: _along(x, token_steps, tokens),
            lambda x: _along(x, tokens, token_steps),
        )
        second = axes.secondary_xaxis("top", functions=ways)
        second.set_xlabel("tokens")
        second.xaxis.set_major_formatter(EngFormatter(sep=""))
    if steps.size or eval_steps.size:
        axes.legend(frameon=False)
    with whole(out_png) as unfinished:
        FigureCanvasAgg(figure).print_png(unfinished)


def _along(x: Any, known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Between known points on straight lines, beyond the last as before it: batches may grow."""
    x = np.asarray(x, float)
    slope = (values[-1] - values[-2]) / (known[-1] - known[-2])
    beyond = np.maximum(x - known[-1], 0) + np.minimum(x, 0)
    return np.interp(x, known, values) + slope * beyond


def _as_it_is(loss: Any) -> Any:
    return loss


def _smooth(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Average with weights that fall off on both sides, so that a falling curve is not delayed.

    ``counts``: of how many steps each value is the mean; the last may be of few.
    """
    decay = math.exp(-1 / max(1.0, len(values) / 60))

    def one_sided(values: np.ndarray) -> np.ndarray:
        total, sums = 0.0, []
        for value in values:
            total = decay * total + value
            sums.append(total)
        return np.array(sums)

    def both_sides(values: np.ndarray) -> np.ndarray:
        return one_sided(values) + one_sided(values[::-1])[::-1] - values

    return both_sides(values * counts) / both_sides(counts)


def _series(records: list[dict[str, float | int]], name: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(r["step"], r[name]) for r in records if np.isfinite(r.get(name, np.nan))]
    steps, values = np.array(points).reshape(-1, 2).T
    return steps, values
