"""What a data set is like: classes, lengths, truncation, duplicates."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from jaxlm.data.fidelity import TOO_MUCH, Tally
from jaxlm.data.labelled.examples import Examples

_BINS, _BAR, _ROWS = 8, 20, 20  # at most: bins of lengths, characters of a bar, rows of classes


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Statistics of one split of a data set."""

    examples: int
    classes: dict[str, int]
    """Examples of each class, the most frequent first; empty where there are no classes."""
    lengths: dict[int, int]
    """Examples by tokens, before any were cut: each count is of those up to its key, and above the
    key before."""
    longest: int
    median: int
    truncated: float
    """Share of examples that lost tokens to the maximal length."""
    duplicates: int
    """Examples removed because another split has them as well."""


def describe(
    examples: Examples, classes: Iterable[str], *, duplicates: int = 0, number: int | None = None
) -> Statistics:
    """Statistics of encoded examples and their classes (one, none or several for each).

    ``number`` is how many there are, where they are not a row each.
    """
    sizes = examples.untruncated
    # A few very long texts share the last bin, so that the others can be told apart.
    width = int(np.ceil(np.quantile(sizes, 0.99) / _BINS / 8)) * 8
    highs = np.arange(1, _BINS + 1) * width
    highs = np.append(highs[highs < sizes.max()], sizes.max())
    counts = np.bincount(np.searchsorted(highs, sizes), minlength=len(highs))
    return Statistics(
        examples=len(examples) if number is None else number,
        classes=dict(Counter(classes).most_common()),
        lengths=dict(zip(highs.tolist(), counts.tolist(), strict=True)),
        longest=int(sizes.max()),
        median=int(np.median(sizes)),
        truncated=float(np.mean(sizes > examples.lengths)),
        duplicates=duplicates,
    )


def tally(examples: Examples, texts: Iterable[str], unk: int | None) -> Tally:
    """Count what is kept of texts in encoded examples of them."""
    counts = Tally(unk)
    counts.add_texts(texts)
    for row, size in zip(examples.rows, examples.untruncated.tolist(), strict=True):
        tokens = row["tokens"]
        counts.add_tokens(tokens[tokens != examples.pad], max(size - tokens.shape[-1], 0))
    return counts


def longer(examples: Examples, most: int | None, given: int) -> str:
    """Which maximal length cuts few tokens, as far as a model reads: ``most`` tokens.

    ``given`` is the one that there is.
    """
    sizes = examples.untruncated.astype(int)
    lengths = np.arange(8, sizes.max() + 8, 8)
    cut = np.array([np.maximum(sizes - length, 0).sum() / sizes.sum() for length in lengths])
    enough = int((cut > TOO_MUCH).sum())
    if most is None or lengths[enough] <= most:
        return f"--data.max-length {lengths[enough]} cuts {cut[enough]:.1%}"
    left = np.maximum(sizes - most, 0).sum() / sizes.sum()
    change = f"where --data.max-length {most} cuts {left:.1%}; "
    if given >= most:
        change = f"whatever --data.max-length {given} says; take a model that reads more, or "
    return (
        f"the model reads {most} at most, {change}give the parts of long texts as examples of "
        "their own"
    )


def render(parts: Mapping[str, Statistics]) -> RenderableType:
    """Tables for the console, one column for each split, such as training and validation."""
    summary = Table(box=None, pad_edge=False)
    for name in ("", "examples", "median length", "longest", "truncated", "duplicates removed"):
        summary.add_column(name, justify="right" if name else "left", overflow="fold")
    for name, part in parts.items():
        numbers = (f"{part.examples:,}", f"{part.median}", f"{part.longest}")
        summary.add_row(name, *numbers, f"{part.truncated:.1%}", f"{part.duplicates:,}")
    tables: list[RenderableType] = [summary]
    classes = {name: part.classes for name, part in parts.items() if part.classes}
    if classes:
        labels = list(dict.fromkeys(label for counts in classes.values() for label in counts))
        tables += [Text(), _bars("class", labels, classes)]
        if len(labels) > _ROWS:
            tables.append(Text(f"and {len(labels) - _ROWS} more classes"))
    for name, part in parts.items():
        rows = {f"up to {high}": count for high, count in part.lengths.items()}
        tables += [Text(), _bars("tokens", list(rows), {name: rows})]
    return Group(*tables)


def _bars(title: str, labels: list[str], columns: Mapping[str, Mapping[str, int]]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(title, overflow="ellipsis", max_width=30)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)  # a narrow terminal has short bars
        table.add_column("")
    for label in labels[:_ROWS]:
        cells: list[RenderableType] = [Text(label)]  # not markup: a label may hold brackets
        for counts in columns.values():
            count = counts.get(label, 0)
            bar = "█" * round(_BAR * count / max(counts.values()))
            cells += [f"{count:,} ({count / sum(counts.values()):.1%})", bar or "▏"]
        table.add_row(*cells)
    return table
