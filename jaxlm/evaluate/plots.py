"""Pictures of an evaluation; each file is replaced at once."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, fontManager, get_font
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from jaxlm.errors import InputError, note
from jaxlm.evaluate.calibration import Reliability
from jaxlm.evaluate.metrics import higher_is_better
from jaxlm.runtime.storage import whole

RIGHT, WRONG, REFERENCE = "#2b6cb0", "#dd6b20", "#4a5568"  # the colours of loss.png
CURVES = (RIGHT, WRONG, "#2f855a", "#6b46c1", "#b83280", "#2c7a7b", "#975a16", REFERENCE)
MARKERS = "osD^vPX*"
Value = str | int | float | bool | None  # of a swept parameter


def plot_confusion(
    labels: Int[np.ndarray, "examples"],
    predicted: Int[np.ndarray, "examples"],
    label_names: Sequence[str],
    out_png: Path,
) -> None:
    """Draw how often each label was taken for each: what is right in blue, what is not in orange.

    A cell's number is its count, its depth of colour its share of its row.
    """
    num_labels = len(label_names)
    counts = np.zeros((num_labels, num_labels), int)
    np.add.at(counts, (labels, predicted), 1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # A curve that lifts the small shares, since it is the rare mistakes that are looked for.
    depth = shares[..., None] ** 0.6
    colour = np.where(np.eye(num_labels, dtype=bool)[..., None], to_rgb(RIGHT), to_rgb(WRONG))

    names = [name if len(name) <= 24 else f"{name[:14]}…{name[-9:]}" for name in label_names]
    names, fonts = _drawable(names)
    numbered = num_labels <= 40
    cell = min(max(5.5 / num_labels, 0.33 if numbered else 0.16), 1.1)  # inches
    name_size = 10 if num_labels <= 12 else 8 if numbered else 6
    margin = 1.1 + 0.075 * max(map(len, names))
    side = num_labels * cell + margin
    figure = Figure(figsize=(max(side, 3.6), side), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(1 - depth * (1 - colour), interpolation="nearest")
    axes.set_xticks(np.arange(num_labels + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(num_labels + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#e2e8f0", linewidth=0.8)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    text_size = min(10.0, 21 * cell) if num_labels > 4 else 12.0
    slanted = 0.09 * max(map(len, names)) > cell
    axes.set_xticks(
        range(num_labels),
        names,
        rotation=45 if slanted else 0,
        ha="right" if slanted else "center",
        rotation_mode="anchor",
        fontsize=name_size,
        fontfamily=fonts,
    )
    axes.set_yticks(range(num_labels), names, fontsize=name_size, fontfamily=fonts)
    axes.set_xlabel("predicted")
    axes.set_ylabel("gold")
    axes.set_title(
        f"{len(labels):,} texts, {np.trace(counts) / max(len(labels), 1):.1%} right", fontsize=10
    )
    for row, column in zip(*np.nonzero(counts * numbered), strict=True):
        share = f"\n{shares[row, column]:.0%}" if cell >= 0.8 else ""
        axes.text(
            column,
            row,
            _short(int(counts[row, column])) + share,
            ha="center",
            va="center",
            fontsize=text_size,
            color="white" if depth[row, column, 0] > 0.6 else "#1a202c",
        )
    _save(figure, out_png)


def plot_reliability(reliability: Reliability, out_png: Path) -> None:
    """Draw how often predictions of each probability are right, and how many there are."""
    num_bins = len(reliability.counts)
    edges = np.arange(num_bins) / num_bins
    figure = Figure(figsize=(4.8, 5.2), dpi=150, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    width = 1 / num_bins
    bars = {"width": width, "align": "edge", "edgecolor": "white", "linewidth": 0.8}
    centers, filled = edges + width / 2, reliability.counts > 0
    said, right = reliability.confidence, reliability.accuracy
    top.bar(edges, right, color=RIGHT, label="accuracy", **bars)
    top.vlines(centers[filled], right[filled], said[filled], color=WRONG, linewidth=1.5)
    top.scatter(
        centers[filled], said[filled], s=20, color=WRONG, zorder=3, label="mean probability"
    )
    top.plot([0, 1], [0, 1], color=REFERENCE, linestyle="--", linewidth=1, label="calibrated")
    top.set_ylabel("accuracy")
    top.set_ylim(0, 1)
    top.set_title(f"expected calibration error {reliability.error:.3f}", fontsize=10)
    top.legend(framealpha=0.85, edgecolor="none", loc="upper left", fontsize=9)
    bottom.bar(edges, reliability.counts / reliability.counts.sum(), color=REFERENCE, **bars)
    bottom.set_ylabel("share")
    bottom.set_xlabel("probability of the prediction")
    bottom.set_xlim(0, 1)
    for axes in (top, bottom):
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        _tidy(axes)
    bottom.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _save(figure, out_png)


def plot_learning_curves(
    curves: Mapping[str, Mapping[int, Sequence[float]]],
    out_png: Path,
    *,
    x_label: str = "examples per class",
    y_label: str = "accuracy",
) -> None:
    """Draw scores by the number of examples: mean ± standard deviation, and a dot for each seed.

    Args:
        curves: for each name, for each number of examples, one score for each seed.
    """
    if not any(curves.values()):
        raise InputError("there are no scores to draw a learning curve of")
    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    names, fonts = _drawable(curves)
    for i, (name, curve) in enumerate(zip(names, curves.values(), strict=True)):
        colour, marker = CURVES[i % len(CURVES)], MARKERS[i % len(MARKERS)]
        sizes = sorted(curve)
        # Side by side, so that bars of one size do not hide each other.
        places = np.array(sizes) * 1.03 ** (i - (len(curves) - 1) / 2)
        means = np.array([np.mean(curve[size]) for size in sizes])
        sds = np.array([_sd(curve[size]) for size in sizes])
        axes.fill_between(places, means - sds, means + sds, color=colour, alpha=0.15, linewidth=0)
        axes.errorbar(
            places,
            means,
            sds,
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=1.8,
            elinewidth=1,
            capsize=2.5,
            label=f" {name}" if name.startswith("_") else name,  # which a legend would leave out
        )
        for place, size in zip(places, sizes, strict=True):
            if len(curve[size]) > 1:
                dots = [place] * len(curve[size])
                axes.scatter(dots, curve[size], s=7, color=colour, alpha=0.35, zorder=3)
    axes.set_xscale("log")
    _name_ticks(axes, sorted({size for curve in curves.values() for size in curve}))
    axes.set_xlabel(x_label)
    (metric,), own = _drawable([y_label])
    axes.set_ylabel(metric, fontfamily=own)
    axes.legend(frameon=False, prop={"family": fonts})
    _tidy(axes)
    _save(figure, out_png)


def plot_sweep(
    trials: Sequence[Mapping[str, Value]], scores: Sequence[float], out_png: Path, *, metric: str
) -> None:
    """Draw a dot for each trial by each parameter that varies, the means, and the best in orange.

    Args:
        trials: the value of every parameter in each trial.
        scores: one for each trial; those that are not finite are left out.
    """
    if len(trials) != len(scores):
        raise InputError(f"{len(trials)} trials have {len(scores)} scores: each has one")
    finite = [i for i, score in enumerate(scores) if math.isfinite(score)]
    if not finite:
        raise InputError(f"none of {len(scores)} trials has a finite {metric} to draw")
    rows = [trials[i] for i in finite]
    values = np.array([scores[i] for i in finite])
    best = int(values.argmax() if higher_is_better(metric) else values.argmin())
    varying = [name for name in rows[0] if len({row[name] for row in rows}) > 1]
    panels = varying or list(rows[0])[:1]
    num_columns = min(len(panels), 3)
    num_rows = -(-len(panels) // num_columns)
    figure = Figure(
        figsize=(1 + 3.2 * num_columns, 0.4 + 2.9 * num_rows), dpi=150, layout="constrained"
    )
    grid = figure.subplots(num_rows, num_columns, sharey=True, squeeze=False)
    for axes, name in zip(grid.flat, panels, strict=False):
        places, joined = _place(axes, [row[name] for row in rows])
        spots = np.unique(places)
        means = [values[places == spot].mean() for spot in spots]
        axes.plot(
            spots, means, linestyle=joined, marker="_", markersize=14, color=RIGHT, linewidth=1.5
        )
        axes.scatter(places, values, s=22, color=RIGHT, alpha=0.5, linewidth=0)
        axes.scatter(places[best], values[best], s=60, color=WRONG, zorder=3)
        axes.set_xlabel(name)
        _tidy(axes)
    (shown,), fonts = _drawable([metric])
    for axes in grid[:, 0]:
        axes.set_ylabel(shown, fontfamily=fonts)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    title = f"{shown} of {len(values)} trials, {values[best]:.4g} at best"
    figure.suptitle(title, fontsize=10, fontfamily=fonts)
    _save(figure, out_png)


def _place(axes: Axes, values: Sequence[Value]) -> tuple[Float[np.ndarray, "trials"], str]:
    """Where values stand on the x axis, and the line that may join them.

    Numbers stand at their size, other things side by side.
    """
    axes.margins(x=0.12)
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        numbers = np.array(values, np.float64)
        if numbers.min() > 0 and numbers.max() / numbers.min() >= 8:
            axes.set_xscale("log")
        if len(np.unique(numbers)) <= 6:
            _name_ticks(axes, np.unique(numbers).tolist())
        return numbers, "-"
    names = list(dict.fromkeys(str(value) for value in values))
    shown, fonts = _drawable(names)
    axes.set_xticks(range(len(names)), shown, fontfamily=fonts)
    axes.set_xlim(-0.5, len(names) - 0.5)
    return np.array([names.index(str(value)) for value in values], np.float64), "none"


def _name_ticks(axes: Axes, places: Sequence[float | int]) -> None:
    axes.xaxis.set_major_locator(FixedLocator(places))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.4g}" if x < 1e4 else f"{x:g}"))


def _drawable(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Texts as matplotlib has to be given them, and the fonts for them.

    What no font on this machine can draw is replaced by numbers, which is said.
    """
    shown = [name.replace("$", r"\$") for name in names]  # between two would be mathematics
    fonts = list(rcParams["font.sans-serif"][:1])
    lacking = {c for name in shown for c in name if not c.isspace()} - _characters(
        findfont(fonts[0])
    )
    others = [entry for entry in fontManager.ttflist if not entry.name.startswith("Last Resort")]
    for entry in sorted(others, key=lambda entry: entry.name) if lacking else ():  # that has boxes
        if entry.name not in fonts and (more := lacking & _characters(entry.fname)):
            lacking -= more
            fonts.append(entry.name)
    if lacking:
        numbered = {i: name for i, name in enumerate(shown) if lacking & set(name)}
        note(
            f"no font on this machine can draw {''.join(sorted(lacking))[:20]}: the plot has "
            f"numbers for {', '.join(f'{i} = {name}' for i, name in numbered.items())}; install "
            "one, such as Noto Sans CJK"
        )
        shown = [str(i) if i in numbered else name for i, name in enumerate(shown)]
    return shown, fonts


def _characters(font: str | Path) -> set[str]:
    try:
        return set(map(chr, get_font(str(font)).get_charmap()))
    except (OSError, RuntimeError):  # it is damaged, or gone
        return set()


def _tidy(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _sd(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _short(count: int) -> str:
    return f"{count:,}" if count < 10_000 else f"{count / 1000:.0f}k"


def _save(figure: Figure, out_png: Path) -> None:
    # A figure of its own, not pyplot's: no global state.
    with whole(out_png) as unfinished:
        FigureCanvasAgg(figure).print_png(unfinished)
