"""What a user reads after an evaluation: the most wrong examples, and scores over seeds."""

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from jaxlm.data.tabular import json_text
from jaxlm.errors import InputError
from jaxlm.evaluate.metrics import HIGHER_IS_BETTER
from jaxlm.runtime.storage import whole

Scores = Mapping[str, Mapping[str, Sequence[float]]]  # row → column → one for each seed


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One example as the model sees it."""

    loss: float
    gold: str
    predicted: str
    probability: float | None
    """What the model gives to its prediction; None where that is a number."""
    text: str
    origin: str
    """Where the example stands, such as ``dev.tsv:12``."""
    right: bool
    """As the task's metric counts it, whatever ``gold`` and ``predicted`` look like."""


def surprise(probability: float) -> float:
    """-log of what the model gives to the truth; finite, as JSON wants it, where that is 0."""
    return -math.log(max(probability, float(np.finfo(np.float32).tiny)))


def classified(
    texts: Sequence[str],
    labels: Int[np.ndarray, "examples"],
    probabilities: Float[np.ndarray, "predictions labels"],
    label_names: Sequence[str],
    origins: Sequence[str],
) -> list[Prediction]:
    """Examples of a classification; the loss is -log of the probability of the gold label."""
    lengths = {len(texts), len(labels), len(probabilities), len(origins)}
    if len(lengths) > 1:
        raise InputError(
            f"{len(texts)} texts, {len(labels)} labels, {len(probabilities)} predictions and "
            f"{len(origins)} origins are not of the same examples"
        )
    return [
        Prediction(
            loss=surprise(float(probabilities[i, gold])),
            gold=label_names[int(gold)],
            predicted=label_names[int(guess)],
            probability=float(probabilities[i, guess]),
            text=texts[i],
            origin=origins[i],
            right=bool(gold == guess),
        )
        for i, (gold, guess) in enumerate(zip(labels, probabilities.argmax(axis=1), strict=True))
    ]


def labelled(
    texts: Sequence[str],
    labels: Float[np.ndarray, "examples labels"],
    probabilities: Float[np.ndarray, "examples labels"],
    thresholds: Float[np.ndarray, "labels"],
    label_names: Sequence[str],
    origins: Sequence[str],
) -> list[Prediction]:
    """Examples with any number of labels; the loss is the mean of all labels' -log of the truth."""
    true, guessed = labels > 0.5, probabilities > thresholds

    def shown(row: Bool[np.ndarray, "labels"]) -> str:
        return ", ".join(name for name, own in zip(label_names, row, strict=True) if own) or "none"

    return [
        Prediction(
            loss=float(np.mean([surprise(x) for x in np.where(gold, row, 1 - row).tolist()])),
            gold=shown(gold),
            predicted=shown(guess),
            probability=float(np.prod(np.where(guess, row, 1 - row))),
            text=text,
            origin=origin,
            right=bool(np.all(gold == guess)),
        )
        for text, gold, guess, row, origin in zip(
            texts, true, guessed, probabilities.astype(np.float64), origins, strict=True
        )
    ]


def regressed(
    texts: Sequence[str],
    numbers: Float[np.ndarray, "examples"],
    values: Float[np.ndarray, "examples"],
    deviation: float,
    origins: Sequence[str],
) -> list[Prediction]:
    """Examples with a number; the loss is the squared error in deviations of training data."""
    return [
        Prediction(
            loss=((value - number) / deviation) ** 2,
            gold=f"{number:.6g}",
            predicted=f"{value:.6g}",
            probability=None,
            text=text,
            origin=origin,
            right=value == number,
        )
        for text, number, value, origin in zip(
            texts, numbers.tolist(), values.tolist(), origins, strict=True
        )
    ]


def most_wrong(predictions: Iterable[Prediction], count: int = 20) -> list[Prediction]:
    """Those that are wrong, by falling loss; often the label is wrong and not the model."""
    wrong = (p for p in predictions if not p.right)
    return heapq.nlargest(count, wrong, key=lambda p: p.loss)


def write_jsonl(predictions: Iterable[Prediction], path: Path) -> None:
    """One object a line; the file is replaced at once."""
    with whole(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        for prediction in predictions:
            left_out = ("right", *(["probability"] if prediction.probability is None else []))
            shown = {name: x for name, x in vars(prediction).items() if name not in left_out}
            file.write(json_text(shown) + "\n")


def predictions_table(
    predictions: Iterable[Prediction], title: str = "Most wrong", *, width: int = 80
) -> Table:
    """Two lines for each, to print: the text above where it is from.

    On a terminal of less than 72 columns what is given and predicted stands above them.
    """
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    if width < 72:
        table.add_column("loss  gold → predicted")
        for p in predictions:
            cell = Text(f"{p.loss:.2f}  {p.gold} → ")
            cell.append(_guess(p), "" if p.right else "red")
            text = Text(" ".join(p.text.split()), no_wrap=True, overflow="ellipsis")
            table.add_row(Group(cell, text, Text(p.origin, "dim", overflow="fold")))
        return table
    table.add_column("loss", justify="right", no_wrap=True)
    for name in ("gold", "predicted"):
        table.add_column(name, max_width=20, min_width=10)
    table.add_column("text", min_width=20)
    for p in predictions:
        # Text, for brackets in a string would be read as markup.
        guess = Text(_guess(p), "" if p.right else "red")
        text = Text(" ".join(p.text.split()), no_wrap=True, overflow="ellipsis")
        text.append(f"\n{p.origin}", "dim")
        table.add_row(f"{p.loss:.2f}", Text(p.gold), guess, text)
    return table


def _guess(prediction: Prediction) -> str:
    probability = prediction.probability
    return prediction.predicted + ("" if probability is None else f" {probability:.0%}")


def summary_table(
    scores: Scores, *, title: str | None = None, scale: float = 1.0, digits: int = 4
) -> Table:
    """Mean ± standard deviation over seeds, to print; the best of a known metric is bold.

    Args:
        scale: what scores are multiplied by; 100 for shares in percent.
    """
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    header, *rows = _summary(scores, scale, digits)
    for i, (name, _) in enumerate(header):
        table.add_column(Text(name), justify="right" if i else "left")
    for row in rows:
        table.add_row(*(Text(cell, "bold" if best else "") for cell, best in row))
    return table


def summary_markdown(scores: Scores, *, scale: float = 1.0, digits: int = 4) -> str:
    """The same as a Markdown table."""
    header, *rows = _summary(scores, scale, digits)
    lines = [[name for name, _ in header], ["---", *["---:"] * (len(header) - 1)]]
    lines += [[f"**{cell}**" if best else cell for cell, best in row] for row in rows]
    lines = [[cell.replace("|", r"\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _summary(scores: Scores, scale: float, digits: int) -> list[list[tuple[str, bool]]]:
    """Cells, the header first, and whether each is the best of its column."""
    columns = list(dict.fromkeys(column for row in scores.values() for column in row))
    best: dict[str, float] = {}
    for column in columns:
        means = [np.mean(row[column]) for row in scores.values() if row.get(column)]
        if column in HIGHER_IS_BETTER and len(means) > 1:
            best[column] = float(max(means) if HIGHER_IS_BETTER[column] else min(means))
    lines = [[("", False), *((column, False) for column in columns)]]
    for name, row in scores.items():
        line = [(name, False)]
        for column in columns:
            values = row.get(column, ())
            is_best = bool(values) and float(np.mean(values)) == best.get(column)
            line.append((mean_and_sd(values, scale=scale, digits=digits), is_best))
        lines.append(line)
    return lines


def mean_and_sd(values: Sequence[float], *, scale: float = 1.0, digits: int = 4) -> str:
    """``0.9123 ± 0.0041``, the standard deviation of a sample (n - 1); of one value, itself."""
    if not values:
        return "–"
    mean = f"{np.mean(values) * scale:.{digits}f}"
    return f"{mean} ± {np.std(values, ddof=1) * scale:.{digits}f}" if len(values) > 1 else mean
