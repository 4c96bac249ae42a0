"""Pairs of texts, of which a model reads the source and learns to write the target."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxlm.data.labelled.examples import Examples, Row
from jaxlm.data.labelled.framing import Framer, Ids
from jaxlm.data.labelled.records import Record
from jaxlm.errors import InputError

Long = Literal["cut", "skip", "raise"]


@dataclass(frozen=True, kw_only=True)
class PairFields:
    """Which fields of a record are what."""

    source: str = "source"
    """What is read, such as a text to be translated."""
    target: str | None = "target"
    """What is to be written; None: it is not known."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A source, and its target if that is known."""

    source: str
    target: str | None
    origin: str

    @property
    def asked(self) -> str:
        """The source."""
        return self.source

    @property
    def response(self) -> str | None:
        """The target."""
        return self.target

    @property
    def content(self) -> str:
        """All text."""
        return self.source if self.target is None else f"{self.source}\n{self.target}"

    @property
    def stratum(self) -> str:
        """Pairs are all of one class."""
        return ""


def read(records: Iterable[Record], fields: PairFields) -> list[Pair]:
    """The pair of each record; without ``fields.target`` the source alone."""
    return [
        Pair(
            source=record.text(fields.source),
            target=None if fields.target is None else record.text(fields.target),
            origin=record.origin,
        )
        for record in records
    ]


def source_ids(framer: Framer, texts: Sequence[str], prefix: str = "") -> list[Ids]:
    """The tokens of sources with what stands before each, framed, and cut to the longest row."""
    framer = framer.source
    return [framer.frame(ids).tokens for ids in framer.ids([prefix + text for text in texts])]


def num_cut(framer: Framer, texts: Sequence[str], prefix: str = "") -> int:
    """Sources of which :func:`source_ids` cuts something."""
    framer = framer.source
    ids = framer.ids([prefix + text for text in texts])
    return sum(framer.size(one) > framer.max_length for one in ids)


def encode(framer: Framer, pairs: Sequence[Pair], *, prefix: str = "", long: Long) -> Examples:
    """A row for each pair, with the arrays that :mod:`jaxlm.objectives.seq2seq` reads.

    The source is ``tokens`` [length] and ``lengths`` []; ``targets`` [target_length] end with the
    token of the end of a text, and ``decoder_tokens`` are these behind the token of its beginning,
    without the last. ``weights`` [] is 1. ``long`` says what becomes of pairs of which a side is
    longer than a row.
    """
    start, end = (np.array([i], np.int32) for i in (framer.special.cls, framer.special.sep))
    rows: list[Row] = []
    sizes, too_long = [], []
    sources = framer.source.ids([prefix + pair.source for pair in pairs])
    targets = framer.ids([pair.target or "" for pair in pairs])
    for pair, source, target in zip(pairs, sources, targets, strict=True):
        target = np.concatenate([target, end])
        both = framer.source.size(source), len(target)
        if max(both) > framer.max_length:
            too_long.append((max(both), pair.origin))
            if long == "skip":
                continue
        target = target[: framer.max_length]  # without its end there is no end to be learned
        rows.append(
            {
                "tokens": framer.source.frame(source).tokens,
                "lengths": np.array(min(both[0], framer.max_length), np.int32),
                "targets": target,
                "decoder_tokens": np.concatenate([start, target[:-1]]),
                "target_lengths": np.array(len(target), np.int32),
                "weights": np.ones((), np.float32),
            }
        )
        sizes.append(both)
    notes = []
    if too_long:
        longest, origin = max(too_long)
        what = (
            f"{len(too_long):,} of {len(pairs):,} pairs have a side of more than "
            f"{framer.max_length} tokens, the longest {longest:,} ({origin})"
        )
        way = f"--data.max-length {longest} takes them whole"
        if framer.most is not None and longest > framer.most:
            way = f"the model reads {framer.most} at most"
        if long == "raise" or not rows:
            raise InputError(f"{what}: {way}, --task.long cut cuts them, and skip leaves them out")
        done = "are cut at their ends" if long == "cut" else "are left out"
        notes = [f"{what}: they {done} ({way})"]
    return Examples(
        rows=rows,
        along_length=frozenset({"tokens"}),
        along_target=frozenset({"targets", "decoder_tokens"}),
        pad=framer.source.special.pad,
        untruncated=np.array([size for size, _ in sizes], np.int32),
        untruncated_targets=np.array([size for _, size in sizes], np.int32),
        notes=tuple(notes),
    )
