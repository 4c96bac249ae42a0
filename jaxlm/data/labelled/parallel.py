"""Parallel text: files whose lines belong together, such as sentences and their translations."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxlm.data import files
from jaxlm.data.labelled.records import Paths, Record, find_all
from jaxlm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ParallelText:
    """Two files of text: line n of one goes with line n of the other.

    The fields of a record are ``source`` and ``target``.
    """

    source: Paths
    """A file with a source a line; or several, a folder of them, or a pattern such as
    'shards/*.en'."""
    target: Paths
    """A file with the target of each line; or as many, in the same order."""
    encoding: str | None = None
    """What the files are written in, such as windows-1252; None: UTF-8, or UTF-16 where it is."""

    def records(self) -> Iterator[Record]:
        """One for each pair of lines, blank ones too."""
        return read(self.source, self.target, ("source", "target"), self.encoding)

    def fingerprint(self) -> str:
        """A sha256 of the contents, but not of the files' names."""
        sides = [
            files.sha256(find_all(side), "parallel", *files.given(self.encoding))
            for side in (self.source, self.target)
        ]
        return " ".join(sides)


def read(
    source: Paths, target: Paths, names: Sequence[str], encoding: str | None = None
) -> Iterator[Record]:
    """The pairs of lines, with these names of their two fields."""
    sources, targets = find_all(source), find_all(target)
    if len(sources) != len(targets):
        raise InputError(
            f"{source} is {len(sources)} files and {target} {len(targets)}: each file of one side "
            "needs one of the other"
        )
    for one, other in zip(sources, targets, strict=True):
        lines = [list(files.lines(path, encoding=encoding)) for path in (one, other)]
        _check_same_number(one, other, *map(len, lines))
        for number, texts in enumerate(zip(*lines, strict=True), start=1):
            fields = dict(zip(names, texts, strict=True))
            yield Record(fields=fields, origin=f"{one} and {other}:{number}")


def _check_same_number(one: Path, other: Path, count: int, other_count: int) -> None:
    if count == other_count:
        return
    longer, least = (one, other_count) if count > other_count else (other, count)
    unpack = {".bz2": "bzip2", ".xz": "xz"}.get(longer.suffix.lower(), "gzip")
    raise InputError(
        f"{one} has {count:,} lines and {other} {other_count:,}, but line n of one must go with "
        "line n of the other: add those that are missing, or, if they are the last, leave them "
        f"out: {unpack} -dcf {shlex.quote(str(longer))} | head -n {least} > NEW"
    )
