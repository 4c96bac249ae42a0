"""What of a folder becomes which parameter, and everything that does not fit, without stopping."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxlm.convert import folder, layout
from jaxlm.convert.architecture import Fields, names_task
from jaxlm.convert.table import Row, Sizes
from jaxlm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Report:
    """What is read as what."""

    rows: tuple[str, ...]
    """A line for each parameter: its tensors, and its path and shape here."""
    others: tuple[str, ...]
    """Tensors that hold nothing to read, and copies of others."""
    differences: tuple[str, ...]
    """Why the model cannot be read, each in a sentence; empty: it can."""


def read(path: Path) -> Report:
    """That of the model in a folder."""
    architecture, config = layout.describe(path)
    raw, fields = folder.open_tensors(path), Fields(folder.read_config(path), folder.CONFIG)
    architecture = architecture.of(names_task(fields))
    task_head, _ = layout.task_head_of(fields, architecture)
    sizes, names = layout.sizes_of(config, task_head), layout.names_of(raw, architecture, task_head)
    others = [f"{name}: nothing to read" for name in sorted(set(raw) - set(names.values()))]
    differences = []
    for copy, original in architecture.copies.items():
        old = names.pop(copy, None)
        if old is None:
            continue
        first = names.setdefault(original, old)
        if first == old:
            continue
        others.append(f"{old}: a copy of {first}")
        if not np.array_equal(raw[first], raw[old]):
            differences.append(f"{old} differs from {first}; {architecture.untied}")
    rows = layout.rows_of(names, architecture, task_head, sizes)
    tensors = folder.Renamed(raw, names)
    known = {name for row in rows for name in row.names(sizes)}
    unknown = names.keys() - known
    other = layout.of_other_head(unknown, architecture, fields)
    others += [
        f"{names[name]}: of a head that is computed otherwise, left out" for name in sorted(other)
    ]
    differences += [f"{names[name]} has no place" for name in sorted(unknown - other)]
    for row in rows:
        try:
            row.read(tensors, sizes, str(path))
        except InputError as error:
            differences.append(str(error))
    lines = tuple(_line(row, sizes) for row in rows)
    return Report(rows=lines, others=tuple(others), differences=tuple(differences))


def _line(row: Row, sizes: Sizes) -> str:
    names = row.names(sizes)
    few = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}" if names else "(zeros)"
    part = f", part {row.part + 1} of {row.parts}" if row.parts > 1 else ""
    return f"{few}{part}  ->  {row.ours} {list(row.shape(sizes))}  ({row.layout})"
